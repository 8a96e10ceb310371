"""The effect explorer: its record is what the library makes and scores, and its JavaScript counts as Python does."""
import base64
import io
import json
import re
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from test_explorers import run_js  # noqa: F401, a fixture

from deepvideo_r1.config import AugmentConfig
from deepvideo_r1.core import Sample
from deepvideo_r1.explore.effect import (
    LEVELS, NAMES, EffectExplorer, agreeing_share, change_frames, choose_spread, order_of_masks, read_record, text_of,
)
from deepvideo_r1.explore.explorers import read_module
from deepvideo_r1.hints import make_hint
from deepvideo_r1.reward import total_reward

RECORD = read_record()
QUESTIONS = RECORD["questions"]


@pytest.mark.parametrize("question", QUESTIONS, ids=NAMES)
def test_every_recorded_reward_is_that_of_its_text(question):
    sample = Sample(question["id"], question=question["question"], answer=question["answer"], kind="number")
    texts = [text_of(question, number) for number in range(len(question["texts"]))]
    assert [total_reward(text, sample)[0] for text in texts] == question["rewards"]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("question", QUESTIONS, ids=NAMES)
def test_every_level_is_recorded(question):
    for knob, levels in RECORD["levels"].items():
        assert levels == pytest.approx(LEVELS[knob], abs=1e-4)
        assert [len(numbers) for numbers in question[knob]] == [32] * len(levels)
        for numbers, counts in zip(question[knob], question["counts"][knob]):
            shown, counted = Counter(question["rewards"][number] for number in numbers), dict(counts)
            assert sum(counted.values()) == 256 and all(shown[reward] <= counted[reward] for reward in shown)
        assert question[knob][0] == question["noise"][0]  # no change is the same for all knobs
    for level, numbers in zip(RECORD["levels"]["hint"], question["hint"]):
        start = make_hint(question["trace"], level)
        assert all(text_of(question, number).startswith(f"<think>\n{start}" if start else "<think>") for number in numbers)


@pytest.mark.parametrize("question", QUESTIONS, ids=NAMES)
def test_the_frames_are_a_strip_of_a_toy_clip(question):
    image = Image.open(io.BytesIO(base64.b64decode(question["frames"].partition(",")[2])))
    assert image.size == (28 * (len(question["mask_order"]) + 1), 28)
    assert question["mask_order"] == order_of_masks(12, question["id"])


def test_questions_become_harder():
    right = [dict(question["counts"]["noise"][0]).get(2.0, 0) for question in QUESTIONS]
    assert right == sorted(right, reverse=True) and right[0] > 0.9 * 256 and right[-1] < 0.05 * 256


def test_the_methods_claim_on_the_record():
    "Noise makes the easy question's groups differ, a hint those of the hard ones; too much noise makes them agree again."
    share = lambda question, knob, level: agreeing_share(
        [reward for reward, count in QUESTIONS[question]["counts"][knob][level] for _ in range(count)], 8)
    assert share(0, "noise", 4) < 0.2 < 0.5 < share(0, "noise", 0) < share(0, "noise", 6)
    assert share(4, "hint", 5) < 0.1 < 0.9 < share(4, "hint", 0)
    assert share(2, "noise", 0) < 0.05


def test_the_script_counts_as_python_does(run_js):  # noqa: F811
    groups = [[2, 2, 2, 1, 0, 0, 1, 2, 2], [1] * 8, [0, 1] * 8, [2.0] * 31 + [1.0], torch.arange(10).tolist()]
    cases = [(group, size) for group in groups for size in (2, 3, 8)]
    found = run_js("effect", [("agreeingShare", *case) for case in cases])
    assert found == pytest.approx([agreeing_share(*case) for case in cases], abs=1e-12)
    numbers = list(range(len(QUESTIONS[1]["texts"])))[:20]
    found = run_js("effect", [("textOf", QUESTIONS[1], number) for number in numbers])
    assert found == [text_of(QUESTIONS[1], number) for number in numbers]
    assert run_js("effect", [("answerOf", text) for text in ("a<answer> 12 </answer>", "none", "<answer></answer>")]) \
        == ["12", "\u2013", "\u2013"]


def test_the_script_looks_up_what_python_looks_up(run_js):  # noqa: F811
    cases = [{"sigma": 0.2, "masked_share": 0, "hint_share": 0}, {"sigma": 0, "masked_share": 0.5, "hint_share": 0},
             {"sigma": 0, "masked_share": 0, "hint_share": 0.65}, {"sigma": 0, "masked_share": 0, "hint_share": 0},
             {"sigma": 0.27, "masked_share": 0, "hint_share": 0}]
    now = run_js("effect", [("changeNow", case, RECORD["levels"]) for case in cases])
    for case, one in zip(cases, now):
        for number, question in enumerate(QUESTIONS):
            widget = EffectExplorer(question=number, group=1, **case)
            eight, every = widget.rewards_now(after=True)
            js, = run_js("effect", [("effect", question, one["name"], one["level"])])
            assert js["accuracy"] == sum(reward == 2 for reward in every) / 256
            assert js["vanishing"] == pytest.approx(agreeing_share(every, 8), abs=1e-12)
            found, = run_js("effect", [("responses", question, one["name"], one["level"])])
            assert found["rewards"][8:16] == eight
            widget.close()


def test_choices_and_changes():
    assert choose_spread([0.5, 0.5, 1.0], (0.5, 0.5)) == [0, 1]
    frames = torch.full((12, 3, 28, 28), 100, dtype=torch.uint8)
    weak, strong = (change_frames(frames, "noise", sigma, "q").float() - 100 for sigma in (0.05, 0.1))
    assert (strong - 2 * weak).abs().max() <= 2  # the same noise, scaled
    light, heavy = (change_frames(frames, "mask", share, "q")[:, 0, 0, 0] == 128 for share in (0.25, 0.75))
    assert light.sum() == 3 and heavy.sum() == 9 and (heavy | ~light).all()


def test_the_module_stands_alone_and_knows_the_widgets_names():
    text, widget = read_module("effect"), EffectExplorer()
    assert not re.search(r"^\s*import\b|\bimport\(", text, re.M) and len(text) < 34_000
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(fetch|eval|XMLHttpRequest|localStorage|innerHTML)\b", text)
    own = {key for key in widget.keys if key[0] != "_" and key not in ("layout", "tabbable", "tooltip")}
    assert own <= set(re.findall(r'"([a-z]+(?:_[a-z]+)?)"', text))
    assert json.loads(widget.recorded) == RECORD and widget.config == asdict(
        AugmentConfig(hint_as="prefix", hint_source="stored"))
    assert widget.picture().startswith(b"\x89PNG") and len(widget.picture()) < 60_000
    assert len(json.dumps(widget.get_state())) < 130_000
