"""The command `deepvideo-r1` as a user meets it: exit codes, files, one line for a mistake, stopping and going on."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deepvideo_r1.config import tiny_cpu
from deepvideo_r1.experiment import run_training
from deepvideo_r1.support.checkpoint import whole_checkpoints
from deepvideo_r1.support.clock import repeatable
from deepvideo_r1.support.files import read_jsonl
from deepvideo_r1.toy.made_up import write_made_up_run
from deepvideo_r1.toy.table import toy_table
from deepvideo_r1.toy.runs import read_results

SCRIPT = Path(sys.executable).with_name("deepvideo-r1")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
COMMANDS = ("toy", "world", "train", "evaluate", "launch", "ask", "plan", "data check", "map")


@dataclass
class Done:
    code: int
    stdout: str
    stderr: str


class Commands:
    "Starts commands through `command_server.py`, each in a process of its own."

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        server = [sys.executable, str(Path(__file__).with_name("command_server.py"))]
        self.server = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=ENVIRONMENT)

    def request(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *args, folder: Path | None = None) -> tuple[int, Path, Path]:
        "Process id, file of stdout and file of stderr of a command that has begun."
        self.count += 1
        stdout, stderr = (self.folder / f"{self.count}.{name}" for name in ("stdout", "stderr"))
        pid = self.request(start=dict(args=[str(arg) for arg in args], folder=str(folder or self.folder),
                                      stdout=str(stdout), stderr=str(stderr)))
        return pid, stdout, stderr

    def end(self, running: tuple[int, Path, Path]) -> Done:
        pid, stdout, stderr = running
        code = self.request(wait=pid, timeout=120)
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            pytest.fail(f"the command still runs; it said: {stderr.read_text()}")
        return Done(code, stdout.read_text(), stderr.read_text())

    def run(self, *args, folder: Path | None = None) -> Done:
        return self.end(self.start(*args, folder=folder))

    def run_until(self, is_reached, number: signal.Signals, *args) -> Done:
        "Sends a signal to the command's first process once `is_reached(stderr so far)`."
        running = self.start(*args)
        give_up = time.monotonic() + 60
        while not (reached := is_reached(running[2].read_text() if running[2].exists() else "")):
            if time.monotonic() > give_up:
                break
            time.sleep(0.01)
        os.kill(running[0], number)
        done = self.end(running)
        assert reached, f"the moment to stop never came; the command said: {done.stderr}"
        return done


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.server.stdin.close()
    commands.server.wait(10)


def check_one_line(done: Done, *parts) -> None:
    "Exit code 2 and exactly one line on stderr, in which all parts stand."
    assert done.code == 2, done.stdout + done.stderr
    assert re.fullmatch(r"deepvideo-r1: error: [^\n]+\n", done.stderr), done.stderr
    for part in parts:
        assert str(part) in done.stderr
    assert done.stdout == ""


def figures(directory: Path) -> list[dict]:
    return [repeatable(row) for row in read_jsonl(directory / "metrics.jsonl")]


# --- what works ---------------------------------------------------------------------------------------------------


def test_the_installed_script(tmp_path):
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and all(command in done.stdout for command in COMMANDS)
    train = [SCRIPT, "train", "--model", tmp_path, "--data", tmp_path / "no.jsonl", "--out", tmp_path / "out"]
    failed = subprocess.run(train, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    check_one_line(Done(failed.returncode, failed.stdout, failed.stderr), tmp_path / "no.jsonl", "no such file")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli, command):
    done = cli.run(*command.split(), "--help")
    assert done.code == 0 and done.stderr == ""
    assert f"usage: deepvideo-r1 {command}" in done.stdout and "tyro" not in done.stdout.lower()


HEAVY = {"torch", "transformers", "accelerate", "peft", "numpy", "matplotlib"}
LOOK = """import sys
from deepvideo_r1.cli import main
try: code = main(sys.argv[1:])
except SystemExit as stop: code = stop.code or 0
print(code, *sorted({name.partition(".")[0] for name in sys.modules}))"""


@pytest.mark.parametrize("arguments", [
    ["--help"], ["toy", "--help"], ["train", "--help"], ["train", "--preset", "paper_7b", "--help"], ["evaluate", "--help"],
    ["data", "check", "--help"], ["plan", "--preset", "paper_7b", "--help"], ["train", "--no-such-flag"], ["no-such-command"], ["toy", "--arms", "ppo"],
    ["train", "--model", "m", "--data", "d", "--prompt.template", "chat"]], ids=" ".join)
def test_the_parser_needs_no_heavy_library(arguments):
    done = subprocess.run([sys.executable, "-c", LOOK, *arguments], capture_output=True, text=True, timeout=60)
    code, *modules = done.stdout.splitlines()[-1].split()
    assert int(code) == (0 if "--help" in arguments else 2), done.stderr
    assert not HEAVY & set(modules)


def test_plan_says_whether_a_run_fits(cli, tiny_model):
    done = cli.run("plan", "--model", tiny_model, "--gpu", "24")
    assert done.code == 0 and done.stderr == "" and "1 GPU: fits" in done.stdout and "MB on each GPU" in done.stdout
    done = cli.run("plan", "--preset", "paper_7b", "--gpus", "8", "--sharding", "ddp")
    assert done.code == 0 and "does not fit" in done.stdout.splitlines()[-1]
    assert "change first: FSDP2 (recipes/8gpu_fsdp2.yaml)" in done.stdout.splitlines()[-1] and "KV cache" in done.stdout
    check_one_line(cli.run("plan", "--preset", "paper_7b", "--gpu", "h900"), "'h900'", "allowed are a100-40")
    check_one_line(cli.run("plan", "--model", "nowhere"), "nowhere", "no such directory")


def test_help_lists_the_choices(cli):
    page = cli.run("train", "--help").stdout
    for choices in ("{plain,think}", "{float32,bfloat16}", "{always,vanishing}", "{jsonl,seed_bench_r1,", "{grpo,reg_grpo,"):
        assert choices in page.replace("\n", "").replace(" ", ""), choices


def test_the_table_of_the_toy_fits_a_narrow_terminal(tmp_path):
    page = io.StringIO()
    arms = ("grpo", "reg_grpo_da", "reg_grpo_both_redraw")
    results = read_results(write_made_up_run(tmp_path, arms=arms, extras=False))
    Console(file=page, width=80, force_terminal=False).print(toy_table(results))
    lines = page.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "\u2026" not in page.getvalue()
    assert sum(line.lstrip().startswith(arms) for line in lines) == 9  # a line for each arm and seed, none is broken


def test_world(cli, tmp_path):
    size = ["--sft-videos", 2, "--rl-videos", 3, "--eval-videos", 1]
    done = cli.run("world", "--out", "w", *size, folder=tmp_path)
    assert done.code == 0 and done.stdout.startswith("w: ") and "6 sft" in done.stdout and "6 rl" in done.stdout
    videos = {path: path.stat().st_mtime_ns for path in (tmp_path / "w/videos").glob("*.mp4")}
    assert len(videos) == 2 + 3 + 3 and json.loads((tmp_path / "w/world.json").read_text())["rl_videos"] == 3
    assert cli.run("world", "--out", "w", *size, folder=tmp_path).code == 0
    assert videos == {path: path.stat().st_mtime_ns for path in (tmp_path / "w/videos").glob("*.mp4")}
    check_one_line(cli.run("world", "--out", tmp_path / "w", *size[:-1], 2), tmp_path / "w", "another config")


def test_evaluate_and_ask(cli, trained_model, tiny_world, tmp_path):
    arguments = ["evaluate", "--model", trained_model, "--data", tiny_world / "L1.jsonl", "--out", tmp_path / "e",
                 "--max-tokens", 24, "--prompt.template", "plain", "--n-responses", 2, "--temperature", 1.0]
    done = cli.run(*arguments)
    assert done.code == 0 and f"rows: {tmp_path / 'e/rows.jsonl'}" in done.stdout and "L1" in done.stdout
    rows = (tmp_path / "e/rows.jsonl").read_text()
    summary = json.loads((tmp_path / "e/summary.json").read_text())
    questions = (tiny_world / "L1.jsonl").read_text().splitlines()
    assert len(rows.splitlines()) == summary["all"]["n"] == len(questions)
    found = [json.loads(row) for row in rows.splitlines()]
    assert [row["id"] for row in found] == [json.loads(line)["id"] for line in questions]
    assert summary["L1"]["format"][0] == pytest.approx(sum(sum(r["parts"]["format"]) / 2 for r in found) / len(found))
    assert cli.run(*arguments).code == 0 and (tmp_path / "e/rows.jsonl").read_text() == rows  # nothing is asked twice

    video = next((tiny_world / "videos").glob("*.mp4"))
    ask = ["ask", "how many points in total ?", "--model", trained_model, "--max-tokens", 24,
           "--prompt.template", "plain"]
    with_video, without = cli.run(*ask, "--video", video), cli.run(*ask)
    assert with_video.code == without.code == 0 and with_video.stderr == ""
    assert with_video.stdout.strip() and with_video.stdout != without.stdout
    kept = tmp_path / "clips"
    for _ in range(2):  # decoded, then from the disk
        assert cli.run(*ask, "--video", video, "--prompt.cache-dir", kept).stdout == with_video.stdout
    assert len(list(kept.rglob("*.safetensors"))) == 1


def train_arguments(model, world, out, *more):
    return ["train", "--preset", "tiny_cpu", "--model", model, "--data", world / "rl.jsonl", "--out", out, "--steps", 6,
            "--rollout.max-tokens", 24, "--train.prompts-per-step", 6, "--train.learning-rate", 1e-3,
            "--augment.enabled", "--augment.min-groups", 4, "--augment.hint-source", "stored", *more]


@pytest.fixture(scope="module")
def whole_run(cli, trained_model, tiny_world, tmp_path_factory) -> Path:
    "The directory of an uninterrupted `train`."
    out = tmp_path_factory.mktemp("train") / "whole"
    done = cli.run(*train_arguments(trained_model, tiny_world, out))
    assert done.code == 0, done.stderr
    assert done.stdout == f"model: {out / 'model'}\nmetrics: {out / 'metrics.jsonl'}\n"
    start, *lines = done.stderr.splitlines()
    assert start.startswith("1 process, whole on cpu; weights: trained ") and "of 4 responses" in start
    assert lines[0].startswith("step 1 of 6: reward 0.") and lines[-1].startswith("step 6 of 6: reward ")
    assert all(re.fullmatch(r"step \d of 6: .*, tokens/s [\d,]+, time left 0:\d\d:\d\d", line) for line in lines)
    return out


def weights(directory: Path) -> bytes:
    return (directory / "model/model.safetensors").read_bytes()


def test_train(whole_run, cli, trained_model):
    rows = figures(whole_run)
    assert [row["step"] for row in rows] == list(range(6)) and len({row["reward_mean"] for row in rows}) > 1
    assert json.loads((whole_run / "config.json").read_text())["train"]["steps"] == 6
    assert weights(whole_run) != (trained_model / "model.safetensors").read_bytes()
    asked = cli.run("ask", "how many points in total ?", "--model", whole_run / "model", "--max-tokens", 4)
    assert asked.code == 0  # the result is a checkpoint like any other


def test_train_goes_on_after_an_interrupt(cli, trained_model, tiny_world, whole_run, tmp_path):
    out = tmp_path / "run"
    arguments = train_arguments(trained_model, tiny_world, out)  # saves every 10 steps: only the interrupt saves here
    stopped = cli.run_until(lambda _: len(read_jsonl(out / "metrics.jsonl")) >= 2, signal.SIGINT, *arguments)
    assert stopped.code == 130 and stopped.stdout == ""
    assert re.search(r"stopped after \d steps; the same command continues\n$", stopped.stderr)
    assert 2 <= len(figures(out)) < 6 and not (out / "model").exists()
    assert cli.run(*arguments).code == 0
    assert figures(out) == figures(whole_run) and weights(out) == weights(whole_run)


def test_train_goes_on_after_a_kill(cli, trained_model, tiny_world, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    arguments = lambda out: train_arguments(trained_model, tiny_world, out, "--train.save-every", 2, "--steps", 8)
    assert cli.run(*arguments(whole)).code == 0
    killed = cli.run_until(lambda _: len(read_jsonl(out / "metrics.jsonl")) >= 3, signal.SIGKILL, *arguments(out))
    assert killed.code == -signal.SIGKILL
    assert whole_checkpoints(out / "checkpoints") and not (out / "model").exists()
    assert cli.run(*arguments(out)).code == 0
    assert figures(out) == figures(whole) and weights(out) == weights(whole)


def test_a_skipped_clip_is_told(cli, trained_model, tiny_world, tmp_path):
    rows = [json.loads(line) for line in (tiny_world / "rl.jsonl").read_text().splitlines()]
    rows += [row | {"id": row["id"] + "-again"} for row in rows]
    for row in rows:
        row["video"] = str(tiny_world / row["video"])
    rows[5]["video"] = str(tmp_path / "gone.mp4")
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    done = cli.run(*train_arguments(trained_model, tmp_path, out, "--train.prompts-per-step", 24, "--steps", 1))
    assert done.code == 0 and f"1 question left out:\n  {tmp_path / 'gone.mp4'}: no such file" in done.stderr
    assert [(row["groups"], row["bad_clips"]) for row in figures(out)] == [(23, 1)]


# --- the toy ------------------------------------------------------------------------------------------------------

TOY = ["toy", "--arms", "grpo", "reg_grpo_da",
       "--world.sft-videos", 50, "--world.rl-videos", 8, "--world.eval-videos", 3,
       "--cold-start.vision-steps", 115, "--cold-start.vision-batch", 2, "--cold-start.sft-steps", 6,
       "--cold-start.sft-batch", 8,
       "--cold-start.hidden-size", 48, "--cold-start.n-layers", 2, "--rollout.group-size", 2, "--rollout.max-tokens", 8,
       "--train.steps", 12, "--train.prompts-per-step", 4, "--train.prompts-per-forward", 4, "--train.save-every", 4]


@pytest.mark.slow  # about a minute, and its interrupts race with the work on a busy machine
def test_the_toy_goes_on_wherever_it_was_interrupted(cli, tmp_path):
    out, cache = tmp_path / "runs/mini", tmp_path / "runs/cache"
    told = []

    def stop_when(is_reached):
        told.append(cli.run_until(is_reached, signal.SIGINT, *TOY, "--out", out))
        assert told[-1].code == 130 and "the same command continues" in told[-1].stderr, told[-1].stderr
        assert "Traceback" not in told[-1].stderr, told[-1].stderr
        assert not (out / "results.json").exists()

    stop_when(lambda stderr: len(list(cache.glob("world-*/videos/*.mp4"))) > 10)
    assert not list(cache.glob("world-*/world.json")) and "cold start" not in told[-1].stderr
    stop_when(lambda stderr: list(cache.glob("cold-*/checkpoints/step-*")))
    assert not list(cache.glob("cold-*/cold_start.json")) and "stopped in the cold start" in told[-1].stderr
    stop_when(lambda stderr: any(read_jsonl(path) for path in out.glob("arms/*/metrics.jsonl")))
    assert list(cache.glob("cold-*/cold_start.json")) and not list(out.glob("arms/*/arm.json"))
    assert all(whole_checkpoints(path.parent / "checkpoints") for path in out.glob("arms/*/metrics.jsonl"))

    done = cli.run(*TOY, "--out", out)
    assert done.code == 0, done.stderr
    assert f"report: {out / 'report.html'}" in done.stdout and (out / "report.html").stat().st_size > 1000
    check_results(json.loads((out / "results.json").read_text()))
    for arm in ("grpo", "reg_grpo_da"):
        assert [row["step"] for row in figures(out / f"arms/{arm}-seed0")] == list(range(12))
    check_cold_start(cache, tmp_path / "again")


def is_share(value) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


def check_results(results: dict) -> None:
    assert results["config"]["train"]["steps"] == 12 and results["config"]["arms"] == ["grpo", "reg_grpo_da"]
    start = results["cold_start"]
    assert start["seconds"] > 0 and start["reused"] is False
    assert [(arm["arm"], arm["seed"]) for arm in results["arms"]] == [("grpo", 0), ("reg_grpo_da", 0)]
    for arm in results["arms"]:
        assert arm["steps"] == 12
        assert arm["responses"] >= 12 * 4 * 2 and arm["seconds"] > 0 and arm["kl_end"] >= 0
        assert all(0 <= arm[name] <= 2 for name in ("reward_start", "reward_end"))
        assert set(arm["vanishing_ratio"]) == {"original", "final"}
        assert all(map(is_share, arm["vanishing_ratio"].values()))
    for accuracy in (start["accuracy"], *(arm["accuracy"] for arm in results["arms"])):
        assert set(accuracy) == {"L1", "L2", "L3"}
        assert all(is_share(level[way]) for level in accuracy.values() for way in ("greedy", "sampled"))


def check_cold_start(cache: Path, folder: Path) -> None:
    "The interrupted cold start gave the weights of an uninterrupted one."
    from deepvideo_r1.cli import ToyConfig
    from deepvideo_r1.toy.cold_start import cold_start
    from deepvideo_r1.toy.config import ColdStartConfig
    from deepvideo_r1.toy.world import WorldConfig

    config = ToyConfig(world=WorldConfig(sft_videos=50, rl_videos=8, eval_videos=3),
                       cold_start=ColdStartConfig(115, 2, 6, 8, hidden_size=48, n_layers=2))
    folder.mkdir()
    shutil.copytree(next(cache.glob("world-*")), folder / next(cache.glob("world-*")).name)
    torch.set_num_threads(1)
    _, model, told = cold_start(config, folder)
    assert told["reused"] is False and weights(model.parent) == weights(next(cache.glob("cold-*")))


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path, tiny_world):
    "A function that writes a questions file with the videos of the tiny world; `change` may edit its rows."
    def write(change=lambda rows: rows) -> Path:
        rows = [json.loads(line) for line in (tiny_world / "rl.jsonl").read_text().splitlines()]
        rows = change([row | {"video": str(tiny_world / row["video"])} for row in rows])
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return path

    return write


def edit(number: int, **fields):
    def change(rows):
        rows[number] |= fields
        return rows

    return change


ROWS = {  # what is done to the rows -> what the line must say besides the file
    "empty": (lambda rows: [], ["holds no rows"]),
    "broken": (lambda rows: rows[:4] + ['{"question": "how ma\n'], ["line 5"]),
    "no object": (lambda rows: rows[:2] + ["[1, 2]\n"], ["line 3", "JSON object"]),
    "answer": (edit(2, kind="choice", options=["one", "two"], answer="C"),
               ["line 3", "'C'", "among its options (A, B)"]),
    "kind": (edit(6, kind="essay"), ["line 7", "'essay'", "choice, number, text, grounding"]),
    "field": (edit(0, questoin="?"), ["line 1", "'questoin'"]),
    "twice": (lambda rows: rows + rows[:1], ["line 13", "was used before, on line 1"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_questions_file_that_cannot_be_used(cli, trained_model, questions, tmp_path, case):
    path, out = questions(ROWS[case][0]), tmp_path / "out"
    for command in ("train", "evaluate"):
        done = cli.run(command, "--model", trained_model, "--data", path, "--out", out, "--strict")
        check_one_line(done, path, *ROWS[case][1])
        assert not out.exists()


@pytest.mark.parametrize("content, cause", [(None, "no such file"), ("a film", "Invalid data"), ("", "empty")])
def test_ask_about_a_video_that_cannot_be_read(cli, trained_model, tmp_path, content, cause):
    video = tmp_path / "film.mp4"
    if content is not None:
        video.write_text(content)
    check_one_line(cli.run("ask", "what ?", "--model", trained_model, "--video", video), video, cause)


@pytest.mark.parametrize("question, cause", [
    ("how many points ? " * 3000, ("tokens; the model's context of", "no room for it and a response of up to 8")),
    ("a <|video_pad|> ?", ("the text holds the special token <|video_pad|>; remove it",))])
def test_ask_what_the_model_cannot_be_asked(cli, trained_model, question, cause):
    check_one_line(cli.run("ask", question, "--model", trained_model, "--max-tokens", 8), "sample question: ", *cause)


def test_a_model_that_cannot_be_used(cli, trained_model, questions, tmp_path):
    data, out, other = questions(), tmp_path / "out", tmp_path / "other"
    shutil.copytree(trained_model, other)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    cut = tmp_path / "cut"
    shutil.copytree(trained_model, cut)
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    for model, *parts in ((other, "'llama'", "qwen2_vl, qwen2_5_vl"), (tmp_path / "gone",), (cut,)):
        check_one_line(cli.run("train", "--model", model, "--data", data, "--out", out), model, *parts)
        assert not out.exists()


def test_settings_that_cannot_be_used(cli, trained_model, questions, tmp_path):
    data, out = questions(), tmp_path / "out"
    train = ["train", "--model", trained_model, "--data", data, "--out", out]
    check_one_line(cli.run(*train, "--rollout.group-size", 1), "group_size is 1", "at least 2")
    check_one_line(cli.run(*train, "--prompt.template", "chat"), "'chat'", "plain, think")
    check_one_line(cli.run("toy", "--arms", "ppo", "--out", out), "'ppo'", "grpo")
    check_one_line(cli.run("train", "--preset", "huge"), "'huge'", "tiny_cpu")
    assert not out.exists()


def test_a_directory_of_another_run(cli, trained_model, questions, tmp_path):
    data, out = questions(), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    train = train_arguments(trained_model, data.parent, out)
    train[train.index("--data") + 1] = data
    check_one_line(cli.run(*train), out, "not empty")
    (out / "notes.txt").unlink()
    assert cli.run(*train, "--steps", 1).code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    check_one_line(cli.run(*train, "--steps", 1, "--train.seed", 1), out, "train.seed was 0, is 1")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_place_that_cannot_be_written(cli, trained_model, tiny_world, tmp_path):
    (tmp_path / "file").write_text("a file, no folder")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        check_one_line(cli.run(*train_arguments(trained_model, tiny_world, out)), tmp_path / "file")
        check_one_line(cli.run("world", "--out", out), tmp_path / "file")
        evaluate = ["evaluate", "--model", trained_model, "--data", tiny_world / "L1.jsonl", "--out", out]
        check_one_line(cli.run(*evaluate), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "a file, no folder"


@pytest.fixture
def small_disk(tmp_path):
    "A function that gives a folder with so many kilobytes of room; skips where none can be made."
    mounted = []

    def make(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can make a small disk")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


@pytest.mark.parametrize("room, steps", [(0.3, 6), (1.5, 6), (1.2, 2)], ids=["weights", "optimizer", "model"])
def test_training_on_a_full_disk(cli, trained_model, tiny_world, whole_run, small_disk, room, steps):
    "Told before the first step, since the disk is too small for the run."
    disk = small_disk(int(room * len(weights(whole_run)) / 1024))  # how often the weights fit
    train = train_arguments(trained_model, tiny_world, disk / "run", "--train.save-every", 2, "--steps", steps)
    done = cli.run(*train)
    assert done.code == 2 and done.stdout == "", done.stderr
    assert re.search(rf"deepvideo-r1: error: {disk}/run[^ ]*: no space left on the device: .* needs [\d.e-]+ GB and [\d.e-]+ GB "
                     "are free; free some and run the same command again", done.stderr), done.stderr
    assert not list((disk / "run").rglob("*.safetensors"))
    enlarge(disk)
    assert cli.run(*train).code == 0
    assert figures(disk / "run") == figures(whole_run)[:steps]
    assert steps < 6 or weights(disk / "run") == weights(whole_run)


def test_a_disk_that_fills_up_while_a_run_trains(trained_model, tiny_world, small_disk):
    "The save is refused before it begins, the checkpoint before stays, and the run continues to the same weights."
    disk, other = small_disk(64 * 1024), small_disk(64 * 1024)
    config = tiny_cpu(str(trained_model), str(tiny_world / "rl.jsonl"))
    config = replace(config, train=replace(config.train, steps=4, prompts_per_step=3, save_every=2))

    def fill(row):
        if row["step"] == 2:
            (disk / "other").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 200_000)))

    run_training(replace(config, out=str(other / "run")))
    with pytest.raises(OSError, match="the next checkpoint needs"):
        run_training(replace(config, out=str(disk / "run")), on_step=fill)
    assert [path.name for path in whole_checkpoints(disk / "run/checkpoints")] == ["step-000002"]
    (disk / "other").unlink()
    run_training(replace(config, out=str(disk / "run")))
    assert weights(disk / "run") == weights(other / "run") and figures(disk / "run") == figures(other / "run")


def test_a_world_and_answers_on_a_full_disk(cli, trained_model, tiny_world, small_disk):
    disk = small_disk(64)
    world = ["world", "--out", disk / "w", "--sft-videos", 20, "--rl-videos", 1, "--eval-videos", 1]
    done = cli.run(*world)
    assert done.code == 2 and done.stdout == "" and done.stderr.splitlines()[0] == "world: started"
    *_, last = done.stderr.splitlines()
    assert re.fullmatch(rf"deepvideo-r1: error: {disk}/w[^ ]*: no space left on the device; .*", last), last
    assert len(done.stderr.splitlines()) == 2 and not (disk / "w/world.json").exists()
    assert not list(disk.rglob("*.tmp"))  # no half a video
    (disk / "fill").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 4096)))
    evaluate = ["evaluate", "--model", trained_model, "--data", tiny_world / "L1.jsonl", "--out", disk / "e",
                "--max-tokens", 24]
    done = cli.run(*evaluate)
    *_, last = done.stderr.splitlines()
    assert done.code == 2
    assert re.fullmatch(rf"deepvideo-r1: error: {disk}/e[^ ]*: no space left on the device; .*", last), done.stderr
    enlarge(disk)
    assert cli.run(*world).code == 0 and cli.run(*evaluate).code == 0
    assert len(read_jsonl(disk / "e/rows.jsonl")) == 4


def test_too_many_bad_clips(cli, trained_model, questions, tmp_path):
    gone = [str(tmp_path / f"gone{i}.mp4") for i in range(2)]
    data, out = questions(lambda rows: edit(3, video=gone[0])(edit(8, video=gone[1])(rows))), tmp_path / "out"
    train = train_arguments(trained_model, data.parent, out)
    train[train.index("--data") + 1] = data
    done = cli.run(*train, "--train.prompts-per-step", 12)
    start, _, rest = done.stderr.partition("\n")
    assert start.startswith("1 process, whole on ")  # said before the first step
    check_one_line(replace(done, stderr=rest), "2 of 12 clips cannot be read", "more than 5%", "no such file")
    assert any(path in done.stderr for path in gone)
    assert not (out / "model").exists() and not whole_checkpoints(out / "checkpoints")
