"""Public formats in their exact shapes, the real NExT-GQA validation split, bad rows, and orders that never change."""
import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepvideo_r1.core import Sample
from deepvideo_r1.data.datasets import FORMATS, DataError, load_samples
from deepvideo_r1.data.rows import answer_letter, shuffle_options, strip_letters

SEED_TRAIN = {
    "sample_id": 39, "video_source": "EpicKitchens", "video_id": "P07_113", "task_goal": "Cut and peel the onion",
    "question": "Considering the progress shown in the video and my current observation in the last frame, what action "
                "should I take next in order to cut and peel the onion?",
    "answer": "grab onion", "current_observation_frame": 9308,
    "task_progress_metadata": [{"narration_text": "open drawer", "start_frame": 9162, "stop_frame": 9203}],
    "negative_answers": ["open drawer", "grab knife", "cut onion", "close drawer", "wash hands"],
    "video_basename": "P07_113_39.mp4", "current_observation_basename": "P07_113_39.png"}
SEED_VALIDATION = {key: value for key, value in SEED_TRAIN.items() if key != "negative_answers"} | {
    "choice_a": "cut onion", "choice_b": "open drawer", "choice_c": "grab onion", "choice_d": "open drawer",
    "golden_choice_idx": "C", "domain": "Daily life", "scenario": "Cooking", "task_start_frame": 9000,
    "task_level": "L1"}
VIDEO_R1 = {
    "problem_id": 2, "problem": "What appears on the screen in Russian during the missile's ascent?",
    "data_type": "video", "problem_type": "multiple choice",
    "options": ["A. A YouTube subscription notification", "B. A military command", "C. A warning message",
                "D. A weather update"],
    "solution": "<answer>A</answer>", "path": "./LLaVA-Video-178K/liwei_youtube_videos/ytb_x.mp4",
    "data_source": "LLaVA-Video-178K/30_60_s_youtube_v0_1"}
VIDEO_R1_EVAL = {
    "problem_id": 1, "problem": "What kind of sugar is this, aldose or ketose?", "data_type": "video",
    "problem_type": "multiple choice", "original_question_type": "multiple-choice",
    "options": ["A. aldose", "B. ketose", *(f"{letter}. sugar {letter}" for letter in "CDEFGHI"), "J. sucrose"],
    "process": "", "solution": "<answer>J</answer>", "path": "./Evaluation/VideoMMMU/dev_Biology_3.mp4",
    "data_source": "https://www.youtube.com/watch?v=x"}
LONGVIDEOBENCH = {
    "id": "vid_0", "video_id": "vid", "video_path": "vid.mp4", "subtitle_path": "vid_en.json", "question": "which one?",
    "candidates": ["a cup", "a plate", "a book", "a hat"], "correct_choice": 2, "duration": 473.0,
    "duration_group": 600, "question_category": "T3E", "topic_category": "KH-Knowledge-History",
    "starting_timestamp_for_subtitles": 0}
GLUE = {
    "id": "4882821564_1", "video": "1104/4882821564.mp4", "question": "why did the boy pick up one present ?",
    "options": ["(A) share with the girl", "(B) approach lady sitting there", "(C) unwrap it",
                "(D) playing with toy train", "(E) gesture something"],
    "duration": 90, "glue": [[13.8, 29.8], [40, 41.5]], "type": "CW", "answer": "(C)"}
NEXTGQA = {
    "video_id": "4882821564", "frame_count": "2697", "width": "640", "height": "480",
    "question": "why did the boy pick up one present", "answer": "unwrap it", "qid": "1", "type": "CW",
    "a0": "share with the girl", "a1": "approach lady sitting there", "a2": "unwrap it", "a3": "playing with toy train",
    "a4": "gesture something"}
OWN = {"question": "what is cut ?", "kind": "choice", "options": ["a rope", "an onion"], "answer": "an onion"}
ROWS = {"seed_bench_r1": SEED_TRAIN, "video_r1": VIDEO_R1, "longvideobench": LONGVIDEOBENCH, "videochat_r1_gqa": GLUE,
        "jsonl": OWN}


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_nextgqa(folder: Path, rows, spans, split="val") -> Path:
    with (folder / f"{split}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(NEXTGQA))
        table.writeheader()
        table.writerows(rows)
    write(folder / f"gsub_{split}.json", spans)
    return folder


def load_one(tmp_path: Path, format: str, row: dict, **how) -> Sample:
    [sample] = load_samples(write(tmp_path / "rows.jsonl", [row]), format=format, **how)
    return sample


# --- SEED-Bench-R1 ---------------------------------------------------------------------------------------------------


def test_seed_bench_training_row(tmp_path):
    file = write(tmp_path / "annotations" / "training_6k.jsonl", [SEED_TRAIN])
    [sample] = load_samples(file, format="seed_bench_r1")
    assert [sample] == load_samples(file, format="seed_bench_r1")
    assert sample.id == "39" and sample.kind == "choice" and sample.question == SEED_TRAIN["question"]
    assert sample.options["ABCD".index(sample.answer)] == "grab onion"
    assert len(set(sample.options)) == 4 and set(sample.options) - {"grab onion"} < set(SEED_TRAIN["negative_answers"])
    assert sample.video == str(tmp_path / "videos/EpicKitchens/P07_113_39.mp4")
    assert sample.images == (str(tmp_path / "images/EpicKitchens/P07_113_39.png"),)
    assert sample.meta["task_goal"] == "Cut and peel the onion" and "level" not in sample.meta


def test_seed_bench_rows_without_progress_have_no_video(tmp_path):
    for row in (SEED_TRAIN, SEED_VALIDATION):
        sample = load_one(tmp_path, "seed_bench_r1", {**row, "task_progress_metadata": []})
        assert sample.video is None and len(sample.images) == 1


@pytest.mark.parametrize("level", ["L1", "L2", "L3"])
def test_seed_bench_levels(tmp_path, level):
    write(tmp_path / "annotations" / f"validation_{level}.jsonl", [{**SEED_VALIDATION, "task_level": level}])
    [sample] = load_samples(tmp_path, format="seed_bench_r1", split=level)
    assert sample.options == ("cut onion", "open drawer", "grab onion", "open drawer") and sample.answer == "C"
    assert sample.meta["level"] == level and sample.meta["split"] == level and sample.meta["domain"] == "Daily life"
    assert sample.video.startswith(str(tmp_path / "videos"))


def test_a_level_is_taken_from_a_mixed_file(tmp_path):
    rows = [{**SEED_VALIDATION, "sample_id": i, "task_level": f"L{1 + i % 3}"} for i in range(7)]
    file = write(tmp_path / "validation.jsonl", rows)
    assert [s.id for s in load_samples(file, format="seed_bench_r1", split="L1")] == ["0", "3", "6"]
    assert len(load_samples(file, format="seed_bench_r1")) == 7
    write(file, rows[:1])
    with pytest.raises(DataError, match="no rows of split L2"):
        load_samples(file, format="seed_bench_r1", split="L2")


@pytest.mark.parametrize("negatives", [
    ["open drawer", "open drawer", "grab onion", "sit"], ["Grab  Onion", "sit"], ["grab onion"] * 5 + ["sit"],
    ["sit", "SIT", "sit "], [" ", "sit"],
])
def test_repeated_options_never_mislabel(tmp_path, negatives):
    for seed in range(20):
        sample = load_one(tmp_path, "seed_bench_r1", {**SEED_TRAIN, "negative_answers": negatives}, seed=seed)
        assert sample.options["ABCD".index(sample.answer)] == "grab onion"
        assert sum(option.casefold().split() == ["grab", "onion"] for option in sample.options) == 1
        assert len(set(sample.options)) == len(sample.options) >= 2


def test_a_repeated_id_keeps_its_question(tmp_path):
    rows = [SEED_TRAIN, {**SEED_TRAIN, "question": "and then?"}, {**SEED_TRAIN, "question": "and now?"}]
    samples = load_samples(write(tmp_path / "rows.jsonl", rows), format="seed_bench_r1")
    assert [s.id for s in samples] == ["39", "39@line 2", "39@line 3"] and samples[2].question == "and now?"


# --- Video-R1 --------------------------------------------------------------------------------------------------------


def test_video_r1_choice(tmp_path):
    [sample] = load_samples(write(tmp_path / "Video-R1-260k.json", [VIDEO_R1]), format="video_r1")
    assert sample == load_samples(tmp_path, format="video_r1")[0]
    assert sample.options[0] == "A YouTube subscription notification" and sample.answer == "A"
    assert sample.video == str(tmp_path / "LLaVA-Video-178K/liwei_youtube_videos/ytb_x.mp4") and sample.images == ()
    assert sample.meta["problem_type"] == "multiple choice" and sample.meta["data_source"].startswith("LLaVA")


@pytest.mark.parametrize("problem_type, solution, kind, meta", [
    ("numerical", "42", "number", {"decimals": 2}), ("numerical", "1,234.50", "number", {"decimals": 2}),
    ("OCR", "STOP here", "text", {"judge": "ocr"}), ("free-form", "It is red.\nVery red.", "text",
                                                     {"judge": "free_form"}),
    ("regression", "3.75", "number", {"judge": "regression"}), ("regression", "0", "number", {"judge": "regression"}),
])
@pytest.mark.parametrize("data_type", ["image", "video"])
def test_video_r1_other_kinds(tmp_path, problem_type, solution, kind, meta, data_type):
    row = {**VIDEO_R1, "problem_type": problem_type, "solution": f"<answer>{solution}</answer>", "options": [],
           "data_type": data_type, "path": "./OCR/page.png"}
    sample = load_one(tmp_path, "video_r1", row, root="/media")
    assert (sample.kind, sample.answer, sample.options) == (kind, solution, ())
    assert meta.items() <= sample.meta.items()
    where = "/media/OCR/page.png"
    assert (sample.video, sample.images) == ((where, ()) if data_type == "video" else (None, (where,)))


def test_video_r1_evaluation_file_with_ten_options(tmp_path):
    write(tmp_path / "eval_videommmu.json", [VIDEO_R1_EVAL])
    [sample] = load_samples(tmp_path, format="video_r1", split="videommmu", root="/data")
    assert sample.answer == "J" and sample.options[9] == "sucrose" and len(sample.options) == 10
    assert sample.video == "/data/Evaluation/VideoMMMU/dev_Biology_3.mp4"
    assert sample.meta["original_question_type"] == "multiple-choice" and "response" not in sample.meta


def test_video_r1_trace_becomes_a_response(tmp_path):
    sample = load_one(tmp_path, "video_r1", {**VIDEO_R1, "process": "<think>It is.</think>"})
    assert sample.meta["response"] == "<think>It is.</think>\n<answer>A</answer>"


@pytest.mark.parametrize("split", ["mvbench", "tempcompass", "videomme", "videommmu", "vsibench", "mmvu"])
def test_the_six_evaluation_files_are_known_by_name(tmp_path, split):
    write(tmp_path / f"eval_{split}.json", [VIDEO_R1_EVAL, {**VIDEO_R1_EVAL, "problem_id": 2}])
    write(tmp_path / "Video-R1-260k.json", [VIDEO_R1])
    assert len(load_samples(tmp_path, format="video_r1", split=split)) == 2


# --- LongVideoBench --------------------------------------------------------------------------------------------------


def test_longvideobench(tmp_path):
    write(tmp_path / "lvb_val.json", [LONGVIDEOBENCH, {**LONGVIDEOBENCH, "id": "vid_1", "correct_choice": 0}])
    first, second = load_samples(tmp_path, format="longvideobench", split="val")
    assert (first.answer, second.answer) == ("C", "A") and first.options == tuple(LONGVIDEOBENCH["candidates"])
    assert first.video == str(tmp_path / "videos/vid.mp4")
    assert first.meta["duration_group"] == 600 and first.meta["starting_timestamp_for_subtitles"] == 0


def test_longvideobench_without_answers(tmp_path):
    row = {key: value for key, value in LONGVIDEOBENCH.items() if key != "correct_choice"}
    write(tmp_path / "lvb_test_wo_gt.json", [row])
    [sample] = load_samples(tmp_path, format="longvideobench", split="test")
    assert (sample.kind, sample.answer, sample.meta["unlabelled"]) == ("text", "@", True)
    assert sample.options == tuple(LONGVIDEOBENCH["candidates"])


# --- NExT-GQA --------------------------------------------------------------------------------------------------------


def test_nextgqa_official_files(tmp_path):
    rows = [NEXTGQA, {**NEXTGQA, "qid": "2", "a4": "unwrap it"},
            {**NEXTGQA, "qid": "7", "answer": "share with the girl"}]
    spans = {"4882821564": {"duration": 90, "fps": 29.97, "location": {
        "1": [[13.8, 29.8]], "2": [[1, 2], [40.5, 91]], "7": [[0, 90]]}}}
    write_nextgqa(tmp_path, rows, spans)
    samples = load_samples(tmp_path, format="nextgqa", split="val")
    unnamed = load_samples(tmp_path, format="nextgqa")  # the only split there
    assert [replace(s, meta={**s.meta, "split": "val"}) for s in unnamed] == samples
    assert [s.id for s in samples] == ["4882821564_1", "4882821564_2", "4882821564_7"]
    assert [s.answer for s in samples] == ["C", "C", "A"] and {s.kind for s in samples} == {"choice"}
    assert samples[1].spans == ((1.0, 2.0), (40.5, 90.0)) and samples[1].meta["duration"] == 90  # one ends after the clip
    assert samples[1].meta["official_spans"] == [[1.0, 2.0], [40.5, 91.0]] and "official_spans" not in samples[0].meta
    assert samples[0].video == str(tmp_path / "4882821564.mp4")
    assert load_samples(tmp_path, format="nextgqa", root="/v")[0].video == "/v/4882821564.mp4"
    write(tmp_path / "map_vid_vidorID.json", {"4882821564": "1104/4882821564"})
    assert load_samples(tmp_path, format="nextgqa", root="/v")[0].video == "/v/1104/4882821564.mp4"


def test_nextgqa_question_without_intervals(tmp_path):
    write_nextgqa(tmp_path, [NEXTGQA, {**NEXTGQA, "qid": "2"}], {"4882821564": {"location": {"1": [[1, 2]]}}})
    with pytest.raises(DataError, match="val.csv, line 3: field 'location' has no intervals for question 2"):
        load_samples(tmp_path, format="nextgqa")
    assert len(load_samples(tmp_path, format="nextgqa", strict=False)) == 1
    (tmp_path / "gsub_val.json").unlink()
    with pytest.raises(DataError, match="gsub_val.json"):
        load_samples(tmp_path, format="nextgqa")


REAL = {  # videos with questions, questions, intervals, questions with several, intervals that end late, types
    "val": (567, 3358, 3931, 339, 3, {"CW": 1474, "TN": 879, "CH": 481, "TC": 472, "TP": 52}),
    "test": (None, 5553, 6600, 591, 0, {"CW": 2456, "TN": 1356, "TC": 852, "CH": 796, "TP": 93}),
}


def check_real(folder: Path, split: str) -> None:
    videos, questions, intervals, several, late, types = REAL[split]
    samples = load_samples(folder, format="nextgqa", split=split)
    with (folder / f"{split}.csv").open(newline="") as file:
        table = {f"{row['video_id']}_{row['qid']}": row for row in csv.DictReader(file)}
    listed = json.loads((folder / f"gsub_{split}.json").read_text())
    assert len(listed) == {"val": 570, "test": 999}[split]  # some of them have no question
    assert len(samples) == questions and sum(len(s.spans) for s in samples) == intervals
    assert videos is None or len({s.video for s in samples}) == videos
    assert sum(len(s.spans) > 1 for s in samples) == several
    official = {s.id: s.meta.get("official_spans", [list(span) for span in s.spans]) for s in samples}
    assert sum(end > s.meta["duration"] for s in samples for _, end in official[s.id]) == late
    assert all(0 <= start <= end <= s.meta["duration"] for s in samples for start, end in s.spans)
    assert Counter(s.meta["type"] for s in samples) == types
    for sample in samples:
        row = table[sample.id]
        assert sample.options["ABCDE".index(sample.answer)] == row["answer"].strip()
        assert sample.question == row["question"].strip()
        truth = listed[row["video_id"]]["location"][row["qid"]]
        assert official[sample.id] == [[float(start), float(end)] for start, end in truth]


def test_nextgqa_validation_split_loads_whole(shared_dir):
    check_real(shared_dir / "nextgqa", "val")


def test_nextgqa_test_split_loads_whole():
    if not os.environ.get("NEXTGQA_DIR"):
        pytest.skip("set NEXTGQA_DIR to a folder with test.csv and gsub_test.json")
    check_real(Path(os.environ["NEXTGQA_DIR"]), "test")


def test_videochat_r1_file(tmp_path):
    write(tmp_path / "nextgqa_val.json", [GLUE])
    [sample] = load_samples(tmp_path, format="videochat_r1_gqa", split="val", root="/v")
    assert (sample.id, sample.answer, sample.kind, sample.options[2]) == ("4882821564_1", "C", "choice", "unwrap it")
    assert sample.spans == ((13.8, 29.8), (40.0, 41.5)) and sample.video == "/v/1104/4882821564.mp4"


# --- bad rows --------------------------------------------------------------------------------------------------------

BAD = [  # format, what changes in a good row (None removes the field), the field that is named
    ("seed_bench_r1", {"question": None}, "question"), ("seed_bench_r1", {"question": "  "}, "question"),
    ("seed_bench_r1", {"answer": 3}, "answer"), ("seed_bench_r1", {"negative_answers": []}, "negative_answers"),
    ("seed_bench_r1", {"negative_answers": ["x", 3]}, "negative_answers"),
    ("seed_bench_r1", {"video_source": None}, "video_source"),
    ("seed_bench_r1", {"video_basename": None}, "video_basename"),
    ("seed_bench_r1", {"current_observation_basename": None}, "current_observation_basename"),
    ("seed_bench_r1", {**SEED_VALIDATION, "golden_choice_idx": "E"}, "golden_choice_idx"),
    ("seed_bench_r1", {**SEED_VALIDATION, "golden_choice_idx": 2}, "golden_choice_idx"),
    ("seed_bench_r1", {**SEED_VALIDATION, "golden_choice_idx": "A"}, "answer"),
    ("seed_bench_r1", {**SEED_VALIDATION, "choice_a": ""}, "choice_a"),
    ("video_r1", {"problem": ""}, "problem"), ("video_r1", {"problem_type": "essay"}, "problem_type"),
    ("video_r1", {"data_type": "audio"}, "data_type"), ("video_r1", {"path": None}, "path"),
    ("video_r1", {"options": "A. x"}, "options"), ("video_r1", {"options": [None]}, "options"),
    ("video_r1", {"options": [f"option {i}" for i in range(27)]}, "options"),
    ("video_r1", {"solution": "<answer>E</answer>"}, "solution"), ("video_r1", {"solution": None}, "solution"),
    ("video_r1", {"problem_type": "numerical", "solution": "<answer>3/4</answer>"}, "solution"),
    ("video_r1", {"problem_type": "regression", "solution": "<answer>nan</answer>"}, "solution"),
    ("video_r1", {"problem_type": "OCR", "solution": "<answer> </answer>"}, "solution"),
    ("longvideobench", {"candidates": None}, "option0"), ("longvideobench", {"candidates": {}}, "candidates"),
    ("longvideobench", {"correct_choice": 4}, "correct_choice"),
    ("longvideobench", {"correct_choice": "C"}, "correct_choice"),
    ("longvideobench", {"correct_choice": True}, "correct_choice"), ("longvideobench", {"video_path": 7}, "video_path"),
    ("videochat_r1_gqa", {"glue": []}, "glue"), ("videochat_r1_gqa", {"glue": [3, 4]}, "glue"),
    ("videochat_r1_gqa", {"glue": [[4, 3]]}, "glue"), ("videochat_r1_gqa", {"glue": [[-3, -1]]}, "glue"),
    ("videochat_r1_gqa", {"glue": [[1, float("nan")]]}, "glue"), ("videochat_r1_gqa", {"answer": "(F)"}, "answer"),
    ("jsonl", {"kind": None}, "kind"), ("jsonl", {"colour": "red"}, "colour"), ("jsonl", {"answer": "a cat"}, "answer"),
    ("jsonl", {"options": ["an onion", "an onion"]}, "answer"), ("jsonl", {"spans": [[2, 1]]}, "spans"),
    ("jsonl", {"spans": [[1, float("inf")]]}, "spans"), ("jsonl", {"kind": "number", "answer": "nan"}, "answer"),
    ("jsonl", {"meta": {"judge": "taste"}}, "meta"), ("jsonl", {"images": "a.png"}, "images"),
]


@pytest.mark.parametrize("suffix, place", [(".json", "index 1"), (".jsonl", "line 2")])
@pytest.mark.parametrize("format, change, field", BAD)
def test_a_bad_row_is_named(tmp_path, format, change, field, suffix, place):
    good = {**ROWS[format], **({"answer": "an onion"} if format == "jsonl" else {})}
    bad = {key: value for key, value in {**good, **change}.items() if value is not None}
    name = {"seed_bench_r1": "sample_id", "video_r1": "problem_id"}.get(format, "id")
    rows = [{**good, name: "first"}, {**bad, name: "second"}, {**good, name: "third"}]
    file = write(tmp_path / f"rows{suffix}", rows)
    with pytest.raises(DataError) as caught:
        load_samples(file, format=format)
    assert str(caught.value).startswith(f"{file}, {place}: ") and repr(field) in str(caught.value)
    assert (caught.value.file, caught.value.place, caught.value.field) == (str(file), place, field)
    samples = load_samples(file, format=format, strict=False)
    assert [s.id for s in samples] == ["first", "third"]
    assert [str(error) for error in samples.problems] == [str(caught.value)]
    with pytest.warns(UserWarning, match="1 rows left out; the first: .*rows"):
        load_samples(file, format=format, strict=False)


@pytest.mark.parametrize("format", ["jsonl", "longvideobench", "videochat_r1_gqa"])
def test_two_rows_with_one_id(tmp_path, format):
    row = {**ROWS[format], "id": "same"}
    with pytest.raises(DataError, match="line 2: field 'id' is 'same', which was used before, on line 1"):
        load_samples(write(tmp_path / "rows.jsonl", [row, row]), format=format)


@pytest.mark.parametrize("text, message", [
    ("", "holds no rows"), ("[]", "holds no rows"), ('[{"a": 1}, ', "not a JSON list"),
    ("[1]", "index 0: a row must be"),
    ('{"rows": []}', "line 1"), ("[" * 100_000, "not a JSON list"), ("nonsense", "line 1: not JSON"),
])
def test_files_that_are_no_list_of_rows(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    for format in set(FORMATS) - {"nextgqa"}:
        with pytest.raises(DataError, match=message):
            load_samples(tmp_path / "rows.json", format=format)


def test_a_file_without_a_good_row_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match="no rows that can be used; the first problem: .*line 1") as caught:
        load_samples(write(tmp_path / "rows.jsonl", [{}, {}]), strict=False)
    assert len(caught.value.problems) == 2


def test_folders_and_formats_that_are_not_there(tmp_path):
    with pytest.raises(DataError,
                       match="allowed are jsonl, seed_bench_r1, video_r1, longvideobench, nextgqa, videochat"):
        load_samples(tmp_path, format="parquet")
    with pytest.raises(DataError, match="no such file"):
        load_samples(tmp_path / "absent.jsonl")
    for format in FORMATS:
        with pytest.raises(DataError, match="needs a split"):
            load_samples(tmp_path, format=format, split="nowhere")
    for name in ("lvb_val.json", "lvb_test_wo_gt.json"):
        write(tmp_path / name, [LONGVIDEOBENCH])
    with pytest.raises(DataError, match="lvb_test_wo_gt.json, lvb_val.json"):
        load_samples(tmp_path, format="longvideobench")


def test_lines_end_at_line_feeds_only(tmp_path):
    text = json.dumps({**OWN, "question": "what\u2028is\x0bcut\x85?"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(f"\ufeff{text}\r\n\r\n{text}\n".encode())
    samples = load_samples(tmp_path / "rows.jsonl")
    assert [s.id for s in samples] == ["1", "3"] and samples[0].question == "what\u2028is\x0bcut\x85?"


junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda one: st.lists(one, max_size=4) | st.dictionaries(st.text(max_size=4), one, max_size=3),
                    max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(format=st.sampled_from([*ROWS, "nextgqa"]), place=st.integers(0, 30), value=junk)
@example(format="jsonl", place=4, value=[[1]])
def test_any_value_anywhere_gives_a_sample_or_a_named_error(format, place, value):
    row = dict({**ROWS, "nextgqa": {**NEXTGQA, "spans": [[1, 2]], "file": "x.mp4"}}[format])
    field = [*row, "meta", "spans", "id", "images", "video", "process", "options"][place % (len(row) + 7)]
    try:
        sample = FORMATS[format]({**row, field: value}, root=Path("root"), default_id="1", seed=0)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        assert sample.question.strip() and all(type(option) is str for option in sample.options)
        assert sample.kind != "choice" or sample.options[ord(sample.answer) - 65] is not None


# --- options ---------------------------------------------------------------------------------------------------------

SHOW = """
import sys
from deepvideo_r1.data.datasets import load_samples
print([(s.id, s.options, s.answer) for s in load_samples(sys.argv[1], format="seed_bench_r1", seed=int(sys.argv[2]))])
"""


def test_options_have_the_same_order_in_every_process(tmp_path):
    rows = [{**SEED_TRAIN, "sample_id": i} for i in range(50)]
    file = write(tmp_path / "rows.jsonl", rows)
    here = [(s.id, s.options, s.answer) for s in load_samples(file, format="seed_bench_r1", seed=3)]
    for hash_seed in ("1", "2"):
        told = subprocess.run([sys.executable, "-c", SHOW, str(file), "3"], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": hash_seed})
        assert told.stdout.strip() == str(here)
    backwards = load_samples(write(file, rows[::-1]), format="seed_bench_r1", seed=3)
    assert [(s.id, s.options, s.answer) for s in backwards[::-1]] == here  # an order is the sample's own
    other = load_samples(file, format="seed_bench_r1", seed=4)[::-1]
    assert sum(a.options != b[1] for a, b in zip(other, here)) > 40


def test_an_order_that_must_never_change():
    assert shuffle_options("abcdef", 2, 0, "options", "39") == (("e", "c", "f", "a", "b", "d"), "B")


@given(options=st.lists(st.sampled_from(["x", "y", "z"]), min_size=1, max_size=10), seed=st.integers(0, 99),
       data=st.data())
def test_the_right_option_is_followed_by_its_place(options, seed, data):
    right = data.draw(st.integers(0, len(options) - 1))
    marked = [f"{option}{i}" for i, option in enumerate(options)]
    shuffled, letter = shuffle_options(marked, right, seed)
    assert sorted(shuffled) == sorted(marked) and shuffled[ord(letter) - 65] == marked[right]
    assert shuffle_options(options, right, seed) == (tuple(one[0] for one in shuffled), letter)


@pytest.mark.parametrize("options, answer, letter", [
    (["A. x", "B. y"], "B", "B"), (["(A) x", "(B) y"], "(B)", "B"), (["x", "y"], "y", "B"),
    (["A) x", "B) y"], "A", "A"),
    (["A. x", "B. x"], "B", "B"), (["C. x", "A. y"], "C", "A"), (["A. x", "B. y"], "B. y", "B"),
    (["A.x", "B.y"], "A", "A"),
    (["A", "B"], "B", "B"), (["A: 1", "B: 2"], "A", "A"), (["A. B", "B. A"], "B. A", "B"),
])
def test_letters_of_a_file(options, answer, letter):
    assert answer_letter(answer, *strip_letters(options)) == letter


# --- what real files hold ------------------------------------------------------------------------------------------------


def reader_of(folder: Path, format: str, rows) -> tuple[Path, dict]:
    "A file of this format with these rows, in its own kind of file."
    if format == "nextgqa":
        write_nextgqa(folder, rows, {"4882821564": {"duration": 90, "location": {row["qid"]: [[13.8, 29.8]] for row in rows}}})
        return folder / "val.csv", {"format": format}
    return write(folder / "rows.jsonl", rows), {"format": format}


@pytest.mark.parametrize("text, encoding, message", [
    ("caf\u00e9", "latin-1", "0xe9 is not UTF-8"), ("Fr\u00fchst\u00fcck", "cp1252", "0xfc is not UTF-8"), ("\u6f22\u5b57", "gbk", "is not UTF-8"),
    ("\u6f22\u5b57", "shift-jis", "is not UTF-8"), ("caf\u00e9", "utf-16", "UTF-16"), ("cafe", "utf-16-le", "UTF-16"), ("cafe", "utf-32", "UTF-16 or UTF-32")])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "lines.json", "val.csv", "gsub_val.json", "map_vid_vidorID.json"])
def test_a_file_that_is_not_utf8_is_refused_with_its_line_and_byte(tmp_path, name, text, encoding, message):
    write_nextgqa(tmp_path, [NEXTGQA], {"4882821564": {"location": {"1": [[1, 2]]}}})
    first, row = {**OWN, "question": "what?"}, {**OWN, "question": text}
    dump = lambda value: json.dumps(value, ensure_ascii=False)
    content = {"rows.jsonl": f"{dump(first)}\n{dump(row)}\n", "lines.json": f"{dump(first)}\n{dump(row)}\n",
               "rows.json": f"[{dump(first)},\n{dump(row)}]", "val.csv": (tmp_path / "val.csv").read_text() + f"x,{text}\n",
               "gsub_val.json": f'{{"a":\n"{text}"}}', "map_vid_vidorID.json": f'{{"a":\n"{text}"}}'}[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    file, how = (tmp_path / "val.csv", {"format": "nextgqa"}) if name[:4] in ("val.", "gsub", "map_") else (tmp_path / name, {})
    wide = encoding.startswith("utf-")
    place = "line 1" if wide else f"line {2 + (name == 'val.csv')}"
    for strict in (True, False):
        with pytest.raises(DataError, match=message) as caught:
            load_samples(file, strict=strict, **how)
    offset = int(re.search(r"byte (\d+)", str(caught.value))[1])
    assert str(caught.value).startswith(f"{tmp_path / name}, {place}, byte ") and caught.value.place == place
    assert offset == 0 if wide else content.encode(encoding)[offset] > 127 and content.encode(encoding)[:offset].isascii()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_is_allowed(tmp_path, name):
    text = {"rows.jsonl": json.dumps(OWN), "rows.json": json.dumps([OWN]), "rows.csv": "question,kind,answer\r\nwhat?,text,caf\u00e9\r\n"}[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert len(load_samples(tmp_path / name)) == 1


OPTIONAL = {"seed_bench_r1": ["sample_id", "task_progress_metadata", "task_goal", "domain", "golden_choice_idx", "task_level", "choice_a"],
            "video_r1": ["problem_id", "process", "data_source", "original_question_type"],
            "longvideobench": ["id", "subtitle_path", "duration", "duration_group", "question_category", "correct_choice", "option0"],
            "videochat_r1_gqa": ["id", "type", "duration"],
            "jsonl": ["id", "video", "images", "spans", "meta", "response", "show_answer"]}


@pytest.mark.parametrize("format", OPTIONAL)
def test_null_is_an_absent_field(tmp_path, format):
    for name in OPTIONAL[format]:
        row = {key: value for key, value in ROWS[format].items() if key != name}
        assert load_one(tmp_path, format, {**row, name: None}) == load_one(tmp_path, format, row), name
    everything = {**dict.fromkeys(OPTIONAL[format]), **ROWS[format]}
    assert load_one(tmp_path, format, everything) == load_one(tmp_path, format, ROWS[format])


def test_null_instead_of_padding_and_of_a_kind_that_has_no_options(tmp_path):
    padded = {key: value for key, value in LONGVIDEOBENCH.items() if key != "candidates"} | {
        "candidates": None, "option0": "a cup", "option1": "a plate", "option2": "a book", "option3": None, "option4": "N/A",
        "correct_choice": 2.0, "duration_group": 600.0}  # as pandas writes whole numbers beside absent ones
    sample = load_one(tmp_path, "longvideobench", padded)
    assert sample.options == ("a cup", "a plate", "a book") and sample.answer == "C"
    shown = {**VIDEO_R1, "problem_type": "numerical", "solution": "<answer>4</answer>", "options": None, "problem_id": 7.0}
    assert load_one(tmp_path, "video_r1", shown).id == "7"
    three = load_one(tmp_path, "seed_bench_r1", {**SEED_VALIDATION, "choice_d": None})
    assert len(three.options) == 3


WAYS = ["{}. {}", "({}) {}", "{}) {}", "{}: {}", "[{}] {}", "{}\uff0e{}", "\uff08{}\uff09{}", "{}\u3001 {}", " {}.  {} ", "Option {}: {}"]


def lettered(format: str, texts, way: str, lower: bool = False) -> dict:
    "A row whose options carry their letters."
    marked = [way.format(chr((97 if lower else 65) + i), text) for i, text in enumerate(texts)]
    if format == "seed_bench_r1":
        return {**SEED_VALIDATION, **{f"choice_{letter}": text for letter, text in zip("abcd", marked)}, "answer": texts[2]}
    if format == "nextgqa":
        return {**NEXTGQA, **{f"a{i}": text for i, text in enumerate([*marked, way.format("e" if lower else "E", "sit")])}, "answer": texts[2]}
    field = {"longvideobench": "candidates"}.get(format, "options")
    answer = {"video_r1": {"solution": "<answer>C</answer>"}, "longvideobench": {}, "videochat_r1_gqa": {"answer": "(C)"},
              "jsonl": {"answer": "C"}}[format]
    return {**ROWS[format], field: marked, **answer}


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("format", [*ROWS, "nextgqa"])
def test_options_that_carry_their_letters_are_shown_once(tmp_path, format, way, lower):
    texts = ["a cup", "a plate", "a book", "a hat"]
    if lower and "\uff0e" in way:
        way = "{}\uff0e {}"
    file, how = reader_of(tmp_path, format, [lettered(format, texts, way, lower)])
    [sample] = load_samples(file, **how)
    assert sample.options[:4] == tuple(texts) and sample.answer == "C"


@pytest.mark.parametrize("options, answer, right", [
    (["B. cat", "A. dog", "C. cow"], "A", "dog"), (["B. cat", "A. dog", "C. cow"], "cat", "cat"), (["b) cat", "a) dog"], "a", "dog"),
    (["(C) cat", "(A) dog", "(B) cow"], "C. cat", "cat"), (["A. cat", "B. dog"], "b", "dog"), (["A. cat", "B. dog"], "B) dog", "dog"),
    (["A. cat", "B. dog"], "dog.", "dog"), (["cat", "dog"], "\uff22", "dog")])
def test_a_letter_means_the_option_that_carries_it(tmp_path, options, answer, right):
    sample = load_one(tmp_path, "jsonl", {**OWN, "options": options, "answer": answer})
    assert sample.options["ABC".index(sample.answer)] == right


@pytest.mark.parametrize("options, answer", [
    (["A. cat", "A. dog"], "A"), (["A. cat", "B. dog", "cow"], "A"), (["A. cat", "B. dog", "B. cow"], "cow"), (["A. cat", "B."], "A"),
    (["A. cat", "B. dog"], "A. dog"), (["A. cat", "B. dog"], "C"), (["B", "A"], "A"), (["A. cat", "B. dog"], "A or B")])
def test_letters_that_contradict_each_other_are_refused(tmp_path, options, answer):
    with pytest.raises(DataError, match="field '(options|answer)'"):
        load_one(tmp_path, "jsonl", {**OWN, "options": options, "answer": answer})


QUESTION = {"video_r1": "problem"}


@pytest.mark.parametrize("mark", ["<video>\n", "<image>\n", "<VIDEO> ", "<image_1>", "<video>\n<image>\n", "<img>a.png</img> "])
@pytest.mark.parametrize("format", [*ROWS, "nextgqa"])
def test_marks_of_a_video_are_taken_out_of_a_question(tmp_path, format, mark):
    row, field = {**ROWS, "nextgqa": NEXTGQA}[format], QUESTION.get(format, "question")
    file, how = reader_of(tmp_path, format, [{**row, field: f"{mark}what is it?"}])
    with pytest.warns(UserWarning, match="1 of 1 questions had marks such as <video> in the text"):
        [sample] = samples = load_samples(file, **how)
    assert sample.question == "what is it?" and len(samples.notes) == 1 and "".join(sample.meta["removed_marks"]) in mark.replace("\n", "")
    file, how = reader_of(tmp_path, format, [{**row, field: "what is it?<|im_end|>"}])
    with pytest.raises(DataError, match=f"field '{field}' holds the special token <.im_end.>"):
        load_samples(file, **how)
    file, how = reader_of(tmp_path, format, [{**row, field: "is x < y > z, or <b>?"}])
    assert load_samples(file, **how)[0].question == "is x < y > z, or <b>?"


@pytest.mark.parametrize("given, clamped", [([[-0.1, 5]], ((0.0, 5.0),)), ([[80, 91.5]], ((80.0, 90.0),)), ([[1, 2], [-2, 95]], ((1.0, 2.0), (0.0, 90.0)))])
def test_intervals_that_reach_out_of_the_clip_are_clamped_and_counted(tmp_path, given, clamped):
    write_nextgqa(tmp_path, [NEXTGQA], {"4882821564": {"duration": 90, "location": {"1": given}}})
    write(tmp_path / "rows.jsonl", [{"question": "when?", "kind": "grounding", "spans": given, "meta": {"duration": 90}}])
    glue = write(tmp_path / "glue.jsonl", [{**GLUE, "glue": given}])
    for file, format in ((tmp_path / "val.csv", "nextgqa"), (glue, "videochat_r1_gqa"), (tmp_path / "rows.jsonl", "jsonl")):
        with pytest.warns(UserWarning, match="1 of 1 questions have intervals that reach out of the clip"):
            [sample] = load_samples(file, format=format)
        assert sample.spans == clamped and sample.meta["official_spans"] == [[float(a), float(b)] for a, b in given]


@pytest.mark.parametrize("spans", [[[95, 99]], [[-3, -1]], [[3, 1]], [[0, float("nan")]], [[0, float("inf")]], [[0, 10**400]], [[1, 2], [200, 300]]])
def test_intervals_that_are_mistakes_are_refused(tmp_path, spans):
    with pytest.raises(DataError, match="line 1: field 'glue'"):
        load_one(tmp_path, "videochat_r1_gqa", {**GLUE, "glue": spans})
