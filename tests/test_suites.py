"""The benchmarks: their figures by hand and by an independent rewrite, their files end to end, processes and mistakes."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_datasets import GLUE, LONGVIDEOBENCH, NEXTGQA, SEED_VALIDATION, VIDEO_R1, VIDEO_R1_EVAL, write, write_nextgqa
from test_video import hang

from deepvideo_r1.support.files import read_jsonl
from deepvideo_r1.cli import main
from deepvideo_r1.config import PromptConfig
from deepvideo_r1.core import Sample
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.evaluation.evaluate import evaluate, parsed_answer, parsed_evidence
from deepvideo_r1.evaluation.metrics import accuracy_metrics, generic_metrics, grounding_metrics, vsi_metrics
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import EVIDENCE, load_processor, question_text
from deepvideo_r1.reward import total_reward
from deepvideo_r1.evaluation.suites import BENCHMARKS, load_benchmark, paper_results

PLAIN = PromptConfig("plain")


def answered(sample: Sample, *texts: str) -> dict:
    "A row as `evaluate` writes it, for responses that no model has given."
    parts = [total_reward(text, sample)[1] for text in texts]
    evidence = {"evidence": [parsed_evidence(text) for text in texts]} if sample.spans and sample.kind == "choice" else {}
    return {"id": sample.id, "question": sample.question, "kind": sample.kind, "spans": [list(s) for s in sample.spans],
            "responses": list(texts), "parsed": [parsed_answer(text, sample) for text in texts], **evidence,
            "parts": {name: [one[name] for one in parts] for name in parts[0]}, "meta": sample.meta}


def say(answer, glue=None) -> str:
    return f"<think>so</think><answer>{answer}</answer>" + (f"<glue>{glue}</glue>" if glue is not None else "")


def by_name(metrics, group="all") -> dict:
    return {metric.name: metric for metric in metrics if metric.subset == group}


# --- NExT-GQA: an independent rewrite of the official scorer ------------------------------------------------------


def official(true: dict[str, list], predicted: dict[str, tuple], right: dict[str, bool]) -> dict[str, float]:
    "The official figures from their definition, all pairs at once; questions without a prediction are left out."
    names = [name for name in true if name in predicted]
    counts = [len(true[name]) for name in names]
    t = np.array([span for name in names for span in true[name]], float)
    p = np.repeat(np.array([predicted[name] for name in names], float), counts, axis=0)
    shared = np.minimum(t[:, 1], p[:, 1]) - np.maximum(t[:, 0], p[:, 0])
    hull = np.maximum(t[:, 1], p[:, 1]) - np.minimum(t[:, 0], p[:, 0])
    length = p[:, 1] - p[:, 0]
    inside = (t[:, 0] <= p[:, 0]) & (p[:, 0] <= t[:, 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(length == 0, 0.0, shared / hull)
        iop = np.where(length == 0, inside.astype(float), shared / length)
    starts = np.cumsum([0, *counts[:-1]])
    iou, iop = (np.maximum(np.maximum.reduceat(values, starts), 0) for values in (iou, iop))
    correct = np.array([right[name] for name in names])
    return {"Acc@GQA": (correct & (iop >= 0.5)).mean(), "mIoP": iop.mean(), "IoP@0.3": (iop >= 0.3).mean(),
            "IoP@0.5": (iop >= 0.5).mean(), "mIoU": iou.mean(), "R@0.3": (iou >= 0.3).mean(), "R@0.5": (iou >= 0.5).mean(),
            "R@0.7": (iou >= 0.7).mean()}


def as_published(sample: Sample) -> list[tuple[float, float]]:
    "The true intervals as the file has them: some reach out of the clip, and the rewards use what lies in it."
    return [tuple(span) for span in sample.meta.get("official_spans", sample.spans)]


def on_a_grid(spans, cells: int) -> np.ndarray:
    "Which tenths of a second lie in one of the spans, whose bounds are tenths of a second."
    grid = np.zeros(cells, bool)
    for start, end in spans:
        grid[round(10 * start) : round(10 * end)] = True
    return grid


def random_predictions(samples: list[Sample], seed: int) -> dict[str, list[tuple[float, float]] | None]:
    "Near the truth, far from it, of length 0, on its borders, several at once, or none."
    rng, found = random.Random(seed), {}
    for sample in samples:
        start, end = rng.choice(sample.spans)
        near = lambda: tuple(sorted(round(max(0.0, bound + rng.gauss(0, 4)), 1) for bound in (start, end)))
        point = round(rng.uniform(max(0, start - 3), end + 3), 1)
        found[sample.id] = rng.choice([
            [near()], [near()], [near(), near()], [(point, point)], [(start, end)], [(start, round((start + end) / 2, 6))],
            [(start, round(start + 2 * (end - start), 6))], [(round(end + 5, 6), round(end + 9, 6))], None])
    return found


def check_scorer(samples: list[Sample], seed: int) -> None:
    predicted, rng = random_predictions(samples, seed), random.Random(seed)
    letters = {sample.id: rng.choice("ABCDE") for sample in samples}
    rows = [answered(s, say(letters[s.id], predicted[s.id] and str(predicted[s.id]))) for s in samples]
    assert [row["evidence"] == [None] for row in rows] == [predicted[s.id] is None for s in samples]
    firsts = {name: spans[0] for name, spans in predicted.items() if spans}
    right = {sample.id: letters[sample.id] == sample.answer for sample in samples}
    true = {sample.id: as_published(sample) for sample in samples}

    ours = by_name(grounding_metrics([row for row in rows if row["evidence"][0]]))
    theirs = official(true, firsts, right)
    assert {name: ours[name].mean for name in theirs} == pytest.approx(theirs, abs=1e-12)

    whole = by_name(grounding_metrics(rows))  # a question without a prediction counts as 0 and is not left out
    share = len(firsts) / len(samples)
    assert {name: whole[name].mean for name in theirs} == pytest.approx({n: v * share for n, v in theirs.items()}, abs=1e-12)
    assert whole["Acc@QA"].mean == pytest.approx(sum(right.values()) / len(samples))
    assert whole["mIoU"].unparsed == whole["Acc@GQA"].unparsed == len(samples) - len(firsts) > 0
    assert whole["several intervals"].mean == pytest.approx(sum(len(p or ()) > 1 for p in predicted.values()) / len(samples))


def check_unions(samples: list[Sample], seed: int) -> None:
    "Unions are compared on a grid, so all bounds must be tenths of a second."
    rng, rows, ious, grounded = random.Random(seed), [], [], []
    for sample in samples:
        if any(abs(10 * bound - round(10 * bound)) > 1e-6 for span in as_published(sample) for bound in span):
            continue
        spans = [tuple(sorted((rng.randrange(1, 600) / 10, rng.randrange(600, 900) / 10))) for _ in range(rng.choice([1, 2, 4]))]
        spans += [(a + 0.5, b + 3) for a, b in sample.spans] if rng.random() < 0.7 else []
        spans = [(round(a, 1), round(b, 1)) for a, b in spans]
        cells = round(10 * max(bound for span in (*spans, *as_published(sample)) for bound in span)) + 1
        given, true = on_a_grid(spans, cells), on_a_grid(as_published(sample), cells)
        ious.append((given & true).sum() / (given | true).sum())
        grounded.append((given & true).sum() / given.sum() >= 0.5)
        rows.append(answered(sample, say(sample.answer, spans)))
    ours = by_name(grounding_metrics(rows))
    assert len(rows) > 20 and 0 < sum(grounded) < len(grounded)
    assert ours["mIoU of unions"].mean == pytest.approx(np.mean(ious), abs=1e-9)
    assert ours["Acc@GQA of unions"].mean == pytest.approx(np.mean(grounded), abs=1e-9)
    assert ours["R@0.3 of unions"].mean == pytest.approx(np.mean(np.array(ious) >= 0.3), abs=2 / len(rows))


def made_up_questions(seed: int) -> list[Sample]:
    rng = random.Random(seed)
    spans = lambda: [tuple(sorted((rng.randrange(300) / 10, rng.randrange(300, 600) / 10))) for _ in range(rng.choice([1, 1, 2, 3]))]
    return [Sample(id=str(i), question="?", options=tuple("vwxyz"), answer=rng.choice("ABCDE"), kind="choice",
                   spans=tuple(spans()), meta={"type": rng.choice(["CW", "TN"])}) for i in range(300)]


@pytest.mark.parametrize("seed", range(3))
def test_the_official_scorer_on_made_up_questions(seed):
    check_scorer(made_up_questions(seed), seed)
    check_unions(made_up_questions(seed), seed)


@pytest.mark.parametrize("seed", range(3))
def test_the_official_scorer_on_the_real_annotations(shared_dir, seed):
    samples = load_samples(shared_dir / "nextgqa", format="nextgqa", split="val")
    assert len(samples) == 3358
    check_scorer(samples, seed)
    check_unions(samples, seed)


def test_types_of_questions_add_up(shared_dir):
    samples = load_samples(shared_dir / "nextgqa", format="nextgqa", split="val")
    rng = random.Random(0)
    rows = [answered(s, say(rng.choice("ABCDE"), [as_published(s)[0]])) for s in samples]
    metrics = grounding_metrics(rows)
    assert {m.subset: m.n for m in metrics if m.name == "Acc@GQA"} == {
        "all": 3358, "type CH": 481, "type CW": 1474, "type TC": 472, "type TN": 879, "type TP": 52}
    for name in ("Acc@QA", "Acc@GQA", "mIoU"):
        parts = [m for m in metrics if m.name == name and m.subset != "all"]
        assert sum(m.mean * m.n for m in parts) / 3358 == pytest.approx(by_name(metrics)[name].mean)
    assert by_name(metrics)["mIoU"].mean == 1.0  # the first true interval is one of the true ones


def test_the_official_figures_use_the_official_numbers(tmp_path):
    given = {"1": [[-0.1, 5]], "2": [[80, 100]], "3": [[10, 20]]}
    write_nextgqa(tmp_path, [{**NEXTGQA, "qid": qid} for qid in given], {"4882821564": {"duration": 90, "location": given}})
    with pytest.warns(UserWarning, match="2 of 3 questions have intervals that reach out of the clip"):
        samples = load_samples(tmp_path, format="nextgqa")
    assert [s.spans for s in samples] == [((0.0, 5.0),), ((80.0, 90.0),), ((10.0, 20.0),)]
    rows = [answered(s, say("C", [s.spans[0]])) for s in samples]
    figures = by_name(grounding_metrics(rows))
    assert figures["mIoU"].mean == figures["mIoU of unions"].mean == pytest.approx((5 / 5.1 + 10 / 20 + 1) / 3)
    assert [total_reward(say("C", [s.spans[0]]), s)[1]["iou"] for s in samples] == [1.0, 1.0, 1.0]  # what can be reached


# --- the other figures by hand ------------------------------------------------------------------------------------


def question(name: str, answer: str, **fields) -> Sample:
    return Sample(id=name, question="?", **{"kind": "choice", "options": ("a", "b", "c")} | fields, answer=answer)


def test_a_failed_parse_is_wrong_and_counted():
    samples = [question(str(i), "A", meta={"level": "L1"}) for i in range(4)]
    texts = [say("A"), say("a cat or a dog"), "A", say("")]  # a letter; no letter; no block; nothing in it
    [whole, level] = accuracy_metrics([answered(s, text) for s, text in zip(samples, texts)], by=("level",))
    assert (whole.mean, whole.n, whole.unparsed) == (0.25, 4, 3) == (level.mean, level.n, level.unparsed)
    for _ in range(3):  # never random
        assert accuracy_metrics([answered(s, text) for s, text in zip(samples, texts)])[0] == whole


def test_several_responses_to_a_question_count_once():
    rows = [answered(question("a", "A"), say("A"), say("B"), say("?")), answered(question("b", "B"), say("B"))]
    [metric] = accuracy_metrics(rows)
    assert metric.mean == pytest.approx((1 / 3 + 1) / 2) and (metric.n, metric.unparsed) == (2, 1)


def test_a_clip_that_did_not_open_is_left_out():
    lost = {"id": "c", "kind": "choice", "error": "c.mp4: no such file", "meta": {"level": "L1"}}
    rows = [answered(question("a", "A", meta={"level": "L1"}), say("A")), lost]
    assert [(m.mean, m.n, m.unreadable) for m in accuracy_metrics(rows, by=("level",))] == [(1.0, 1, 1)] * 2
    assert accuracy_metrics([lost]) == []


def test_seed_bench_by_level_and_domain(tmp_path):
    rows = [SEED_VALIDATION | {"sample_id": i, "task_level": f"L{1 + i % 3}", "domain": ("Work", "Hobby")[i // 3 % 2]}
            for i in range(12)]
    samples = load_benchmark("seed_bench_r1", write(tmp_path / "validation.jsonl", rows))
    asked = [answered(s, say("C" if s.meta["level"] == "L1" or s.meta["domain"] == "Hobby" else "A")) for s in samples]
    found = {m.subset: (m.mean, m.n) for m in BENCHMARKS["seed_bench_r1"].metrics(asked)}
    assert found == {"all": (8 / 12, 12), "level L1": (1.0, 4), "level L2": (0.5, 4), "level L3": (0.5, 4),
                     "domain Hobby": (1.0, 6), "domain Work": (2 / 6, 6)}


def test_splits_with_the_same_ids_and_no_levels(tmp_path):
    rows = [{key: value for key, value in SEED_VALIDATION.items() if key != "task_level"} | {"sample_id": i} for i in range(2)]
    for level in ("L1", "L3"):
        write(tmp_path / f"annotations/validation_{level}.jsonl", rows)
    samples = load_benchmark("seed_bench_r1", tmp_path, split="L1,L3")
    assert [s.id for s in samples] == ["L1/0", "L1/1", "L3/0", "L3/1"]
    found = BENCHMARKS["seed_bench_r1"].metrics([answered(s, say("C" if s.id == "L3/1" else "A")) for s in samples])
    assert {m.subset: m.mean for m in found if "level" in m.subset} == {"level L1": 0.0, "level L3": 0.5}


def test_longvideobench_by_duration(tmp_path):
    rows = [LONGVIDEOBENCH | {"id": str(i), "duration_group": seconds, "question_category": "T3E"}
            for i, seconds in enumerate([3600, 15, 15, 60, 600])]
    samples = load_benchmark("longvideobench", write(tmp_path / "lvb_val.json", rows))
    found = BENCHMARKS["longvideobench"].metrics([answered(s, say("C" if s.id in "02" else "B")) for s in samples])
    assert [(m.subset, m.mean) for m in found] == [
        ("all", 2 / 5), ("duration_group 15", 0.5), ("duration_group 60", 0.0), ("duration_group 600", 0.0),
        ("duration_group 3600", 1.0), ("question_category T3E", 2 / 5)]


def vsi_rows() -> list[dict]:
    row = VIDEO_R1 | {"path": "./Evaluation/VSI-Bench/scannet/scene0011_00.mp4"}
    number = row | {"problem_type": "regression", "options": [], "original_question_type": "object_abs_distance"}
    types = ("object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard", "route_planning")
    rows = [number | {"solution": f"<answer>{truth}</answer>"} for truth in ("10", "4", "0")]
    rows += [row | {"original_question_type": one} for one in (*types, types[0])]
    return [row | {"problem_id": i} for i, row in enumerate(rows)]


def test_vsi_bench_by_type(tmp_path):
    samples = load_benchmark("vsibench", write(tmp_path / "eval_vsibench.json", vsi_rows()))
    assert Counter(s.meta.get("judge") for s in samples) == {"mra": 3, None: 5}
    # 12 for 10: an error of 0.2 keeps 0.50 to 0.80, 7 of 10. "about 4" cannot be read. 0 for 0 is right.
    texts = ["12", "about 4", "0", "A", "B", "A", "B", "B"]
    metrics = vsi_metrics([answered(s, say(text)) for s, text in zip(samples, texts)])
    found = {(m.subset, m.name): m for m in metrics}
    field = "original_question_type"
    assert found["numbers", "MRA"].mean == pytest.approx((0.7 + 0 + 1) / 3) and found["numbers", "MRA"].unparsed == 1
    assert found["choices", "accuracy"].mean == pytest.approx(2 / 5)
    assert found[f"{field} object_rel_direction_easy", "accuracy"].mean == 0.5
    directions = (0.5 + 0 + 1) / 3
    assert found["all", "mean of the types"].mean == pytest.approx((1.7 / 3 + directions + 0.0) / 3)
    assert found["all", "mean of the types"].n == 8


def test_the_toy_world_has_the_papers_recall():
    grounding = [Sample(id=str(i), question="?", kind="grounding", spans=((0, 10),), meta={"level": "L1"}) for i in range(4)]
    rows = [answered(s, say(text)) for s, text in zip(grounding, ("0 to 5", "0 to 10", "20 to 30", "soon"))]
    found = by_name(generic_metrics(rows))
    assert found["mIoU"].mean == pytest.approx(1.5 / 4) and found["mIoU"].unparsed == 1
    assert [found[f"R@{m}"].mean for m in (0.3, 0.5, 0.7)] == [0.5, 0.25, 0.25]  # an IoU of 0.5 is not above 0.5


def test_the_papers_figures_belong_to_a_benchmark():
    for name in BENCHMARKS:
        figures = paper_results(name)
        assert all(figure.benchmark == name and 0 < figure.percent < 100 for figure in figures)
        assert len({(f.subset, f.name, f.model, f.method) for f in figures}) == len(figures)
    table_4 = {"level L1": 48.1, "level L2": 51.1, "level L3": 44.0}  # the same runs stand in Tables 1 and 4
    assert {f.subset: f.percent for f in paper_results("seed_bench_r1")
            if (f.model, f.method) == ("Qwen2.5-VL-3B", "DeepVideo-R1")} == table_4


# --- prompts that ask for what is judged --------------------------------------------------------------------------


def test_a_response_as_the_prompt_asks_for_it_gets_every_reward():
    sample = question("g", "B", spans=((3.5, 7.0), (9.0, 12.5)))
    text = question_text(sample)
    shown = re.findall(r"\[\(.*?\)\]", text)
    assert EVIDENCE in text and len(shown) == 2
    assert total_reward(say("B", shown[1]), sample)[1] == {"format": 1.0, "accuracy": 1.0, "iou": 1.0}
    assert total_reward(say("B", shown[0]), sample)[1] == {"format": 1.0, "accuracy": 1.0, "iou": 0.5}
    assert total_reward(say("B"), sample)[1]["format"] == 0.0
    for other in (question("c", "B"), Sample(id="w", question="?", kind="grounding", spans=((1, 2),))):
        assert "glue" not in question_text(other)


# --- each benchmark's files, from the command line ----------------------------------------------------------------


def fixture_files(name: str, folder: Path, video: Path) -> tuple[list[str], int]:
    "Writes a benchmark's files in their exact shape, with videos; returns the flags that read them, and the questions."
    put = lambda path: (folder / path).parent.mkdir(parents=True, exist_ok=True) or shutil.copy(video, folder / path)
    if name == "seed_bench_r1":
        for level in ("L1", "L2"):
            rows = [SEED_VALIDATION | {"sample_id": i, "task_level": level} for i in range(2)]
            rows[1] |= {"task_progress_metadata": []}  # the image alone
            write(folder / f"annotations/validation_{level}.jsonl", rows)
        put(f"videos/EpicKitchens/{SEED_VALIDATION['video_basename']}")
        picture = folder / "images/EpicKitchens" / SEED_VALIDATION["current_observation_basename"]
        picture.parent.mkdir(parents=True)
        from PIL import Image

        Image.new("RGB", (60, 40), "green").save(picture)
        return ["--split", "L1,L2"], 4
    if name == "longvideobench":
        write(folder / "lvb_val.json", [LONGVIDEOBENCH, LONGVIDEOBENCH | {"id": "vid_1", "duration_group": 15}])
        put("videos/vid.mp4")
        return [], 2
    if name == "nextgqa":
        write_nextgqa(folder, [NEXTGQA, NEXTGQA | {"qid": "3"}],
                      {NEXTGQA["video_id"]: {"duration": 90, "fps": 29.97, "location": {"1": [[1.2, 5.8]], "3": [[12.1, 17.1], [20.0, 23.5]]}}})
        put(f"media/{NEXTGQA['video_id']}.mp4")
        return ["--root", str(folder / "media")], 2
    if name == "videochat_r1_gqa":
        write(folder / "nextgqa_test.json", [GLUE])
        put(GLUE["video"])
        return ["--split", "test"], 1
    rows = vsi_rows() if name == "vsibench" else [VIDEO_R1_EVAL, VIDEO_R1_EVAL | {"problem_id": 2, "solution": "<answer>B</answer>"}]
    write(folder / f"eval_{name}.json", rows)
    for row in rows:
        put(row["path"])
    return [], len(rows)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def evaluate_arguments(model, data, out, *more) -> list:
    return ["evaluate", "--model", model, "--data", data, "--out", out, "--max-tokens", 6, "--prompt.max-frames", 4, *more]


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "world"])
def test_a_benchmark_end_to_end(trained_model, tiny_world, tmp_path, capsys, name):
    folder = tmp_path / "set"
    folder.mkdir()
    flags, n = fixture_files(name, folder, next((tiny_world / "videos").glob("*.mp4")))
    command = evaluate_arguments(trained_model, folder, tmp_path / "out", "--benchmark", name, *flags)
    code, stdout, stderr = run(capsys, *command)
    assert code == 0, stderr
    rows, saved = read_jsonl(tmp_path / "out/rows.jsonl"), json.loads((tmp_path / "out/benchmark.json").read_text())
    assert len(rows) == saved["questions"] == n and saved["unreadable"] == saved["skipped_rows"] == 0
    for row in rows:
        assert {"id", "prompt", "frames", "responses", "parsed", "parts", "answer", "meta"} <= set(row)
        assert row["question"] in row["prompt"] and all(f"{chr(65 + i)}. {o}" in row["prompt"] for i, o in enumerate(row["options"]))
        kinds = Counter(frame["modality"] for frame in row["frames"])
        assert row["prompt"].count("<|video_pad|>") == kinds["video"] and row["prompt"].count("<|image_pad|>") == kinds["image"]
        assert all(0 < len(frame["seconds"]) <= 4 for frame in row["frames"])
        assert len(row["responses"]) == len(row["parsed"]) == 1
    assert saved["figures"][0]["n"] + saved["figures"][0]["unreadable"] <= n
    figures = {(f["subset"], f["name"]) for f in saved["figures"]}
    expected = {"vsibench": ("all", "mean of the types"), "nextgqa": ("type CW", "Acc@GQA"), "videochat_r1_gqa": ("all", "mIoU of unions"),
                "seed_bench_r1": ("level L2", "accuracy"), "longvideobench": ("duration_group 15", "accuracy")}
    assert expected.get(name, ("all", "accuracy")) in figures
    assert all(0 <= f["low"] <= f["mean"] <= f["high"] <= 1 for f in saved["figures"])
    assert ("paper" in stdout) == bool(saved["paper"]) and "rows:" in stdout
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    assert run(capsys, *command)[0] == 0 and (tmp_path / "out/rows.jsonl").read_bytes() == before  # nothing is asked twice


def test_a_test_split_without_answers_gives_predictions(trained_model, tiny_world, tmp_path, capsys):
    row = {key: value for key, value in LONGVIDEOBENCH.items() if key != "correct_choice"}
    write(tmp_path / "lvb_test_wo_gt.json", [row])
    (tmp_path / "videos").mkdir()
    shutil.copy(next((tiny_world / "videos").glob("*.mp4")), tmp_path / "videos/vid.mp4")
    code, stdout, stderr = run(capsys, *evaluate_arguments(
        trained_model, tmp_path, tmp_path / "out", "--benchmark", "longvideobench", "--split", "test"))
    assert code == 0 and "Nothing to measure" in stdout, stderr
    [row] = read_jsonl(tmp_path / "out/rows.jsonl")
    assert "accuracy" not in row["parts"] and "the letter of the right option" in row["prompt"]


def test_the_toy_world_with_and_without_its_name(trained_model, tiny_world, tmp_path, capsys):
    plain = ["--prompt.template", "plain", "--max-tokens", 24]
    one = evaluate_arguments(trained_model, tiny_world, tmp_path / "a", *plain, "--benchmark", "world", "--split", "L1")
    two = evaluate_arguments(trained_model, tiny_world / "L1.jsonl", tmp_path / "b", *plain)
    assert run(capsys, *one)[0] == run(capsys, *two)[0] == 0
    named, bare = (read_jsonl(tmp_path / name / "rows.jsonl") for name in "ab")
    assert [row["responses"] for row in named] == [row["responses"] for row in bare]
    figures = json.loads((tmp_path / "a/benchmark.json").read_text())["figures"]
    summary = json.loads((tmp_path / "b/summary.json").read_text())
    assert [figures[0][key] for key in ("mean", "low", "high")] == summary["all"]["accuracy"]
    assert figures[0]["unparsed"] == summary["all"]["unparsed"] == sum(row["parsed"] == [None] for row in bare)


# --- going on, and several processes ------------------------------------------------------------------------------


class Rank:
    "Stands in for the accelerator of one of several processes, which are threads here."

    def __init__(self, process_index: int, barrier: threading.Barrier):
        self.process_index, self.num_processes, self.wait_for_everyone = process_index, barrier.parties, barrier.wait


@pytest.fixture(scope="module")
def asking(trained_model, tiny_world):
    "A function that evaluates some questions, the questions, and the rows that one process gives."
    policy, processor = load_policy(trained_model), load_processor(trained_model)
    samples = load_samples(tiny_world / "rl.jsonl")

    def ask(path, accelerator=None, **more):
        return evaluate(policy, processor, samples, prompt=PLAIN, max_tokens=24, batch_prompts=1, path=path,
                        accelerator=accelerator, **more)

    return ask, samples, ask(None)


def ask_together(ask, path: Path, count: int, dies: int | None = None) -> list:
    "What each of several processes returns or raises; one may die after its second question, and ends the others."
    barrier, found = threading.Barrier(count, timeout=60), [None] * count

    def work(rank: int) -> None:
        def die(done: int, total: int) -> None:
            if rank == dies and len(read_jsonl(path.with_name(f"rows.process{rank}.jsonl"))) == 2:
                barrier.abort()
                raise SystemError("killed")

        try:
            found[rank] = ask(path, Rank(rank, barrier), on_progress=die)
        except (SystemError, threading.BrokenBarrierError) as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_cover_every_question_once(asking, asked, tmp_path, count):
    ask, samples, whole = asking
    assert ask_together(ask, tmp_path / "rows.jsonl", count) == [whole] * count
    assert sorted(asked) == sorted(sample.id for sample in samples)
    assert read_jsonl(tmp_path / "rows.jsonl") == whole and not list(tmp_path.glob("rows.process*"))


@pytest.mark.parametrize("later", [1, 2, 4])
def test_a_dead_process_loses_nothing_that_it_has_written(asking, asked, tmp_path, later):
    ask, samples, whole = asking
    path = tmp_path / "rows.jsonl"
    found = ask_together(ask, path, 3, dies=1)
    assert isinstance(found[1], SystemError) and all(isinstance(one, threading.BrokenBarrierError) for one in found[::2])
    rows = [row for part in tmp_path.glob("rows.process*.jsonl") for row in read_jsonl(part)]
    assert len(read_jsonl(tmp_path / "rows.process1.jsonl")) == 2 and len(rows) == 2 + 4 + 4 and not path.exists()
    with (tmp_path / "rows.process1.jsonl").open("a") as file:
        file.write('{"id": "torn in the midd')
    asked.clear()
    assert (ask_together(ask, path, later) if later > 1 else [ask(path)]) == [whole] * later
    assert set(asked) == {sample.id for sample in samples} - {row["id"] for row in rows} and len(asked) == 2
    assert read_jsonl(path) == whole and not list(tmp_path.glob("rows.process*"))


def test_a_question_that_was_corrected_or_whose_clip_came_back_is_asked_again(asking, asked, tmp_path):
    ask, samples, whole = asking
    path = tmp_path / "rows.jsonl"
    lost = {key: whole[3][key] for key in ("id", "question", "subset", "kind", "temperature", "meta")} | {"error": "gone"}
    rows = [whole[0] | {"question": "an older wording ?"}, *whole[1:3], lost, *whole[4:]]
    write(path, rows)
    assert ask(path) == whole and sorted(asked) == sorted([samples[0].id, samples[3].id])


def test_clips_that_take_too_long_are_counted_and_tried_again(trained_model, tiny_world, tmp_path, capsys, monkeypatch):
    command = evaluate_arguments(trained_model, tiny_world, tmp_path / "out", "--benchmark", "world", "--split", "grounding")
    with monkeypatch.context() as patch:
        patch.setattr("deepvideo_r1.data.visuals.read_video", hang)
        assert run(capsys, *command, "--timeout", 0.5)[0] == 0
    rows, saved = read_jsonl(tmp_path / "out/rows.jsonl"), json.loads((tmp_path / "out/benchmark.json").read_text())
    assert all("took more than 0.5 seconds" in row["error"] for row in rows) and saved["unreadable"] == len(rows) == 2
    assert saved["figures"] == []
    assert run(capsys, *command)[0] == 0
    assert all("error" not in row for row in read_jsonl(tmp_path / "out/rows.jsonl"))
    assert json.loads((tmp_path / "out/benchmark.json").read_text())["unreadable"] == 0


def test_clips_are_read_apart_unless_a_lesson_asks_otherwise(tiny_model, tiny_world, monkeypatch):
    from deepvideo_r1.data import visuals

    guarded = []
    monkeypatch.setattr(visuals, "read_video_safely", lambda path, *, read, timeout, **how: guarded.append(timeout) or read(path, **how))
    sample, processor = load_samples(tiny_world / "L1.jsonl")[0], load_processor(tiny_model)
    clips = [visuals.load_visuals(sample, processor, **how)[0][1] for how in ({}, {"timeout": 9}, {"timeout": None})]
    assert guarded == [60.0, 9] and all(torch.equal(clip.frames, clips[0].frames) for clip in clips)


def test_several_processes_need_a_file(asking):
    with pytest.raises(ValueError, match="2 processes need a path"):
        asking[0](None, Rank(0, threading.Barrier(2)))


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
          str(Path(sys.executable).with_name("deepvideo-r1"))]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def launch(*arguments) -> subprocess.Popen:
    return subprocess.Popen([*LAUNCH, *map(str, arguments)], env=ENVIRONMENT, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_give_the_table_of_one(trained_model, tiny_world, tmp_path, capsys):
    more = ["--prompt.template", "plain", "--max-tokens", 24, "--benchmark", "world", "--split", "L1,L2,grounding"]
    command = lambda out: evaluate_arguments(trained_model, tiny_world, tmp_path / out, *more)
    process = launch(*command("two"))
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.count("rows:") == 1 and stderr.count("2 processes share 10 questions") == 1  # one process speaks
    assert run(capsys, *command("one"))[0] == 0
    for name in ("rows.jsonl", "benchmark.json", "benchmark.md", "summary.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert not list((tmp_path / "two").glob("rows.process*"))


@pytest.mark.slow
def test_a_killed_process_and_then_one_alone(tiny_model, tiny_world, tmp_path, capsys):
    more = ["--max-tokens", 300, "--batch-prompts", 1, "--benchmark", "world", "--split", "L1,L2,L3,grounding"]
    command = lambda out: evaluate_arguments(tiny_model, tiny_world, tmp_path / out, *more)  # it never ends a response
    process = launch(*command("two"))
    part, give_up = tmp_path / "two/rows.process1.jsonl", time.monotonic() + 90
    while not (part.exists() and part.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    workers = [int(line.split()[0]) for line in subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout.splitlines()]
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    left = {row["id"] for file in (tmp_path / "two").glob("rows*.jsonl") for row in read_jsonl(file)}
    code, _, stderr = run(capsys, *command("two"))
    assert code == 0, stderr
    assert run(capsys, *command("one"))[0] == 0
    rows = [read_jsonl(tmp_path / name / "rows.jsonl") for name in ("one", "two")]
    assert rows[0] == rows[1] and 2 <= len(left) < len(rows[0])


# --- mistakes -----------------------------------------------------------------------------------------------------


def check_one_line(found: tuple[int, str, str], *parts) -> None:
    code, stdout, stderr = found
    assert code == 2 and stdout == "" and len(stderr.splitlines()) == 1, stderr
    assert all(str(part) in stderr for part in parts), stderr


def test_what_cannot_be_asked(trained_model, tiny_world, tmp_path, capsys):
    out = tmp_path / "out"
    command = lambda data, *more: run(capsys, *evaluate_arguments(trained_model, data, out, *more))
    check_one_line(command(tiny_world, "--benchmark", "vsi-bench"), "'vsi-bench'", *BENCHMARKS)
    check_one_line(command(tiny_world, "--benchmark", "nextgqa", "--split", "train"), "'train'", "nextgqa are val, test")
    check_one_line(command(tiny_world, "--benchmark", "world"), tiny_world, "needs a split", "L1, L2, L3, grounding")
    check_one_line(command(tiny_world, "--benchmark", "mvbench"), tiny_world, "eval_mvbench.json")
    check_one_line(command(tiny_world / "L1.jsonl", "--benchmark", "mvbench"), "L1.jsonl", "'problem_type' is missing", "format video_r1")
    check_one_line(command(tiny_world / "L1.jsonl", "--benchmark", "nextgqa"), "gsub_L1.json", "no such file", "format nextgqa")
    check_one_line(command(tmp_path / "gone.jsonl", "--benchmark", "mmvu"), "gone.jsonl", "no such file")
    check_one_line(command(tiny_world / "L1.jsonl", "--batch-prompts", 0), "batch_prompts", "1 or more")
    assert not out.exists()


def test_rows_of_another_model_or_prompt_are_refused(trained_model, tiny_model, tiny_world, tmp_path, capsys):
    first = evaluate_arguments(trained_model, tiny_world / "L1.jsonl", tmp_path / "out")
    assert run(capsys, *first)[0] == 0
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    other = evaluate_arguments(tiny_model, tiny_world / "L1.jsonl", tmp_path / "out")
    check_one_line(run(capsys, *other), "another config", "model was", tiny_model)
    check_one_line(run(capsys, *first, "--prompt.template", "plain"), "prompt.template was 'think', is 'plain'")
    assert run(capsys, *first, "--batch-prompts", 2)[0] == 0 and (tmp_path / "out/rows.jsonl").read_bytes() == before


def test_bad_rows_are_told_and_counted_or_stop_the_command(trained_model, tiny_world, tmp_path, capsys):
    rows = [json.loads(line) | {"video": str(tiny_world / json.loads(line)["video"])}
            for line in (tiny_world / "L1.jsonl").read_text().splitlines()]
    path = write(tmp_path / "L1.jsonl", [rows[0], rows[1] | {"kind": "essay"}, rows[2], rows[3] | {"answer": "many"}])
    for more in ([], ["--benchmark", "world"]):
        out = tmp_path / f"out{len(more)}"
        code, stdout, stderr = run(capsys, *evaluate_arguments(trained_model, path, out, *more))
        assert code == 0 and f"2 bad rows of {path} left out" in stderr
        assert f"{path}, line 2: " in stderr and f"{path}, line 4: field 'answer'" in stderr
        assert len(read_jsonl(out / "rows.jsonl")) == 2
        check_one_line(run(capsys, *evaluate_arguments(trained_model, path, tmp_path / "no", *more, "--strict")), f"{path}, line 2")
        assert not (tmp_path / "no").exists()
    assert json.loads((tmp_path / "out2/benchmark.json").read_text())["skipped_rows"] == 2


# --- a data set before it is used ---------------------------------------------------------------------------------


def test_data_check(tiny_world, tmp_path, capsys):
    rows = [json.loads(line) | {"video": str(tiny_world / json.loads(line)["video"])}
            for line in (tiny_world / "rl.jsonl").read_text().splitlines()]
    (tmp_path / "film.mp4").write_text("a film")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(Path(rows[4]["video"]).read_bytes()[:2000])
    rows[0] |= {"video": str(tmp_path / "film.mp4")}
    rows[2] |= {"video": str(tmp_path / "gone.mp4")}
    rows[4] |= {"video": str(cut)}
    rows[6] |= {"kind": "choice", "options": ["3", "4"], "answer": "B"}
    rows[7] |= {"answer": "many"}
    path = write(tmp_path / "rows.jsonl", rows)
    code, stdout, stderr = run(capsys, "data", "check", path, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert code == 0 and stderr.splitlines() == ["files: started", "files: done"]
    assert (report["rows"], report["left_out"], report["kinds"]) == (11, 1, {"number": 10, "choice": 1})
    assert set(report["bad"]) == {str(tmp_path / name) for name in ("film.mp4", "gone.mp4", "cut.mp4")}
    assert report["options"] == {"2": 1} and len(set(report["seconds"])) == 1 and report["seconds"][0] == pytest.approx(6, abs=0.01)
    assert report["opened"] - len(report["bad"]) == len(report["frames"]) > 0 and report["complete"]
    assert "line 8: field 'answer'" in stdout and str(cut) in stdout and "3 bad" in stdout
    assert (tmp_path / "out/check.png").read_bytes()[:4] == b"\x89PNG"
    code, stdout, _ = run(capsys, "data", "check", path, "--every", 3, "--out", tmp_path / "third")
    assert code == 0 and json.loads((tmp_path / "third/check.json").read_text())["opened"] == -(-report["files"] // 3)


def test_data_check_with_a_model_reads_the_rows_once(tiny_world, tiny_model, tmp_path, capsys, monkeypatch):
    rows = [json.loads(line) | {"video": str(tiny_world / json.loads(line)["video"])}
            for line in (tiny_world / "rl.jsonl").read_text().splitlines()[:4]]
    rows[1] |= {"answer": "many"}
    rows[2] |= {"question": "how many points ? " * 3000}
    path, calls = write(tmp_path / "rows.jsonl", rows), []
    monkeypatch.setattr("deepvideo_r1.data.check.load_samples", lambda *a, **k: pytest.fail("the rows were read again"))
    monkeypatch.setattr("deepvideo_r1.data.datasets.load_samples",
                        lambda *a, **k: calls.append(a) or load_samples(*a, **k))
    code, stdout, _ = run(capsys, "data", "check", path, "--model", tiny_model, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert code == 0 and len(calls) == 1
    assert (report["rows"], report["left_out"], report["asked"], list(report["unaskable"])) == (3, 1, 3, [rows[2]["id"]])
    assert f"questions: 3 tried with {tiny_model}, 1 cannot be asked" in stdout


def test_data_check_of_files_that_take_too_long(tiny_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("deepvideo_r1.data.check.import_module", lambda name: SimpleNamespace(probe_video=hang))
    code, stdout, _ = run(capsys, "data", "check", tiny_world / "L1.jsonl", "--timeout", 0.5, "--out", tmp_path)
    assert code == 0 and stdout.count("took more than 0.5 seconds and was cut off") == 2 and "2 bad" in stdout


def test_data_check_stops_and_reports(tiny_world, tmp_path, capsys, monkeypatch):
    from deepvideo_r1.data import check

    read, opened = check.read_video_safely, []

    def interrupted(path, **how):
        opened.append(path)
        if len(opened) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return read(path, **how)

    monkeypatch.setattr(check, "read_video_safely", interrupted)
    code, stdout, stderr = run(capsys, "data", "check", tiny_world / "rl.jsonl", "--out", tmp_path)
    assert code == 130 and "opened 2" in stdout and "interrupted" in stdout and "reported" in stderr.splitlines()[-1]
    assert json.loads((tmp_path / "check.json").read_text())["complete"] is False


def test_data_check_of_what_is_no_data_set(tiny_world, tmp_path, capsys):
    check_one_line(run(capsys, "data", "check", tmp_path / "gone.jsonl"), "gone.jsonl", "no such file")
    check_one_line(run(capsys, "data", "check", tiny_world / "L1.jsonl", "--format", "csv"), "'csv'", "jsonl, seed_bench_r1")
    check_one_line(run(capsys, "data", "check", tiny_world / "L1.jsonl", "--every", 0), "every must be 1 or more")


def test_data_check_of_the_real_annotations(shared_dir, tmp_path, capsys):
    code, stdout, _ = run(capsys, "data", "check", shared_dir / "nextgqa", "--format", "nextgqa", "--every", 100, "--out", tmp_path)
    assert code == 0 and "rows: 3358 good, 0 left out" in stdout and "3358 questions with 5" in stdout
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["files"] == 567 and len(report["bad"]) == report["opened"] == 6  # three videos have no question; the files are not there


@pytest.mark.parametrize("name, format", [("seed_bench_r1", "seed_bench_r1"), ("nextgqa", "nextgqa"), ("mvbench", "video_r1")])
def test_a_policy_trains_on_public_formats(trained_model, tiny_world, tmp_path, capsys, name, format):
    folder = tmp_path / "set"
    folder.mkdir()
    fixture_files(name, folder, next((tiny_world / "videos").glob("*.mp4")))
    data, flags = {"seed_bench_r1": (folder, ("--split", "L1")), "nextgqa": (folder, ("--split", "val", "--root", folder / "media")),
                   "mvbench": (folder / "eval_mvbench.json", ())}[name]
    code, stdout, stderr = run(capsys, "train", "--model", trained_model, "--data", data, "--format", format, *flags, "--out", tmp_path / "out",
                               "--steps", 1, "--train.prompts-per-step", 2, "--rollout.group-size", 2, "--rollout.max-tokens", 6,
                               "--prompt.max-frames", 4, "--prompt.max-pixels", 3136)
    assert code == 0, stderr
    row, = read_jsonl(tmp_path / "out/metrics.jsonl")
    assert row["groups"] == 2 and row["bad_clips"] == 0 and (tmp_path / "out/model/model.safetensors").exists()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["format"] == format
