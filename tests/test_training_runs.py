"""What people who train for days expect: held-out questions, the best model, samples, trackers, mixtures, a line in the log."""
import json
import os
import signal
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepvideo_r1.training.held_out as held_out_module
from deepvideo_r1.cli import main, parse
from deepvideo_r1.config import EvalConfig, RolloutConfig, RunConfig, TrainConfig, tiny_cpu
from deepvideo_r1.core import Sample
from deepvideo_r1.data.datasets import Samples
from deepvideo_r1.data.mixture import MixedSamples, data_files, load_mixture
from deepvideo_r1.evaluation.evaluate import evaluate, summarise
from deepvideo_r1.experiment import run_training
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.model.prompt import load_processor
from deepvideo_r1.support.checkpoint import whole_checkpoints
from deepvideo_r1.support.clock import repeatable
from deepvideo_r1.support.files import read_jsonl
from deepvideo_r1.support.glossary import unexplained
from deepvideo_r1.support.interrupts import Stopped
from deepvideo_r1.training.held_out import EVALUATION_FIELDS, SAMPLE_FIELDS

SCRIPT = Path(__file__).with_name("watched_training.py")


def make_config(model, world, out, **changes) -> RunConfig:
    "Five steps of a run that asks the held-out questions of level 1 every second step."
    train = TrainConfig(steps=5, prompts_per_step=4, prompts_per_forward=4, learning_rate=3e-3, warmup_steps=1, save_every=3,
                        workers=0)
    watch = EvalConfig(str(world / "L1.jsonl"), every=2, metric="format", samples=2)
    config = tiny_cpu(str(model), str(world / "rl.jsonl"))
    return replace(config, out=str(out), rollout=RolloutConfig(4, max_tokens=24), train=train, eval=watch, **changes)


def timeless(path: Path) -> list[dict]:
    return [{name: value for name, value in repeatable(row).items()} for row in read_jsonl(path)]


def files_of(out: Path) -> dict:
    "What a run has left behind, without what differs from time to time."
    rows = {name: timeless(out / name) for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")}
    models = {name: (out / name / "model.safetensors").read_bytes() for name in ("model", "best")}
    return rows | models | {"note": json.loads((out / "best/evaluation.json").read_text())}


@pytest.fixture(scope="module")
def watched(trained_model, tiny_world, tmp_path_factory) -> Path:
    "The directory of a run with held-out questions, from start to end."
    out = tmp_path_factory.mktemp("watched") / "run"
    torch.set_num_threads(1)
    run_training(make_config(trained_model, tiny_world, out))
    return out


# --- evaluation while a run trains -----------------------------------------------------------------------------------


def test_the_start_every_nth_step_and_the_end_are_evaluated(watched):
    rows = read_jsonl(watched / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert all(row["n"] == 4 and row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] for row in rows)
    names = ["best", "checkpoints", "config.json", "evaluations.jsonl", "identity.json", "metrics.jsonl", "model", "samples.jsonl"]
    assert sorted(path.name for path in watched.iterdir()) == names


def test_every_field_is_explained(watched, tiny_world, tmp_path):
    rows, samples = read_jsonl(watched / "evaluations.jsonl"), read_jsonl(watched / "samples.jsonl")
    assert all(unexplained(row, EVALUATION_FIELDS) == [] for row in rows)
    assert all(set(row) == set(SAMPLE_FIELDS) for row in samples)
    with_intervals = {"mean_iou"}
    assert {name for name in EVALUATION_FIELDS if "<" not in name} - with_intervals <= set(rows[0])


def test_the_figures_are_those_of_an_evaluation_of_the_model(watched, tiny_world):
    questions = load_mixture(str(tiny_world / "L1.jsonl"))
    for name, step in (("model", 5), ("best", json.loads((watched / "best/evaluation.json").read_text())["step"])):
        config = make_config("", tiny_world, "x")
        rows = evaluate(load_policy(watched / name), load_processor(watched / name), questions, prompt=config.prompt,
                        max_tokens=config.rollout.max_tokens)
        row = next(row for row in read_jsonl(watched / "evaluations.jsonl") if row["step"] == step)
        assert summarise(rows)["all"]["format"] == pytest.approx([row["format"], row["format_low"], row["format_high"]])
        samples = {s["id"]: s["response"] for s in read_jsonl(watched / "samples.jsonl") if s["step"] == step}
        assert samples.items() <= {row["id"]: row["responses"][0] for row in rows}.items() and len(samples) == 2


def test_the_best_model_is_the_first_with_the_highest_figure(watched):
    rows = read_jsonl(watched / "evaluations.jsonl")
    best = max(rows[1:], key=lambda row: row["format"])
    note = json.loads((watched / "best/evaluation.json").read_text())
    assert (note["step"], note["metric"], note["value"]) == (best["step"], "format", best["format"])
    values = [row["format"] for row in rows[1:]]
    assert [row["best"] for row in rows] == [False] + [v > max(values[:i], default=-1) for i, v in enumerate(values)]


def test_asking_held_out_questions_changes_nothing_in_the_run(watched, trained_model, tiny_world, tmp_path):
    run_training(replace(make_config(trained_model, tiny_world, tmp_path / "run"), eval=EvalConfig()))
    assert timeless(tmp_path / "run/metrics.jsonl") == timeless(watched / "metrics.jsonl")
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (watched / "model/model.safetensors").read_bytes()
    assert not (tmp_path / "run/best").exists()


def interrupting(monkeypatch, number: int, act) -> None:
    "Does something before the evaluation of that number asks its third question."
    calls = []
    plain = held_out_module.evaluate

    def counted(policy, processor, samples, **settings):
        calls.append(1)
        if len(calls) == number:
            settings["batch_prompts"] = 1
            settings["on_progress"] = lambda done, total: act() if done == 2 else None
        return plain(policy, processor, samples, **settings)

    monkeypatch.setattr(held_out_module, "evaluate", counted)


@pytest.mark.parametrize("number, step, signal_number", [(1, 0, signal.SIGINT), (2, 2, signal.SIGTERM), (4, 5, signal.SIGTERM)])
def test_a_signal_in_an_evaluation_saves_the_steps_and_the_same_command_continues(
        watched, trained_model, tiny_world, tmp_path, monkeypatch, number, step, signal_number):
    config = make_config(trained_model, tiny_world, tmp_path / "run")
    interrupting(monkeypatch, number, lambda: os.kill(os.getpid(), signal_number))
    with pytest.raises(Stopped, match=f"stopped after {step} steps; the same command continues") as caught:
        run_training(config)
    assert caught.value.number == signal_number
    saved = whole_checkpoints(tmp_path / "run/checkpoints")
    assert [path.name for path in saved[-1:]] == [f"step-{step:06d}"] * (step > 0)
    run_training(config)
    assert files_of(tmp_path / "run") == files_of(watched)
    assert not (tmp_path / "run/.evaluation").exists()


@pytest.mark.parametrize("number", [2, 4])
def test_an_evaluation_that_was_cut_off_is_done_again(watched, trained_model, tiny_world, tmp_path, monkeypatch, number):
    config = make_config(trained_model, tiny_world, tmp_path / "run")

    def crash():
        raise MemoryError

    interrupting(monkeypatch, number, crash)
    with pytest.raises(MemoryError):
        run_training(config)
    assert (tmp_path / "run/.evaluation/rows.jsonl").exists()
    run_training(config)
    assert files_of(tmp_path / "run") == files_of(watched) and not (tmp_path / "run/.evaluation").exists()


def test_rows_of_steps_that_no_checkpoint_holds_are_taken_back(watched, trained_model, tiny_world, tmp_path):
    config = make_config(trained_model, tiny_world, tmp_path / "run")

    def crash(row):
        if row["step"] == 4:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_training(config, on_evaluation=crash)
    assert [row["step"] for row in read_jsonl(tmp_path / "run/evaluations.jsonl")] == [0, 2, 4]  # the checkpoint is of step 3
    told = []
    run_training(config, on_evaluation=lambda row: told.append(row["step"]))
    assert told == [4, 5] and files_of(tmp_path / "run") == files_of(watched)


def test_what_is_asked_may_change_when_a_run_continues(trained_model, tiny_world, tmp_path):
    config = make_config(trained_model, tiny_world, tmp_path / "run")
    config = replace(config, train=replace(config.train, steps=2))
    run_training(config)
    others = replace(config.eval, data=str(tiny_world / "L2.jsonl"), every=1, questions=3, n_responses=2, temperature=1.0)
    run_training(replace(config, train=replace(config.train, steps=4), eval=others, trackers=()))
    rows = read_jsonl(tmp_path / "run/evaluations.jsonl")
    assert [(row["step"], row["n"]) for row in rows] == [(0, 4), (2, 4), (3, 3), (4, 3)]
    assert len({row["questions"] for row in rows}) == 2 and rows[2]["best"]  # the first of its questions


def test_mistakes_in_the_held_out_data_are_told_before_a_model_is_loaded(trained_model, tiny_world, tmp_path):
    config = make_config("no such model", tiny_world, tmp_path / "run")
    with pytest.raises(ValueError, match="gone.jsonl: no such file"):
        run_training(replace(config, eval=replace(config.eval, data="gone.jsonl")))
    with pytest.raises(ValueError, match="eval.metric is mean_iou, which no question of .*L1.jsonl gives; it can be accuracy or format"):
        run_training(replace(config, eval=replace(config.eval, metric="mean_iou")))
    assert not (tmp_path / "run").exists()

    broken = tmp_path / "broken.jsonl"
    broken.write_text((tiny_world / "L1.jsonl").read_text() + "not json\n")
    config = make_config(trained_model, tiny_world, tmp_path / "run")
    config = replace(config, root=str(tiny_world), eval=replace(config.eval, data=str(broken)), train=replace(config.train, steps=1))
    with pytest.warns(UserWarning, match="broken.jsonl: 1 rows left out; the first: .*line 5"):
        run_training(config)
    with pytest.raises(ValueError, match="broken.jsonl, line 5"):
        run_training(replace(config, strict=True, out=str(tmp_path / "strict")))


def test_two_processes_evaluate_as_one_does(watched, trained_model, tiny_world, tmp_path):
    """DDP and FSDP2, each with two processes: the same figures and responses, and a best model that is whole.

    A signal that only one of them receives, in an evaluation, stops both, and the run continues.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, [*launch, trained_model, tiny_world, tmp_path])], env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one = files_of(watched)
    for name in ("ddp", "stopped", "sharded"):
        two = files_of(tmp_path / name)
        assert [row["step"] for row in two["evaluations.jsonl"]] == [0, 2, 4, 5]
        assert two["samples.jsonl"] == one["samples.jsonl"] and two["note"] == one["note"]
        for row, expected in zip(two["evaluations.jsonl"], one["evaluations.jsonl"]):
            assert row == expected
        weights, expected = (load_policy(path / "best").state_dict() for path in (tmp_path / name, watched))
        assert all(torch.allclose(weights[key], expected[key], atol=1e-4) for key in expected)


# --- trackers --------------------------------------------------------------------------------------------------------


def points(out: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(out / "tensorboard")).Reload().Scalars(name)]


def test_tensorboard_shows_every_step_once_after_a_run_was_interrupted(watched, trained_model, tiny_world, tmp_path):
    config = make_config(trained_model, tiny_world, tmp_path / "run", trackers=("tensorboard",))

    def crash(row):
        if row["step"] == 3:  # after the checkpoint of step 3 and before that of step 5
            raise MemoryError

    with pytest.raises(MemoryError):
        run_training(config, on_step=crash)
    run_training(config)
    for file, part, names in (("metrics.jsonl", "train", ("reward_mean", "kl")), ("evaluations.jsonl", "eval", ("accuracy", "format_low"))):
        for name in names:
            expected = [(row["step"], pytest.approx(row[name])) for row in read_jsonl(watched / file)]
            assert points(tmp_path / "run", f"{part}/{name}") == expected
    assert files_of(tmp_path / "run") == files_of(watched)


def test_weights_and_biases_continues_the_same_run(trained_model, tiny_world, tmp_path, monkeypatch):
    logged, begun = {}, []

    class Run:
        def log(self, values, step):
            logged.setdefault(step, {}).update(values)

        def finish(self):
            pass

    stub = types.ModuleType("wandb")
    stub.__spec__ = types.SimpleNamespace(name="wandb")
    stub.init = lambda **settings: begun.append(settings) or Run()
    stub.config = types.SimpleNamespace(update=lambda values, **more: None)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    config = make_config(trained_model, tiny_world, tmp_path / "run", trackers=("wandb",))
    for steps in (1, 3):
        run_training(replace(config, train=replace(config.train, steps=steps)))
    assert [(b["project"], b["name"], b["resume"], b["id"] == begun[0]["id"]) for b in begun] == [("deepvideo-r1", "run", "allow", True)] * 2
    assert sorted(logged) == [0, 1, 2, 3] and "train/reward_mean" in logged[2] and "eval/accuracy" in logged[2]


def test_a_tracker_that_is_not_installed_is_told_in_one_line(tiny_world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("deepvideo_r1.support.trackers.find_spec", lambda name: None)
    code = main(["train", "--preset", "tiny_cpu", "--model", "m", "--data", str(tiny_world / "rl.jsonl"), "--out",
                 str(tmp_path / "run"), "--trackers", "tensorboard"])
    error = capsys.readouterr().err
    assert code == 2 and error == "deepvideo-r1: error: trackers names tensorboard, which is not installed: pip install tensorboard\n"
    assert not (tmp_path / "run").exists()


# --- several data files ----------------------------------------------------------------------------------------------


def mixed(sizes, weights) -> MixedSamples:
    parts = [Samples(Sample(id=f"{file}-{i}", question="?", answer="x") for i in range(size)) for file, size in enumerate(sizes)]
    return MixedSamples(parts, [file.weight for file in data_files([f"{n}.jsonl:{w}" for n, w in enumerate(weights)])])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["1", "2", "0.1", "7", "1e-2", "33"])), min_size=2, max_size=5),
       st.integers(1, 9), st.integers(0, 60), st.integers(0, 3))
def test_a_mixture_has_its_proportions_its_epochs_and_no_memory(files, prompts_per_step, n_steps, seed):
    samples = mixed(*zip(*files))
    steps = [samples.step_indices(step, prompts_per_step, seed) for step in range(n_steps)]
    alone = mixed(*zip(*files))
    for step in reversed(range(n_steps)):  # in any order
        assert alone.step_indices(step, prompts_per_step, seed) == steps[step] and len(steps[step]) == prompts_per_step

    # Every file has its share, and each of its questions comes once in an epoch.
    walked, n = Counter(index for step in steps for index in step), n_steps * prompts_per_step
    for file, (size, share) in enumerate(zip(samples.sizes, samples.shares)):
        counts = [walked[sum(samples.sizes[:file]) + i] for i in range(size)]
        assert abs(sum(counts) - share * n) <= len(files)
        assert max(counts) - min(counts) <= 1


def test_a_file_is_drawn_from_as_if_it_were_alone_in_epochs():
    samples = mixed([4, 3], ["2", "1"])
    first = [i for step in range(6) for i in samples.step_indices(step, 3, 0) if i < 4]  # two in each step
    assert sorted(first[:4]) == sorted(first[4:8]) == sorted(first[8:]) == list(range(4))
    assert len({tuple(first[i : i + 4]) for i in (0, 4, 8)}) > 1


def write_split(world: Path, folder: Path) -> tuple[Path, Path]:
    "The questions of the world in two files, in which the same ids occur."
    lines = [json.loads(line) for line in (world / "rl.jsonl").read_text().splitlines()]
    halves = [folder / "a.jsonl", folder / "b.jsonl"]
    for half, path in enumerate(halves):
        rows = [row | {"id": f"q{i}", "video": str(world / row["video"])} for i, row in enumerate(lines[half::2])]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return halves[0], halves[1]


def test_a_run_on_two_files_continues_bit_for_bit(trained_model, tiny_world, tmp_path):
    a, b = write_split(tiny_world, tmp_path)
    words = ["--data", f"{a}:2", str(b), "--train.prompts-per-step", "3", "--train.save-every", "1", "--rollout.max-tokens", "8"]
    command = parse(["train", "--preset", "tiny_cpu", "--model", str(trained_model), *words])
    config = replace(command.args[0], rollout=RolloutConfig(2, max_tokens=8))
    assert config.data == (f"{a}:2", str(b))

    def run(name: str, steps: int):
        now = replace(config, out=str(tmp_path / name), train=replace(config.train, steps=steps))
        return run_training(now), timeless(tmp_path / name / "metrics.jsonl")

    trainer, whole = run("whole", 4)
    ids = [sample.id for sample in trainer.samples]
    assert len(ids) == len(set(ids)) == 12 and ids[6:] == [f"q{i}@2" for i in range(6)]
    taken = [trainer.samples[i].id for step in range(4) for i in trainer.feed.indices(step, 3, config.train.seed)]
    assert sum("@2" in name for name in taken) == 4
    run("parts", 2)
    assert run("parts", 4)[1] == whole

    # Other weights, or another content of one of the files, are another run.
    with pytest.raises(ValueError, match="belongs to another config .data was"):
        run_training(replace(config, data=(f"{a}:3", str(b)), out=str(tmp_path / "whole"), train=replace(config.train, steps=4)))
    b.write_text(b.read_text().replace("q3", "r3"))
    with pytest.raises(ValueError, match="other questions"):
        run("whole", 4)


@pytest.mark.parametrize("data, message", [
    (["{a}:2", "gone.jsonl:1"], "gone.jsonl: no such file"),
    (["{a}:many", "{b}"], "the weight of {a} is 'many', it must be a number above 0, as in {a}:2"),
    (["{a}:nan", "{b}"], "the weight of {a} is 'nan', it must be a number above 0"),
    (["{a}:-1", "{b}"], "the weight of {a} is -1, it must be above 0"),
    (["{a}", "{a}:2"], "{a} is named twice; name it once, with the sum of its weights"),
])
def test_mistakes_in_the_data_are_one_line(tiny_world, tmp_path, capsys, data, message):
    a, b = write_split(tiny_world, tmp_path)
    words = [word.format(a=a, b=b) for word in data]
    code = main(["train", "--preset", "tiny_cpu", "--model", "m", "--out", str(tmp_path / "run"), "--data", *words])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("deepvideo-r1: error: ") and len(error.splitlines()) == 1, error
    assert message.format(a=a, b=b) in error and not (tmp_path / "run").exists()


def test_bad_rows_of_several_files_are_named_and_counted_and_strict_stops(trained_model, tiny_world, tmp_path, capsys):
    a, b = write_split(tiny_world, tmp_path)
    a.write_text(a.read_text() + "broken\n")
    b.write_text('{"question": 5}\n' + b.read_text())
    words = ["train", "--preset", "tiny_cpu", "--model", str(trained_model), "--out", str(tmp_path / "run"), "--steps", "1",
             "--train.prompts-per-step", "2", "--rollout.max-tokens", "4", "--data", str(a), f"{b}:0.5"]
    assert main([*words, "--strict"]) == 2
    error = capsys.readouterr().err
    assert f"{a}, line 7: not JSON" in error and len(error.splitlines()) == 1
    assert main(words) == 0
    error = capsys.readouterr().err.splitlines()
    assert error[0] == f"2 bad rows of {a} {b}:0.5 left out:" and f"{a}, line 7" in error[1] and f"{b}, line 1" in error[2]


# --- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_has_a_line_for_the_first_and_last_step_and_for_each_evaluation(trained_model, tiny_world, tmp_path, capsys):
    words = ["train", "--preset", "tiny_cpu", "--model", str(trained_model), "--data", str(tiny_world / "rl.jsonl"), "--out",
             str(tmp_path / "run"), "--steps", "3", "--train.prompts-per-step", "2", "--rollout.max-tokens", "4",
             "--eval.data", str(tiny_world / "L1.jsonl"), "--eval.every", "2", "--eval.metric", "format"]
    assert main(words) == 0
    done = capsys.readouterr()
    first, *lines = done.err.splitlines()
    assert first.startswith("1 process, whole on ")
    starts = [line.partition(":")[0] for line in lines]
    assert starts == ["evaluation at step 0", "step 1 of 3", "evaluation at step 2", "step 3 of 3", "evaluation at step 3"]
    last = lines[3]
    assert all(f"{name} " in last for name in ("reward", "vanishing", "KL", "evaluation accuracy", "tokens/s", "time left"))
    out = tmp_path / "run"
    assert done.out == f"model: {out / 'model'}\nbest: {out / 'best'}\nmetrics: {out / 'metrics.jsonl'}\n"
