"""A reward of one's own, from Python and from the command line: checked before training, and named when it is wrong."""
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from deepvideo_r1.config import AugmentConfig, ObjectiveConfig, PromptConfig, RewardConfig, RolloutConfig, RunConfig, TrainConfig
from deepvideo_r1.core import Prompt, Rollout, Sample
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.experiment import run_training
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.reward import CheckedReward, RewardError, load_reward, score, total_reward, try_reward
from deepvideo_r1.support.files import read_jsonl
from deepvideo_r1.support.identity import check_identity, source_hash
from deepvideo_r1.trainer import Trainer

SAMPLE = Sample(id="q", question="what ?", answer="x")
GOOD = """from dataclasses import replace

import torch


def score(rollout):
    length = torch.tensor([len(text) / 100 for text in rollout.texts])
    return replace(rollout, rewards=length, reward_parts={"length": length})
"""


def rollout(*texts):
    ids = torch.zeros(len(texts), 1, dtype=torch.long)
    return Rollout(SAMPLE, Prompt(ids[0]), ids, ids == 0, ids.float(), texts=texts)


@pytest.fixture
def settings(tiny_model, tiny_world, tmp_path):
    "A run of one step, without a reward."
    return RunConfig(str(tiny_model), str(tiny_world / "rl.jsonl"), str(tmp_path / "out"), prompt=PromptConfig("plain"),
                     rollout=RolloutConfig(2, max_tokens=4), train=TrainConfig(steps=1, prompts_per_step=2))


def test_the_weights_are_those_of_the_config():
    responses = rollout("<think>a</think><answer>x</answer>", "<answer>x</answer>", "no")
    assert score(responses).rewards.tolist() == [2.0, 1.0, 0.0]
    weights = RewardConfig(format_weight=0.25, accuracy_weight=3.0)
    expected = [total_reward(text, SAMPLE, format_weight=0.25, accuracy_weight=3.0)[0] for text in responses.texts]
    assert load_reward(weights)(responses).rewards.tolist() == expected == [3.25, 3.0, 0.0]


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_are_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match="reward.iou_weight must be (0 or more|a finite number), got"):
        RewardConfig(iou_weight=weight)


def test_a_file_and_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path / 'my_rewards.py'}:score", "my_rewards:score"):
        scored = load_reward(RewardConfig(function=name))(rollout("abc", ""))
        assert scored.rewards.tolist() == pytest.approx([0.03, 0.0]) and list(scored.reward_parts) == ["length"]


WRONG = {
    "raises": ("def score(rollout):\n    return rollout\n\n\ndef other(rollout):\n    return 1 / 0\n", "other", 6, "ZeroDivisionError"),
    "returns a number": ("def score(rollout):\n    return 1.0\n", "score", 1, "returned a float"),
    "sets nothing": ("def score(rollout):\n    return rollout\n", "score", 1, "set rewards to NoneType"),
    "one reward for all": ("from dataclasses import replace\nimport torch\ndef score(rollout):\n    return replace(rollout, "
                           "rewards=torch.tensor(1.0))\n", "score", 3, "must be a tensor of shape"),
    "not finite": ("from dataclasses import replace\nimport torch\ndef score(rollout):\n    return replace(rollout, "
                   "rewards=torch.full((2,), float('nan')))\n", "score", 3, "every number must be finite"),
    "a part of the wrong shape": ("from dataclasses import replace\nimport torch\ndef score(rollout):\n    return replace(rollout, "
                                  "rewards=torch.ones(2), reward_parts={'x': torch.ones(3)})\n", "score", 3, "reward_parts['x']"),
    "a name that is taken": ("from dataclasses import replace\nimport torch\ndef score(rollout):\n    return replace(rollout, "
                             "rewards=torch.ones(2), reward_parts={'mean': torch.ones(2)})\n", "score", 3, "taken by the metrics"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, case):
    text, name, line, message = WRONG[case]
    file = tmp_path / "my_rewards.py"
    file.write_text(text)
    with pytest.raises(RewardError) as caught:
        try_reward(load_reward(RewardConfig(function=f"{file}:{name}")), SAMPLE)
    assert f"{file}, line {line}: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("function, message", [
    ("gone.py:score", "cannot be loaded"), ("no.such.module:score", "cannot be loaded"), ("math:no", "has no function 'no'")])
def test_what_cannot_be_loaded(function, message):
    with pytest.raises(ValueError, match=message):
        load_reward(RewardConfig(function=function))


@pytest.mark.parametrize("function", ["my_rewards.py", ":score", "my_rewards.py:", ""])
def test_a_name_has_two_halves(function):
    with pytest.raises(ValueError, match="FILE.py:NAME or PACKAGE.MODULE:NAME"):
        RewardConfig(function=function)


def test_a_trainer_takes_any_function(trained_model, tiny_world, tmp_path):
    def first_letter(responses):
        is_e = torch.tensor([float("e" in text) for text in responses.texts])
        return replace(responses, rewards=is_e + torch.arange(len(is_e)), reward_parts={"has_e": is_e})

    trainer = Trainer(load_policy(trained_model), load_processor(trained_model), load_samples(tiny_world / "rl.jsonl"), tmp_path,
                      train=TrainConfig(prompts_per_step=2), prompt=PromptConfig("plain"), rollout=RolloutConfig(3, max_tokens=8),
                      objective=ObjectiveConfig("grpo"), augment=AugmentConfig(), score=first_letter, accelerator=Accelerator(cpu=True))
    row = trainer.step()
    assert row["reward_mean"] == pytest.approx(1 + row["reward_has_e"]) and row["grad_norm"] > 0
    assert row["reward_format"] == 0.0


def test_a_run_tries_the_reward_before_it_reads_the_model(settings, tmp_path, monkeypatch):
    file = tmp_path / "my_rewards.py"
    file.write_text("def score(rollout):\n    return rollout.missing\n")
    monkeypatch.setattr("deepvideo_r1.experiment.load_policy", lambda *args, **settings: pytest.fail("the model was read"))
    with pytest.raises(RewardError, match=re.escape(f"{file}, line 2: ")):
        run_training(replace(settings, reward=RewardConfig(function=f"{file}:score")))
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_reward_of_your_own(settings, tmp_path):
    (tmp_path / "my_rewards.py").write_text(GOOD)
    run_training(replace(settings, reward=RewardConfig(function=f"{tmp_path / 'my_rewards.py'}:score")))
    row, = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert row["reward_length"] == pytest.approx(row["reward_mean"])
    assert json.loads((tmp_path / "out/config.json").read_text())["reward"]["function"].endswith(":score")


def test_a_directory_knows_the_text_of_its_reward(tmp_path, monkeypatch):
    def identity(name):
        function = load_reward(RewardConfig(function=name)).function
        return {"weights": "w", "tokenizer": "t", "questions": {"q": "1"}, "reward": source_hash(name, function)}

    (tmp_path / "noted_rewards.py").write_text(GOOD)
    (tmp_path / "offered.py").write_text("from noted_rewards import score\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    in_file, in_module, offered = f"{tmp_path / 'noted_rewards.py'}:score", "noted_rewards:score", "offered:score"
    check_identity(tmp_path, identity(in_file))
    check_identity(tmp_path, identity(in_module))  # the same text
    check_identity(tmp_path / "elsewhere", identity(offered))

    (tmp_path / "noted_rewards.py").write_text(GOOD.replace("/ 100", "/ 200"))
    for directory, name in ((tmp_path, in_file), (tmp_path, in_module), (tmp_path / "elsewhere", offered)):
        with pytest.raises(ValueError, match="another reward: the reward function is another. Put"):
            check_identity(directory, identity(name))
    with pytest.raises(ValueError, match="the weights are others; the reward function is another. Put"):
        check_identity(tmp_path, {"weights": "v", "tokenizer": "t", "questions": {"q": "1"}})

    # A directory of an older run, which did not note its reward.
    (tmp_path / "identity.json").write_text('{"weights": "w", "tokenizer": "t", "questions": {"q": "1"}}')
    check_identity(tmp_path, identity(in_file))


def test_a_reward_that_breaks_in_the_middle_stops_the_run_and_says_where(settings, tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(GOOD.replace("len(text) / 100", "len(text) / 100 if '<answer>' in text or not text else float('inf')"))
    with pytest.raises(RewardError, match="every number must be finite"):
        run_training(replace(settings, reward=RewardConfig(function=f"{file}:score")))


def test_a_checked_reward_gives_plain_numbers():
    def score(responses):
        values = torch.ones(2, dtype=torch.float64, requires_grad=True)
        return replace(responses, rewards=2 * values, reward_parts={"x": values.bool()})

    scored = CheckedReward(score)(rollout("a", "b"))
    assert scored.rewards.dtype == torch.float32 and not scored.rewards.requires_grad
    assert scored.reward_parts["x"].tolist() == [1.0, 1.0]


def test_a_run_whose_reward_was_edited_is_not_continued(settings, tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(GOOD)
    config = replace(settings, reward=RewardConfig(function=f"{file}:score"))
    run_training(config)
    longer = replace(config, train=replace(config.train, steps=2))
    file.write_text(GOOD.replace("/ 100", "/ 10"))
    with pytest.raises(ValueError, match="the reward function is another"):
        run_training(longer)
    file.write_text(GOOD)
    assert run_training(longer).state.next_step == 2
