"""What does not stop a run and is told: bad rows, questions that cannot be asked, few questions, equal rewards."""
import json
import re
import warnings
from dataclasses import replace

import pytest
import torch

from deepvideo_r1.config import AugmentConfig, ObjectiveConfig, PromptConfig, RolloutConfig, RunConfig, TrainConfig
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.data.rows import DataError
from deepvideo_r1.experiment import run_training
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.reward import score
from deepvideo_r1.trainer import SILENT_STEPS, Trainer, TrainingError, fit


@pytest.fixture
def questions(tiny_world):
    return load_samples(tiny_world / "rl.jsonl")


@pytest.fixture
def make_trainer(trained_model, tmp_path):
    "A trainer on the questions, with settings of a test."
    def make(questions, *, score=score, augment=AugmentConfig(), rollout=RolloutConfig(2, max_tokens=6),
             objective=ObjectiveConfig("grpo"), name="run", **train):
        settings = TrainConfig(**dict(steps=2, prompts_per_step=4, prompts_per_forward=4, max_bad_share=0.5) | train)
        return Trainer(load_policy(trained_model), load_processor(trained_model), questions, tmp_path / name,
                       prompt=PromptConfig("plain"), score=score, augment=augment, rollout=rollout,
                       objective=objective, train=settings)
    return make


def config_of(trained_model, data, out, **train) -> RunConfig:
    settings = dict(steps=1, prompts_per_step=2, prompts_per_forward=2, save_every=1) | train
    return RunConfig(str(trained_model), str(data), str(out), prompt=PromptConfig("plain"),
                     rollout=RolloutConfig(2, max_tokens=4), train=TrainConfig(**settings))


UNASKABLE = {
    "longer than the context": dict(question="word " * 40_000),
    "a special token in the text": dict(question="what is <|im_start|> here ?"),
}


@pytest.mark.parametrize("name", UNASKABLE)
def test_a_question_that_cannot_be_asked_is_counted_and_left_out(make_trainer, questions, name):
    mixed = [replace(sample, **UNASKABLE[name]) if i == 1 else sample for i, sample in enumerate(questions[:8])]
    trainer = make_trainer(mixed, prompts_per_step=8)
    row = trainer.step()
    assert (row["groups"], row["unaskable"], row["bad_clips"]) == (7, 1, 0)
    assert mixed[1].id in trainer.state.seen.causes()[0]

    restored = make_trainer(mixed)
    restored.state.load_state_dict(json.loads(json.dumps(trainer.state.state_dict())))
    assert restored.state.seen.unaskable == trainer.state.seen.unaskable


def test_too_many_of_them_stop_the_run(make_trainer, questions):
    mixed = [replace(sample, question="word " * 40_000) if i % 2 else sample for i, sample in enumerate(questions[:8])]
    with pytest.raises(TrainingError, match="questions cannot be asked, more than 10%"):
        make_trainer(mixed, prompts_per_step=8, max_bad_share=0.1).step()
    every = [replace(sample, question="word " * 40_000) for sample in questions[:4]]
    with pytest.raises(TrainingError, match="no question can be asked; the first is"):
        make_trainer(every, max_bad_share=1.0).step()


def test_a_hint_that_does_not_fit_leaves_the_group_as_it_was(make_trainer, questions):
    long = [replace(sample, meta=sample.meta | {"trace": "word. " * 40_000}) for sample in questions[:4]]
    always = AugmentConfig(enabled=True, hint_source="stored", min_groups=1, full_reward=2.0, dead_zone=0.0)
    trainer = make_trainer(long, augment=always)
    trainer.state.buffer.push(torch.full((1, 2), 9.0))  # so good a past that every group gets a hint
    row = trainer.step()
    assert row["groups"] == 4 and row["hint_groups"] == 0


def test_a_question_that_is_drawn_twice_has_responses_of_its_own(make_trainer, questions):
    trainer, asked = make_trainer(questions[:3], prompts_per_step=7, rollout=RolloutConfig(2, max_tokens=12)), []
    roll_out = trainer.roll_out
    trainer.roll_out = lambda *args: asked.extend(groups := roll_out(*args)) or groups
    trainer.step()
    assert len({group.sample.id for group in asked}) == 7
    by_question = {}
    for group in asked:
        by_question.setdefault(group.sample.question, set()).add(group.texts)
    assert any(len(texts) > 1 for texts in by_question.values())


def test_few_questions_are_said_at_the_start(trained_model, tiny_world, tmp_path):
    (tmp_path / "one.jsonl").write_text((tiny_world / "rl.jsonl").read_text().splitlines()[0] + "\n")
    config = replace(config_of(trained_model, tmp_path / "one.jsonl", tmp_path / "run"), root=str(tiny_world))
    with pytest.warns(UserWarning, match="a step holds 2 prompts and .*one.jsonl has 1 questions"):
        run_training(config)


def test_bad_rows_are_left_out_and_strict_stops(trained_model, tiny_world, tmp_path):
    lines = (tiny_world / "rl.jsonl").read_text().splitlines()[:4]
    (tmp_path / "mixed.jsonl").write_text("\n".join([lines[0], '{"question": 3}', *lines[1:], "{"]) + "\n")
    config = replace(config_of(trained_model, tmp_path / "mixed.jsonl", tmp_path / "run"), root=str(tiny_world))
    started = []
    trainer = run_training(config, on_start=started.append)
    assert started == [trainer] and len(trainer.samples) == 4
    places = [re.search(r"mixed.jsonl, line (\d+)", str(problem))[1] for problem in trainer.samples.problems]
    assert places == ["2", "6"]
    with pytest.raises(DataError, match="mixed.jsonl, line 2"):
        run_training(replace(config, strict=True, out=str(tmp_path / "strict")))


def test_equal_rewards_are_told_once_and_at_the_end(make_trainer, questions):
    nothing = lambda group: replace(score(group), rewards=torch.zeros(2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(make_trainer(questions[:4], score=nothing, steps=SILENT_STEPS + 2, prompts_per_step=1, save_every=50,
                         rollout=RolloutConfig(2, max_tokens=2)))
    told = [str(warning.message) for warning in caught if "advantage" in str(warning.message)]
    assert len(told) == 2
    assert f"no group of the last {SILENT_STEPS} steps" in told[0] and "right form" in told[0] and "Two of them" in told[0]
    assert f"in its last {SILENT_STEPS + 2} steps" in told[1]


def test_a_run_that_learns_is_not_told(make_trainer, questions):
    length = lambda group: replace(score(group), rewards=group.completion_ids.float().mean(-1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*advantage")
        fit(make_trainer(questions[:4], score=length))


@pytest.mark.parametrize("objective", ["grpo", "reg_grpo", "reinforce", "rloo"])
def test_a_mean_over_tokens_does_not_depend_on_the_passes(make_trainer, questions, objective):
    def gradients(prompts_per_forward):
        trainer = make_trainer(questions[:5], prompts_per_step=5, prompts_per_forward=prompts_per_forward,
                               name=f"by-{prompts_per_forward}", rollout=RolloutConfig(3, max_tokens=24),
                               objective=ObjectiveConfig(objective, kl_coef=0.1, length_norm="token"), max_grad_norm=1e9)
        trainer.step()
        return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])

    whole = gradients(5)
    assert whole.norm() > 0
    for size in (1, 2, 3):
        assert float((gradients(size) - whole).norm() / whole.norm()) < 1e-4
