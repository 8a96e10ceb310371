"""Noise, masks and hints as properties, and the order in which augmentation asks and samples."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepvideo_r1.augment import add_noise, augment_groups, mask_frames, plan_augmentation
from deepvideo_r1.config import AugmentConfig
from deepvideo_r1.core import Clip, Prompt, Rollout, Sample, make_generator

clips = st.builds(
    lambda t, h, w, seed: torch.randint(0, 256, (t, 3, h, w), generator=make_generator(seed), dtype=torch.uint8),
    st.integers(2, 9), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
shares = st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(frames=clips, strength=shares, seed=st.integers(0, 2**31), change=st.sampled_from([add_noise, mask_frames]))
def test_changed_frames_are_new_frames_of_the_same_kind(frames, strength, seed, change):
    before = frames.clone()
    changed = change(frames, strength, generator=make_generator(seed))
    assert changed.dtype == torch.uint8 and changed.shape == frames.shape
    assert changed.data_ptr() != frames.data_ptr() and torch.equal(frames, before)
    assert torch.equal(changed, change(frames, strength, generator=make_generator(seed)))


def test_another_seed_gives_another_change():
    frames = torch.full((8, 3, 14, 14), 100, dtype=torch.uint8)
    for change in (add_noise, mask_frames):
        results = {change(frames, 0.5, generator=make_generator(seed)).numpy().tobytes() for seed in range(6)}
        assert len(results) > 4


@settings(max_examples=50, deadline=None)
@given(sigma=st.floats(0.002, 0.1), seed=st.integers(0, 2**31))
def test_the_noise_has_the_level_it_says(sigma, seed):
    frames = torch.full((8, 3, 56, 56), 128, dtype=torch.uint8)  # 127 steps from both ends: 5 deviations at 0.1
    noise = add_noise(frames, sigma, generator=make_generator(seed)).double() - 128
    n, expected = noise.numel(), math.hypot(255 * sigma, 12**-0.5)  # rounding adds the deviation of a step's length
    assert noise.std() == pytest.approx(expected, rel=0.05 if sigma < 0.01 else 0.02)
    assert abs(noise.mean()) < 5 * expected / n**0.5
    pairs = noise.flatten()
    assert abs((pairs[1:] * pairs[:-1]).mean()) < 5 * expected**2 / n**0.5  # pixels are independent


@settings(max_examples=100, deadline=None)
@given(frames=clips, fraction=shares, seed=st.integers(0, 99))
def test_masked_frames_are_grey_and_others_untouched(frames, fraction, seed):
    frames = frames.clamp(max=127)  # no frame is grey by itself
    masked = mask_frames(frames, fraction, generator=make_generator(seed))
    is_grey = (masked == 128).flatten(1).all(1)
    assert int(is_grey.sum()) == min(round(fraction * len(frames)), len(frames) - 1)
    assert torch.equal(masked[~is_grey], frames[~is_grey])


def test_a_single_frame_cannot_be_masked():
    frame = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        mask_frames(frame, 0.5, generator=make_generator(0))
    assert torch.equal(mask_frames(frame, 0.0, generator=make_generator(0)), frame)
    assert add_noise(frame, 0.5, generator=make_generator(0)).any()


# --- the plan and its order ---------------------------------------------------------------------------------------

TRACE = "t1 red 0\nt2 green 2\nt3 blue 3\nt4 red 3"
RIGHT = f"<think>\n{TRACE}\n</think>\n<answer> 3 </answer>"
WRONG = "<think>\nhm\n</think>\n<answer> 2 </answer>"
SAMPLED = AugmentConfig(enabled=True, hint_source="sampled")


@settings(max_examples=200, deadline=None)
@given(difficulty=st.floats(-2, 2), schedule=st.sampled_from(["adaptive", "fixed"]),
       harder=st.sampled_from(["noise", "mask"]))
def test_easy_becomes_harder_and_hard_easier_within_the_limits(difficulty, schedule, harder):
    config = AugmentConfig(schedule=schedule, harder=harder)
    plan = plan_augmentation(difficulty, config)
    if abs(difficulty) <= config.dead_zone:
        assert plan == {}
    else:
        assert plan["change"] == ("hint" if difficulty > 0 else harder)
        limits = {"adaptive": (config.max_hint, config.max_sigma, config.max_mask),
                  "fixed": (config.fixed_hint, config.fixed_sigma, config.fixed_mask)}
        limit = dict(zip(("hint", "noise", "mask"), limits[schedule]))[plan["change"]]
        assert 0 < plan.get("sigma", plan.get("fraction")) <= limit


class Caller:
    "`ask` and `roll_out` that write down how they were called; responses to a prompt with the answer shown are right."

    def __init__(self):
        self.calls = []

    def ask(self, sample, visuals, **how):
        self.calls.append(("ask", sample.id, *how))
        pixels = torch.cat([clip.frames.flatten() for _, clip in visuals])
        return Prompt(torch.tensor([1, 2]), patches=pixels[None].float(), text=repr(how), prefix=how.get("prefix", ""))

    def roll_out(self, samples, prompts, purpose, features):
        self.calls.append(("sample", purpose, *(f is not None for f in features)))
        assert len(samples) == len(prompts) == len(features)
        text = RIGHT if purpose == "trace" else WRONG
        return [replace(group(s.id, [2.0, 1.0]), prompt=p, texts=(text, WRONG)) for s, p in zip(samples, prompts)]


def group(name, rewards, difficulty=None):
    n = len(rewards)
    sample = Sample(id=name, question="how many ?", answer="3", kind="number", meta={"trace": TRACE})
    return Rollout(sample, Prompt(torch.tensor([1, 2])), torch.zeros(n, 1).long(), torch.ones(n, 1).bool(),
                   torch.zeros(n, 1), (WRONG,) * n, torch.tensor(rewards), difficulty=difficulty,
                   visual_features=torch.zeros(6, 4))


EASY, HARD, EVEN = group("easy", [2.0, 2.0], -0.5), group("hard", [1.0, 1.0], 0.5), group("even", [2.0, 1.0], 0.0)
VISUALS = [("video", Clip(torch.full((4, 3, 28, 28), 100, dtype=torch.uint8), torch.arange(4) / 2))]


def augment(rollouts, config, **how):
    caller, visuals = Caller(), [VISUALS] * len(rollouts)
    new = augment_groups(rollouts, visuals, caller.ask, caller.roll_out, config, key=(0, "noise", 0), **how)
    return new, caller.calls


def test_traces_are_sampled_before_any_changed_prompt():
    new, calls = augment([EASY, HARD, EVEN], SAMPLED)
    assert calls == [
        ("ask", "hard", "show_answer"), ("sample", "trace", True),  # the trace, for the hard one alone
        ("ask", "easy"), ("ask", "hard", "hint"),
        ("sample", "augmented", False, True)]  # one call; what noise has changed, the encoder must see
    assert [r.augmentation.get("change") for r in new] == ["noise", "hint", None]
    assert [r.difficulty for r in new] == [-0.5, 0.5, 0.0] and new[2] is EVEN
    assert "t1 red 0" in new[1].prompt.text and "t4 red 3" not in new[1].prompt.text
    assert not EASY.augmentation and (VISUALS[0][1].frames == 100).all()


@pytest.mark.parametrize("config, expected", [
    (replace(SAMPLED, hint_source="stored", hint_as="prefix"),
     [("ask", "easy"), ("ask", "hard", "prefix"), ("sample", "augmented", False, True)]),
    (replace(SAMPLED, hint_scale=0.0), [("ask", "easy"), ("sample", "augmented", False)]),
    (replace(SAMPLED, redraw_only=True), [("sample", "augmented", True, True)]),
    (replace(SAMPLED, dead_zone=0.6), []),
])
def test_only_what_is_needed_is_asked(config, expected):
    assert augment([EASY, HARD, EVEN], config)[1] == expected


def test_groups_that_vary_can_be_left_alone():
    varied = replace(EASY, rewards=torch.tensor([2.0, 1.0]))
    new, calls = augment([varied, HARD], replace(SAMPLED, second_group="vanishing"))
    assert new[0] is varied and new[1].augmentation["change"] == "hint" and ("ask", "easy") not in calls


def test_first_groups_that_are_kept_stand_at_the_end():
    new, _ = augment([EASY, HARD, EVEN], replace(SAMPLED, keep_first=True))
    assert len(new) == 5 and new[3] is EASY and new[4] is HARD and new[0] is not EASY


def test_without_a_right_trace_the_question_stays():
    class Puzzled(Caller):
        def roll_out(self, samples, prompts, purpose, features):
            groups = super().roll_out(samples, prompts, purpose, features)
            return [replace(group, texts=(WRONG, WRONG), rewards=torch.ones(2)) for group in groups]

    caller = Puzzled()
    new = augment_groups([HARD], [VISUALS], caller.ask, caller.roll_out, SAMPLED, key=(0,))
    assert caller.calls == [("ask", "hard", "show_answer"), ("sample", "trace", True)]
    assert new == [replace(HARD, augmentation={"change": "no_trace"})] and not HARD.augmentation


def test_a_hint_never_gives_the_answer_away_on_its_way_into_the_prompt():
    told = replace(HARD, sample=replace(HARD.sample, meta={"trace": "I count.\nSo the answer is 3.\nDone.\nYes."}))
    new, calls = augment([told], replace(SAMPLED, hint_source="stored", hint_as="prefix"))
    assert new[0].prompt.prefix == "<think>\nI count." and ("sample", "augmented", True) in calls


def test_a_stored_trace_may_stand_in_its_tags():
    tagged = replace(HARD, sample=replace(HARD.sample, meta={"trace": RIGHT}))
    new, _ = augment([tagged], replace(SAMPLED, hint_source="stored", hint_as="prefix"))
    assert new[0].prompt.prefix == "<think>\nt1 red 0\nt2 green 2\nt3 blue 3"


def test_an_image_is_not_masked_and_a_video_beside_it_is():
    seen = []

    def ask(sample, visuals, **how):
        seen.append([clip.frames.clone() for _, clip in visuals])
        return Prompt(torch.tensor([1, 2]))

    image = ("image", Clip(torch.full((1, 3, 28, 28), 100, dtype=torch.uint8), torch.zeros(1)))
    config = replace(SAMPLED, harder="mask")
    for visuals, kind in (([image], None), ([image, *VISUALS], "mask")):
        seen.clear()
        new = augment_groups([EASY], [visuals], ask, Caller().roll_out, config, key=(0,))
        assert new[0].augmentation.get("change") == kind
    assert (seen[0][0] == 100).all() and (seen[0][1] == 128).any()


def test_noise_belongs_to_the_question_and_the_step():
    def pixels(rollouts, key):
        caller = Caller()
        new = augment_groups(rollouts, [VISUALS] * len(rollouts), caller.ask, caller.roll_out, SAMPLED, key=key)
        return {r.sample.id: r.prompt.patches for r in new}

    other = replace(EASY, sample=replace(EASY.sample, id="other"))
    alone, together, later = pixels([EASY], (0, 1)), pixels([other, EASY], (0, 1)), pixels([EASY], (0, 2))
    assert torch.equal(alone["easy"], together["easy"])
    assert not torch.equal(alone["easy"], later["easy"]) and not torch.equal(alone["easy"], together["other"])
