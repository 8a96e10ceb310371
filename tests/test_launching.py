"""Several processes behind one command: one end for all of them, recipes, run files, and starts that are refused."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from test_faults import alive, wait_until, workers_of

from deepvideo_r1.cli import main, parse
from deepvideo_r1.config import PRESETS
from deepvideo_r1.support.checkpoint import newest_checkpoint
from deepvideo_r1.support.files import read_jsonl
from deepvideo_r1.support.recipes import read_recipe
from deepvideo_r1.support.run_directory import difference
from deepvideo_r1.training.launcher import check_processes

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
TWO = [BIN / "deepvideo-r1", "launch", "--processes", 2]


@dataclass
class Running:
    "A command in a process group of its own, as a shell starts it."
    process: subprocess.Popen
    stdout: Path
    stderr: Path

    def end(self, timeout: float = 120) -> tuple[int, str, str]:
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pids = [self.process.pid, *workers_of(self.process.pid)]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"the command still runs; it said: {self.stderr.read_text()}")
        return self.process.returncode, self.stdout.read_text(), self.stderr.read_text()


@pytest.fixture
def start(tmp_path):
    "A function that starts a command; `environment` adds variables."
    started = []

    def begin(*command, **environment) -> Running:
        files = [tmp_path / f"{len(started)}.{name}" for name in ("stdout", "stderr")]
        with files[0].open("w") as stdout, files[1].open("w") as stderr:
            process = subprocess.Popen([str(word) for word in command], env=ENVIRONMENT | environment, stdout=stdout,
                                       stderr=stderr, stdin=subprocess.DEVNULL, cwd=tmp_path, start_new_session=True)
        started.append(Running(process, *files))
        return started[-1]

    yield begin
    for running in started:
        if running.process.poll() is None:
            running.end(0)


def training(model, world, out, *more):
    return ["train", "--preset", "tiny_cpu", "--model", model, "--data", world / "rl.jsonl", "--out", out, "--steps", 40,
            "--rollout.max-tokens", 24, "--train.prompts-per-step", 4, "--train.learning-rate", 1e-3,
            "--train.save-every", 100, *more]


def figures(directory: Path) -> list[dict]:
    kept = lambda name: not re.search("seconds|tokens_per|memory", name)
    return [{k: v for k, v in row.items() if kept(k)} for row in read_jsonl(directory / "metrics.jsonl")]


def reached(out: Path, n_steps: int):
    return lambda: (out / "metrics.jsonl").exists() and len(read_jsonl(out / "metrics.jsonl")) >= n_steps


def stop(running: Running, out: Path, n_steps: int, send) -> tuple[int, str, str]:
    "Ends a training by `send(launcher, processes)` after some steps; no process may be left."
    wait_until(reached(out, n_steps))
    processes = workers_of(running.process.pid)
    assert sum("-m deepvideo_r1" in line for line in processes.values()) == 2
    send(running.process.pid, processes)
    done = running.end()
    wait_until(lambda: not alive(processes), 5)
    return done


# --- one end for all processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compare", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_launch_stops_politely_and_the_same_command_continues(start, trained_model, tiny_world, tmp_path, compare):
    out = tmp_path / "parts"
    command = lambda out: [*TWO, *training(trained_model, tiny_world, out, "--steps", 12)]
    ways = [
        (signal.SIGTERM, lambda launcher, processes: os.kill(launcher, signal.SIGTERM)),
        (signal.SIGINT, lambda launcher, processes: os.killpg(launcher, signal.SIGINT)),  # as Ctrl-C in a terminal
        (signal.SIGTERM, lambda launcher, processes: [os.kill(pid, signal.SIGTERM) for pid in (launcher, *processes)]),
        (signal.SIGTERM, lambda launcher, processes: os.kill(launcher, signal.SIGHUP)),  # as a terminal that is closed
    ]  # the third as a scheduler does it: every process is signalled twice
    for n_steps, (number, send) in zip((2, 4, 6, 8), ways if compare else ways[:2]):
        code, stdout, stderr = stop(start(*command(out)), out, n_steps, send)
        steps = len(figures(out))
        assert code == CODES[number] and stdout == "" and n_steps <= steps < 12, stderr
        assert stderr.endswith(f"\n\ndeepvideo-r1: stopped after {steps} steps; the same command continues\n"), stderr
        assert "Traceback" not in stderr and stderr.count("continues") == 1 and re.search(r"^step \d+ of 12: ", stderr, re.M), stderr
        assert newest_checkpoint(out / "checkpoints").name == f"step-{steps:06d}" and not (out / ".lock").exists()

    code, stdout, stderr = start(*command(out)).end()
    assert code == 0 and stdout.splitlines()[-1] == f"metrics: {out / 'metrics.jsonl'}", stderr
    assert [row["step"] for row in figures(out)] == list(range(12))
    whole = tmp_path / "whole"
    if not compare:
        return
    assert start(*command(whole)).end()[0] == 0
    assert figures(out) == figures(whole)
    weights = [(directory / "model/model.safetensors").read_bytes() for directory in (out, whole)]
    assert weights[0] == weights[1]


def test_what_a_user_can_mend_is_one_line(start, tiny_model, tiny_world, tmp_path, capsys):
    data, words = tiny_world / "rl.jsonl", ["launch", "--processes", "2", "train", "--model", "m", "--data", "d"]
    for wrong, part in (([*words, "--objective.name", "ppo"], "allowed are grpo"), (words[:3], "train or evaluate"),
                        ([*words[:3], "toy"], "got 'toy'"), (["launch", "--nnodes", "2", *words[3:]], "--master-addr"),
                        (["launch", "--recipe", "9gpu", *words[3:]], "8gpu_fsdp2"),
                        (["launch", "--recipe", "8gpu_fsdp2", *words[3:]], "this machine has"),
                        (["launch", "--patience", "0", *words[3:]], "--patience must be above 0")):
        assert main(wrong) == 2  # before any process is started
        stderr = capsys.readouterr().err
        assert re.fullmatch(r"deepvideo-r1: error: [^\n]+\n", stderr) and part in stderr, stderr

    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    code, stdout, stderr = start(*TWO, *training(tiny_model, tiny_world, tmp_path / "out")).end()
    assert code == 2 and stdout == "" and re.fullmatch(r"deepvideo-r1: error: [^\n]+\n", stderr), stderr
    assert "is not empty" in stderr and data.exists()


@pytest.mark.parametrize("seconds", [0.3, pytest.param(1.5, marks=pytest.mark.slow), pytest.param(3.0, marks=pytest.mark.slow),
                                     pytest.param(4.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_start_can_be_stopped_at_any_time(start, tiny_model, tiny_world, tmp_path, number, seconds):
    running = start(*TWO, *training(tiny_model, tiny_world, tmp_path / "out"))
    time.sleep(seconds)
    processes = workers_of(running.process.pid)
    os.kill(running.process.pid, number)
    code, stdout, stderr = running.end()
    assert code == CODES[number] and stdout == "", stderr
    assert "Traceback" not in stderr and stderr.count("the same command") == 1, stderr
    wait_until(lambda: not alive(processes), 5)


PATCH = """import os, signal, time
from dataclasses import replace
import torch
from deepvideo_r1.trainer import Trainer
step, patched = Trainer.step, os.environ["RANK"] == os.environ["PATCHED"]
def other(self):
    if self.state.next_step == 2 and patched:
        {what}
    return step(self)
Trainer.step = other
def score(rollout):
    return replace(rollout, rewards=torch.tensor([float(len(text)) for text in rollout.texts]))
"""


def patched(tmp_path, what: str) -> list:
    "Options of `train` with which a process does something else in its third step."
    (tmp_path / "patch.py").write_text(PATCH.format(what=what))
    return ["--reward.function", f"{tmp_path / 'patch.py'}:score"]


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_crash_shows_its_traceback_once(start, tiny_model, tiny_world, tmp_path, rank):
    more = patched(tmp_path, 'raise KeyError("the cause")')
    running = start(*TWO, *training(tiny_model, tiny_world, tmp_path / "out", *more), PATCHED=rank)
    wait_until(lambda: workers_of(running.process.pid))
    code, stdout, stderr = running.end()
    assert code == 1 and stdout == "" and stderr.count("Traceback") == 1, stderr
    assert stderr.endswith("KeyError: 'the cause'\n") and f"process {rank} of 2:\n" in stderr, stderr
    assert "torch/distributed/launcher" not in stderr and "ChildFailedError" not in stderr


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_process_is_named(start, tiny_model, tiny_world, tmp_path, rank):
    more = patched(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    running = start(*TWO, *training(tiny_model, tiny_world, tmp_path / "out", *more), PATCHED=rank)
    code, stdout, stderr = running.end()
    assert code == 137 and "Traceback" not in stderr, stderr
    assert stderr.endswith(f"process {rank} of 2 was ended by SIGKILL, as when memory runs out\n"), stderr


@pytest.mark.slow
def test_patience_has_an_end(start, tiny_model, tiny_world, tmp_path):
    more, out = patched(tmp_path, "time.sleep(1000)"), tmp_path / "out"
    running = start(*TWO, "--patience", 3, *training(tiny_model, tiny_world, out, *more), PATCHED="1")
    began = []
    code, stdout, stderr = stop(running, out, 2, lambda launcher, processes: (began.append(time.monotonic()),
                                                                           os.kill(launcher, signal.SIGTERM)))
    assert code == 143 and 3 <= time.monotonic() - began[0] < 20
    assert re.search(r"\ndeepvideo-r1: stopped; \d processes did not end in time and were killed; the same command continues "
                     r"from the last checkpoint\n$", stderr), stderr


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(start, tiny_model, tiny_world, tmp_path):
    more, out = patched(tmp_path, "time.sleep(1000)"), tmp_path / "out"

    def twice(launcher, processes):
        os.kill(launcher, signal.SIGINT)
        time.sleep(2)
        os.kill(launcher, signal.SIGINT)

    running = start(*TWO, *training(tiny_model, tiny_world, out, *more), PATCHED="1")
    code, stdout, stderr = stop(running, out, 2, twice)
    assert code == 130 and "Traceback" not in stderr and stderr.count("the same command continues") == 1, stderr


@pytest.mark.slow
def test_processes_save_and_end_when_their_launcher_is_killed(start, tiny_model, tiny_world, tmp_path):
    out = tmp_path / "out"
    running = start(*TWO, *training(tiny_model, tiny_world, out))
    wait_until(reached(out, 2))
    processes = workers_of(running.process.pid)
    os.kill(running.process.pid, signal.SIGKILL)
    running.end()
    wait_until(lambda: not alive(processes), 20)
    assert newest_checkpoint(out / "checkpoints").name == f"step-{len(figures(out)):06d}"


@pytest.mark.slow
def test_two_launchers_meet_and_stop_together(start, tiny_model, tiny_world, tmp_path):
    out, port = tmp_path / "out", 20000 + os.getpid() % 20000
    nodes = [start(BIN / "deepvideo-r1", "launch", "--nnodes", 2, "--node-rank", rank, "--master-addr", "127.0.0.1",
                   "--master-port", port, "--processes", 1, *training(tiny_model, tiny_world, out)) for rank in (0, 1)]
    wait_until(reached(out, 2))
    os.kill(nodes[1].process.pid, signal.SIGTERM)
    for code, stdout, stderr in (node.end() for node in nodes):
        assert code == 143 and "Traceback" not in stderr and "the same command continues" in stderr, stderr


@pytest.mark.slow
def test_a_launcher_that_waits_for_another_machine_can_be_stopped(start, tiny_model, tiny_world, tmp_path):
    running = start(BIN / "deepvideo-r1", "launch", "--nnodes", 2, "--node-rank", 0, "--master-addr", "127.0.0.1",
                    "--master-port", 20000 + os.getpid() % 20000, "--processes", 1,
                    *training(tiny_model, tiny_world, tmp_path / "out"))
    time.sleep(6)
    os.kill(running.process.pid, signal.SIGINT)
    code, stdout, stderr = running.end(10)
    assert (code, stderr) == (130, "\ndeepvideo-r1: stopped before it began; the same command starts it\n")


@pytest.mark.slow
def test_an_evaluation_is_launched_and_stopped_alike(start, tiny_model, tiny_world, tmp_path):
    out = tmp_path / "e"
    command = [*TWO, "evaluate", "--model", tiny_model, "--data", tiny_world / "rl.jsonl", "--out", out, "--batch-prompts", 1,
               "--max-tokens", 200]
    running = start(*command)
    wait_until(lambda: list(out.glob("rows*")) or running.process.poll() is not None)
    os.kill(running.process.pid, signal.SIGTERM)
    code, stdout, stderr = running.end()
    assert code == 143 and "Traceback" not in stderr and stderr.count("the same command continues") == 1, stderr
    code, stdout, stderr = start(*command).end()
    assert code == 0 and len(read_jsonl(out / "rows.jsonl")) == 12, stderr


# --- other launchers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["deepvideo_r1", pytest.param("deepvideo_r1.cli", marks=pytest.mark.slow)])
def test_the_module_is_the_command(start, tmp_path, module):
    code, stdout, stderr = start(sys.executable, "-m", module, "train", "--model", "m", "--data", tmp_path / "no.jsonl").end()
    assert code == 2 and stdout == "" and "no such file" in stderr and len(stderr.splitlines()) == 1


def test_one_process_where_two_were_asked_for_is_refused(start, tiny_model, tiny_world, tmp_path):
    launched = start(BIN / "accelerate", "launch", "--num_processes", 2, "-m", "deepvideo_r1",
                     *training(tiny_model, tiny_world, tmp_path / "out"))
    code, stdout, stderr = launched.end()
    assert code == 1 and "asked for several processes and started one" in stderr and not (tmp_path / "out").exists()
    for environment in ({}, {"WORLD_SIZE": "2", "MASTER_ADDR": "a", "ACCELERATE_MIXED_PRECISION": "no"},
                        {"ACCELERATE_MIXED_PRECISION": "no"}, {"MASTER_ADDR": "a"}, {"SLURM_NTASKS": "8"}):
        check_processes(environment)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [
    [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2],
    [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0]], ids=["torchrun", "accelerate"])
def test_other_launchers_stop_after_the_step_too(start, tiny_model, tiny_world, tmp_path, launcher):
    out = tmp_path / "out"
    running = start(*launcher, "-m", "deepvideo_r1", *training(tiny_model, tiny_world, out))
    code, stdout, stderr = stop(running, out, 2, lambda launcher, processes: os.kill(launcher, signal.SIGTERM))
    assert code == 1 and "SignalException" in stderr  # the launcher's own, which no process can prevent
    assert newest_checkpoint(out / "checkpoints").name == f"step-{len(figures(out)):06d}"


# --- recipes and run files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, processes, machines", [
    ("1gpu", 1, 1), ("4gpu_fsdp2", 4, 1), ("8gpu_fsdp2", 8, 1), ("2nodes_fsdp2", 8, 2)])
def test_recipes(name, processes, machines):
    recipe = read_recipe(name)
    assert (recipe.n_processes, recipe.n_machines) == (processes, machines)
    assert recipe.environment["ACCELERATE_MIXED_PRECISION"] == "no" and recipe.is_sharded == name.endswith("fsdp2")
    if recipe.is_sharded:
        wanted = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                  "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
                  "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_ACTIVATION_CHECKPOINTING": "false",
                  "FSDP_OFFLOAD_PARAMS": "false"}
        assert {name: recipe.environment[name] for name in wanted} == wanted
    assert "wrap_policy" in recipe.path.read_text() or not recipe.is_sharded


def test_a_recipe_sets_what_accelerate_launch_sets(tmp_path):
    (tmp_path / "look.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    content = yaml.safe_load((ROOT / "recipes/8gpu_fsdp2.yaml").read_text()) | {"num_processes": 1}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
    done = subprocess.run([BIN / "accelerate", "launch", "--config_file", tmp_path / "one.yaml", tmp_path / "look.py"],
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    set_by_accelerate = json.loads(done.stdout.splitlines()[-1])
    ours = read_recipe(str(tmp_path / "one.yaml")).environment
    names = [name for name in set_by_accelerate if name.startswith(("ACCELERATE_", "FSDP_"))]
    assert {name: ours[name] for name in names} == {name: set_by_accelerate[name] for name in names} and len(names) > 10


MODELS = {"2_vl_2b": "Qwen2-VL-2B", "2_vl_7b": "Qwen2-VL-7B", "2_5_vl_3b": "Qwen2.5-VL-3B", "2_5_vl_7b": "Qwen2.5-VL-7B"}
RUN_FILES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_run_files_have_the_settings_of_the_paper(path):
    config, = parse(["train", "--config", str(path)]).args
    task, _, model = path.stem.partition("_qwen")
    assert config.model == f"Qwen/{MODELS[model]}-Instruct" and config.format == task and config.out == f"runs/{path.stem}"
    assert config.prompt.max_frames == 16 and config.prompt.max_pixels == 252 * 252 and config.prompt.template == "think"
    assert config.rollout.group_size == 8 and config.augment.window == 100 and config.augment.enabled
    assert config.objective.name == "reg_grpo" and config.objective.kl_coef == 0.1
    changed = difference(PRESETS["paper_3b"](config.model, config.data), config)
    assert set(changed) <= {"out", "format", "split", "root", "train.steps"}  # the rest is what the preset says
    assert "ours" in path.read_text()


def test_there_is_a_run_file_for_every_table():
    tasks = [path.stem.partition("_qwen") for path in RUN_FILES]
    assert sorted(model for task, _, model in tasks if task == "seed_bench_r1") == sorted(MODELS)
    assert {task for task, *_ in tasks} == {"seed_bench_r1", "video_r1", "nextgqa"}


def test_a_file_of_settings_comes_between_preset_and_flags(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\nrollout: {group_size: 6, batch-rows: 5}\ntrain: {learning_rate: 1e-5, steps: 7}\n")
    config, = parse(["train", "--preset", "tiny_cpu", "--config", str(path), "--train.steps", "9"]).args
    assert (config.prompt.template, config.rollout.group_size, config.rollout.batch_rows) == ("plain", 6, 5)
    assert (config.train.learning_rate, config.train.steps, config.train.inner_updates) == (1e-5, 9, 2)
    config, = parse(["train", "--config", str(path)]).args
    assert config.prompt.template == "think" and config.train.steps == 7
    path.write_text("model: m\nn_responses: 3\nprompt: {template: plain}")
    config, = parse(["evaluate", "--config", str(path), "--data", "d", "--temperature", "1"]).args
    assert (config.model, config.n_responses, config.temperature, config.prompt.template) == ("m", 3, 1.0, "plain")

    for text, parts in (("train: {stepz: 3}", ("train.stepz is no setting", "did you mean train.steps")),
                        ("steps: 3", ("did you mean train.steps",)), ("train: {steps: many}", ("'many'", "a whole number")),
                        ("rollout: {group_size: 1}", ("rollout.group_size is 1", "at least 2")),
                        ("objective: {name: ppo}", ("objective.name is 'ppo'", "grpo, reg_grpo")),
                        ("policy: bfloat16", ("policy is 'bfloat16'", "a table of settings")),
                        ("policy: {dtype: float16}", ("policy.dtype is 'float16'", "float32, bfloat16")),
                        ("strict: 1", ("strict is 1", "true or false")), ("a: [", ("line 1",)), ("- a", ("names with values",))):
        path.write_text(text)
        assert main(["train", "--config", str(path), "--model", "m", "--data", "d"]) == 2
        stderr = capsys.readouterr().err
        assert len(stderr.splitlines()) == 1 and all(part in stderr for part in (str(path), *parts)), stderr
    for words, part in ((["--config", "gone.toml"], "no such file"), (["--config"], "--config needs one value"),
                        (["--config", "run.ini"], ".toml, .yaml")):
        assert main(["train", *words]) == 2 and part in capsys.readouterr().err


def test_a_run_can_be_repeated_from_its_own_config(tmp_path, start, tiny_model, tiny_world):
    config, = parse([str(word) for word in training(tiny_model, tiny_world, tmp_path / "out", "--steps", 3)]).args
    from deepvideo_r1.support.run_directory import open_run

    open_run(tmp_path / "out", config)
    again, = parse(["train", "--config", str(tmp_path / "out/config.json"), "--out", str(tmp_path / "out")]).args
    assert again == config
