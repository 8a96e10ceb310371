"""The replay buffer against a list and Eq. 9, its state, and the schedules' limits."""
import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepvideo_r1.config import AugmentConfig
from deepvideo_r1.difficulty import CHANGES, ReplayBuffer, absolute_difficulty, change_strength

FIXED = AugmentConfig(schedule="fixed")

groups = st.lists(st.lists(st.floats(0, 3, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(groups, min_size=1, max_size=8), window=st.integers(1, 12), data=st.data())
def test_the_buffer_follows_equation_nine(steps, window, data):
    min_groups = data.draw(st.integers(1, window))
    buffer, past = ReplayBuffer(window, min_groups=min_groups), []
    for step in steps:
        rewards = torch.tensor(step)
        means = np.mean(step, axis=1)
        recent = past[-window:]
        expected = np.mean(recent) - means if len(recent) >= min_groups else np.zeros(len(means))
        np.testing.assert_allclose(buffer.difficulty(rewards).numpy(), expected, atol=1e-5)
        buffer.push(rewards)
        past += list(means)
        assert len(buffer) == min(len(past), window)
        assert buffer.mean == pytest.approx(np.mean(past[-window:]), abs=1e-6)


def test_groups_are_remembered_one_by_one_and_in_order():
    together, apart = ReplayBuffer(3), ReplayBuffer(3)
    rewards = torch.arange(10.0).view(5, 2)
    together.push(rewards)
    for group in rewards:
        apart.push(group[None])
    assert list(together.means) == list(apart.means) == [4.5, 6.5, 8.5]


def test_an_empty_buffer_knows_nothing():
    buffer = ReplayBuffer()
    assert buffer.window == 100 and len(buffer) == 0 and buffer.mean is None
    assert buffer.difficulty(torch.rand(3, 4)).tolist() == [0.0, 0.0, 0.0]


def test_the_default_starts_with_the_first_sample():
    buffer = ReplayBuffer()
    buffer.push(torch.tensor([[2.0, 0.0]]))
    assert buffer.difficulty(torch.tensor([[2.0, 2.0], [0.0, 0.0]])).tolist() == [-1.0, 1.0]


def test_a_resumed_buffer_goes_on_as_if_nothing_had_happened():
    generator = torch.Generator().manual_seed(0)
    batches = torch.rand(12, 4, 8, generator=generator)
    whole, first = ReplayBuffer(20, min_groups=5), ReplayBuffer(20, min_groups=5)
    for batch in batches[:6]:
        whole.push(batch), first.push(batch)
    second = ReplayBuffer(20, min_groups=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[6:]:
        assert torch.equal(whole.difficulty(batch), second.difficulty(batch))
        whole.push(batch), second.push(batch)
    assert whole.state_dict() == second.state_dict()


def test_the_state_is_a_copy():
    buffer = ReplayBuffer(3)
    buffer.push(torch.ones(1, 2))
    state = buffer.state_dict()
    state["means"].append(7.0)
    buffer.push(torch.zeros(1, 2))
    assert list(buffer.means) == [1.0, 0.0]


@pytest.mark.parametrize("state", [
    {}, dict(window=3), dict(window=4, means=[]), dict(window=3, means=[1.0] * 4), dict(window=3, means=[math.nan]),
    dict(window=3, means=["1"]), dict(window=3, means=None), dict(window=3, means=[None]),
])
def test_a_damaged_state_is_refused_and_changes_nothing(state):
    buffer = ReplayBuffer(3)
    buffer.push(torch.ones(1, 2))
    with pytest.raises(ValueError, match="window|means"):
        buffer.load_state_dict(state)
    assert list(buffer.means) == [1.0]


@pytest.mark.parametrize("window, min_groups", [(0, 1), (-1, 1), (10, 0), (10, 11)])
def test_bad_sizes_are_refused(window, min_groups):
    with pytest.raises(ValueError, match="min_groups"):
        ReplayBuffer(window, min_groups=min_groups)


@pytest.mark.parametrize("rewards", [torch.tensor([[1.0, math.nan]]), torch.tensor([[math.inf, 0.0]]), torch.ones(4)])
def test_bad_rewards_are_refused_and_not_remembered(rewards):
    buffer = ReplayBuffer()
    for call in (buffer.push, buffer.difficulty, absolute_difficulty):
        with pytest.raises(ValueError, match="rewards"):
            call(rewards)
    assert len(buffer) == 0


def test_absolute_difficulty_by_hand():
    rewards = torch.tensor([[2.0, 2.0], [2.0, 0.0], [0.0, 0.0]])
    assert absolute_difficulty(rewards).tolist() == [-1.0, 0.0, 1.0]
    assert absolute_difficulty(rewards, scale=4.0).tolist() == [0.0, 1.0, 2.0]


@given(difficulty=st.floats(-1e6, 1e6, allow_subnormal=False), dead_zone=st.floats(0, 1), name=st.sampled_from(["adaptive", "fixed"]))
def test_a_schedule_reacts_on_one_side_and_within_limits(difficulty, dead_zone, name):
    config = AugmentConfig(schedule=name, dead_zone=dead_zone)
    noise, hint = (change_strength(difficulty, change, config) for change in ("noise", "hint"))
    assert type(noise) is float and type(hint) is float
    assert 0.0 <= noise <= 0.4 and 0.0 <= hint <= 0.8
    assert (noise > 0) == (difficulty < -dead_zone) and (hint > 0) == (difficulty > dead_zone)


@given(a=st.floats(0, 3), b=st.floats(0, 3))
def test_the_harder_the_longer_and_the_easier_the_noisier(a, b):
    low, high = sorted((a, b))
    for change, side in (("hint", 1), ("noise", -1), ("mask", -1)):
        assert change_strength(side * low, change) <= change_strength(side * high, change)


def test_schedules_by_hand():
    noise, hint = (partial(change_strength, change=change) for change in ("noise", "hint"))
    assert noise(-0.4) == pytest.approx(0.2) and noise(-0.02) == 0 and noise(-5.0) == 0.4
    assert hint(0.25) == pytest.approx(0.4) and hint(0.02) == 0 and hint(5.0) == 0.8
    assert noise(-0.03, config=FIXED) == noise(-3.0, config=FIXED) == 0.15 and noise(0.5, config=FIXED) == 0
    assert hint(0.03, config=FIXED) == hint(3.0, config=FIXED) == 0.5 and hint(0.0, config=FIXED) == 0


def test_tensors_give_tensors():
    difficulty = torch.tensor([[-1.0, 0.5]])
    for change, config in itertools.product(CHANGES, (AugmentConfig(), FIXED)):
        levels = change_strength(difficulty, change, config)
        assert levels.shape == (1, 2) and levels.dtype == torch.float32
        assert levels.flatten().tolist() == pytest.approx([change_strength(d, change, config) for d in (-1.0, 0.5)])


@pytest.mark.parametrize("call", [
    lambda: change_strength(math.nan, "noise"), lambda: change_strength(math.nan, "hint"), lambda: AugmentConfig(noise_scale=-1.0),
    lambda: AugmentConfig(max_sigma=-0.1), lambda: AugmentConfig(dead_zone=-0.1), lambda: AugmentConfig(max_hint=1.2),
    lambda: AugmentConfig(fixed_hint=1.2), lambda: absolute_difficulty(torch.ones(1, 2), scale=-1.0),
])
def test_bad_knobs_are_refused(call):
    with pytest.raises(ValueError):
        call()
