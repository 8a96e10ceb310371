"""Qwen3-VL, dense and with experts: what its prompts, positions, features and files have of their own."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_policy import clip
from transformers import AutoConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from deepvideo_r1.core import Sample
from deepvideo_r1.data.visuals import load_visuals
from deepvideo_r1.model.packing import POSITIONS
from deepvideo_r1.model.policy import group_logps, load_policy, save_policy
from deepvideo_r1.model.precision import compute_units, hold_masters
from deepvideo_r1.model.prompt import build_prompt, load_processor
from deepvideo_r1.model.rollout import rescore, rollout_groups
from deepvideo_r1.model.tiny import make_tiny_checkpoint
from deepvideo_r1.toy.world import world_texts

PLAIN = {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "Tiny checkpoints with patches of 16 pixels, as the large ones have."
    torch.set_num_threads(1)
    return {family: make_tiny_checkpoint(tmp_path_factory.mktemp("model") / family, texts=world_texts(), hidden_size=48,
                                         n_layers=3, family=family, patch_size=16, max_pixels=64 * 96) for family in PLAIN}


VISUALS = {
    "a video": [("video", clip(6, 64, 96))],
    "two videos": [("video", clip(4, 64, 32)), ("video", clip(7, 32, 96, seconds=1.7, seed=1))],
    "video and image": [("video", clip(3, 64, 64, seconds=0.8)), ("image", clip(1, 96, 64, seed=2))],
    "image": [("image", clip(1, 96, 64, seed=3))],
    "words": [],
}


def ask(path, name):
    sample = Sample(id=name, question="how many points in total ?", answer="3", kind="number")
    return sample, build_prompt(sample, VISUALS[name], load_processor(path), template="plain")


def roll(policy, path, *names, **how):
    samples, prompts = zip(*(ask(path, name) for name in names))
    return rollout_groups(policy, load_processor(path), samples, prompts, [(0, name) for name in names], **how)


def inputs_of(prompt, config) -> dict[str, torch.Tensor]:
    "What transformers' own model takes: videos and images apart, and which token is which."
    types = torch.zeros_like(prompt.prompt_ids)
    types[prompt.prompt_ids == config.image_token_id], types[prompt.prompt_ids == config.video_token_id] = 1, 2
    inputs = {"input_ids": prompt.prompt_ids[None], "mm_token_type_ids": types[None]}
    sizes = [] if prompt.grid_thw is None else prompt.grid_thw.prod(-1).tolist()
    for modality, names in {"image": ("pixel_values", "image_grid_thw"),
                            "video": ("pixel_values_videos", "video_grid_thw")}.items():
        if chosen := [i for i, m in enumerate(prompt.modalities) if m == modality]:
            parts = prompt.patches.split(sizes)
            inputs |= dict(zip(names, (torch.cat([parts[i] for i in chosen]), prompt.grid_thw[chosen])))
    return inputs


# --- prompts and positions ----------------------------------------------------------------------------------------


def test_every_step_has_its_time_and_its_marks(checkpoints):
    _, prompt = ask(checkpoints["qwen3_vl"], "video and image")
    pad, image = "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
    steps = f"<0.4 seconds>{pad}<1.6 seconds>{pad}"  # frames at 0, 0.8 and 1.6 s, the last one twice
    assert f"<|vision_start|>{steps}<|vision_end|>{image}" in prompt.text
    assert prompt.grid_thw.tolist() == [[2, 4, 4], [1, 6, 4]] and prompt.modalities == ("video", "image")
    ids = load_processor(checkpoints["qwen3_vl"]).pad_ids
    counts = [int((prompt.prompt_ids == ids[modality]).sum()) for modality in ("video", "image")]
    assert counts == [2 * 4, 6]


@pytest.mark.parametrize("convention", POSITIONS)
@pytest.mark.parametrize("name", VISUALS)
def test_positions_are_those_of_transformers(checkpoints, name, convention):
    path = checkpoints["qwen3_vl"]
    policy, (_, prompt) = load_policy(path, positions=convention), ask(path, name)
    inputs = {k: v for k, v in inputs_of(prompt, policy.base.config).items() if not k.startswith("pixel")}
    expected, delta = policy.base.model.get_rope_index(**inputs)
    positions, following = policy.positions(prompt)
    assert torch.equal(positions, expected[:, 0]) and following == len(prompt.prompt_ids) + int(delta)


def test_frames_keep_to_the_budget_of_larger_patches(checkpoints, tmp_path):
    "The smallest size of a published checkpoint, 256 x 256, may be above the budget of a run: then the budget counts."
    processor = replace(load_processor(checkpoints["qwen3_vl"]), min_pixels=256 * 256, max_pixels=4096 * 4096)
    assert processor.factor == 32
    for pixels, budget, side in ((400, None, 384), (40, None, 256), (400, 252 * 252, 224), (40, 252 * 252, 32), (90, 32 * 32, 32)):
        Image.new("RGB", (pixels, pixels)).save(tmp_path / "x.png")
        sample = Sample(id="x", question="?", answer="x", images=(str(tmp_path / "x.png"),))
        (_, found), = load_visuals(sample, processor, max_pixels=budget, timeout=None)
        assert found.frames.shape[-2:] == (side, side)
    with pytest.raises(ValueError, match="at least factor squared = 1024, got 784"):
        load_visuals(sample, processor, max_pixels=28 * 28, timeout=None)


# --- scoring and sampling -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("name", VISUALS)
def test_scores_are_those_of_transformers_with_its_own_positions(checkpoints, family, name):
    path = checkpoints[family]
    policy, plain = load_policy(path), PLAIN[family].from_pretrained(path, attn_implementation="eager")
    rollout, = roll(policy, path, name, group_size=3, max_tokens=9)
    inputs, width = inputs_of(rollout.prompt, plain.config), len(rollout.prompt.prompt_ids)
    scores = group_logps(policy, rollout)
    for ids, mask, found in zip(rollout.completion_ids, rollout.completion_mask, scores):
        ids = ids[mask]
        row = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids[None]], 1),
                   mm_token_type_ids=torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ids))))
        logits = plain(**row).logits[0, width - 1 : -1].index_fill(-1, policy.banned, float("-inf"))
        expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(found[mask], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scoring_gives_the_log_probabilities_of_sampling(checkpoints, family, temperature):
    policy = load_policy(checkpoints[family], temperature=temperature)
    for rollout in roll(policy, checkpoints[family], *VISUALS, group_size=4, max_tokens=10, temperature=temperature):
        with torch.no_grad():
            torch.testing.assert_close(group_logps(policy, rollout), rollout.sampled_logps, atol=1e-4, rtol=0)
        torch.testing.assert_close(rescore(policy, rollout, temperature=temperature), rollout.sampled_logps, atol=1e-4, rtol=0)
        assert rollout.sampled_logps[rollout.completion_mask].std() > 0.3


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("name", VISUALS)
def test_greedy_tokens_are_those_of_transformers(checkpoints, family, name):
    path = checkpoints[family]
    policy = load_policy(path)
    rollout, = roll(policy, path, name, group_size=2, max_tokens=16, temperature=0)
    model = PLAIN[family].from_pretrained(path, attn_implementation="sdpa")
    expected = model.generate(**inputs_of(rollout.prompt, model.config), max_new_tokens=16, do_sample=False,
                              suppress_tokens=policy.banned.tolist())[0, len(rollout.prompt.prompt_ids) :].tolist()
    ours = rollout.completion_ids[0][rollout.completion_mask[0]].tolist()
    assert len(set(ours)) > 1 and ours == expected


@torch.no_grad()
@pytest.mark.parametrize("family", PLAIN)
def test_features_of_all_depths_are_kept_and_used(checkpoints, family):
    policy = load_policy(checkpoints[family])
    rollout, = roll(policy, checkpoints[family], "video and image", group_size=2, max_tokens=6)
    hidden, features = policy.base.config.text_config.hidden_size, rollout.visual_features
    assert features.shape == (2 * 4 + 6, 3 * hidden)
    logps = group_logps(policy, rollout)
    torch.testing.assert_close(group_logps(policy, replace(rollout, visual_features=None)), logps, atol=1e-5, rtol=0)
    for depth in range(3):
        changed = features.clone()
        changed[:, depth * hidden : (depth + 1) * hidden] *= 1.5
        assert (group_logps(policy, replace(rollout, visual_features=changed)) - logps).abs().max() > 1e-3


def test_a_trained_encoder_gets_its_gradient_at_all_depths(checkpoints):
    path = checkpoints["qwen3_vl"]
    policy, plain = load_policy(path, train_vision=True), PLAIN["qwen3_vl"].from_pretrained(path)
    rollout, = roll(policy, path, "a video", group_size=2, max_tokens=5)
    group_logps(policy, rollout).sum().backward()
    inputs, width = inputs_of(rollout.prompt, plain.config), len(rollout.prompt.prompt_ids)
    for ids, mask in zip(rollout.completion_ids, rollout.completion_mask):
        ids = ids[mask]
        row = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids[None]], 1),
                   mm_token_type_ids=torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ids))))
        logits = plain(**row).logits[0, width - 1 : -1].index_fill(-1, policy.banned, float("-inf"))
        logits.log_softmax(-1).gather(1, ids[:, None]).sum().backward()
    ours, theirs = ({name: p.grad for name, p in module.model.visual.named_parameters()} for module in (policy.base, plain))
    assert any("deepstack" in name for name in ours) and all(grad is not None for grad in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4 * float(theirs[name].norm()) + 1e-6, rtol=0)


# --- experts ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_packed_row_chooses_the_experts_of_whole_rows(checkpoints):
    policy, chosen = load_policy(checkpoints["qwen3_vl_moe"]).train(), []
    rollout, = roll(policy, checkpoints["qwen3_vl_moe"], "a video", group_size=3, max_tokens=7)
    for layer in policy.base.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2].sort(-1).values))
    group_logps(policy, rollout)
    packed, width = [ids.clone() for ids in chosen], len(rollout.prompt.prompt_ids)
    chosen.clear()
    group_logps(policy, rollout, shared_prefix=False)
    n_tokens = rollout.completion_ids.shape[1]
    for row, whole in zip(packed, chosen, strict=True):
        row, whole = torch.cat([row[:width], row[width:]]), whole.unflatten(0, (3, width + n_tokens))
        for g, mask in enumerate(rollout.completion_mask):
            start = width + g * n_tokens
            assert torch.equal(whole[g, :width], row[:width])
            assert torch.equal(whole[g, width:][mask], row[start : start + n_tokens][mask])
    assert len(torch.cat(packed).unique()) == 4  # all experts are used


def test_a_balancing_loss_has_no_part_in_scores_and_gradients(checkpoints, tmp_path):
    "transformers adds it to a loss of its own, which is not used here."
    results = []
    for output in (False, True):
        policy = load_policy(checkpoints["qwen3_vl_moe"]).train()
        policy.base.config.text_config.output_router_logits = output
        policy.base.config.text_config.router_aux_loss_coef = 10.0
        rollout, = roll(policy, checkpoints["qwen3_vl_moe"], "image", group_size=2, max_tokens=6)
        logps = group_logps(policy, rollout)
        logps.sum().backward()
        results.append((logps.detach(), [p.grad for p in policy.parameters() if p.grad is not None]))
    (logps, grads), (others, other_grads) = results
    assert torch.equal(logps, others) and all(map(torch.equal, grads, other_grads))
    assert any(p.grad is not None and p.grad.any() for name, p in policy.named_parameters() if "mlp.gate" in name)


def test_new_adapters_reach_all_linear_layers_and_no_experts(checkpoints):
    policy = load_policy(checkpoints["qwen3_vl"], lora_rank=2)
    trained = {name.split(".lora_")[0] for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 7 * 3 and not any("visual" in name for name in trained)
    with pytest.raises(ValueError, match="experts of a qwen3_vl_moe .* set lora_rank to 0 .* or name a dense Qwen3-VL"):
        load_policy(checkpoints["qwen3_vl_moe"], lora_rank=2)


# --- files, types and units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PLAIN)
def test_what_is_saved_is_loaded_as_it_was(checkpoints, tmp_path, family):
    policy, processor = load_policy(checkpoints[family]), load_processor(checkpoints[family])
    rollout, = roll(policy, checkpoints[family], "video and image", group_size=2, max_tokens=6)
    processor = replace(processor, video_pixels=(4096, 25165824))
    save_policy(policy, processor, tmp_path)
    again, read = load_policy(tmp_path), load_processor(tmp_path)
    assert torch.equal(group_logps(again, rollout), group_logps(policy, rollout))
    assert replace(read, tokenizer=processor.tokenizer) == processor
    image, video = (json.loads((tmp_path / name).read_text()) for name in ("preprocessor_config.json",
                                                                          "video_preprocessor_config.json"))
    assert image["processor_class"] == video["processor_class"] == "Qwen3VLProcessor"
    assert video["video_processor_type"] == "Qwen3VLVideoProcessor"
    assert video["size"] == {"shortest_edge": 4096, "longest_edge": 25165824}
    assert image["patch_size"] == video["patch_size"] == 16
    assert AutoConfig.from_pretrained(tmp_path).model_type == family


def test_experts_are_read_as_they_are_published(checkpoints, tmp_path):
    "Published files hold (experts, inputs, outputs), the transpose of how transformers 5 holds them."
    path = checkpoints["qwen3_vl_moe"]
    rollout, = roll(load_policy(path), path, "a video", group_size=2, max_tokens=6)
    expected = group_logps(load_policy(path), rollout)
    shutil.copytree(path, tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    weights = {name: w.mT.contiguous() if "experts" in name else w for name, w in load_file(path / "model.safetensors").items()}
    save_file(weights, file, metadata={"format": "pt"})
    policy = load_policy(tmp_path / "published")
    assert torch.equal(group_logps(policy, rollout), expected)
    save_policy(policy, load_processor(path), tmp_path / "again")
    assert torch.equal(group_logps(load_policy(tmp_path / "again"), rollout), expected)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("settings", [{}, {"train_vision": True}, {"gradient_checkpointing": True}], ids=str)
def test_bfloat16_with_masters_computes_as_without(checkpoints, family, settings):
    plain, mastered = (load_policy(checkpoints[family], dtype="bfloat16", **settings).train() for _ in range(2))
    hold_masters(mastered)
    rollout, = roll(plain, checkpoints[family], "video and image", group_size=2, max_tokens=5)
    logps = group_logps(mastered, rollout)
    assert torch.equal(logps, group_logps(plain, rollout))
    logps.sum().backward()
    trained = [p for p in mastered.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.grad is not None for p in trained)


@pytest.mark.parametrize("family", PLAIN)
def test_every_unit_of_casts_is_run(checkpoints, family):
    "A weight in a module that is never called would stay in float32."
    policy, called = load_policy(checkpoints[family], train_vision=True), set()
    units = compute_units(policy)
    for unit in units:
        unit.register_forward_hook(lambda module, args, out: called.add(module))
    rollout, = roll(policy, checkpoints[family], "a video", group_size=2, max_tokens=3)
    assert called == set(units)
    names = {type(module).__name__ for module in policy.modules()}
    assert set(policy._no_split_modules) <= names  # the units of FSDP2
