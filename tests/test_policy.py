"""One packed row against plain rows of transformers' own models: values and gradients, for both families."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    GenerationConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration,
)

from deepvideo_r1.core import Clip, Rollout, Sample, make_generator
from deepvideo_r1.packing import mrope_positions
from deepvideo_r1.policy import group_logps, load_policy, rollout_batch, save_policy
from deepvideo_r1.prompt import build_prompt, load_processor
from deepvideo_r1.rollout import rollout_groups

PLAIN = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen2_vl": Qwen2VLForConditionalGeneration}


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
def checkpoints(tiny_model, tiny_qwen2_vl):
    return {"qwen2_5_vl": tiny_model, "qwen2_vl": tiny_qwen2_vl}


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


def plain_logps(model, policy, rollout) -> torch.Tensor:
    "log-probabilities by one forward pass of transformers for each response, with eager attention and all logits."
    prompt, rows = rollout.prompt, []
    where, following = policy.positions(prompt)
    pixels, start = {}, 0
    for kind, grid in zip(prompt.visual_kinds, [] if prompt.grid_thw is None else prompt.grid_thw):
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
        row = logits.index_fill(-1, policy.banned, float("-inf")).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        rows.append(nn.functional.pad(row, (0, len(mask) - len(ids))))
    return torch.stack(rows)


def load_plain(path, family, adapter=None):
    model = PLAIN[family].from_pretrained(path, attn_implementation="eager")
    model.model.visual.requires_grad_(False)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True) if adapter else model


def gradients(module, logps) -> dict[str, torch.Tensor]:
    weights = torch.randn(logps.shape, generator=make_generator("weights"))
    module.zero_grad()
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def check_equal_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    ours, theirs = (torch.cat([grads[name].flatten() for name in sorted(grads)]) for grads in (ours, theirs))
    assert theirs.norm() > 1 and (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("visuals", VISUALS)
def test_the_packed_row_equals_plain_rows(checkpoints, family, visuals):
    path = checkpoints[family]
    rollout = make_rollout(path, VISUALS[visuals])
    policy, plain = load_policy(path), load_plain(path, family)
    packed, expected = group_logps(policy, rollout), plain_logps(plain, policy, rollout)
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(group_logps(policy, rollout, shared_prefix=False), expected, atol=2e-5, rtol=0)
    assert expected[rollout.completion_mask].std() > 0.3  # the model has opinions
    check_equal_gradients(gradients(policy.hf, packed), gradients(plain, expected))


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_adapters_and_recomputed_activations(checkpoints, tmp_path, family, checkpointing, lora_rank):
    path = checkpoints[family]
    rollout = make_rollout(path, VISUALS["a video"])
    policy = load_policy(path, lora_rank=lora_rank, gradient_checkpointing=checkpointing).train()
    if lora_rank:
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2, generator=make_generator(name))
        save_policy(policy, load_processor(path), tmp_path)
    plain = load_plain(path, family, tmp_path if lora_rank else None)
    packed, expected = group_logps(policy, rollout), plain_logps(plain, policy, rollout)
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=0)
    ours = gradients(policy.hf, packed)
    assert all("lora" in name for name in ours) == bool(lora_rank)
    check_equal_gradients(ours, gradients(plain, expected))


def test_a_trained_encoder_gets_its_gradient(tiny_model):
    rollout = make_rollout(tiny_model, VISUALS["two videos"])
    policy, plain = load_policy(tiny_model, train_vision=True), load_plain(tiny_model, "qwen2_5_vl")
    plain.model.visual.requires_grad_(True)
    ours = gradients(policy.hf, group_logps(policy, rollout))
    assert any(".visual." in name for name in ours)
    check_equal_gradients(ours, gradients(plain, plain_logps(plain, policy, rollout)))


@torch.no_grad()
def test_every_group_size(tiny_model):
    policy, plain = load_policy(tiny_model), load_plain(tiny_model, "qwen2_5_vl")
    for group_size in range(1, 9):
        rollout = make_rollout(tiny_model, VISUALS["a video"], group_size, lengths=(3, 8, 1, 6, 2))
        torch.testing.assert_close(group_logps(policy, rollout), plain_logps(plain, policy, rollout), atol=2e-5, rtol=0)


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
    other = replace(rollout, completion_ids=torch.where(rollout.completion_mask, rollout.completion_ids, noise))
    logps = group_logps(policy, rollout)
    assert torch.equal(group_logps(policy, other), logps) and (logps[~rollout.completion_mask] == 0).all()


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


def test_the_family_decides_about_time(checkpoints):
    for family, times in (("qwen2_5_vl", [0, 1, 3]), ("qwen2_vl", [0, 1, 2])):
        prompt = make_rollout(checkpoints[family], [("video", clip(6, 28, 28, seconds=0.375))]).prompt
        policy = load_policy(checkpoints[family])
        shown = policy.positions(prompt)[0][0][torch.isin(prompt.prompt_ids, torch.tensor(policy.pad_ids))]
        assert (shown - shown[0]).tolist() == times


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


@pytest.mark.parametrize("change, message", [
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1, it must be 0"),
    ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": None}, "sliding-window"),
])
def test_models_that_cannot_share_a_prompt_are_refused(tiny_model, tmp_path, change, message):
    path = tmp_path / "changed"
    shutil.copytree(tiny_model, path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)


def test_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="the model is of type 'qwen2', supported are qwen2_vl, qwen2_5_vl"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="nowhere: not a model directory or hub id"):
        load_policy(tmp_path / "nowhere")


def test_a_prompt_beyond_the_context_is_refused(tiny_model):
    policy, rollout = load_policy(tiny_model), make_rollout(tiny_model, VISUALS["a video"])
    room = len(rollout.prompt.prompt_ids) + rollout.completion_ids.shape[1]
    policy.context_length = room
    group_logps(policy, rollout)
    policy.context_length = room - 1
    with pytest.raises(ValueError, match=f"have {room} tokens, the model's context is {room - 1}; use fewer frames"):
        group_logps(policy, rollout)


def test_a_placeholder_in_a_response_is_refused(tiny_model):
    policy, rollout = load_policy(tiny_model), make_rollout(tiny_model, VISUALS["a video"])
    for pad in policy.pad_ids:
        ids = rollout.completion_ids.clone()
        ids[2, 1] = pad
        with pytest.raises(ValueError, match="a response holds a video or image placeholder"):
            group_logps(policy, replace(rollout, completion_ids=ids))


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
