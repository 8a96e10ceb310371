"""Damaged files are named, results belong to what is named today, one run works in a directory, signals end everything."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import cli  # noqa: F401, a fixture

from deepvideo_r1.cli import main
from deepvideo_r1.config import PromptConfig
from deepvideo_r1.data.datasets import load_samples
from deepvideo_r1.evaluation.evaluate import evaluate
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.processor import load_processor
from deepvideo_r1.support.checkpoint import newest_checkpoint, publish_checkpoint
from deepvideo_r1.support.files import DamagedFileError, read_json_file, read_jsonl
from deepvideo_r1.support.locks import directory_lock
from deepvideo_r1.toy import cold_start as cold_start_module
from deepvideo_r1.toy.config import ColdStartConfig, ToyConfig, WorldConfig

# --- damaged checkpoints ------------------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random) -> None:
    "One bit of a file."
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero_a_tenth(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    length = max(1, len(content) // 10)
    start = rng.randrange(len(content) - length + 1)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


DAMAGE = {
    "flip": flip, "zeros": zero_a_tenth,
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
    "cut": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "longer": lambda path, rng: path.write_bytes(path.read_bytes() + b"x"),
    "missing": lambda path, rng: path.unlink(),
}


def write_checkpoints(root: Path, steps=(1, 2, 3)) -> None:
    rng = random.Random(0)
    for step in steps:
        (root / ".aside/part").mkdir(parents=True)
        for name, size in (("model.safetensors", 5000), ("optimizer.bin", 3000), ("part/trainer.json", 40)):
            (root / ".aside" / name).write_bytes(rng.randbytes(size))
        publish_checkpoint(root / ".aside", root / f"step-{step:06d}", keep=len(steps))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "part/trainer.json", "MANIFEST.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, name, damage):
    for seed in range(5):
        root = tmp_path / str(seed)
        write_checkpoints(root)
        before = (root / "step-000003" / name).read_bytes()
        DAMAGE[damage](root / "step-000003" / name, random.Random(seed))
        if (root / "step-000003" / name).exists() and (root / "step-000003" / name).read_bytes() == before:
            continue  # zeros were written over zeros
        with pytest.warns(UserWarning, match=rf"step-000003: the checkpoint is damaged \({'.*' if name == 'MANIFEST.json' else name}"):
            assert newest_checkpoint(root).name == "step-000002"


def test_when_all_are_damaged_the_user_decides(tmp_path):
    write_checkpoints(tmp_path)
    for path in tmp_path.glob("step-*"):
        flip(path / "model.safetensors", random.Random(1))
    with warnings.catch_warnings(action="ignore"), pytest.raises(DamagedFileError, match="put back a copy of one, or remove"):
        newest_checkpoint(tmp_path)


def test_an_undamaged_checkpoint_gives_no_warning_and_older_manifests_count(tmp_path):
    write_checkpoints(tmp_path)
    manifest = tmp_path / "step-000003/MANIFEST.json"
    sizes = {name: entry["size"] for name, entry in json.loads(manifest.read_text()).items()}
    with warnings.catch_warnings(action="error"):
        assert newest_checkpoint(tmp_path).name == "step-000003"
        manifest.write_text(json.dumps(sizes))
        assert newest_checkpoint(tmp_path).name == "step-000003"


def small_toy(tmp_path):
    return ToyConfig(world=WorldConfig(sft_videos=2, rl_videos=1, eval_videos=1),
                     cold_start=ColdStartConfig(2, 2, 3, 2, hidden_size=48, n_layers=1),
                     prompt=PromptConfig("plain", max_pixels=28 * 28, cache_dir=str(tmp_path / "clips")))


def test_a_damaged_cold_start_begins_again_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(cold_start_module, "SAVE_EVERY", 2)
    config = small_toy(tmp_path)

    def stop(name, done, total):
        if name == "cold start" and done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    torch.set_num_threads(1)
    whole = cold_start_module.cold_start(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match="stopped in the cold start after step 3"):
        cold_start_module.cold_start(config, tmp_path / "parts", on_progress=stop)
    flip(next((tmp_path / "parts").glob("cold-*/checkpoints/step-*/state.pt")), random.Random(0))
    with pytest.warns(UserWarning, match="state.pt has another checksum"):
        again = cold_start_module.cold_start(config, tmp_path / "parts")
    assert again[2]["loss"] == whole[2]["loss"]
    assert (again[1] / "model.safetensors").read_bytes() == (whole[1] / "model.safetensors").read_bytes()
    assert not list((tmp_path / "parts").rglob("step-*"))


def test_a_cold_start_that_was_damaged_in_the_cache_is_named_and_made_again(tmp_path):
    def make():
        return cold_start_module.cold_start(small_toy(tmp_path), tmp_path)

    torch.set_num_threads(1)
    _, model, _ = make()
    whole = {path.name: path.read_bytes() for path in model.iterdir()}
    for name, damage, words in (("model.safetensors", flip, "another checksum"), ("tokenizer.json", Path.unlink, "is missing"),
                                ("MANIFEST.json", lambda path: path.write_text("{"), "MANIFEST.json cannot be read")):
        damage(model / name, *[random.Random(0)] * (damage is flip))
        with pytest.warns(UserWarning, match=rf"{model.parent}: the cold start is damaged \({'' if 'MANI' in words else name}.*{words}"):
            assert make()[2]["reused"] is False
        assert {path.name: path.read_bytes() for path in model.iterdir()} == whole
        with warnings.catch_warnings(action="error"):
            assert make()[2]["reused"] is True
    assert sorted(path.name for path in model.parent.iterdir()) == ["cold_start.json", "init", "model"]

    # One of an older version has no checksums: it is used, and the user is told.
    (model / "MANIFEST.json").unlink()
    with pytest.warns(UserWarning, match="no checksums, as older versions wrote it; it is used as it is. Remove the folder"):
        assert make()[2]["reused"] is True


# --- damaged files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, line", [
    (b"", 1), (b'{"a": ', 1), (b'{"a": 1,\n"b": 2,\n"c" 3}', 3), (b'{"a": 1}\n\xff', 2), (b"[" * 10**6, 1), (b"\0" * 50, 1),
    (b'{"a": 1}\n{"b": 2}', 2)])
def test_a_json_file_that_is_damaged_is_named_with_its_line(tmp_path, content, line):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"x.json, line {line}: the file is damaged.*; do this"):
        read_json_file(tmp_path / "x.json", advice="do this")


def test_only_the_last_line_may_be_torn(tmp_path):
    rows = [{"step": i, "text": "é" * i} for i in range(6)]
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    path, whole = tmp_path / "x.jsonl", b"".join(lines)
    for end in range(len(whole) + 1):  # wherever a crash cuts the file
        path.write_bytes(whole[:end])
        n_whole = whole[:end].count(b"\n")
        assert read_jsonl(path)[:n_whole] == rows[:n_whole] and len(read_jsonl(path)) <= n_whole + 1
    for number in range(6):  # whichever line is damaged
        path.write_bytes(b"".join(lines[:number] + [lines[number][:-4] + b"\n"] + lines[number + 1 :]))
        with pytest.raises(DamagedFileError, match=rf"x.jsonl, line {number + 1}: "):
            read_jsonl(path)


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def check_one_line(done: tuple[int, str, str], *parts) -> None:
    code, stdout, stderr = done
    assert code == 2 and stdout == "" and len(stderr.splitlines()) == 1, stderr
    assert all(str(part) in stderr for part in parts), stderr


def test_a_damaged_world_is_named_and_two_worlds_are_never_mixed(tmp_path, capsys):
    size = ["--sft-videos", 1, "--rl-videos", 1, "--eval-videos", 1]
    world = lambda *more: run(capsys, "world", "--out", tmp_path / "w", *size, *more)
    assert world()[0] == 0
    (tmp_path / "w/world.json").write_text('{"sft_videos": 1, ')
    check_one_line(world(), tmp_path / "w/world.json", "line 1: the file is damaged", "remove it, and the same command continues")
    (tmp_path / "w/world.json").unlink()
    assert world()[0] == 0
    (tmp_path / "w/world.json").rename(tmp_path / "w/.begun.json")  # as after a kill before the last step
    check_one_line(world("--seed", 1), "another config")
    assert world()[0] == 0 and not (tmp_path / "w/.begun.json").exists()


# --- results that belong to what is named -------------------------------------------------------------------------


@pytest.fixture
def asking(trained_model, tiny_world, tmp_path):
    "Copies of model, questions and clips that a test may change, and the command that evaluates them."
    shutil.copytree(trained_model, tmp_path / "model")
    shutil.copytree(tiny_world, tmp_path / "world")
    command = ["evaluate", "--model", tmp_path / "model", "--data", tmp_path / "world/L1.jsonl", "--max-tokens", 24,
               "--prompt.template", "plain", "--prompt.cache-dir", tmp_path / "clips"]

    def edit(change) -> None:
        path = tmp_path / "world/L1.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in change(read_jsonl(path))))

    return command, tmp_path, edit


def other_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model/model.safetensors")
    name = next(name for name in sorted(weights) if "layers.0" in name)
    save_file(weights | {name: -weights[name]}, folder / "model/model.safetensors", {"format": "pt"})


def other_template(folder: Path, edit) -> None:
    path = folder / "model/chat_template.jinja"
    path.write_text("Answer : " + path.read_text())


def other_clip(folder: Path, edit) -> None:
    first, *_, last = [folder / "world" / row["video"] for row in read_jsonl(folder / "world/L1.jsonl")]
    shutil.copy(last, first)


def other_words(folder: Path, edit) -> None:
    edit(lambda rows: [rows[0] | {"question": "how many blue squares ?"}, *rows[1:]])


def other_options(folder: Path, edit) -> None:
    edit(lambda rows: [rows[0] | {"kind": "choice", "options": ["many", "few"], "answer": "A"}, *rows[1:]])


CHANGES = {  # what changes under the same names -> questions that are asked again, words of the note
    other_weights: (4, "another model gave"), other_template: (4, "another model gave"),
    other_clip: (2, "clips or template"), other_words: (1, "words, options"), other_options: (1, "words, options")}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_under_the_same_name_is_asked_again(asking, asked, capsys, change):
    command, folder, edit = asking
    assert run(capsys, *command, "--out", folder / "e")[0] == 0 and len(asked) == 4
    asked.clear()
    change(folder, edit)
    n_asked, words = CHANGES[change]
    code, _, stderr = run(capsys, *command, "--out", folder / "e")
    assert code == 0 and len(asked) == n_asked and f"{n_asked} questions are asked again, because" in stderr and words in stderr
    assert run(capsys, *command, "--out", folder / "fresh")[0] == 0
    assert read_jsonl(folder / "e/rows.jsonl") == read_jsonl(folder / "fresh/rows.jsonl")
    assert (folder / "e/summary.json").read_text() == (folder / "fresh/summary.json").read_text()


def test_a_corrected_key_is_scored_from_what_is_stored(asking, asked, capsys):
    command, folder, edit = asking
    assert run(capsys, *command, "--out", folder / "e")[0] == 0
    rows = read_jsonl(folder / "e/rows.jsonl")
    asked.clear()
    parsed = rows[0]["parsed"][0]
    answer = f"{parsed:g}" if isinstance(parsed, float) and rows[0]["parts"]["accuracy"] == [0.0] else "77"
    edit(lambda rows: [rows[0] | {"answer": answer}, *rows[1:]])
    code, _, stderr = run(capsys, *command, "--out", folder / "e")
    assert code == 0 and asked == [] and "responses to 1 questions are scored again" in stderr
    again = read_jsonl(folder / "e/rows.jsonl")
    assert again[0]["answer"] == answer and again[0]["responses"] == rows[0]["responses"] and again[1:] == rows[1:]
    assert again[0]["parts"]["accuracy"] == [float(parsed == float(answer))]
    assert run(capsys, *command, "--out", folder / "fresh")[0] == 0
    assert read_jsonl(folder / "fresh/rows.jsonl") == again
    capsys.readouterr()
    asked.clear()
    assert "again" not in run(capsys, *command, "--out", folder / "e")[2] and asked == []  # once is enough


def test_what_is_the_same_by_content_is_not_asked_again(asking, asked, capsys):
    command, folder, edit = asking
    assert run(capsys, *command, "--out", folder / "e")[0] == 0
    asked.clear()
    shutil.copytree(folder / "model", folder / "copy")
    shutil.rmtree(folder / "model")
    (folder / "copy").rename(folder / "model")
    for path in folder.rglob("*.mp4"):
        os.utime(path, (1, 1))
    edit(lambda rows: rows[::-1])
    code, _, stderr = run(capsys, *command, "--out", folder / "e")
    assert code == 0 and "again" not in stderr
    assert [row["id"] for row in read_jsonl(folder / "e/rows.jsonl")] == [row["id"] for row in read_jsonl(folder / "world/L1.jsonl")]


def test_rows_of_questions_that_are_gone_are_left_out_and_said(asking, capsys):
    command, folder, edit = asking
    assert run(capsys, *command, "--out", folder / "e")[0] == 0
    edit(lambda rows: rows[:3])
    assert "1 rows of questions that are not asked any more were left out" in run(capsys, *command, "--out", folder / "e")[2]
    assert len(read_jsonl(folder / "e/rows.jsonl")) == json.loads((folder / "e/summary.json").read_text())["all"]["n"] == 3


def test_rows_that_were_changed_and_rows_of_an_older_version_are_asked_again(asking, asked, capsys):
    command, folder, edit = asking
    assert run(capsys, *command, "--out", folder / "e")[0] == 0
    before = read_jsonl(folder / "e/rows.jsonl")
    for change, words in ((lambda row: row | {"responses": ["<answer> 1 </answer>"]}, "changed or damaged"),
                          (lambda row: {name: value for name, value in row.items() if name != "frames"}, "changed or damaged"),
                          (lambda row: {name: value for name, value in row.items() if name != "identity"}, "do not say which model")):
        asked.clear()
        (folder / "e/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [change(before[0]), *before[1:]]))
        code, _, stderr = run(capsys, *command, "--out", folder / "e")
        assert code == 0 and asked == [before[0]["id"]] and words in stderr
        assert read_jsonl(folder / "e/rows.jsonl") == before


def test_the_function_alone_knows_its_model_too(trained_model, tiny_model, tiny_world, tmp_path):
    samples, path = load_samples(tiny_world / "L1.jsonl"), tmp_path / "rows.jsonl"

    def ask(model, **more):
        return evaluate(load_policy(model), load_processor(model), samples, prompt=PromptConfig("plain", cache_dir=str(tmp_path / "c")),
                        **{"max_tokens": 6, "path": path} | more)

    for model, more in ((trained_model, {}), (tiny_model, {}), (tiny_model, {"max_tokens": 5})):
        assert ask(model, **more) == ask(model, **more, path=None) == read_jsonl(path)


def test_a_question_that_cannot_be_asked_costs_none_of_the_others(asking, capsys):
    command, folder, edit = asking
    assert run(capsys, *command, "--out", folder / "whole")[0] == 0
    extra = [{"id": "long", "question": "how many ? " * 3000, "kind": "number", "answer": "1"},
             {"id": "special", "question": "what is <|image_pad|> ?", "kind": "number", "answer": "1"},
             {"id": "gone", "video": "gone.mp4", "question": "how many ?", "kind": "number", "answer": "1"}]
    edit(lambda rows: [extra[0], *rows[:2], extra[1], *rows[2:], extra[2]])
    code, _, stderr = run(capsys, *command, "--out", folder / "e")
    rows = read_jsonl(folder / "e/rows.jsonl")
    errors = [row["id"] for row in rows if "error" in row]
    assert code == 0 and set(errors) <= {"long", "special", "gone"} and {"long", "gone"} <= set(errors)
    assert f"{len(errors)} of {len(rows)} questions could not be asked, the first is long (" in stderr
    kept = [row for row in rows if row["id"] not in ("long", "special", "gone")]
    assert kept == read_jsonl(folder / "whole/rows.jsonl")


def test_damaged_rows_and_configs_are_named(asking, capsys):
    command, folder, edit = asking
    assert run(capsys, *command, "--out", folder / "e")[0] == 0
    rows, config = ((folder / "e" / name).read_text() for name in ("rows.jsonl", "config.json"))
    lines = rows.splitlines(keepends=True)
    (folder / "e/rows.jsonl").write_text("".join([lines[0], lines[1][:50] + "\n", *lines[2:]]))
    check_one_line(run(capsys, *command, "--out", folder / "e"), folder / "e/rows.jsonl", "line 2: the file is damaged", "remove that line")
    (folder / "e/rows.jsonl").write_text("".join([lines[0], *lines[2:]]))
    assert run(capsys, *command, "--out", folder / "e")[0] == 0 and (folder / "e/rows.jsonl").read_text() == rows
    (folder / "e/config.json").write_text(config[: len(config) // 2])
    check_one_line(run(capsys, *command, "--out", folder / "e"), folder / "e/config.json", "the file is damaged")


# --- one run in a directory ---------------------------------------------------------------------------------------


def test_a_second_run_in_a_directory_is_told_who_works_there(asking, capsys):
    command, folder, _ = asking
    for out, more in ((folder / "e", command), (folder / "w", ["world"]), (folder / "t", ["toy"])):
        with directory_lock(out):
            check_one_line(run(capsys, *more, "--out", out), f"{out} is in use by process {os.getpid()}", "name another directory")
    assert not (folder / "t").exists() and not (folder / "w").exists()


# --- signals ------------------------------------------------------------------------------------------------------


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", SIGNALS)
def test_world_and_evaluate_stop_after_their_step_and_say_so(cli, tiny_model, tiny_world, tmp_path, number):
    world = ["world", "--out", tmp_path / "w", "--sft-videos", 300, "--rl-videos", 1, "--eval-videos", 1]
    evaluate = ["evaluate", "--model", tiny_model, "--data", tiny_world / "rl.jsonl", "--out", tmp_path / "e",
                "--batch-prompts", 1, "--max-tokens", 200, "--prompt.cache-dir", tmp_path / "clips"]
    for command, is_reached, words in (
            (world, lambda _: len(list((tmp_path / "w/videos").glob("*.mp4"))) > 3, r"stopped after video \d+ of 304"),
            (evaluate, lambda _: (tmp_path / "e/rows.jsonl").exists(), r"stopped after \d+ of 12 questions")):
        done = cli.run_until(is_reached, number, *command)
        assert done.code == SIGNALS[number] and done.stdout == "", done.stderr
        assert re.search(rf"\ndeepvideo-r1: {words}; the same command continues\n$", done.stderr), done.stderr
        assert "Traceback" not in done.stderr and not list(tmp_path.rglob(".lock")) + list(tmp_path.rglob("*.tmp"))
    assert cli.run(*evaluate).code == 0 and len(read_jsonl(tmp_path / "e/rows.jsonl")) == 12


TOY = ["toy", "--arms", "grpo", "reg_grpo", "--world.sft-videos", 4, "--world.rl-videos", 4, "--world.eval-videos", 2,
       "--cold-start.vision-steps", 2, "--cold-start.vision-batch", 2, "--cold-start.sft-steps", 2, "--cold-start.sft-batch", 2,
       "--cold-start.hidden-size", 48, "--cold-start.n-layers", 1, "--rollout.group-size", 2, "--rollout.max-tokens", 8,
       "--train.steps", 400, "--train.prompts-per-step", 2, "--train.prompts-per-forward", 2, "--train.save-every", 50]


def workers_of(command: int) -> dict[int, str]:
    "Living processes that a command has started, and what these have started: number -> command line."
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(None, 3) for line in listed]
    family, grown = {command}, True
    while grown:
        more = {int(row[0]) for row in rows if int(row[1]) in family and row[2][0] != "Z"} - family
        family, grown = family | more, bool(more)
    return {int(row[0]): row[3] for row in rows if int(row[0]) in family - {command} and row[2][0] != "Z"}


def wait_until(is_reached, seconds: float = 90) -> None:
    give_up = time.monotonic() + seconds
    while not is_reached():
        assert time.monotonic() < give_up, "it never came"
        time.sleep(0.05)


def alive(pids) -> list[int]:
    stats = (Path(f"/proc/{pid}/stat") for pid in pids)
    return [int(path.parent.name) for path in stats if path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"]


@pytest.mark.parametrize("number, to_group", [
    (signal.SIGTERM, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)])
def test_the_toy_leaves_no_process_behind(cli, tmp_path, number, to_group):
    out = tmp_path / "runs/mini"
    running = cli.start(*TOY, "--out", out, "--prompt.cache-dir", tmp_path / "clips")
    wait_until(lambda: any(read_jsonl(path) for path in out.glob("arms/*/metrics.jsonl")))
    workers = workers_of(running[0])
    assert len(workers) >= 3  # a fork server and two arms
    (os.killpg if to_group else os.kill)(running[0], number)
    done = cli.end(running)
    assert done.code == SIGNALS[number] and "the same command continues" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob(".lock"))
    wait_until(lambda: not alive(workers), 3)
    steps = [len(read_jsonl(path)) for path in out.glob("arms/*/metrics.jsonl")]
    saved = [newest_checkpoint(path.parent / "checkpoints") for path in out.glob("arms/*/metrics.jsonl")]
    # Each stopped after its step and saved it, or had not read the clips of its first.
    assert [path and path.name for path in saved] == [f"step-{n:06d}" if n else None for n in steps]


@pytest.mark.slow
def test_arms_end_at_once_when_the_study_is_killed(cli, tmp_path):
    out = tmp_path / "runs/mini"
    running = cli.start(*TOY, "--out", out, "--prompt.cache-dir", tmp_path / "clips")
    wait_until(lambda: any(read_jsonl(path) for path in out.glob("arms/*/metrics.jsonl")))
    workers = workers_of(running[0])
    os.kill(running[0], signal.SIGKILL)
    cli.end(running)
    wait_until(lambda: not alive(workers), 5)  # the fork server has to unload its libraries


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 1.0, 2.0, 4.0, 6.0])
def test_an_interrupt_in_the_first_seconds_shows_no_traceback(tmp_path, delay):
    script = Path(sys.executable).with_name("deepvideo-r1")
    process = subprocess.Popen([script, *map(str, TOY), "--out", tmp_path / "runs/mini"], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in stderr, stderr
