"""The training loop: resuming, torn checkpoints, NaN, bad clips, seeds, and a batch that teaches nothing."""
import copy
import functools
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from deepvideo_r1 import trainer as trainer_module
from deepvideo_r1.baselines import OBJECTIVES
from deepvideo_r1.config import AugmentConfig, ObjectiveConfig, PromptConfig, RolloutConfig, TrainConfig
from deepvideo_r1.data import clip_cache
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.model.policy import load_policy, rollout_batch
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.reward import score
from deepvideo_r1.support.checkpoint import publish_checkpoint, whole_checkpoints
from deepvideo_r1.support.clock import repeatable
from deepvideo_r1.support.files import read_jsonl
from deepvideo_r1.support.interrupts import Stopped
from deepvideo_r1.trainer import Trainer, TrainingError, fit, load_checkpoint
from deepvideo_r1.training.feed import step_indices

AUGMENT = AugmentConfig(enabled=True, min_groups=4, window=10, hint_as="prefix", hint_source="stored")
TRAIN = TrainConfig(steps=6, prompts_per_step=4, prompts_per_forward=2, inner_updates=2, learning_rate=1e-3,
                    warmup_steps=3, save_every=2)


@pytest.fixture
def make_trainer(trained_model, tiny_world):
    "A function that makes a trainer for a directory; `train` and `rollout` are changes of the settings."
    def make(directory, *, samples=None, lora_rank=0, objective=ObjectiveConfig(), augment=AUGMENT,
             prompt=PromptConfig("plain"), rollout=RolloutConfig(3, max_tokens=24), score=score, **train):
        return Trainer(
            load_policy(trained_model, lora_rank=lora_rank), load_processor(trained_model),
            samples or load_samples(tiny_world / "rl.jsonl"), directory, train=replace(TRAIN, **train),
            prompt=prompt, rollout=rollout, objective=objective, augment=augment, score=score,
            accelerator=Accelerator(cpu=True))

    return make


def figures(rows):
    return [repeatable(row) for row in rows]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop_at(step, signal_number=signal.SIGINT):
    "A reaction to metrics that sends this process a signal after a step."
    def on_step(row):
        if row["step"] == step:
            os.kill(os.getpid(), signal_number)

    return on_step


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(row):
        if row["step"] == step:
            raise Crash

    return on_step


# --- resuming -----------------------------------------------------------------------------------------------------

RUNS = {
    "reg_grpo": dict(),
    "grpo with adapters": dict(objective=ObjectiveConfig("grpo", kl_coef=0.04), lora_rank=4),
    "sampled hints in the prompt, short buffer": dict(
        augment=replace(AUGMENT, hint_source="sampled", hint_as="prompt", window=6)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path, run):
    whole = make_trainer(tmp_path / "whole", **RUNS[run])
    start = weights(whole)
    rows = fit(whole)
    assert not same(weights(whole), start) and len({row["reward_mean"] for row in rows}) > 1
    assert sum(row["noise_groups"] + row["hint_groups"] for row in rows) > 0

    with pytest.raises(Stopped, match="stopped after 3 steps; the same command continues"):
        fit(make_trainer(tmp_path / "parts", **RUNS[run]), on_step=stop_at(1))  # after step 2, which nothing else saves
    with pytest.raises(Stopped, match="stopped after 5 steps"):
        fit(make_trainer(tmp_path / "parts", **RUNS[run]), on_step=stop_at(3, signal.SIGTERM))
    with pytest.raises(Crash):  # step 5 is in the metrics, but in no checkpoint
        fit(make_trainer(tmp_path / "parts", **RUNS[run]), on_step=crash_at(5))
    last = make_trainer(tmp_path / "parts", **RUNS[run])
    assert figures(fit(last)) == figures(rows) == figures(read_jsonl(tmp_path / "parts/metrics.jsonl"))
    assert same(weights(last), weights(whole))
    assert last.state.buffer.state_dict() == whole.state.buffer.state_dict() and len(whole.state.buffer) > 0
    for one, other in zip(*(trainer.learner.optimizer.state_dict()["state"].values() for trainer in (last, whole))):
        assert torch.equal(one["exp_avg"], other["exp_avg"]) and torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])


def cut_short(path):
    with open(path / "state-00000.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 100)


DAMAGE = {
    "a file cut short": cut_short,
    "a file missing": lambda path: (path / "state.json").unlink(),
    "no manifest": lambda path: (path / "MANIFEST.json").unlink(),
    "a manifest cut short": lambda path: (path / "MANIFEST.json").write_text('{"model.safe'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_checkpoint_is_passed_over(make_trainer, tmp_path, damage):
    whole = make_trainer(tmp_path)
    rows = fit(whole)
    checkpoints = whole_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-000004", "step-000006"]
    DAMAGE[damage](checkpoints[-1])
    (tmp_path / "checkpoints/.aside").mkdir()  # what a crash while saving leaves behind
    (tmp_path / "checkpoints/.aside/state-00000.safetensors").write_bytes(b"half")
    again = make_trainer(tmp_path)
    assert load_checkpoint(again) and again.state.next_step == 4
    assert figures(fit(again)) == figures(rows) and same(weights(again), weights(whole))
    assert [path.name for path in whole_checkpoints(tmp_path / "checkpoints")] == ["step-000004", "step-000006"]


def test_a_finished_run_stays_as_it_is(make_trainer, tmp_path):
    rows = fit(make_trainer(tmp_path, steps=2))
    before = (tmp_path / "metrics.jsonl").read_text()
    assert fit(make_trainer(tmp_path, steps=2)) == rows and (tmp_path / "metrics.jsonl").read_text() == before


def test_a_checkpoint_with_other_weights_is_not_used(make_trainer, tmp_path):
    fit(make_trainer(tmp_path, steps=2))
    newest = whole_checkpoints(tmp_path / "checkpoints")[-1]
    index = json.loads((newest / "state.json").read_text())
    index.pop(next(iter(index)))
    (newest / "state.json").write_text(json.dumps(index))
    (newest / "MANIFEST.json").unlink()
    publish_checkpoint(newest.rename(tmp_path / "aside"), newest, 2)
    with pytest.raises(TrainingError, match="cannot be loaded here .*holds other trained weights than this run: 1 differ"):
        fit(make_trainer(tmp_path, steps=2))
    assert newest.is_dir()  # it stays as it is


def test_a_lack_of_memory_is_no_damage(make_trainer, tmp_path, monkeypatch):
    fit(make_trainer(tmp_path, steps=2))
    monkeypatch.setattr(trainer_module, "load_state", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(TrainingError, match="is whole and cannot be loaded here .OutOfMemoryError: no room"):
        fit(make_trainer(tmp_path, steps=4))
    monkeypatch.undo()
    assert len(fit(make_trainer(tmp_path, steps=4))) == 4


def test_the_seed_decides_everything(make_trainer, tmp_path):
    one, same_seed, other = (fit(make_trainer(tmp_path / name, steps=2, seed=seed))
                             for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert figures(one) == figures(same_seed) and figures(one) != figures(other)


@settings(max_examples=60, deadline=None)
@given(n_samples=st.integers(1, 30), prompts_per_step=st.integers(1, 12), seed=st.integers(0, 5))
def test_steps_walk_through_permutations(n_samples, prompts_per_step, seed):
    walked = [i for step in range(3 * n_samples) for i in step_indices(n_samples, step, prompts_per_step, seed)]
    for start in range(0, len(walked) - n_samples + 1, n_samples):
        assert sorted(walked[start : start + n_samples]) == list(range(n_samples))


def test_difficulty_compares_with_the_past_alone(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, augment=AugmentConfig(min_groups=1))
    assert trainer.step()["difficulty_abs"] == 0.0
    before = trainer.state.buffer.mean
    row = trainer.step()
    means = list(trainer.state.buffer.means)[4:]
    assert len(means) == 4 and len(set(means)) > 1
    assert row["difficulty_abs"] == pytest.approx(sum(abs(before - mean) for mean in means) / 4, abs=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_reference_stays_where_the_run_began(make_trainer, trained_model, tmp_path, lora_rank):
    trainer = make_trainer(tmp_path, lora_rank=lora_rank, steps=3, augment=AugmentConfig())
    groups, roll_out = [], trainer.roll_out
    trainer.roll_out = lambda *args: (groups.clear(), groups.extend(roll_out(*args)), groups)[-1]
    rows = [trainer.step() for _ in range(3)]
    assert [row["kl"] > 1e-4 for row in rows] == [True] * 3  # of the second update, when the policy has moved
    batch = rollout_batch(trainer.policy, groups)
    with torch.no_grad():
        start, now = load_policy(trained_model)(batch), trainer.policy(batch)
        torch.testing.assert_close(trainer.learner.reference.logps(batch, trainer.learner.model, trainer.policy), start, atol=2e-5, rtol=0)
        assert (now - start).abs().max() > 0.01


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_dpo_alone_samples_from_the_reference(make_trainer, tmp_path, name, lora_rank):
    trainer = make_trainer(tmp_path, objective=ObjectiveConfig(name, kl_coef=0.0), augment=AugmentConfig(), lora_rank=lora_rank)
    start, samples = weights(trainer), trainer.samples[:3]
    prompts = [trainer.ask(sample, trainer.feed.visuals(i)) for i, sample in enumerate(samples)]
    before = trainer.roll_out(samples, prompts, "same stream")
    rows = [trainer.step() for _ in range(2)]
    assert not same(weights(trainer), start) and all(row["grad_norm"] > 0 for row in rows)
    for parameter in trainer.policy.parameters():
        parameter.data += 0.3 * parameter.requires_grad  # now the policy is far from where it began, and the reference is not
    after = trainer.roll_out(samples, prompts, "same stream")
    unchanged = all(torch.equal(a.completion_ids, b.completion_ids) for a, b in zip(before, after))
    assert unchanged == (name == "dpo")
    assert (trainer.learner.reference.frozen is not None) == (name in ("dpo", "online_dpo") and lora_rank == 0)


def test_an_objective_has_its_own_kl_weight(make_trainer, tmp_path):
    def kl_weight(objective):
        trainer = make_trainer(tmp_path / f"{objective}", objective=objective, augment=AugmentConfig(), inner_updates=1)
        trainer.step()
        row = trainer.step()  # the policy has left its reference
        return (row["loss"] - row["policy_loss" if objective.name == "grpo" else "regression_loss"]) / row["kl"]

    for name, own in (("grpo", 0.04), ("reg_grpo", 1.0)):
        assert kl_weight(ObjectiveConfig(name)) == pytest.approx(own, rel=0.02)
        assert kl_weight(ObjectiveConfig(name, kl_coef=0.5)) == pytest.approx(0.5, rel=0.02)


def test_the_number_of_groups_in_a_forward_pass_changes_nothing(make_trainer, tmp_path):
    rows = [make_trainer(tmp_path, augment=AugmentConfig(), prompts_per_forward=n).step() for n in (1, 3, 4)]
    for row in figures(rows[1:]):
        assert row == pytest.approx(figures(rows)[0], rel=1e-4, abs=1e-6)


# --- the encoder and the clips are paid for once -------------------------------------------------------------------


def count_patches(trainer) -> list[int]:
    "A list that grows by the number of patches at every call of an encoder, the policy's or the reference's."
    seen = []
    for policy in (trainer.policy, trainer.learner.reference.frozen):
        if policy is not None:
            policy.base.model.visual.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return seen


def visited_patches(trainer, step) -> int:
    indices = step_indices(len(trainer.samples), step, trainer.config.train.prompts_per_step, trainer.config.train.seed)
    return sum(len(trainer.ask(trainer.samples[i], trainer.feed.visuals(i)).patches) for i in indices)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("source, place", [("stored", "prefix"), ("stored", "prompt"), ("sampled", "prefix")])
def test_a_step_with_hints_encodes_each_video_once(make_trainer, tmp_path, monkeypatch, source, place, lora_rank):
    monkeypatch.setattr("deepvideo_r1.augment.best_trace", lambda rollout, *, full_reward: rollout.sample.meta["trace"])
    trainer = make_trainer(tmp_path, lora_rank=lora_rank, objective=ObjectiveConfig("grpo", kl_coef=0.04), inner_updates=3,
                           augment=AugmentConfig(enabled=True, second_group="always", keep_first=True, hint_as=place, hint_source=source))
    monkeypatch.setattr(trainer_module, "measure_difficulty", lambda *args: 1.0)  # every group is hard and gets a hint
    asked, scored = [], []
    roll_out, reference = trainer.roll_out, trainer.learner.reference.logps
    trainer.roll_out = lambda samples, prompts, stream, *others: (asked.append(stream), roll_out(samples, prompts, stream, *others))[1]
    trainer.learner.reference.logps = lambda batch, *others: (scored.append(len(batch.prompt_ids)), reference(batch, *others))[1]
    seen = count_patches(trainer)
    for step in range(2):
        row = trainer.step()
        assert row["hint_groups"] == 4 and sum(scored) == 8  # the first groups are trained on as well, against the reference
        assert asked == [f"rollout-{step}", *([f"trace-{step}"] if source == "sampled" else []), f"augmented-{step}"]
        assert sum(seen) == visited_patches(trainer, step) > 0
        for record in (asked, scored, seen):
            record.clear()


def test_noise_is_encoded_again_and_a_second_draw_is_not(make_trainer, tmp_path, monkeypatch):
    for name, augment, times in (("noise", AugmentConfig(enabled=True, second_group="always"), 2),
                                 ("redraw", AugmentConfig(enabled=True, second_group="always", redraw_only=True), 1)):
        trainer = make_trainer(tmp_path / name, augment=augment)
        monkeypatch.setattr(trainer_module, "measure_difficulty", lambda *args: -1.0)
        seen = count_patches(trainer)
        assert trainer.step()[f"{name}_groups"] == 4 and sum(seen) == times * visited_patches(trainer, 0)


def test_a_cache_of_clips_changes_nothing(make_trainer, tmp_path, monkeypatch):
    read = []
    real = clip_cache.load_visuals
    plain = make_trainer(tmp_path / "plain", steps=4)
    rows = fit(plain)

    @functools.wraps(real)
    def counted(sample, *args, **settings):
        read.append(sample.video)
        return real(sample, *args, **settings)

    monkeypatch.setattr(clip_cache, "load_visuals", counted)
    with_cache = PromptConfig("plain", cache_dir=str(tmp_path / "clips"))
    first = make_trainer(tmp_path / "first", steps=4, prompt=with_cache)
    assert figures(fit(first)) == figures(rows) and same(weights(first), weights(plain))
    assert len(read) == len(set(read)) > 0  # questions about one video share its clip
    read.clear()
    second = make_trainer(tmp_path / "second", steps=4, prompt=with_cache)
    assert figures(fit(second)) == figures(rows) and same(weights(second), weights(plain)) and read == []
    fit(make_trainer(tmp_path / "parts", steps=2))  # begun without a cache, continued with one too small for a clip
    tight = make_trainer(tmp_path / "parts", steps=4, prompt=PromptConfig("plain", cache_dir=str(tmp_path / "tight"), cache_gb=1e-9))
    assert figures(fit(tight)) == figures(rows) and same(weights(tight), weights(plain))
    assert list((tmp_path / "tight").iterdir()) == []


def test_the_sampling_settings_reach_the_sampler(make_trainer, tmp_path):
    def groups(**changes):
        trainer = make_trainer(tmp_path, rollout=RolloutConfig(4, max_tokens=12, **changes))
        samples = trainer.samples[:3]
        return trainer.roll_out(samples, [trainer.ask(s, trainer.feed.visuals(i)) for i, s in enumerate(samples)], "stream")

    free, greedy, cut = groups(), groups(top_k=1), groups(top_p=0.3)
    assert any(len(set(r.texts)) > 1 for r in free) and all(len(set(r.texts)) == 1 for r in greedy)
    assert not any(r.sampled_logps.any() for r in greedy) and all(len(r.texts) == 4 for r in cut)
    assert [r.texts for r in cut] != [r.texts for r in free]
    assert [r.texts for r in groups(batch_rows=4)] == [r.texts for r in free] != [r.texts for r in groups(temperature=0.5)]
    for name, value in {"top_k": -1, "top_p": 0.0, "batch_rows": 0, "temperature": math.nan, "max_tokens": 0}.items():
        with pytest.raises(ValueError, match=f"rollout.{name} must be"):
            RolloutConfig(**{name: value})


def test_training_on_cut_rollouts_starts_at_a_ratio_of_one(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, rollout=RolloutConfig(3, max_tokens=24, top_k=20, top_p=0.8), inner_updates=1,
                           objective=ObjectiveConfig("grpo", kl_coef=0.04))
    row = trainer.step()
    assert row["clip_fraction"] == 0 and abs(row["kl"]) < 1e-6 and row["grad_norm"] > 0


def test_sampler_and_scorer_agree_and_the_gap_is_logged(make_trainer, tmp_path):
    for row in fit(make_trainer(tmp_path, steps=2)):
        assert 0 <= row["sampler_gap"] <= row["sampler_gap_max"] < 1e-4 and 0 <= row["sampler_kl"] < 1e-8


def test_the_gap_is_that_of_the_tokens_in_the_update(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, augment=AugmentConfig(), rollout=RolloutConfig(3, max_tokens=24, top_k=3))
    roll_out, groups = trainer.roll_out, []
    trainer.roll_out = lambda *args: (groups.extend(roll_out(*args)), groups)[-1]
    before = copy.deepcopy(trainer.policy)
    row = trainer.step()
    with torch.no_grad():
        gaps = torch.cat([(before(rollout_batch(before, [g]))[0] - g.sampled_logps)[g.completion_mask] for g in groups])
    assert row["sampler_gap"] == pytest.approx(float(gaps.abs().mean()), rel=1e-4) and row["sampler_gap"] > 0.01
    assert row["sampler_gap_max"] == pytest.approx(float(gaps.abs().max()), rel=1e-4)
    assert row["sampler_kl"] == pytest.approx(float((gaps.exp() - 1 - gaps).mean()), rel=1e-3)


@pytest.mark.filterwarnings("error:sampler and scoring pass")
def test_a_run_whose_gap_is_too_large_is_told_once(make_trainer, tmp_path):
    cut = dict(rollout=RolloutConfig(3, max_tokens=24, top_k=2), max_sampler_gap=1e-3, steps=4)
    with pytest.warns(UserWarning, match=r"differ by .* nats per token, more than train.max_sampler_gap \(0.001\)") as told:
        with pytest.raises(Stopped):
            fit(make_trainer(tmp_path / "cut", **cut), on_step=stop_at(1))
    assert len([w for w in told if "max_sampler_gap" in str(w.message)]) == 1
    fit(make_trainer(tmp_path / "cut", **cut))  # continued: nothing more is said
    fit(make_trainer(tmp_path / "all", max_sampler_gap=1e-3, steps=1))  # all tokens may be drawn: nothing to say
    reference = ObjectiveConfig("dpo", kl_coef=0.0)
    fit(make_trainer(tmp_path / "dpo", objective=reference, max_sampler_gap=1e-6, steps=2))  # sampled from another policy by design


# --- what stops a run ---------------------------------------------------------------------------------------------


def poison(trainer, step):
    "A reaction that makes one weight NaN after a step."
    def on_step(row):
        if row["step"] == step:
            with torch.no_grad():
                next(p for p in trainer.policy.parameters() if p.requires_grad).view(-1)[7] = float("nan")

    return on_step


def test_a_nan_stops_the_run_and_the_last_checkpoint_stays(make_trainer, tmp_path):
    whole = fit(make_trainer(tmp_path / "whole"))
    sick = make_trainer(tmp_path / "sick")
    with pytest.raises(TrainingError, match=r"step 3: \w+ is nan.*what was saved is intact"):
        fit(sick, on_step=poison(sick, 2))
    assert [path.name for path in whole_checkpoints(tmp_path / "sick/checkpoints")] == ["step-000002"]
    assert len(read_jsonl(tmp_path / "sick/metrics.jsonl")) == 3
    assert figures(fit(make_trainer(tmp_path / "sick"))) == figures(whole)


def test_a_nan_loss_is_found_before_the_update(make_trainer, tmp_path, monkeypatch):
    real = OBJECTIVES["reg_grpo"]

    @functools.wraps(real)
    def broken(*args, **knobs):
        return real(*args, **knobs)[0] * float("nan"), {}

    monkeypatch.setitem(OBJECTIVES, "reg_grpo", broken)
    trainer = make_trainer(tmp_path)
    before = weights(trainer)
    with pytest.raises(TrainingError, match="step 0: grad_norm is nan before update 0"):
        trainer.step()
    assert same(weights(trainer), before)


def with_bad_clips(tiny_world, tmp_path, n_bad):
    "24 questions, of which some have a clip that is missing or no video."
    samples = load_samples(tiny_world / "rl.jsonl")
    samples += [replace(sample, id=f"{sample.id}-again") for sample in samples]
    (tmp_path / "text.mp4").write_text("not a film")
    for i in range(n_bad):
        samples[5 * i + 2] = replace(samples[5 * i + 2], video=str(tmp_path / ("text.mp4" if i else "gone.mp4")))
    return samples


def test_a_bad_clip_is_counted_and_skipped(make_trainer, tiny_world, tmp_path):
    samples = with_bad_clips(tiny_world, tmp_path, 1)
    trainer = make_trainer(tmp_path, samples=samples, prompts_per_step=6, steps=8)
    rows = fit(trainer)
    met = [2 in step_indices(24, step, 6, 0) for step in range(8)]
    assert sum(met) == 2  # once in each epoch
    assert [row["groups"] for row in rows] == [6 - bad for bad in met]
    assert [row["bad_clips"] for row in rows] == [int(any(met[: i + 1])) for i in range(8)]
    assert trainer.state.seen.bad == {2: f"{tmp_path}/gone.mp4: no such file"}
    again = make_trainer(tmp_path, samples=samples, prompts_per_step=6, steps=8)
    assert load_checkpoint(again) and again.state.seen.bad == trainer.state.seen.bad


def test_too_many_bad_clips_stop_the_run(make_trainer, tiny_world, tmp_path):
    trainer = make_trainer(tmp_path, samples=with_bad_clips(tiny_world, tmp_path, 2), prompts_per_step=24)
    before = weights(trainer)
    with pytest.raises(TrainingError, match=r"step 0: 2 of 24 clips cannot be read, more than 5%; the first is .*mp4"):
        trainer.step()
    assert same(weights(trainer), before)
    patient = make_trainer(tmp_path / "patient", samples=with_bad_clips(tiny_world, tmp_path, 2), prompts_per_step=24,
                           max_bad_share=0.1)
    assert patient.step()["groups"] == 22


# --- a batch that teaches nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["reg_grpo", "grpo"])
def test_equal_rewards_leave_the_weights_alone(make_trainer, tmp_path, objective):
    ones = torch.ones(3)
    equal = lambda rollout: replace(rollout, rewards=ones, reward_parts={"format": ones, "accuracy": 0 * ones})
    trainer = make_trainer(tmp_path, score=equal, objective=ObjectiveConfig(objective, kl_coef=0.0), augment=AugmentConfig())
    before = weights(trainer)
    row = trainer.step()
    assert row["vanishing_original"] == row["vanishing_final"] == row["vanishing_update"] == 1.0 and row["grad_norm"] == 0.0
    gradients = [p.grad for p in trainer.policy.parameters() if p.requires_grad]
    assert all(grad is not None and not grad.any() for grad in gradients)
    assert same(weights(trainer), before)
    assert trainer.learner.reference.frozen is None  # none is kept where no KL is asked for


def test_metrics_are_plain_numbers(make_trainer, tmp_path):
    row = make_trainer(tmp_path).step()
    assert json.loads(json.dumps(row)) == row and all(isinstance(value, (int, float)) for value in row.values())
