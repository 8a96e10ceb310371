"""The training loop: resuming, torn checkpoints, NaN, bad clips, seeds, and a batch that teaches nothing."""
import functools
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from deepvideo_r1 import trainer as trainer_module
from deepvideo_r1.augment import AugmentConfig
from deepvideo_r1.baselines import OBJECTIVES
from deepvideo_r1.checkpoint import Stopped, read_metrics, whole_checkpoints
from deepvideo_r1.config import ObjectiveConfig, PromptConfig, RolloutConfig, TrainConfig
from deepvideo_r1.datasets import load_samples
from deepvideo_r1.policy import load_policy, rollout_batch
from deepvideo_r1.prompt import load_processor
from deepvideo_r1.trainer import Trainer, TrainingError, fit, load_checkpoint, step_indices

AUGMENT = AugmentConfig(enabled=True, min_samples=4, window=10, hint_as="prefix", hint_source="stored")
TRAIN = TrainConfig(steps=6, prompts_per_step=4, prompts_per_forward=2, inner_updates=2, learning_rate=1e-3,
                    warmup_steps=3, save_every=2)


@pytest.fixture
def make_trainer(trained_model, tiny_world):
    "A function that makes a trainer for a directory; `train` and `rollout` are changes of the settings."
    def make(directory, *, samples=None, lora_rank=0, objective=ObjectiveConfig(), augment=AUGMENT, **train):
        return Trainer(
            load_policy(trained_model, lora_rank=lora_rank), load_processor(trained_model),
            samples or load_samples(tiny_world / "rl.jsonl"), directory, train=replace(TRAIN, **train),
            prompt=PromptConfig("plain"), rollout=RolloutConfig(3, max_tokens=24), objective=objective, augment=augment,
            accelerator=Accelerator(cpu=True))

    return make


def figures(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


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

    with pytest.raises(Stopped, match="stopped after step 3; the same command continues"):
        fit(make_trainer(tmp_path / "parts", **RUNS[run]), on_step=stop_at(1))  # after step 2, which nothing else saves
    with pytest.raises(Stopped, match="stopped after step 5"):
        fit(make_trainer(tmp_path / "parts", **RUNS[run]), on_step=stop_at(3, signal.SIGTERM))
    with pytest.raises(Crash):  # step 5 is in the metrics, but in no checkpoint
        fit(make_trainer(tmp_path / "parts", **RUNS[run]), on_step=crash_at(5))
    last = make_trainer(tmp_path / "parts", **RUNS[run])
    assert figures(fit(last)) == figures(rows) == figures(read_metrics(tmp_path / "parts/metrics.jsonl"))
    assert same(weights(last), weights(whole))
    assert last.buffer.state_dict() == whole.buffer.state_dict() and len(whole.buffer) > 0
    for one, other in zip(*(trainer.optimizer.state_dict()["state"].values() for trainer in (last, whole))):
        assert torch.equal(one["exp_avg"], other["exp_avg"]) and torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])


def cut_short(path):
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 100)


DAMAGE = {
    "a file cut short": cut_short,
    "a file missing": lambda path: next(path.glob("random_states*")).unlink(),
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
    (tmp_path / "checkpoints/.aside/model.safetensors").write_bytes(b"half")
    again = make_trainer(tmp_path)
    assert load_checkpoint(again) and again.next_step == 4
    assert figures(fit(again)) == figures(rows) and same(weights(again), weights(whole))
    assert [path.name for path in whole_checkpoints(tmp_path / "checkpoints")] == ["step-000004", "step-000006"]


def test_a_finished_run_stays_as_it_is(make_trainer, tmp_path):
    rows = fit(make_trainer(tmp_path, steps=2))
    before = (tmp_path / "metrics.jsonl").read_text()
    assert fit(make_trainer(tmp_path, steps=2)) == rows and (tmp_path / "metrics.jsonl").read_text() == before


def test_another_number_of_processes_is_refused(make_trainer, tmp_path):
    fit(make_trainer(tmp_path, steps=2))
    state = whole_checkpoints(tmp_path / "checkpoints")[-1] / "trainer.json"
    state.write_text(state.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ValueError, match="was saved by 2 processes, this run has 1"):
        fit(make_trainer(tmp_path, steps=4))


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
    trainer = make_trainer(tmp_path, augment=AugmentConfig(min_samples=1))
    assert trainer.step()["difficulty_abs"] == 0.0
    before = trainer.buffer.mean
    row = trainer.step()
    means = list(trainer.buffer.means)[4:]
    assert len(means) == 4 and len(set(means)) > 1
    assert row["difficulty_abs"] == pytest.approx(sum(abs(before - mean) for mean in means) / 4, abs=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_reference_stays_where_the_run_began(make_trainer, trained_model, tmp_path, lora_rank):
    trainer = make_trainer(tmp_path, lora_rank=lora_rank, steps=3, augment=AugmentConfig())
    groups, sample = [], trainer.sample
    trainer.sample = lambda *args, **how: (groups.clear(), groups.extend(sample(*args, **how)), groups)[-1]
    rows = [trainer.step() for _ in range(3)]
    assert [row["kl"] > 1e-4 for row in rows] == [True] * 3  # of the second update, when the policy has moved
    batch = rollout_batch(trainer.policy, groups)
    with torch.no_grad():
        start, now = load_policy(trained_model)(batch), trainer.policy(batch)
        torch.testing.assert_close(trainer._reference_logps(batch), start, atol=2e-5, rtol=0)
        assert (now - start).abs().max() > 0.01


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_and_dpo_alone_samples_from_the_reference(make_trainer, tmp_path, name, lora_rank):
    trainer = make_trainer(tmp_path, objective=ObjectiveConfig(name, kl_coef=0.0), augment=AugmentConfig(), lora_rank=lora_rank)
    start, samples = weights(trainer), trainer.samples[:3]
    prompts = [trainer.ask(sample, trainer.visuals(i)) for i, sample in enumerate(samples)]
    before = trainer.sample(samples, prompts, "same stream")
    rows = [trainer.step() for _ in range(2)]
    assert not same(weights(trainer), start) and all(row["grad_norm"] > 0 for row in rows)
    for parameter in trainer.policy.parameters():
        parameter.data += 0.3 * parameter.requires_grad  # now the policy is far from where it began, and the reference is not
    after = trainer.sample(samples, prompts, "same stream")
    unchanged = all(torch.equal(a.completion_ids, b.completion_ids) for a, b in zip(before, after))
    assert unchanged == (name == "dpo")
    assert (trainer.reference is not None) == (name in ("dpo", "online_dpo") and lora_rank == 0)


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
    with pytest.raises(TrainingError, match=r"step 3: \w+ is nan.*the last checkpoint is intact"):
        fit(sick, on_step=poison(sick, 2))
    assert [path.name for path in whole_checkpoints(tmp_path / "sick/checkpoints")] == ["step-000002"]
    assert len(read_metrics(tmp_path / "sick/metrics.jsonl")) == 3
    assert figures(fit(make_trainer(tmp_path / "sick"))) == figures(whole)


def test_a_nan_loss_is_found_before_the_update(make_trainer, tmp_path, monkeypatch):
    real = trainer_module.OBJECTIVES["reg_grpo"]

    @functools.wraps(real)
    def broken(*args, **knobs):
        return real(*args, **knobs)[0] * float("nan"), {}

    monkeypatch.setitem(trainer_module.OBJECTIVES, "reg_grpo", broken)
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
    assert trainer.bad_clips == {2: f"{tmp_path}/gone.mp4: no such file"}
    again = make_trainer(tmp_path, samples=samples, prompts_per_step=6, steps=8)
    assert load_checkpoint(again) and again.bad_clips == trainer.bad_clips


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
def test_equal_rewards_leave_the_weights_alone(make_trainer, tmp_path, monkeypatch, objective):
    ones = torch.ones(3)
    monkeypatch.setattr(trainer_module, "score", lambda rollout: replace(
        rollout, rewards=ones, reward_parts={"format": ones, "accuracy": 0 * ones}))
    trainer = make_trainer(tmp_path, objective=ObjectiveConfig(objective, kl_coef=0.0), augment=AugmentConfig())
    before = weights(trainer)
    row = trainer.step()
    assert row["vanishing_original"] == row["vanishing_trained"] == 1.0 and row["grad_norm"] == 0.0
    gradients = [p.grad for p in trainer.policy.parameters() if p.requires_grad]
    assert all(grad is not None and not grad.any() for grad in gradients)
    assert same(weights(trainer), before)
    assert trainer.reference is None  # none is kept where no KL is asked for


def test_metrics_are_plain_numbers(make_trainer, tmp_path):
    row = make_trainer(tmp_path).step()
    assert json.loads(json.dumps(row)) == row and all(isinstance(value, (int, float)) for value in row.values())
