"""Where the text after a video continues: both conventions against the installed transformers, and where each is remembered."""
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import transformers
from test_policy import VISUALS, checkpoints, clip, load_plain, make_rollout, tiny_qwen2_vl  # noqa: F401 (fixtures)
from transformers import Qwen3VLConfig, Qwen3VLModel

import deepvideo_r1.model.policy as policy_module
from deepvideo_r1 import cli
from deepvideo_r1.commands import AskConfig, EvaluateConfig
from deepvideo_r1.config import PolicyConfig, Positions, RunConfig
from deepvideo_r1.evaluation.evaluate import _model_hash
from deepvideo_r1.experiment import check_directory, read_parts
from deepvideo_r1.model.packing import POSITIONS, mrope_positions
from deepvideo_r1.model.policy import PolicyModel, group_logps, load_policy, save_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.model.rollout import rollout_groups
from deepvideo_r1.support.run_directory import open_run
from deepvideo_r1.training.reference import Reference

FAMILIES = ("qwen2_5_vl", "qwen2_vl")
INSTALLED = "after_frame"  # the convention of transformers from 5.3 to 5.24
OTHER, = set(POSITIONS) - {INSTALLED}
SHOWN = VISUALS | {"long video": [("video", clip(8, 28, 28, seconds=2.0))]}  # 1 x 1 tokens over 14 s

CHANGED = """transformers {version} puts the text after a video at other positions than 5.3 to 5.24: {found}.
What to do: say so in nbs/model/03_packing.ipynb (its list of conventions and its lesson), in the comments of `positions` in
nbs/01_config.ipynb, nbs/01b_commands.ipynb and nbs/model/10_policy.ipynb, and set INSTALLED above to the convention that it
follows now; where it follows neither, add a third one to POSITIONS. The default must stay that of the checkpoints' authors."""


def kinds(prompt, config) -> torch.Tensor:
    "0 for text, 1 for an image, 2 for a video, (1, P)."
    return (1 * (prompt.prompt_ids == config.image_token_id) + 2 * (prompt.prompt_ids == config.video_token_id))[None]


def grids(prompt, family) -> dict[str, torch.Tensor]:
    "Grids as transformers takes them, and times, which Qwen2-VL does not know."
    found = {}
    for name, modality in (("image_grid_thw", "image"), ("video_grid_thw", "video")):
        which = torch.tensor([m == modality for m in prompt.modalities], dtype=torch.bool)
        if which.any():
            found[name] = prompt.grid_thw[which]
    if "video_grid_thw" in found and family != "qwen2_vl":
        found["second_per_grid_ts"] = torch.tensor(
            [s for s, m in zip(prompt.seconds_per_grid, prompt.modalities) if m == "video"])
    return found


def pixels(prompt) -> dict[str, torch.Tensor]:
    "Patches as transformers takes them."
    found, start = {}, 0
    for modality, grid in zip(prompt.modalities, [] if prompt.grid_thw is None else prompt.grid_thw):
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        part = prompt.patches[start : start + int(grid.prod())]
        start += len(part)
        found[name] = torch.cat([found[name], part]) if name in found else part
    return found


def places_of_transformers(path, family, prompt) -> torch.Tensor:
    model = load_plain(path, family).model
    return model.get_rope_index(prompt.prompt_ids[None], kinds(prompt, model.config), **grids(prompt, family))[0][:, 0]


# --- the installed transformers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_follows_the_convention_that_is_written_down(checkpoints, family):  # noqa: F811
    prompt = make_rollout(checkpoints[family], SHOWN["long video"]).prompt
    theirs = places_of_transformers(checkpoints[family], family, prompt)
    visual = torch.isin(prompt.prompt_ids, torch.tensor(list(load_processor(checkpoints[family]).pad_ids.values()))).nonzero()
    start, word = visual[0].item(), visual[-1].item() + 1
    first_words = {"after_video": theirs[:, :word].max().item() + 1,
                   "after_frame": theirs[0, start].item() + prompt.grid_thw[0, 1:].max().item() // 2}
    assert len(set(first_words.values())) == 2
    found = [rule for rule, place in first_words.items() if theirs[:, word].tolist() == [place] * 3]
    assert found == [INSTALLED], CHANGED.format(version=transformers.__version__, found=found[0] if found else "neither")


def is_after_all_before(places, is_text) -> bool:
    "Whether every word is one past the largest position before it, over the three axes."
    before = torch.cat([torch.tensor([-1]), places.amax(0).cummax(0).values[:-1]])
    return torch.equal(places[:, is_text], (before + 1)[is_text].expand(3, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_after_video_is_one_past_the_largest_position_before(checkpoints, family):  # noqa: F811
    "The definition of the authors, written out; up to the first video's end transformers agrees with it."
    path, outran = checkpoints[family], 0
    ours, other = (load_policy(path, positions=rule) for rule in POSITIONS)
    for visuals in SHOWN.values():
        prompt = make_rollout(path, visuals).prompt
        (places, following), (early, earlier) = ours.positions(prompt), other.positions(prompt)
        is_text = ~torch.isin(prompt.prompt_ids, torch.tensor(ours.pad_ids))
        assert is_after_all_before(places, is_text) and following == places.max() + 1
        assert earlier == early[0, -1] + 1
        outran += not is_after_all_before(early, is_text)
        end = is_text.logical_not().nonzero()[0].item() + 1 if visuals else len(is_text)
        assert torch.equal(places[:, :end], places_of_transformers(path, family, prompt)[:, :end])
    assert outran >= 2


def test_qwen3_vl_shows_steps_as_images_for_which_both_conventions_agree():
    "transformers' own positions of a Qwen3-VL: each grid step has words before it, and no time within."
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, head_dim=16, bos_token_id=None, eos_token_id=None)
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[0])
    with torch.device("meta"):
        model = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    step = torch.tensor([0, 0] + [2] * 6 + [0])  # time in words, 2 x 3 merged tokens, an end mark
    row = torch.cat([torch.zeros(3, dtype=torch.long), step.repeat(5), torch.zeros(4, dtype=torch.long)])
    places = model.get_rope_index(row[None], row[None], video_grid_thw=torch.tensor([[5, 4, 6]]))[0][:, 0]
    assert is_after_all_before(places, row == 0)
    one_by_one = [mrope_positions(row, torch.tensor([[1, 4, 6]] * 5), ["image"] * 5, [0.0] * 5, pad_ids=[2], convention=rule)
                  for rule in POSITIONS]
    assert all(torch.equal(ours, places) for ours, _ in one_by_one)


# --- one policy, both conventions ---------------------------------------------------------------------------------


def logps_of_transformers(model, family, policy, rollout) -> torch.Tensor:
    "log pi (G, T) by a forward pass of transformers for each response, with the positions that it makes itself."
    prompt, rows = rollout.prompt, []
    for ids, mask in zip(rollout.completion_ids, rollout.completion_mask):
        ids = ids[mask]
        row = torch.cat([prompt.prompt_ids, ids])
        token_types = torch.cat([kinds(prompt, model.config), torch.zeros_like(ids)[None]], 1)
        model.model.rope_deltas = None
        logits = model(input_ids=row[None], mm_token_type_ids=token_types, **grids(prompt, family), **pixels(prompt)).logits
        logits = logits[0, len(prompt.prompt_ids) - 1 : -1].index_fill(-1, policy.banned, float("-inf"))
        scores = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(scores, (0, len(mask) - len(ids))))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SHOWN)
def test_packed_rows_equal_rows_of_transformers_with_its_own_positions(checkpoints, family, name):  # noqa: F811
    path, rollout = checkpoints[family], make_rollout(checkpoints[family], SHOWN[name])
    plain = load_plain(path, family)
    policy, other = (load_policy(path, positions=rule) for rule in (INSTALLED, OTHER))
    with torch.no_grad():
        expected = logps_of_transformers(plain, family, policy, rollout)
        for shared_prefix in (True, False):
            found = group_logps(policy, rollout, shared_prefix=shared_prefix)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        gap = (group_logps(other, rollout) - expected).abs().max()
    if name == "long video":
        assert gap > 0.05
    if name == "words":
        assert gap < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["two videos", "video and image", "long video"])
def test_greedy_tokens_are_those_of_generate_with_its_own_positions(checkpoints, family, name):  # noqa: F811
    path, asked = checkpoints[family], make_rollout(checkpoints[family], SHOWN[name])
    prompt, model = asked.prompt, load_plain(path, family)

    def sample(rule):
        policy = load_policy(path, positions=rule)
        rollout, = rollout_groups(policy, load_processor(path), [asked.sample], [prompt], [(0,)], group_size=2,
                                  max_tokens=24, temperature=0)
        with torch.no_grad():
            torch.testing.assert_close(group_logps(policy, rollout), rollout.sampled_logps, atol=1e-4, rtol=0)
        return policy, rollout.completion_ids[0][rollout.completion_mask[0]].tolist()

    (policy, ours), (_, others) = sample(INSTALLED), sample(OTHER)
    ids = model.generate(input_ids=prompt.prompt_ids[None], mm_token_type_ids=kinds(prompt, model.config),
                         **grids(prompt, family), **pixels(prompt), max_new_tokens=24, do_sample=False, suppress_tokens=policy.banned.tolist(),
                         eos_token_id=model.generation_config.eos_token_id)
    assert ours == ids[0, len(prompt.prompt_ids) :].tolist()
    if name == "long video":
        assert ours != others and len({*ours, *others}) > 2


@pytest.mark.parametrize("rule", POSITIONS)
def test_scoring_gives_the_log_probabilities_of_sampling(tiny_model, rule):
    policy, asked = load_policy(tiny_model, positions=rule), [make_rollout(tiny_model, shown) for shown in SHOWN.values()]
    rollouts = rollout_groups(policy, load_processor(tiny_model), [r.sample for r in asked], [r.prompt for r in asked],
                              [(i,) for i in range(len(asked))], group_size=3, max_tokens=9)
    for rollout in rollouts:  # prompts of different lengths were sampled side by side
        with torch.no_grad():
            torch.testing.assert_close(group_logps(policy, rollout), rollout.sampled_logps, atol=1e-4, rtol=0)


# --- where it is remembered ---------------------------------------------------------------------------------------


def test_settings_and_functions_know_the_same_conventions(tiny_model):
    assert get_args(Positions) == POSITIONS
    plain = load_policy(tiny_model)
    defaults = {PolicyConfig().positions, EvaluateConfig("m", "d").positions, AskConfig("q", model="m").positions,
                plain.convention, PolicyModel(plain.hf, pad_ids=plain.pad_ids).convention}
    assert defaults == {"after_video"}
    with pytest.raises(ValueError, match="positions is 'after', allowed are after_video, after_frame"):
        load_policy(tiny_model, positions="after")


def test_a_checkpoint_does_not_remember_the_convention(tiny_model, tmp_path):
    for rule in POSITIONS:
        save_policy(load_policy(tiny_model, positions=rule), load_processor(tiny_model), tmp_path / rule)
    names = sorted(path.name for path in (tmp_path / "after_video").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after_frame").iterdir())
    for name in names:
        assert (tmp_path / "after_video" / name).read_bytes() == (tmp_path / "after_frame" / name).read_bytes(), name
    assert load_policy(tmp_path / "after_frame").convention == "after_video"


def test_a_run_gives_its_convention_to_policy_and_reference_and_keeps_it(tiny_model, tiny_world, tmp_path):
    config = RunConfig(str(tiny_model), str(tiny_world / "rl.jsonl"), out=str(tmp_path / "run"),
                       policy=PolicyConfig(positions="after_frame"))
    policy = read_parts(config).policy
    assert policy.convention == "after_frame"
    reference = Reference(policy, SimpleNamespace(is_fsdp2=False, device="cpu"))
    with reference.policy(policy) as frozen:
        assert frozen is not policy and frozen.convention == "after_frame"

    open_run(config.out, config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["policy"]["positions"] == "after_frame"
    check_directory(config)
    with pytest.raises(ValueError, match="policy.positions was 'after_frame', is 'after_video'"):
        check_directory(replace(config, policy=PolicyConfig()))


def test_an_evaluation_notices_another_convention(tiny_model):
    processor = load_processor(tiny_model)
    first, other, again = (_model_hash(load_policy(tiny_model, positions=rule), processor)
                           for rule in (*POSITIONS, POSITIONS[0]))
    assert first == again != other


@pytest.mark.parametrize("command, config", [
    (cli.ask, AskConfig("what happens ?", model="{model}", positions="after_frame")),
    (cli.evaluate, EvaluateConfig("{model}", "{data}", out="{out}", positions="after_frame"))])
def test_commands_pass_the_convention_on(tiny_model, tiny_world, tmp_path, monkeypatch, command, config):
    class Seen(Exception):
        pass

    def load(path, **settings):
        raise Seen(settings["positions"])

    monkeypatch.setattr(policy_module, "load_policy", load)
    places = {"model": str(tiny_model), "data": str(tiny_world / "rl.jsonl"), "out": str(tmp_path / "out")}
    named = {key: value.format(**places) for key, value in vars(config).items() if isinstance(value, str)}
    with pytest.raises(Seen, match="after_frame"):
        command(replace(config, **named))
