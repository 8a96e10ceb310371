"""The metrics of Eq. 22 to 24 against sums written out by hand, and the evaluation file."""
import random

import pytest

from deepvideo_r1.config import PromptConfig
from deepvideo_r1.core import Sample
from deepvideo_r1.evaluation import evaluate as evaluation
from deepvideo_r1.evaluation.evaluate import accuracy, ious, paired_gain, recall_at, summarise
from deepvideo_r1.evaluation.intervals import mean_interval
from deepvideo_r1.support.identity import question_hashes


def row(name, group="L1", **parts):
    return {"id": name, "subset": group, "kind": "number", "temperature": 0.0, "parts": {"format": [1.0], **parts}}


def test_accuracy_averages_responses_then_questions():
    rng = random.Random(0)
    answers = [[float(rng.random() < 0.4) for _ in range(rng.choice([1, 2, 5]))] for _ in range(40)]
    rows = [row(str(i), accuracy=a) for i, a in enumerate(answers)]
    by_hand = sum(sum(a) / len(a) for a in answers) / 40
    assert sum(accuracy(rows)) / 40 == pytest.approx(by_hand)
    assert summarise(rows)["all"]["accuracy"][0] == pytest.approx(by_hand)
    assert by_hand != pytest.approx(sum(map(sum, answers)) / sum(map(len, answers)))  # questions count, not responses


def test_mean_iou_and_recall_by_hand():
    rows = [row("a", iou=[0.2, 0.8]), row("b", iou=[0.5]), row("c", accuracy=[1.0])]
    assert ious(rows) == [0.5, 0.5]
    assert recall_at(rows, 0.5) == [0.5, 0.0]  # an IoU of 0.5 is not above 0.5
    table = summarise(rows)["all"]
    assert table["mean_iou"][0] == 0.5 and table["recall_at_0.3"][0] == 0.75 and table["recall_at_0.7"][0] == 0.25


def test_unreadable_clips_are_neither_right_nor_wrong():
    rows = [row("a", accuracy=[1.0]), {"id": "b", "subset": "L1", "kind": "number", "temperature": 0.0, "error": "b.mp4: gone"}]
    assert summarise(rows)["L1"]["accuracy"][0] == 1.0
    assert summarise(rows)["L1"]["unreadable"] == 1


def test_intervals_cover_the_truth():
    rng, covered = random.Random(1), 0
    for _ in range(400):
        _, low, high = mean_interval([float(rng.random() < 0.3) for _ in range(200)])
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / 400 <= 0.985


def test_a_paired_gain_is_narrower_than_two_separate_intervals():
    rng = random.Random(2)
    before = [row(str(i), accuracy=[float(rng.random() < 0.5)]) for i in range(300)]
    after = [row(r["id"], accuracy=[max(r["parts"]["accuracy"][0], float(rng.random() < 0.1))]) for r in before]
    gain, low, high = paired_gain(after, before)
    width = sum(high - low for _, low, high in (mean_interval(accuracy(rows)) for rows in (before, after)))
    assert 0 < low < gain < high and high - low < width / 2


def test_hashes_of_questions_are_those_of_files_written_before(tmp_path, monkeypatch):
    clip, image, frames = tmp_path / "clip.mp4", tmp_path / "one.png", tmp_path / "frames"
    clip.write_bytes(bytes(range(256)) * 1000)
    image.write_bytes(b"one")
    frames.mkdir()
    (frames / "0.png").write_bytes(b"12345")
    samples = [
        Sample(id="a", video=str(clip), question="Was ist das \u2013 ? \ud83d", options=("ein Ei", "zwei"), answer="B",
               kind="choice", meta={"dataset": "x", "n": 1.5}),
        Sample(id="b", images=(str(image), str(tmp_path / "gone.png")), question="how many ?", answer="1", kind="number"),
        Sample(id="c", video=str(frames), question="when ?", kind="grounding", spans=((1.0, 2.5),)),
        Sample(id="d", question="why ?", answer="so")]

    # What identity.json holds.
    assert question_hashes(samples) == {
        "a": "20ad6e37bc3cf045ad9adda5f67452f0", "b": "614e93679381debf083d08b07de7390c",
        "c": "9914adb62ded6974f91f9f011c198553", "d": "1c09dccfe4126de3b42e637e4531449a"}

    # What rows of an evaluation hold.
    monkeypatch.setattr(evaluation, "_model_hash", lambda *parts: "the model")
    settings = evaluation._AnswerSettings(PromptConfig("plain"))
    identities = evaluation._identities(None, None, samples, settings)
    assert {name: identity["question"] for name, identity in identities.items()} == {
        "a": "17a15d122012930e847650a351ebd5e0", "b": "098c42f479a05cb2269a8c9f99ac06a0",
        "c": "e6da8e1ff8dc480b1721eeb6d2d95d4c", "d": "7c903e5781c3a3387628e172ee87c9c5"}
