"""Sampling against transformers' own generation, against the scoring pass, and against the probabilities it claims."""
import shutil
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (LogitsProcessorList, Qwen2_5_VLForConditionalGeneration, SuppressTokensLogitsProcessor,
                          TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

from deepvideo_r1.core import Clip, Sample, make_generator
from deepvideo_r1.model.policy import group_logps, load_policy
from deepvideo_r1.model.prompt import build_prompt, load_processor
from deepvideo_r1.model.rollout import Sampling, rescore, rollout_groups, sample_tokens, sampling_logps


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
    if prompt.modalities == ("video",):
        inputs |= {"pixel_values_videos": prompt.patches, "video_grid_thw": prompt.grid_thw,
                   "second_per_grid_ts": torch.tensor(prompt.seconds_per_grid)}
    elif prompt.modalities == ("image",):
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
            torch.testing.assert_close(group_logps(policy, rollout), rollout.sampled_logps, atol=1e-4, rtol=0)
        assert rollout.sampled_logps[rollout.completion_mask].std() > 0.3


CUTS = [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 30, "top_p": 0.8}, {"top_k": 5, "top_p": 0.9, "temperature": 0.6}]


@pytest.mark.parametrize("cut", CUTS)
def test_rescoring_gives_the_log_probabilities_of_a_cut_distribution(tiny_model, cut):
    policy = load_policy(tiny_model, temperature=cut.get("temperature", 1.0))
    for rollout in roll(policy, tiny_model, *VISUALS, group_size=5, max_tokens=12, **cut):
        mask, old = rollout.completion_mask, rollout.sampled_logps
        torch.testing.assert_close(rescore(policy, rollout, **cut), old, atol=1e-4, rtol=0)
        with torch.no_grad():
            over_all_tokens = group_logps(policy, rollout)
        assert (old - over_all_tokens)[mask].min() >= -1e-4 and (old - over_all_tokens)[mask].mean() > 0.1
        if "top_k" in cut:  # a distribution over k tokens has a likely token
            assert old[mask].max() >= -torch.tensor(float(cut["top_k"])).log()


def test_rescoring_without_a_cut_is_scoring(tiny_model):
    policy = load_policy(tiny_model, temperature=0.7)
    for rollout in roll(policy, tiny_model, *VISUALS, group_size=3, max_tokens=9, temperature=0.7):
        with torch.no_grad():
            expected = group_logps(policy, rollout)
        for chunk in (2048, 5):
            torch.testing.assert_close(rescore(policy, rollout, temperature=0.7, chunk=chunk), expected, atol=1e-5, rtol=0)


def test_one_token_to_choose_from_is_the_greedy_one(tiny_model):
    policy = load_policy(tiny_model)
    greedy, by_k, by_p = (roll(policy, tiny_model, *VISUALS, group_size=2, max_tokens=8, **how)
                          for how in ({"temperature": 0, "top_k": 3, "top_p": 0.5}, {"top_k": 1}, {"top_p": 1e-6}))
    for expected, *others in zip(greedy, by_k, by_p):
        assert expected.sampled_logps[expected.completion_mask].max() < 0  # greedy is scored over all tokens
        for found in others:
            assert torch.equal(found.completion_ids, expected.completion_ids) and not found.sampled_logps.any()


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
            torch.testing.assert_close(rollout.sampled_logps, expected.sampled_logps, atol=1e-5, rtol=0)


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
    assert torch.equal(first.completion_ids, again.completion_ids) and torch.equal(first.sampled_logps, again.sampled_logps)


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
    assert (mask == (torch.arange(mask.shape[1]) < lengths[:, None])).all() and (rollout.sampled_logps[~mask] == 0).all()
    assert rollout.texts[0] == processor.tokenizer.decode(ids[0][mask[0]], skip_special_tokens=True)


# --- one token ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(logits=st.lists(st.floats(-200, 200, width=32), min_size=2, max_size=30), banned=st.sets(st.integers(0, 29)),
       level=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
       temperature=st.sampled_from([0, 0.3, 1]))
def test_a_banned_id_is_never_drawn(logits, banned, level, temperature):
    banned = sorted(i for i in banned if i < len(logits))[: len(logits) - 1]
    ids, logps = sample_tokens(torch.tensor([logits]), torch.tensor([level], dtype=torch.float64),
                               Sampling(temperature), banned=torch.tensor(banned, dtype=torch.long))
    assert int(ids) not in banned and torch.isfinite(logps).all() and float(logps) <= 1e-6


def by_transformers(logits, *, temperature, top_k, top_p, banned):
    "What `generate` samples from, as log-probabilities."
    steps = LogitsProcessorList([SuppressTokensLogitsProcessor(banned)] if banned else [])
    steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    return steps(None, logits).log_softmax(-1)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 400), levels=st.sampled_from([1, 3, 20, 10**6]), top_k=st.integers(0, 40),
       top_p=st.one_of(st.sampled_from([1.0, 0.5, 0.25]), st.floats(1e-4, 1)), temperature=st.sampled_from([0.3, 1.0, 2.5]),
       n_banned=st.integers(0, 5))
def test_the_cut_is_that_of_transformers(seed, n, levels, top_k, top_p, temperature, n_banned):
    generator = make_generator(seed)
    logits = (torch.randn(4, n, generator=generator) * levels).round() / levels * 4  # few levels: many ties
    banned = torch.randperm(n, generator=generator)[: min(n_banned, n - 1)].sort().values
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ours = sampling_logps(logits, Sampling(**how), banned=banned)
    theirs = by_transformers(logits, banned=banned.tolist(), **how)
    # Of equal tokens at the border as many are kept; which ones, its sort leaves open for rows longer than 16.
    torch.testing.assert_close(ours.sort().values, theirs.sort().values, atol=1e-6, rtol=0)
    untied = torch.tensor([len(row.unique()) == n for row in logits])
    with mock.patch("torch.sort", partial(torch.sort, stable=True)):
        settled = by_transformers(logits, banned=banned.tolist(), **how)
    for same, rows in ((theirs, untied), (settled, ...)):
        assert torch.equal(ours[rows] > float("-inf"), same[rows] > float("-inf"))
        torch.testing.assert_close(ours[rows], same[rows], atol=1e-6, rtol=0)
    assert (ours > float("-inf")).any(-1).all() and not (ours[:, banned] > float("-inf")).any()
    torch.testing.assert_close(ours.exp().sum(-1), torch.ones(4), atol=1e-5, rtol=0)


def test_the_cut_at_ties_and_borders():
    def kept(logits, banned=None, **how):
        return (sampling_logps(torch.tensor([logits]), Sampling(**how), banned=banned)[0] > float("-inf")).tolist()

    assert kept([0.0, 1.0, 1.0, 1.0, 2.0], top_k=2) == [False, True, True, True, True]
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.5) == [False, False, True, True]  # exactly half is held by two
    assert kept([0.0, 0.0, 0.0, 0.0], top_p=0.51) == [False, True, True, True]
    assert kept([5.0, 5.0], top_p=1e-9) == [False, True] and kept([9.0, 0.0], top_k=100) == [True, True]
    assert kept([3.0, 2.0, 1.0], top_k=2, banned=torch.tensor([0])) == [False, True, True]
    # top-k goes first: of the two that it leaves, the likelier holds 0.73, of all four only 0.64
    assert kept([3.0, 2.0, 1.0, 0.0], top_k=2, top_p=0.7) == [True, False, False, False]
    assert kept([3.0, 2.0, 1.0, 0.0], top_p=0.7) == [True, True, False, False]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(0, 12), top_p=st.floats(1e-3, 1), temperature=st.sampled_from([0.2, 1, 3]),
       level=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])))
def test_a_draw_comes_from_the_distribution_that_is_reported(seed, top_k, top_p, temperature, level):
    logits, banned = torch.randn(3, 12, generator=make_generator(seed)) * 3, torch.tensor([2, 7])
    sampling = Sampling(temperature, top_k, top_p)
    ids, logps = sample_tokens(logits, torch.full((3,), level, dtype=torch.float64), sampling, banned=banned)
    assert torch.equal(logps, sampling_logps(logits, sampling, banned=banned).gather(1, ids[:, None])[:, 0])
    assert torch.isfinite(logps).all() and not torch.isin(ids, banned).any()


def test_without_a_cut_nothing_is_cut():
    logits, banned = torch.randn(50, 300, generator=make_generator("old")) * 4, torch.tensor([3, 299])
    uniforms = torch.rand(50, generator=make_generator("draws"), dtype=torch.float64)
    expected = (logits / 0.8).index_fill(-1, banned, float("-inf")).log_softmax(-1)
    cumulative = expected.double().exp().cumsum(-1)
    ids, logps = sample_tokens(logits, uniforms, Sampling(0.8), banned=banned)
    drawn = [int((row <= u * row[-1]).sum()) for row, u in zip(cumulative, uniforms)]
    assert ids.tolist() == drawn and torch.equal(logps, expected.gather(1, ids[:, None])[:, 0])


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
        torch.testing.assert_close(group_logps(policy, rollout), rollout.sampled_logps, atol=1e-4, rtol=0)


def test_frequencies_are_the_probabilities():
    n, generator = 400_000, make_generator("draws")
    logits = torch.randn(12, generator=generator) * 2
    banned = torch.tensor([0, 5, 11])
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.8), (2.0, 6, 0.9)):
        expected = by_transformers(logits[None], temperature=temperature, top_k=top_k, top_p=top_p, banned=banned.tolist())
        expected = expected[0].exp().double()
        assert (expected > 0).sum() == 9 or top_k or top_p < 1
        ids, logps = sample_tokens(logits.expand(n, -1), torch.rand(n, generator=generator, dtype=torch.float64),
                                   Sampling(temperature, top_k, top_p), banned=banned)
        found = ids.bincount(minlength=12) / n
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
        torch.testing.assert_close(logps.double().exp(), expected[ids], atol=1e-6, rtol=0)


@pytest.mark.parametrize("cut", [{}, {"top_k": 25, "top_p": 0.9}])
def test_the_policy_draws_first_tokens_as_often_as_it_says(tiny_model, cut):
    policy, n = load_policy(tiny_model), 20_000
    rollout, = roll(policy, tiny_model, "short video", group_size=n, max_tokens=1, batch_rows=n, **cut)
    ids, counts = rollout.completion_ids[:, 0].unique(return_counts=True)
    each = replace(rollout, completion_ids=ids[:, None], completion_mask=torch.ones(len(ids), 1, dtype=torch.bool))
    expected = rescore(policy, each, **cut)[:, 0].double().exp()
    assert 0.99 < expected.sum() < 1.0001 and len(ids) > (20 if not cut else 10)
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


@pytest.mark.parametrize("how", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")}])
def test_impossible_cuts_are_refused_before_anything_is_computed(tiny_model, how):
    policy = load_policy(tiny_model)
    policy.encode = None  # calling it would fail
    with pytest.raises(ValueError, match="top_k must be at least 0"):
        roll(policy, tiny_model, "short video", **how)
