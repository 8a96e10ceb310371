"""One packed row against plain rows of transformers' own models: values and gradients, for all families."""
import json
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration,
)

from deepvideo_r1.core import Clip, Rollout, Sample, make_generator
from deepvideo_r1.model.packing import LogpHead, mrope_positions
from deepvideo_r1.model.policy import group_logps, load_policy, rollout_batch, save_policy
from deepvideo_r1.model.prompt import build_prompt, load_processor
from deepvideo_r1.model.rollout import rollout_groups
from deepvideo_r1.model.tiny import make_tiny_checkpoint
from deepvideo_r1.toy.world import world_texts

PLAIN = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen2_vl": Qwen2VLForConditionalGeneration,
         "qwen3_vl": Qwen3VLForConditionalGeneration, "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration}


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tiny_model, tmp_path_factory):
    "A random tiny Qwen2-VL with the tokenizer and preprocessor of the tiny Qwen2.5-VL."
    directory = tmp_path_factory.mktemp("model") / "qwen2_vl"
    shutil.copytree(tiny_model, directory, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    found = json.loads((tiny_model / "config.json").read_text())
    text = {k: v for k, v in found["text_config"].items() if k not in ("model_type", "layer_types")}
    vision = dict(depth=2, embed_dim=48, hidden_size=48, num_heads=2, mlp_ratio=2)
    ids = {k: v for k, v in found.items() if k.endswith("_token_id")}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
    for module in model.modules():  # the usual deviation of 0.02 is too small at this width: all would look alike
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    model.generation_config = GenerationConfig.from_pretrained(tiny_model)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoints(tiny_model, tiny_qwen2_vl, tmp_path_factory):
    stepwise = {family: make_tiny_checkpoint(tmp_path_factory.mktemp("model") / family, texts=world_texts(), hidden_size=48,
                                             n_layers=2, family=family) for family in ("qwen3_vl", "qwen3_vl_moe")}
    return {"qwen2_5_vl": tiny_model, "qwen2_vl": tiny_qwen2_vl} | stepwise


def clip(n_frames, height, width, *, seconds=0.5, seed=0):
    pixels = torch.randint(0, 256, (n_frames, 3, height, width), generator=make_generator(seed), dtype=torch.uint8)
    return Clip(pixels, torch.arange(n_frames) * seconds)


VISUALS = {
    "a video": [("video", clip(6, 56, 84))],
    "two videos": [("video", clip(4, 56, 28)), ("video", clip(7, 28, 84, seconds=1.7, seed=1))],
    "video and image": [("video", clip(3, 56, 56, seconds=0.8)), ("image", clip(1, 84, 56, seed=2))],
    "words": [],
}


def make_rollout(path, visuals, group_size=4, seed=0, lengths=(5, 1, 9, 7)) -> Rollout:
    "Random responses of different lengths to a question about some visuals."
    processor = load_processor(path)
    sample = Sample(id=f"s{seed}", question="how many squares red ?", answer="3", kind="number")
    prompt = build_prompt(sample, visuals, processor, template="plain")
    lengths = torch.tensor([lengths[g % len(lengths)] for g in range(group_size)])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(8, len(processor.tokenizer), mask.shape, generator=make_generator(seed, "ids")) * mask
    return Rollout(sample, prompt, ids, mask, torch.zeros(mask.shape))


def plain_distributions(model, policy, rollout) -> list[torch.Tensor]:
    "log pi (tokens, V) of each response by a forward pass of transformers of its own, with eager attention and all logits."
    prompt, rows = rollout.prompt, []
    where, following = policy.positions(prompt)
    pixels, start = {}, 0
    for kind, grid in zip(prompt.modalities, [] if prompt.grid_thw is None else prompt.grid_thw):
        names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
        part = prompt.patches[start : start + int(grid.prod())]
        start += len(part)
        for name, value in zip(names, (part, grid[None])):
            pixels[name] = torch.cat([pixels[name], value]) if name in pixels else value
    for ids, mask in zip(rollout.completion_ids, rollout.completion_mask):
        ids = ids[mask]
        after = torch.arange(following, following + len(ids)).expand(3, -1)
        positions = torch.cat([where, after], 1)[:, None]
        logits = model(input_ids=torch.cat([prompt.prompt_ids, ids])[None], position_ids=positions,
                       **pixels).logits[0, len(prompt.prompt_ids) - 1 : -1]
        rows.append((logits / policy.temperature).index_fill(-1, policy.banned, float("-inf")).log_softmax(-1))
    return rows


def pad(rows, width) -> torch.Tensor:
    return torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])


def plain_logps(model, policy, rollout) -> torch.Tensor:
    found = zip(plain_distributions(model, policy, rollout), rollout.completion_ids, rollout.completion_mask)
    return pad([row.gather(1, ids[mask][:, None])[:, 0] for row, ids, mask in found], rollout.completion_ids.shape[1])


def load_plain(path, family, adapter=None):
    model = PLAIN[family].from_pretrained(path, attn_implementation="eager")
    model.model.visual.requires_grad_(False)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True) if adapter else model


def gradients(module, logps) -> dict[str, torch.Tensor]:
    weights = torch.randn(logps.shape, generator=make_generator("weights"))
    module.zero_grad()
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def check_equal_gradients(ours, theirs, bound=1e-5):
    assert ours.keys() == theirs.keys()
    ours, theirs = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (ours, theirs))
    assert theirs.norm() > 1 and (ours - theirs).norm() / theirs.norm() < bound


@contextmanager
def float64_islands():
    """Where a model in float64 would work in float32, it works in float64; yields how often that was, by function.

    The islands: norms, rotary angles, the encoder's rotation and eager softmax in transformers, and the logits in our head.
    """
    found = Counter()

    def widen(function):
        def call(*args, **kwargs):
            found[function.__name__] += any(x is torch.float32 for x in (*args, *kwargs.values()))
            args = [torch.float64 if x is torch.float32 else x for x in args]
            return function(*args, **{k: torch.float64 if x is torch.float32 else x for k, x in kwargs.items()})
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", widen(torch.Tensor.to))
        patch.setattr(torch.Tensor, "float", lambda self: self.to(torch.float32))
        patch.setattr(nn.functional, "softmax", widen(nn.functional.softmax))
        yield found


def make_pair(path, family, directory, lora_rank=0, checkpointing=False):
    "Our policy, and transformers' own model with the same weights and adapters."
    policy = load_policy(path, lora_rank=lora_rank, gradient_checkpointing=checkpointing).train()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # zero at first: the adapters would change nothing
            nn.init.normal_(parameter, std=0.05, generator=make_generator(name))
    if lora_rank:
        save_policy(policy, load_processor(path), directory)
    return policy, load_plain(path, family, directory if lora_rank else None)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("visuals", VISUALS)
@pytest.mark.parametrize("lora_rank, checkpointing", [(0, False), (4, False), (0, True), (4, True)])
def test_the_packed_row_equals_plain_rows(checkpoints, tmp_path, family, visuals, lora_rank, checkpointing):
    if lora_rank and family == "qwen3_vl_moe":
        pytest.skip("new adapters do not reach experts: refused")
    rollout = make_rollout(checkpoints[family], VISUALS[visuals])
    policy, plain = make_pair(checkpoints[family], family, tmp_path, lora_rank, checkpointing)
    packed, expected = group_logps(policy, rollout), plain_logps(plain, policy, rollout)
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(group_logps(policy, rollout, shared_prefix=False), expected, atol=2e-5, rtol=0)
    assert expected[rollout.completion_mask].std() > 0.3  # the model has opinions
    ours = gradients(policy.hf, packed)
    assert all("lora" in name for name in ours) == bool(lora_rank)
    if lora_rank:
        with policy.hf.disable_adapter():
            assert (group_logps(policy, rollout) - packed).abs().max() > 0.05
    check_equal_gradients(ours, gradients(plain, expected))

    policy.double(), plain.double()
    if family == "qwen3_vl_moe":  # the matrix product over all experts at once knows no float64
        policy.base.set_experts_implementation("eager"), plain.set_experts_implementation("eager")
    with float64_islands() as islands:
        packed, expected = group_logps(policy, rollout), plain_logps(plain, policy, rollout)
        assert packed.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(packed, expected, atol=1e-8, rtol=0)
        check_equal_gradients(gradients(policy.hf, packed), gradients(plain, expected), 1e-8)
    assert islands["to"] and islands["softmax"]


@torch.no_grad()
def test_in_float64_the_islands_are_what_is_left(tiny_model):
    rollout = make_rollout(tiny_model, VISUALS["a video"])
    policy, plain = load_policy(tiny_model).double(), load_plain(tiny_model, "qwen2_5_vl").double()
    apart = (group_logps(policy, rollout) - plain_logps(plain, policy, rollout)).abs().max()
    assert 1e-8 < apart < 1e-5


def test_a_trained_encoder_gets_its_gradient(tiny_model):
    rollout = make_rollout(tiny_model, VISUALS["two videos"])
    policy, plain = load_policy(tiny_model, train_vision=True), load_plain(tiny_model, "qwen2_5_vl")
    plain.model.visual.requires_grad_(True)
    ours = gradients(policy.hf, group_logps(policy, rollout))
    assert any(".visual." in name for name in ours)
    check_equal_gradients(ours, gradients(plain, plain_logps(plain, policy, rollout)))


@torch.no_grad()
@pytest.mark.parametrize("family", PLAIN)
def test_every_group_size(checkpoints, family):
    policy, plain = load_policy(checkpoints[family]), load_plain(checkpoints[family], family)
    rollout = make_rollout(checkpoints[family], VISUALS["a video"], 16, lengths=(3, 8, 1, 6, 2, 5, 4))
    expected = plain_logps(plain, policy, rollout)
    for g in range(1, 17):
        part = replace(rollout, completion_ids=rollout.completion_ids[:g], completion_mask=rollout.completion_mask[:g])
        torch.testing.assert_close(group_logps(policy, part), expected[:g], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", PLAIN)
def test_groups_in_a_batch_do_not_see_each_other(checkpoints, family):
    policy = load_policy(checkpoints[family])
    rollouts = [make_rollout(checkpoints[family], shown, 3, seed, lengths=(2 + seed, 6, 1))
                for seed, shown in enumerate(VISUALS.values())]
    with torch.no_grad():
        together = policy(rollout_batch(policy, rollouts))
        for one, logps in zip(rollouts, together):
            width = one.completion_ids.shape[1]
            torch.testing.assert_close(logps[:, :width], group_logps(policy, one), atol=2e-5, rtol=0)
            assert (logps[:, width:] == 0).all()


def test_padding_scores_nothing_and_changes_nothing(tiny_model):
    policy, rollout = load_policy(tiny_model), make_rollout(tiny_model, VISUALS["a video"])
    noise = torch.randint(8, 300, rollout.completion_ids.shape, generator=make_generator(1))
    noise[:, ::2] = policy.pad_ids[0]  # nobody looks there
    other = replace(rollout, completion_ids=torch.where(rollout.completion_mask, rollout.completion_ids, noise))
    logps = group_logps(policy, rollout)
    assert torch.equal(group_logps(policy, other), logps) and (logps[~rollout.completion_mask] == 0).all()


# --- entropy ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_is_that_of_the_whole_distribution(checkpoints, family, temperature):
    path, mask = checkpoints[family], None
    policy, plain = load_policy(path, temperature=temperature), load_plain(path, family)
    for visuals in VISUALS.values():
        rollout = make_rollout(path, visuals)
        mask = rollout.completion_mask
        rows = [-(row.exp() * row.masked_fill(row.isinf(), 0.0)).sum(-1)
                for row in plain_distributions(plain, policy, rollout)]
        logps, entropy = group_logps(policy, rollout, entropy=True)
        assert torch.equal(logps, group_logps(policy, rollout)) and entropy.dtype == torch.float32
        torch.testing.assert_close(entropy, pad(rows, mask.shape[1]), atol=2e-5, rtol=0)
        assert (entropy[~mask] == 0).all() and entropy[mask].min() > 0.5
        again = group_logps(policy, rollout, shared_prefix=False, entropy=True)
        torch.testing.assert_close(again, (logps, entropy), atol=2e-5, rtol=0)


def test_entropy_changes_no_gradient(tiny_model):
    policy, rollout = load_policy(tiny_model), make_rollout(tiny_model, VISUALS["a video"])
    with_entropy, entropy = group_logps(policy, rollout, entropy=True)
    assert not entropy.requires_grad
    ours, plain = gradients(policy.hf, with_entropy), gradients(policy.hf, group_logps(policy, rollout))
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in ours)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_head_gives_the_same_in_chunks(entropy):
    generator = make_generator("head")
    head = LogpHead(16, 90, bias=False)
    nn.init.normal_(head.weight, generator=generator)
    hidden, targets = torch.randn(23, 16, generator=generator), torch.randint(0, 80, (23,), generator=generator)
    banned, found = torch.tensor([81, 89]), {}
    for chunk in (1, 4, 23, None):
        rows = hidden.clone().requires_grad_()
        out = head(rows, targets, banned=banned, temperature=0.7, chunk=chunk, entropy=entropy)
        logps, *rest = out if entropy else (out,)
        found[chunk] = torch.stack([logps, *rest]), *torch.autograd.grad(logps.pow(2).sum(), (rows, head.weight))
        torch.testing.assert_close(found[chunk], found[1], atol=1e-3, rtol=1e-4)  # gradients of up to a hundred
    full = (head(hidden) / 0.7).index_fill(-1, banned, float("-inf")).double().softmax(-1)
    expected = [full.gather(1, targets[:, None])[:, 0].log(), *([torch.special.entr(full).sum(-1)] if entropy else [])]
    torch.testing.assert_close(found[4][0].double(), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("vocabulary, most", [(300, 2048), (152_064, 441)])
def test_the_logits_that_exist_together_are_bounded(monkeypatch, vocabulary, most, entropy):
    head, seen = LogpHead(1, vocabulary, bias=False), []

    def record(self, rows, weight, banned, temperature):
        seen.append(len(rows))
        return torch.zeros(len(rows), 2)

    monkeypatch.setattr(LogpHead, "_scaled_logits", record)
    head(torch.zeros(5000, 1), torch.zeros(5000, dtype=torch.long), entropy=entropy)
    assert sum(seen) == 5000 and max(seen) == most and max(seen) * vocabulary <= 2**26


# --- positions ----------------------------------------------------------------------------------------------------

PAD = 9


def test_positions_by_hand():
    # 2 words; a video of 2 grid steps 1.5 s apart, 2 x 3 tokens each; 1 word; an image of 2 x 2 tokens; 2 words
    ids = torch.tensor([1, 1] + [PAD] * 12 + [1] + [PAD] * 4 + [1, 1])
    grids = torch.tensor([[2, 4, 6], [1, 4, 4]])
    expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 5, 5, 5, 5, 5, 6, 7, 7, 7, 7, 9, 10],  # 1.5 s are 3 positions
        [0, 1, 2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3, 6, 7, 7, 8, 8, 9, 10],
        [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 6, 7, 8, 7, 8, 9, 10],
    ]
    positions, following = mrope_positions(ids, grids, ("video", "image"), (1.5, 1.0), pad_ids=[PAD],
                                           tokens_per_second=2)
    assert positions.tolist() == expected and following == 11


@pytest.mark.parametrize("tokens_per_second, seconds, times", [
    (2, 0.75, [0, 1, 3, 4, 6]),  # fractions are kept until after the product
    (2, 4.0, [0, 8, 16, 24, 32]), (2, 0.1, [0, 0, 0, 0, 0]), (None, 4.0, [0, 1, 2, 3, 4]), (25, 0.04, [0, 1, 2, 3, 4]),
])
def test_time_is_real_for_qwen2_5_vl_and_counted_for_qwen2_vl(tokens_per_second, seconds, times):
    positions, following = mrope_positions(torch.full((5,), PAD), torch.tensor([[5, 2, 2]]), ("video",), (seconds,),
                                           pad_ids=[PAD], tokens_per_second=tokens_per_second)
    assert positions[0].tolist() == times and positions[1:].unique().tolist() == [0] and following == times[-1] + 1


@pytest.mark.parametrize("family, apart, times", [
    ("qwen2_5_vl", 0.375, [0, 1, 3]), ("qwen2_5_vl", 1.7, [0, 6, 13]),  # 0.75 s and 3.4 s a step: 1.5 and 6.8 positions
    ("qwen2_5_vl", 0.25025, [0, 1, 2]), ("qwen2_vl", 0.375, [0, 1, 2]), ("qwen2_vl", 1.7, [0, 1, 2])])
def test_time_goes_from_the_frames_to_the_words_after_them(checkpoints, family, apart, times):
    rollout = make_rollout(checkpoints[family], [("video", clip(5, 28, 28, seconds=apart))])  # the last frame fills its step
    policy, ids = load_policy(checkpoints[family]), rollout.prompt.prompt_ids
    (where, following), visual = policy.positions(rollout.prompt), torch.isin(ids, torch.tensor(policy.pad_ids))
    start, end = visual.nonzero()[0].item(), visual.nonzero()[-1].item()
    assert rollout.prompt.seconds_per_grid == pytest.approx((2 * apart,))
    assert where[0][visual].tolist() == [start + t for t in times] and where[1:, visual].unique().tolist() == [start]
    words = torch.arange(start + times[-1] + 1, start + times[-1] + len(ids) - end)
    assert torch.equal(where[:, end + 1 :], words.expand(3, -1)) and following == words[-1] + 1


def test_every_forward_gets_our_positions(checkpoints):
    for family, path in checkpoints.items():
        policy, seen = load_policy(path), []
        policy.base.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
        asked = make_rollout(path, [("video", clip(6, 28, 28, seconds=2.0))])
        where, following = policy.positions(asked.prompt)
        rollout, = rollout_groups(policy, load_processor(path), [asked.sample], [asked.prompt], [(0,)], group_size=3,
                                  max_tokens=5)
        assert torch.equal(seen[0], where[:, None])
        for t, step in enumerate(seen[1:]):
            assert step.shape[0] == 3 and step.unique().tolist() == [following + t]
        seen.clear()
        group_logps(policy, rollout)
        after = torch.arange(following, following + rollout.completion_ids.shape[1]).repeat(3)
        assert len(seen) == 1 and torch.equal(seen[0][:, 0], torch.cat([where, after.expand(3, -1)], 1))


def test_positions_of_images_and_words_are_those_of_transformers(checkpoints):
    for family, path in checkpoints.items():
        prompt = make_rollout(path, [("image", clip(1, 84, 56)), ("image", clip(1, 28, 112, seed=1))]).prompt
        model = load_plain(path, family).model
        is_image = (prompt.prompt_ids == model.config.image_token_id).int()[None]
        expected, _ = model.get_rope_index(prompt.prompt_ids[None], is_image, image_grid_thw=prompt.grid_thw)
        assert torch.equal(load_policy(path).positions(prompt)[0], expected[:, 0])


def test_placeholders_must_match_the_grids():
    with pytest.raises(ValueError, match="3 placeholder tokens do not match the visual grids"):
        mrope_positions(torch.full((3,), PAD), torch.tensor([[2, 4, 4]]), ("video",), (1.0,), pad_ids=[PAD])


# --- what is refused ----------------------------------------------------------------------------------------------


def no_compute(policy):
    "Makes every forward pass of a policy fail."
    def fail(module, args):
        raise AssertionError("computed before it was refused")

    for module in (policy.get_input_embeddings(), policy.base.model.visual, policy.base.model.language_model):
        module.register_forward_pre_hook(fail)
    return policy


def write_config(source, target, **text):
    "A copy of a checkpoint with other settings of its language model."
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"] |= text
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("change, message", [
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1, it must be 0 because .* set it to 0 in config.json"),
    ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": None},
     "sliding-window attention is on .* set use_sliding_window to false"),
    ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
     "sliding-window attention is on"),
])
def test_models_that_cannot_share_a_prompt_are_refused(checkpoints, tmp_path, monkeypatch, family, change, message):
    if family.startswith("qwen3") and change.get("max_window_layers") == 0:
        pytest.skip("transformers has no windows for this family")
    path = write_config(checkpoints[family], tmp_path / "changed", **change)
    monkeypatch.setattr(PLAIN[family], "from_pretrained", None)  # calling it would fail
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


def test_an_adapter_that_drops_out_is_refused(tiny_model, tmp_path, monkeypatch):
    save_policy(load_policy(tiny_model, lora_rank=2), load_processor(tiny_model), tmp_path)
    load_policy(tmp_path)
    found = tmp_path / "adapter_config.json"
    found.write_text(json.dumps(json.loads(found.read_text()) | {"lora_dropout": 0.05}))
    monkeypatch.setattr(PLAIN["qwen2_5_vl"], "from_pretrained", None)
    with pytest.raises(ValueError, match="lora_dropout is 0.05, it must be 0 because .* set it to 0 in adapter_config"):
        load_policy(tmp_path)


@pytest.mark.parametrize("other", ["qwen2", "qwen3_5", "bert"])
def test_another_family_is_refused(tmp_path, other):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": other}))
    message = (f"the model is of type '{other}', supported are qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe; name a "
               "checkpoint of one of these")
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="nowhere: not a model directory or hub id"):
        load_policy(tmp_path / "nowhere")


def test_a_row_beyond_the_context_is_refused(tiny_model):
    policy, rollout = load_policy(tiny_model), make_rollout(tiny_model, VISUALS["a video"])
    room = len(rollout.prompt.prompt_ids) + rollout.completion_ids.shape[1]
    policy.context_length = room
    group_logps(policy, rollout)
    policy.context_length = room - 1
    with pytest.raises(ValueError, match=f"have {room} tokens, the model's context is {room - 1}; use fewer frames"):
        group_logps(no_compute(policy), rollout)


def without_tokens(rollout, which):
    mask = rollout.completion_mask.clone()
    mask[which] = False
    return replace(rollout, completion_mask=mask)


def with_id(rollout, token):
    ids = rollout.completion_ids.clone()
    ids[2, 1] = token
    return replace(rollout, completion_ids=ids)


def no_columns(rollout):
    return replace(rollout, completion_ids=rollout.completion_ids[:, :0], completion_mask=rollout.completion_mask[:, :0])


@pytest.mark.parametrize("spoil, message", [
    (lambda r, ids: without_tokens(r, [0, 3]), r"prompt 1: responses \[0, 3\] of 4 are empty; .* leave them out"),
    (lambda r, ids: no_columns(r), r"prompt 1: responses \[0, 1, 2, 3\] of 4 are empty"),
    *[(lambda r, ids, name=name: with_id(r, ids[name]), r"prompt 1: a response holds the ids \[\d+\], .* keep .* out of sampling")
      for name in ("<|video_pad|>", "<|image_pad|>", "<|vision_start|>")],
    (lambda r, ids: replace(r, completion_ids=r.completion_ids[:, 1:]), r"completion_ids are \(4, 8\) and .* is \(4, 9\)"),
    (lambda r, ids: replace(r, completion_ids=r.completion_ids[:3], completion_mask=r.completion_mask[:3]),
     r"the groups have \[3, 4\] responses; a batch takes groups of one size"),
])
def test_responses_that_cannot_be_scored_are_refused(tiny_model, spoil, message):
    policy, ids = no_compute(load_policy(tiny_model)), load_processor(tiny_model).tokenizer.get_vocab()
    good, other = (make_rollout(tiny_model, VISUALS["a video"], seed=seed) for seed in (0, 1))
    with pytest.raises(AssertionError, match="computed"):
        policy(rollout_batch(policy, [good, other]))
    with pytest.raises(ValueError, match=message):
        policy(rollout_batch(policy, [good, spoil(other, ids)]))


def test_an_id_without_a_token_is_refused(tiny_model):
    rollout = make_rollout(tiny_model, VISUALS["words"])
    policy = load_policy(tiny_model)
    policy.banned = torch.cat([policy.banned, torch.tensor([50])])  # as rows of a padded head are
    with pytest.raises(ValueError, match=r"holds the ids \[50\]"):
        group_logps(policy, with_id(rollout, 50))


# --- the encoder runs once ----------------------------------------------------------------------------------------


def test_the_encoder_sees_each_video_once(tiny_model):
    policy, processor = load_policy(tiny_model), load_processor(tiny_model)
    seen = []  # patches of each call
    policy.base.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    asked = [make_rollout(tiny_model, VISUALS[name], seed=i) for i, name in enumerate(("a video", "two videos"))]
    rollouts = rollout_groups(policy, processor, [r.sample for r in asked], [r.prompt for r in asked], [(0,), (1,)],
                              group_size=4, max_tokens=6)
    batch = rollout_batch(policy, rollouts)
    for _ in range(2):  # two inner updates
        policy(batch).sum().backward()
    group_logps(policy, rollouts[0])
    assert seen == [sum(len(r.prompt.patches) for r in asked)]
