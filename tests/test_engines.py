"""Engines: the built-in loop against transformers and against itself in every form, and what a trainer asks of another engine."""
import dataclasses
import math

import pytest
import torch

from deepvideo_r1.config import (
    AugmentConfig, EngineConfig, ObjectiveConfig, PromptConfig, RolloutConfig, TrainConfig)
from deepvideo_r1.core import QuestionError, make_generator
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.data.visuals import load_visuals
from deepvideo_r1.model.batch import make_batch
from deepvideo_r1.model.decoding import CACHES, PromptCache, RowCache, complete, prompts_at_once, read_prompts, read_tokens
from deepvideo_r1.model.policy import group_logps, load_policy
from deepvideo_r1.model.prompt import build_prompt, load_processor
from deepvideo_r1.model.rollout import BuiltInEngine, Responses, awake, rescore, rollout_groups, stop_ids_of
from deepvideo_r1.model.sampling import Sampling
from deepvideo_r1.sampler_weights import sampler_weights
from deepvideo_r1.support.interrupts import TrainingError
from deepvideo_r1.trainer import Trainer, fit


@pytest.fixture(scope="module")
def asked(tiny_model, tiny_world):
    "A policy, its processor, and questions with prompts of different lengths: videos, two hints, and words alone."
    policy, processor = load_policy(tiny_model), load_processor(tiny_model)
    samples = load_samples(tiny_world / "rl.jsonl")[:4]
    visuals = [load_visuals(sample, processor) for sample in samples]
    prompts = [build_prompt(sample, shown, processor, template="plain") for sample, shown in zip(samples, visuals)]
    prompts[1] = build_prompt(samples[1], visuals[1], processor, template="plain", hint="the first second is red top-left")
    prompts[3] = build_prompt(samples[3], [], processor, template="plain")
    return policy, processor, samples, prompts


def draws(n_prompts: int, group_size: int, n_tokens: int, name: str = "draws") -> torch.Tensor:
    return torch.rand(n_prompts, group_size, n_tokens, generator=make_generator(name), dtype=torch.float64)


@pytest.mark.parametrize("leave_at", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cache", ["growing", "static"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_leave_change_no_response(asked, tiny_model, cache, leave_at, dtype):
    policy, _, _, prompts = asked if dtype == "float32" else (load_policy(tiny_model, dtype=dtype), *asked[1:])
    uniforms, how = draws(4, 5, 40), dict(stop_ids=list(range(25)))
    done = complete(policy, prompts, uniforms, cache=cache, leave_at=leave_at, **how)
    lengths = done.mask.sum(-1)
    assert lengths.min() < 5 and lengths.max() > 10, "the responses should end at different times"
    for b, prompt in enumerate(prompts):
        alone = complete(policy, [prompt], uniforms[b : b + 1], leave_at=0, **how)
        width = alone.ids.shape[-1]
        if dtype == "float32":
            assert torch.equal(alone.ids[0], done.ids[b, :, :width])
            assert torch.allclose(alone.logps[0], done.logps[b, :, :width], atol=2e-5)
        assert not done.mask[b, :, width:].any() or dtype == "bfloat16"
    ends = torch.isin(done.ids, torch.tensor(how["stop_ids"])) & done.mask
    assert (ends.sum(-1) <= 1).all() and (done.ids[~done.mask] == 0).all() and (done.logps[~done.mask] == 0).all()


@pytest.mark.parametrize("dtype, mean, largest", [("float32", 5e-6, 2e-5), ("bfloat16", 0.03, 0.15)])
def test_what_is_sampled_is_what_is_scored(asked, tiny_model, dtype, mean, largest):
    policy = load_policy(tiny_model, dtype=dtype)
    _, processor, samples, prompts = asked
    keys = [(0, i) for i in range(4)]
    for group in rollout_groups(policy, processor, samples, prompts, keys, group_size=6, max_tokens=40):
        gap = (group_logps(policy, group).detach() - group.sampled_logps)[group.completion_mask].abs()
        assert gap.mean() < mean and gap.max() < largest


def test_the_prompt_is_kept_once(asked):
    policy, _, _, prompts = asked
    sizes = {}
    for group_size in (2, 16):
        _, kept = read_prompts(policy, make_batch(policy, prompts[:1]))
        rows = RowCache(kept, group_size, 8, first_room=8)
        ids = torch.full((group_size,), 40)
        read_tokens(policy, rows, ids, ids)
        sizes[group_size] = rows.nbytes - kept.nbytes, kept.nbytes
    assert sizes[2][1] == sizes[16][1], "the prompt's keys and values do not depend on G"
    assert sizes[16][0] == 8 * sizes[2][0]


def test_rows_and_their_prompts_leave_the_memory(asked):
    policy, _, _, prompts = asked
    _, kept = read_prompts(policy, make_batch(policy, prompts))
    rows, before = RowCache(kept, 3, 4, first_room=4), kept.nbytes
    read_tokens(policy, rows, torch.full((12,), 40), torch.full((12,), 50))
    rows.advance()
    rows.keep(torch.tensor([3, 4, 9]))  # two of the second prompt, one of the last
    assert rows.n_prompts == 2 and rows.n_places == 2 and kept.nbytes == before // 2
    assert {keys.shape[:3] for keys, _ in rows.layers.values()} == {(2, 2, 2)}
    rows.keep(torch.tensor([2]))
    assert (rows.n_prompts, rows.n_places, rows.is_full) == (1, 1, True) and kept.nbytes == before // 4


def test_room_for_tokens_grows_to_the_longest_response_and_no_further(asked):
    policy, _, _, prompts = asked
    _, kept = read_prompts(policy, make_batch(policy, prompts[:1]))
    rows, rooms = RowCache(kept, 2, 11, first_room=3), []
    for t in range(11):
        read_tokens(policy, rows, torch.full((2,), 40), torch.full((2,), 50 + t))
        rows.advance()
        rooms.append(rows.layers[0][0].shape[3])
    assert rooms == [3, 3, 3, 6, 6, 6, 11, 11, 11, 11, 11]


def test_the_engine_cuts_prompts_by_rows_and_by_memory(asked, monkeypatch):
    import deepvideo_r1.model.rollout as module

    policy, processor, _, prompts = asked
    sizes, right = [], module.complete
    monkeypatch.setattr(module, "complete", lambda policy, some, *args, **how: sizes.append(len(some)) or right(
        policy, some, *args, **how))
    how = dict(group_size=4, max_tokens=6, stop_ids=stop_ids_of(policy, processor))
    keys, found = [(0, i) for i in range(4)], {}
    for rows, memory, expected in ((4, None, [1, 1, 1, 1]), (9, None, [2, 2]), (None, 10**12, [4]), (None, 1, [1, 1, 1, 1])):
        if memory:
            monkeypatch.setattr("deepvideo_r1.model.decoding.free_memory", lambda device: memory)
        sizes.clear()
        found[rows, memory] = BuiltInEngine(policy, batch_rows=rows).sample(prompts, keys, Sampling(), **how)
        assert sizes == expected
    first, *others = found.values()
    for other in others:
        for a, b in zip(first, other):
            width = int(a.mask.sum(-1).max())
            assert torch.equal(a.ids[:, :width], b.ids[:, :width])
    assert prompts_at_once(policy, 100, 4, 10, memory=10**12, most=8) == 8


def test_a_graph_is_refused_on_a_cpu(asked):
    policy, _, _, prompts = asked
    with pytest.raises(ValueError, match="cache is 'graph' on cpu; allowed are auto, growing, static"):
        complete(policy, prompts[:1], draws(1, 2, 4), stop_ids=[5], cache="graph")
    with pytest.raises(ValueError, match="cache is 'paged'"):
        complete(policy, prompts[:1], draws(1, 2, 4), stop_ids=[5], cache="paged")
    assert CACHES == dataclasses.fields(RolloutConfig)[-1].type.__args__


@pytest.mark.gpu
def test_a_graph_writes_what_the_growing_cache_writes(tiny_model, asked):
    policy = load_policy(tiny_model).to("cuda")
    _, _, _, prompts = asked
    how = dict(stop_ids=list(range(25)))
    wanted = complete(policy, prompts, draws(4, 5, 40), **how)
    for cache in ("static", "graph", "auto"):
        done = complete(policy, prompts, draws(4, 5, 40), cache=cache, **how)
        assert torch.equal(done.ids, wanted.ids) and torch.allclose(done.logps, wanted.logps, atol=1e-4)


# --- another engine beside a training run -----------------------------------------------------------------------------

class Elsewhere:
    "An engine with a policy of its own, which is read from the checkpoint and takes weights only when it is told."

    def __init__(self, path, *, shift: float = 0.0, deaf: bool = False):
        self.policy, self.shift, self.deaf, self.calls, self.asleep = load_policy(path).eval(), shift, deaf, [], True

    def sample(self, prompts, keys, sampling, **how):
        assert not self.asleep, "asked while asleep"
        self.calls.append(f"sample {len(prompts)}")
        how.pop("visual_features")
        groups = BuiltInEngine(self.policy).sample(prompts, keys, sampling, **how)
        return [Responses(group.ids, group.mask, group.logps + self.shift * group.mask) for group in groups]

    def load_weights(self, policy):
        self.calls.append("weights")
        if not self.deaf:
            self.policy.load_state_dict(policy.state_dict())

    def sleep(self):
        self.calls.append("sleep")
        self.asleep = True

    def wake(self):
        self.calls.append("wake")
        self.asleep = False


def even_ids(rollout):
    "A reward that differs within every group: the share of tokens whose id is even."
    mask = rollout.completion_mask
    return dataclasses.replace(rollout, rewards=((rollout.completion_ids % 2 == 0) & mask).sum(-1) / mask.sum(-1))


def make_trainer(path, world, directory, *, sampler=None, engine=EngineConfig(), steps=2, augment=False, **train) -> Trainer:
    augment = AugmentConfig(enabled=augment, min_groups=1, redraw_only=True, dead_zone=0.0)
    return Trainer(load_policy(path), load_processor(path), load_samples(world / "rl.jsonl"), directory, sampler=sampler,
                   engine=engine, train=TrainConfig(steps=steps, prompts_per_step=2, learning_rate=1e-3, warmup_steps=0,
                                                    workers=0, **train),
                   prompt=PromptConfig("plain"), rollout=RolloutConfig(4, max_tokens=20), augment=augment,
                   objective=ObjectiveConfig("grpo", kl_coef=0.1), score=even_ids)


def test_a_run_with_another_engine_is_the_run_with_the_built_in_one(trained_model, tiny_world, tmp_path):
    sampler = Elsewhere(trained_model)
    own = fit(make_trainer(trained_model, tiny_world, tmp_path / "own"))
    other = fit(make_trainer(trained_model, tiny_world, tmp_path / "other", sampler=sampler))
    assert sampler.calls == 2 * ["weights", "wake", "sample 2", "sleep"]
    for a, b in zip(own, other):
        assert a["reward_mean"] == b["reward_mean"] and a["completion_length"] == b["completion_length"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["sampler_gap"] < 1e-5
    assert other[0]["engine_gap"] < 1e-5 and "engine_gap" not in other[1], "the first step has a comparison, the second none"
    assert other[1]["kl"] > 0, "the policy should have moved, so that the weights of the second step are others"


def test_second_groups_come_from_the_engine_too_and_it_sleeps_while_the_policy_is_updated(trained_model, tiny_world, tmp_path):
    sampler = Elsewhere(trained_model)
    fit(make_trainer(trained_model, tiny_world, tmp_path, sampler=sampler, augment=True))
    assert sampler.calls == ["weights", "wake", "sample 2", "sleep", "weights", "wake", "sample 2", "sample 2", "sleep"]


def test_an_engine_with_old_weights_stops_the_run(trained_model, tiny_world, tmp_path):
    deaf = make_trainer(trained_model, tiny_world, tmp_path, sampler=Elsewhere(trained_model, deaf=True), steps=6,
                        engine=EngineConfig(check_every=3, max_gap=1e-3))
    with pytest.raises(TrainingError, match="step 3: .*max_gap is 0.001"):
        fit(deaf)
    assert deaf.state.next_step == 3
    assert deaf.sampler.calls[-1] == "sleep", "the engine is sent to sleep where a step fails"


def test_the_weight_of_the_scorer_over_the_sampler(trained_model, tiny_world, tmp_path):
    "An engine that reports half of each probability doubles every weight, and so the gradient."
    rows = {}
    for name, shift, weight in (("plain", 0.0, "none"), ("same", 0.0, "token"), ("half", -math.log(2), "token"),
                                ("ignored", -math.log(2), "none"), ("response", 0.0, "response")):
        engine = EngineConfig(weight=weight, max_weight=4.0, max_gap=10.0)
        trainer = make_trainer(trained_model, tiny_world, tmp_path / name, sampler=Elsewhere(trained_model, shift=shift),
                               engine=engine, steps=1, max_grad_norm=1e9, max_sampler_gap=10.0)
        rows[name], = fit(trainer)
    assert rows["plain"]["grad_norm"] > 0.01
    assert rows["same"]["grad_norm"] == pytest.approx(rows["plain"]["grad_norm"], rel=1e-3)
    assert rows["response"]["grad_norm"] == pytest.approx(rows["plain"]["grad_norm"], rel=1e-3)
    assert rows["ignored"]["grad_norm"] == pytest.approx(rows["plain"]["grad_norm"], rel=1e-3)
    assert rows["half"]["grad_norm"] == pytest.approx(2 * rows["plain"]["grad_norm"], rel=1e-3)
    assert rows["half"]["sampler_weight"] == pytest.approx(2, rel=1e-4) and rows["half"]["sampler_weight_cut"] == 0
    assert "sampler_weight" not in rows["plain"]


def test_weights_against_a_loop_in_plain_python():
    generator = make_generator("weights")
    old, sampled = (-3 * torch.rand(2, 3, 4, generator=generator) for _ in range(2))
    mask = torch.arange(4) < torch.tensor([[4, 2, 1], [3, 4, 4]])[..., None]
    for kind, cap in (("token", 1.5), ("response", 2.0), ("response", 1e9)):
        found = sampler_weights(old, sampled, mask, kind=kind, max_weight=cap)
        for b in range(2):
            for g in range(3):
                ratios = [math.exp(float(old[b, g, t] - sampled[b, g, t])) for t in range(4) if mask[b, g, t]]
                for t in range(4):
                    value = 1.0 if t >= len(ratios) else min(cap, ratios[t] if kind == "token" else math.prod(ratios))
                    assert float(found[b, g, t]) == pytest.approx(value, rel=1e-5)


def test_an_engine_is_sent_to_sleep_when_sampling_fails(asked, tiny_model):
    policy, sampler = asked[0], Elsewhere(tiny_model)
    with pytest.raises(QuestionError), awake(sampler, policy):
        raise QuestionError("too long")
    assert sampler.calls == ["weights", "wake", "sleep"]


def test_groups_of_another_engine_get_their_encoder_output_once(asked, tiny_model):
    policy, processor, samples, prompts = asked
    sampler = Elsewhere(tiny_model)
    sampler.wake()
    calls = []
    hook = policy.base.model.visual.register_forward_hook(lambda *_: calls.append(1))
    groups = rollout_groups(policy, processor, samples, prompts, [(i,) for i in range(4)], group_size=2, max_tokens=4,
                            engine=sampler)
    assert len(calls) == 3 and [group.visual_features is None for group in groups] == [False, False, False, True]
    for group in groups:
        rescore(policy, group)
    hook.remove()
    assert len(calls) == 3, "scoring asks the encoder again"


def test_prompts_that_see_padding_do_not_see_it(asked):
    policy, _, _, prompts = asked
    short, long = sorted(prompts[:2], key=lambda prompt: len(prompt.prompt_ids))
    alone, kept = read_prompts(policy, make_batch(policy, [short]))
    both, padded = read_prompts(policy, make_batch(policy, [short, long]))
    assert kept.padding is None and padded.padding is not None and isinstance(padded, PromptCache)
    assert torch.allclose(alone[0], both[0], atol=1e-5)
