"""Sampling against transformers' own generation, against the scoring pass, and against the probabilities it claims."""
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLForConditionalGeneration

from deepvideo_r1.core import Clip, Sample, make_generator
from deepvideo_r1.policy import group_logps, load_policy
from deepvideo_r1.prompt import build_prompt, load_processor
from deepvideo_r1.rollout import rollout_groups, sample_tokens


def clip(n_frames, height, width, seconds=0.5):
    pixels = torch.randint(0, 256, (n_frames, 3, height, width), generator=make_generator(n_frames), dtype=torch.uint8)
    return Clip(pixels, torch.arange(n_frames) * seconds)


VISUALS = {
    "short video": [("video", clip(4, 56, 84))],  # two steps of half a second: both count positions alike
    "image": [("image", clip(1, 84, 56))],
    "words": [],
    "long video": [("video", clip(8, 28, 28, 2.0))],  # 1 x 1 tokens over 14 s: positions follow time only here
}


def ask(path, name, question="how many points in total ?"):
    sample = Sample(id=name, question=question, answer="3", kind="number")
    return sample, build_prompt(sample, VISUALS[name], load_processor(path), template="plain")


def roll(policy, path, *names, keys=None, **how):
    samples, prompts = zip(*(ask(path, name) for name in names))
    keys = keys or [(0, name) for name in names]
    return rollout_groups(policy, load_processor(path), samples, prompts, keys, **how)


def generate(path, prompt, policy, *, max_tokens, patch) -> list[int]:
    "Greedy tokens of transformers' `generate`, in the positions it finds itself or in ours."
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, attn_implementation="sdpa")
    kinds = torch.zeros_like(prompt.prompt_ids)
    for value, token in ((1, model.config.image_token_id), (2, model.config.video_token_id)):
        kinds[prompt.prompt_ids == token] = value
    inputs = {"input_ids": prompt.prompt_ids[None], "mm_token_type_ids": kinds[None]}
    if prompt.visual_kinds == ("video",):
        inputs |= {"pixel_values_videos": prompt.patches, "video_grid_thw": prompt.grid_thw,
                   "second_per_grid_ts": torch.tensor(prompt.seconds_per_grid)}
    elif prompt.visual_kinds == ("image",):
        inputs |= {"pixel_values": prompt.patches, "image_grid_thw": prompt.grid_thw}
    if patch:
        where, following = policy.positions(prompt)
        ours = where[:, None], torch.tensor([[following - where.shape[1]]])
        model.model.get_rope_index = lambda *args, **kwargs: ours
    ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, suppress_tokens=policy.banned.tolist(),
                         eos_token_id=model.generation_config.eos_token_id)
    return ids[0, len(prompt.prompt_ids) :].tolist()


@pytest.mark.parametrize("name, patch", [
    ("short video", False), ("image", False), ("words", False), ("long video", True)])
def test_greedy_tokens_are_those_of_transformers(tiny_model, name, patch):
    policy = load_policy(tiny_model)
    rollout, = roll(policy, tiny_model, name, group_size=2, max_tokens=24, temperature=0)
    ours = rollout.completion_ids[0][rollout.completion_mask[0]].tolist()
    assert len(set(ours)) > 2 and ours == rollout.completion_ids[1][rollout.completion_mask[1]].tolist()
    assert ours == generate(tiny_model, rollout.prompt, policy, max_tokens=24, patch=patch)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scoring_gives_the_log_probabilities_of_sampling(tiny_model, temperature):
    policy = load_policy(tiny_model, temperature=temperature)
    for rollout in roll(policy, tiny_model, *VISUALS, group_size=5, max_tokens=12, temperature=temperature):
        with torch.no_grad():
            torch.testing.assert_close(group_logps(policy, rollout), rollout.old_logps, atol=1e-4, rtol=0)
        assert rollout.old_logps[rollout.completion_mask].std() > 0.3


def test_a_group_does_not_depend_on_its_company(tiny_model):
    policy = load_policy(tiny_model)
    how = dict(group_size=4, max_tokens=10)
    alone = {name: roll(policy, tiny_model, name, **how)[0] for name in VISUALS}
    every = list(VISUALS)
    for names, batch_rows in ((every, 512), (every[::-1], 512), (every, 8), (every[1:3], 4)):
        for rollout in roll(policy, tiny_model, *names, batch_rows=batch_rows, **how):
            expected = alone[rollout.sample.id]
            assert torch.equal(rollout.completion_ids, expected.completion_ids) and rollout.texts == expected.texts
            assert torch.equal(rollout.completion_mask, expected.completion_mask)
            torch.testing.assert_close(rollout.old_logps, expected.old_logps, atol=1e-5, rtol=0)


def test_the_key_names_the_draws(tiny_model):
    policy = load_policy(tiny_model)
    one, same, other = (roll(policy, tiny_model, "words", keys=[key], group_size=3, max_tokens=8)[0]
                        for key in ((1,), (1,), (2,)))
    assert one.texts == same.texts != other.texts
    assert len(set(one.texts)) == 3


def test_known_features_spare_the_encoder(tiny_model):
    policy = load_policy(tiny_model)
    first, = roll(policy, tiny_model, "short video", group_size=2, max_tokens=6)
    policy.encode = None  # calling it would fail
    again, = roll(policy, tiny_model, "short video", group_size=2, max_tokens=6,
                  visual_features=[first.visual_features])
    assert torch.equal(first.completion_ids, again.completion_ids) and torch.equal(first.old_logps, again.old_logps)


def test_a_response_ends_with_its_stop_id(tiny_model):
    policy, processor = load_policy(tiny_model), load_processor(tiny_model)
    stops = torch.tensor(policy.base.generation_config.eos_token_id)
    policy.base.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_add(-1, stops, torch.full((len(output), len(stops)), 3.0)))
    rollout, = roll(policy, tiny_model, "words", group_size=64, max_tokens=16)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    lengths = mask.sum(-1)
    assert 1 <= lengths.min() < lengths.max() == mask.shape[1]
    for row, length in zip(ids, lengths.tolist()):
        assert not torch.isin(row[: length - 1], stops).any() and (row[length:] == 0).all()
        assert length == 16 or row[length - 1] in stops
    assert (mask == (torch.arange(mask.shape[1]) < lengths[:, None])).all() and (rollout.old_logps[~mask] == 0).all()
    assert rollout.texts[0] == processor.tokenizer.decode(ids[0][mask[0]], skip_special_tokens=True)


# --- one token ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(logits=st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=30), banned=st.sets(st.integers(0, 29)),
       level=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
       temperature=st.sampled_from([0, 0.3, 1]))
def test_a_banned_id_is_never_drawn(logits, banned, level, temperature):
    banned = sorted(i for i in banned if i < len(logits))[: len(logits) - 1]
    ids, logps = sample_tokens(torch.tensor([logits]), torch.tensor([level], dtype=torch.float64),
                               temperature=temperature, banned=torch.tensor(banned, dtype=torch.long))
    assert int(ids) not in banned and torch.isfinite(logps).all() and float(logps) <= 1e-6


def test_banned_ids_stay_out_of_responses(tiny_model):
    policy = load_policy(tiny_model)
    banned = policy.banned
    assert set(policy.pad_ids) <= set(banned.tolist())
    policy.base.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_add(-1, banned, torch.full((len(output), len(banned)), 50.0)))
    rollout, = roll(policy, tiny_model, "short video", group_size=512, max_tokens=20)
    drawn = rollout.completion_ids[rollout.completion_mask]
    assert len(drawn) > 5000 and not torch.isin(drawn, banned).any()


def test_rows_of_the_head_without_a_token_are_never_drawn(tiny_model, tmp_path):
    path = tmp_path / "padded"
    shutil.copytree(tiny_model, path)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_model)
    n = len(load_processor(tiny_model).tokenizer)
    model.resize_token_embeddings(n + 600, mean_resizing=False)
    model.save_pretrained(path)
    policy = load_policy(path)
    rollout, = roll(policy, path, "short video", group_size=256, max_tokens=16)
    assert int(rollout.completion_ids.max()) < n
    with torch.no_grad():
        torch.testing.assert_close(group_logps(policy, rollout), rollout.old_logps, atol=1e-4, rtol=0)


def test_frequencies_are_the_probabilities():
    n, generator = 400_000, make_generator("draws")
    logits = torch.randn(12, generator=generator) * 2
    banned = torch.tensor([0, 5, 11])
    for temperature in (1.0, 0.5, 2.0):
        expected = (logits / temperature).index_fill(0, banned, float("-inf")).softmax(0).double()
        ids, logps = sample_tokens(logits.expand(n, -1), torch.rand(n, generator=generator, dtype=torch.float64),
                                   temperature=temperature, banned=banned)
        found = ids.bincount(minlength=12) / n
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
        torch.testing.assert_close(logps.double().exp(), expected[ids], atol=1e-6, rtol=0)


def test_the_policy_draws_first_tokens_as_often_as_it_says(tiny_model):
    policy, n = load_policy(tiny_model), 20_000
    rollout, = roll(policy, tiny_model, "short video", group_size=n, max_tokens=1, batch_rows=n)
    ids, counts = rollout.completion_ids[:, 0].unique(return_counts=True)
    each = replace(rollout, completion_ids=ids[:, None], completion_mask=torch.ones(len(ids), 1, dtype=torch.bool))
    with torch.no_grad():
        expected = group_logps(policy, each)[:, 0].double().exp()
    assert expected.sum() > 0.99 and len(ids) > 20
    assert ((counts / n - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 1 / n).all()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_response_that_might_leave_the_context_is_refused_before_it_is_sampled(tiny_model):
    policy = load_policy(tiny_model)
    _, prompt = ask(tiny_model, "short video")
    policy.context_length = len(prompt.prompt_ids) + 8
    roll(policy, tiny_model, "short video", group_size=2, max_tokens=8)
    with pytest.raises(ValueError, match="context"):
        roll(policy, tiny_model, "short video", group_size=2, max_tokens=9)


@pytest.mark.parametrize("how", [{"group_size": 0}, {"max_tokens": 0}, {"temperature": -1.0}])
def test_impossible_settings_are_refused(tiny_model, how):
    with pytest.raises(ValueError, match="must be at least"):
        roll(load_policy(tiny_model), tiny_model, "words", **how)
