"""Rows of any shape: each is good from the file to the reward, or is left out with its line and its field."""
import csv
import io
import json
import random
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from test_datasets import GLUE, LONGVIDEOBENCH, NEXTGQA, OWN, SEED_TRAIN, SEED_VALIDATION, VIDEO_R1, write

from deepvideo_r1.data.check import describe_rows
from deepvideo_r1.data.datasets import DataError, load_samples
from deepvideo_r1.hints import make_hint
from deepvideo_r1.model.prompt import question_text
from deepvideo_r1.reward import total_reward

COUNT = {**OWN, "answer": 3, "kind": "number", "options": [], "meta": {"level": "L1", "trace": "One. Two. Three."}}
WHEN = {"question": "when ?", "kind": "grounding", "spans": [[1, 2.5]], "video": "a.mp4", "meta": {"duration": 9}}
SAID = {"question": "what ?", "kind": "text", "answer": "a dog", "images": ["a.png"], "id": "x", "response": "so",
        "show_answer": False, "meta": {"judge": "free_form", "level": "L2", "trace": "A dog barks.\nSo a dog."}}
BASES = [("jsonl", OWN), ("jsonl", COUNT), ("jsonl", WHEN), ("jsonl", SAID), ("seed_bench_r1", SEED_TRAIN),
         ("seed_bench_r1", SEED_VALIDATION), ("video_r1", VIDEO_R1), ("longvideobench", LONGVIDEOBENCH),
         ("video_r1", {**VIDEO_R1, "problem_type": "numerical", "solution": "<answer>4</answer>"}),
         ("videochat_r1_gqa", GLUE)]
VALUES = [
    None, True, False, 0, -1, 2, 39.0, 1.5, 10**300, 10**400, -(10**300), float("nan"), float("inf"), 1e308, "", " ", "\n", "A", "b",
    "[/b]", "[bold red]", "[link=http://x]", "\ud800", "a\udfffb", "a\0b", "\x1b[31m", "\u202e", "<|im_end|>", "<|vision_start|>x",
    "<video>", "<image>\nwhat?", "x" * 5000, "nan", "inf", "1e400", "9" * 5000, "L1", "3", "<answer>A</answer>", "<think>", "video",
    "choice", "number", "text", "grounding", "mra", "a.mp4", "../../x", "C:\\x", "١٢", [], [[]], [None], ["A. x"], ["A. x", "A. y"],
    ["A. x", "B. y", "z"], ["B. x", "A. y"], ["x", 1, 2.5], ["x", ["y"]], ["<image>", "y"], ["\ud800", "y"], ["x"] * 27, [10**300],
    [float("nan"), "x"], [[1, 2]], [[2, 1]], [[-0.1, 5]], [[0, 10**300]], [[0, 10**400]], [["a", "b"]], [[1, 2, 3]], [[True, False]],
    [1, 2], [[1e308, 1e308]], [[8, 12]], [[-5, -1]], {}, {"a": [1]}, {"level": ["L1"]}, {"level": 3}, {"level": {"a": 1}}, {"level": True},
    {"trace": ["a", "b"]}, {"trace": 5}, {"trace": ""}, {"trace": "<think>"}, {"judge": "mra"}, {"judge": ["mra"]}, {"judge": 1},
    {"decimals": 10**300}, {"decimals": "2"}, {"decimals": -5}, {"unlabelled": "yes"}, {"unlabelled": True}, {"duration": "9"},
    {"duration": -1}, {"duration": 10**400}, {"shown_answer": 5}, {"[/b]": "[/b]"}, {"\ud800": 1}, {"level": "[/b]"},
    {"official_spans": 5}, {"removed_marks": [1]}, {"split": 3}, {"": ""}]


def nested(draw: random.Random, depth: int = 0):
    "A value inside of lists and objects."
    value = draw.choice(VALUES)
    return value if depth > 3 or draw.random() < 0.6 else draw.choice([[value, nested(draw, depth + 1)], {"level": value, "x": nested(draw, depth + 1)}])


def fuzzed(draw: random.Random, base: dict) -> dict:
    "A row with one to three fields changed: another value, a changed element, no field, or one more."
    row = json.loads(json.dumps(base))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        name, change = draw.choice([*row, "meta", "spans", "id"]) if row else "id", draw.random()
        if change < 0.1:
            row.pop(name, None)
        elif change < 0.15:
            row[draw.choice(["colour", "[/b]", "\ud800", "", "meta", "spans", "duration"])] = draw.choice(VALUES)
        elif change < 0.35 and isinstance(row.get(name), (list, dict)) and row[name]:
            key = draw.choice(list(row[name])) if isinstance(row[name], dict) else draw.randrange(len(row[name]))
            row[name][key] = nested(draw)
        else:
            row[name] = nested(draw)
    return row


def use(samples) -> None:
    "All that happens to a question whose files are not opened yet: prompt, rewards, hint, report, table."
    for sample in samples:
        shown = question_text(sample, template="plain")
        for text in (sample.id, shown, sample.answer, sample.video or "", *sample.images, *sample.options):
            assert isinstance(text, str) and text.encode() is not None and "\0" not in (sample.video or "")
        for answer in ("A", "3", "1 to 2", sample.answer, ""):
            response = f"<think>x</think><answer>{answer}</answer><glue>[(1, 2)]</glue>"
            total, parts = total_reward(response, sample)
            assert 0 <= total <= 3 and all(0 <= part <= 1 for part in parts.values())
        if sample.kind != "grounding" and not sample.meta.get("unlabelled") and "<" not in sample.answer:
            assert total_reward(f"<answer>{sample.answer}</answer>", sample)[1]["accuracy"] == 1.0
        trace = sample.meta.get("trace", "")
        if trace.strip() and "<think>" not in trace:
            make_hint(trace, 0.5, sample)
        assert isinstance(sample.meta.get("level", ""), str) and json.dumps(sample.meta).encode()
    table = Table("level", "question")
    for sample in samples:
        table.add_row(Text(sample.meta.get("level", "all")), Text(sample.question))
    Console(file=io.StringIO()).print(table)


def check(tmp_path: Path, format: str, rows: list[dict]) -> None:
    file = write(tmp_path / "rows.jsonl", rows)
    with warnings.catch_warnings(action="ignore"):
        try:
            samples = load_samples(file, format=format, strict=False)
            problems = samples.problems
        except DataError as error:
            samples, problems = [], error.problems
    assert len(samples) + len(problems) == len(rows)
    for problem in problems:
        assert problem.place.startswith("line ") and str(problem).startswith(f"{file}, {problem.place}: "), problem
        assert problem.field or str(problem).endswith("''") or "not JSON" in str(problem) or "field ''" in str(problem), problem
        assert "\n" not in str(problem) and str(problem).encode() and len(str(problem)) < len(str(file)) + 400, problem
    use(samples)
    json.dumps(describe_rows(samples, problems)).encode()


@pytest.mark.parametrize("number, each", [(i, 60) for i in range(len(BASES))] + [
    pytest.param(i, 400, marks=pytest.mark.slow) for i in range(len(BASES))])
def test_a_row_of_any_shape_is_good_or_named(tmp_path, number, each):
    format, base = BASES[number]
    draw = random.Random(1000 * each + number)
    rows = [{**fuzzed(draw, base)} for _ in range(each)]
    name = {"seed_bench_r1": "sample_id", "video_r1": "problem_id"}.get(format, "id")
    for i, row in enumerate(rows):  # two rows with one id are another error
        if isinstance(row.get(name), (int, str)) and not isinstance(row.get(name), bool) and str(row[name]).strip() and len(str(row[name])) < 50:
            row[name] = f"{row[name]}-{i}"
    check(tmp_path, format, rows)


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_each_value_in_each_field_of_a_row(tmp_path, value):
    for number, (format, base) in enumerate(BASES):
        rows = [{**base, name: value} for name in (*base, "meta", "spans", "options", "images", "id") if name in base or format == "jsonl"]
        check(tmp_path, format, [{**row, **({"id": str(i)} if format != "seed_bench_r1" and row.get("id") != value else {})} if format in (
            "jsonl", "longvideobench", "videochat_r1_gqa") else row for i, row in enumerate(rows)])


@pytest.mark.parametrize("seed", range(40))
def test_tables_with_their_intervals_are_good_or_named(tmp_path, seed):
    draw = random.Random(seed)
    rows = [{**NEXTGQA, "qid": str(i)} for i in range(8)]
    for row in rows[1:]:
        texts = [value for value in VALUES if isinstance(value, str) and "\ud800" not in value and "\udfff" not in value and "\0" not in value]
        row[draw.choice([name for name in row if name not in ("qid", "video_id")])] = draw.choice(texts)
    spans = {"4882821564": {"duration": 90, "fps": 29.97, "location": {str(i): [[1, 2]] for i in range(8)}}}
    place, value = draw.randrange(4), draw.choice([value for value in VALUES if value not in (None,)])
    if place == 0:
        spans["4882821564"] = value
    elif place == 1:
        spans["4882821564"][draw.choice(["duration", "fps", "location"])] = value
    else:
        spans["4882821564"]["location"][str(draw.randrange(8))] = value
    with (tmp_path / "val.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(NEXTGQA))
        table.writeheader()
        table.writerows(rows)
    write(tmp_path / "gsub_val.json", spans)
    write(tmp_path / "map_vid_vidorID.json", {"4882821564": draw.choice([[1], 5, "1104/4882821564", {"a": 1}])})
    with warnings.catch_warnings(action="ignore"):
        try:
            samples = load_samples(tmp_path, format="nextgqa", strict=False)
            problems = samples.problems
        except DataError as error:
            samples, problems = [], error.problems
    assert len(samples) + len(problems) == len(rows) and all(problem.field for problem in problems)
    use(samples)
