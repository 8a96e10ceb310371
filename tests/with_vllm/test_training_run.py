"""Runs that sample with vLLM, from the command line: start, stop, another start; two processes; what is refused."""
import os
import subprocess
import sys

import pytest
from bench import load_policy, make_tiny_checkpoint

from deepvideo_r1.config import EngineConfig
from deepvideo_r1.support.files import read_jsonl

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1", "COLUMNS": "200"}


REWARD = """
from dataclasses import replace

def distinct(rollout):
    "Another reward for every response, also for those of a random model."
    n = rollout.completion_ids.float().mean(-1) / 100
    return replace(rollout, rewards=n, reward_parts={"distinct": n})
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "own_reward.py").write_text(REWARD)
    return make_tiny_checkpoint(folder / "tiny", hidden_size=384, n_layers=2)


def command(model, world, out, steps, *others):
    return ["train", "--preset", "tiny_cpu", "--model", model, "--data", world / "rl.jsonl", "--out", out, "--steps", steps,
            "--train.prompts-per-step", 4, "--train.prompts-per-forward", 4, "--train.inner-updates", 1, "--train.learning-rate", 1e-3,
            "--train.warmup-steps", 1, "--train.save-every", 3, "--rollout.max-tokens", 12, "--engine.name", "vllm", "--engine.eager", "--engine.max-length", 512,
            "--engine.check-every", 2, "--reward.function", f"{model.parent / 'own_reward.py'}:distinct", *others]


def run(*words, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "deepvideo_r1", *map(str, words)], env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_that_was_extended_has_sampled_from_every_update(model, world, tmp_path):
    "Each step's responses are scored as they were reported, before and after the second start; other weights at its end."
    run(*command(model, world, tmp_path / "run", 3))
    run(*command(model, world, tmp_path / "run", 5))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(5))
    assert [row["step"] for row in rows if "engine_gap" in row] == [0, 2, 3, 4]  # every second one, and the first of a start
    for row in rows:
        assert row["sampler_gap_max"] < 1e-4 and row.get("engine_gap", 0.0) < 1e-5 and row["grad_norm"] > 0
    trained, start = (dict(load_policy(path).named_parameters()) for path in (tmp_path / "run/model", model))
    assert max(float((trained[name] - start[name]).abs().max()) for name in trained) > 1e-4


@pytest.mark.parametrize("adapter", ["merged", "adapter"])
def test_a_run_with_lora(model, world, tmp_path, adapter):
    run(*command(model, world, tmp_path / "run", 3, "--policy.lora-rank", 4, "--engine.adapter", adapter))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 3 and all(row["sampler_gap_max"] < 1e-4 for row in rows)


def test_two_processes(model, world, tmp_path):
    run("launch", "--processes", 2, *command(model, world, tmp_path / "run", 3))
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 3 and all(row["sampler_gap_max"] < 1e-4 for row in rows) and EngineConfig().max_gap > rows[0]["engine_gap"]


def test_an_objective_that_samples_from_the_reference_is_refused(model, world, tmp_path):
    said = run(*command(model, world, tmp_path / "run", 3, "--objective.name", "dpo"), code=2)
    assert "samples from the reference" in said and "builtin" in said and "Traceback" not in said
