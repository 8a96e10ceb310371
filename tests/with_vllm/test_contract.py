"""vLLM reads what the trainer has written, and reports what the policy computes: for each family of models."""
from dataclasses import replace

import pytest
import torch
from bench import make_bench, shake

from deepvideo_r1.core import QuestionError
from deepvideo_r1.model.engine_input import allowed_ids
from deepvideo_r1.model.rollout import BuiltInEngine, Sampling, rescore, stop_ids_of
from deepvideo_r1.model.vllm_engine import _as_vllm_input, check_versions

BOUND = 1e-4  # nats, the largest of all tokens, in float32


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def bench(request, world, tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("models"), world, family=request.param)


def test_the_versions_of_this_environment_go_together():
    check_versions()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.0, 20, 0.8), Sampling(0.0)], ids=repr)
def test_reported_log_probabilities_are_those_of_the_policy(bench, sampling):
    "For videos at three rates, an image, several visuals and text alone. That the ids of the prompt are equal is checked within."
    gap = bench.gap(sampling, group_size=1 if sampling.temperature == 0 else 4)
    assert gap.largest < BOUND, gap


def test_the_rate_of_a_video_matters_where_steps_are_placed_in_time(bench):
    "So that equal positions at several rates are no accident."
    one = bench.sample(chosen=slice(0, 3))
    scores = [rescore(bench.policy, replace(one[0], prompt=prompt)) for prompt in bench.prompts[:3]]
    matters = [not torch.allclose(scores[0], other, atol=1e-3) for other in scores[1:]]
    assert matters == [bench.policy.tokens_per_second is not None or bench.policy.family.is_stepwise] * 2


def test_positions(bench):
    "vLLM's own function, for the very input that it gets."
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    model, = bench.engine.llm.collective_rpc(lambda worker: worker.get_model())
    for prompt in bench.prompts:
        given = _as_vllm_input(bench.policy, prompt)
        features = [MultiModalFeatureSpec(data=item, modality=modality, identifier=name, mm_position=place)
                    for modality in given.get("mm_placeholders", {})
                    for item, name, place in zip(given["mm_kwargs"][modality], given["mm_hashes"][modality],
                                                 given["mm_placeholders"][modality])]
        positions, delta = model.get_mrope_input_positions(given["prompt_token_ids"], features)
        ours, following = bench.policy.positions(prompt)
        assert torch.equal(positions.long(), ours)
        assert delta + len(prompt.prompt_ids) == following


def test_greedy_responses_are_those_of_the_builtin_engine(bench):
    "Up to ties within rounding: of these models there are none."
    ours, theirs = (bench.sample(Sampling(0.0), engine=engine, group_size=1) for engine in (BuiltInEngine(bench.policy), None))
    assert [group.texts for group in theirs] == [group.texts for group in ours]
    for one, other in zip(ours, theirs):
        assert torch.equal(one.completion_ids, other.completion_ids) and torch.equal(one.finished, other.finished)


def test_responses_differ_within_a_group_and_come_again_for_the_same_key(bench):
    first, again = bench.sample(), bench.sample()
    alone = bench.sample(chosen=slice(3, 4))
    rows = [{tuple(row) for row in group.completion_ids.tolist()} for group in first]
    assert sum(len(group) for group in rows) > 0.8 * sum(len(group.texts) for group in first)
    assert [group.texts for group in again] == [group.texts for group in first]
    assert alone[0].texts == first[3].texts  # whatever else is asked beside it
    assert first[6].texts != bench.sample(chosen=slice(7, 8))[0].texts


def test_a_response_ends_with_the_first_stop_id(bench):
    stops = set(stop_ids_of(bench.policy, bench.processor))
    groups, ended = bench.sample(group_size=16, max_tokens=40), 0
    for group in groups:
        for ids, mask, finished in zip(group.completion_ids.tolist(), group.completion_mask, group.finished):
            length = int(mask.sum())
            assert mask[:length].all() and not any(ids[length:])
            assert not stops & set(ids[: length - 1])
            assert bool(finished) == (ids[length - 1] in stops)
            assert finished or length == 40
            ended += bool(finished)
    assert 0 < ended < sum(len(group.finished) for group in groups)


def test_banned_ids_are_never_drawn(bench):
    banned = [i for i in range(bench.policy.base.lm_head.weight.shape[0]) if i not in allowed_ids(bench.policy)]
    drawn = lambda: {i for group in bench.sample(Sampling(2.0), chosen=slice(0, 4), group_size=16, max_tokens=24) for i in group.completion_ids.unique().tolist()}
    assert not drawn() & set(banned)

    allowed, bench.engine.allowed = bench.engine.allowed, list(range(bench.policy.base.lm_head.weight.shape[0]))
    try:
        assert drawn() & set(banned)  # and would be otherwise
    finally:
        bench.engine.allowed = allowed


def test_tokens_are_as_frequent_as_reported(bench):
    "First tokens of many responses against the probabilities that came with them."
    n_responses = 1500
    group, = bench.sample(Sampling(2.0), chosen=slice(0, 1), group_size=n_responses, max_tokens=1)
    ids, logps = group.completion_ids[:, 0], group.sampled_logps[:, 0]
    chance = {int(i): float(logp.exp()) for i, logp in zip(ids, logps)}
    expected = torch.tensor([n_responses * p for p in chance.values() if n_responses * p >= 5])
    seen = torch.tensor([float((ids == i).sum()) for i, p in chance.items() if n_responses * p >= 5])
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    assert len(seen) > 15 and chi2 < len(seen) + 4 * (2 * len(seen)) ** 0.5


def test_a_prompt_that_is_too_long_is_refused_before_any_is_asked(bench):
    with pytest.raises(QuestionError, match=r"prompt 0 and a response of up to 1000 tokens have \d+, the engine keeps room for 1024"):
        bench.sample(max_tokens=1000)
    assert bench.gap().largest < BOUND  # nothing is left in the queue


@pytest.mark.parametrize("part", ["visual", "embed_tokens", "layers.0.self_attn", "layers.1.mlp", "norm"])
def test_an_update_of_any_part_arrives(bench, part):
    "What was reported before the load is wrong afterwards, and right again after it."
    shake(bench.policy, part)
    stale = bench.gap()
    assert stale.mean > 0.01, part
    bench.engine.load_weights(bench.policy)
    assert bench.gap().largest < BOUND, part
