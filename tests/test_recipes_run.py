"""A sharded training through a recipe, with the commands that the documents name, on two CPU processes."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepvideo_r1.config import tiny_cpu
from deepvideo_r1.experiment import run_training
from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.support.clock import repeatable
from deepvideo_r1.support.files import read_jsonl

HOOK = Path(__file__).with_name("fsdp_on_cpu")


def test_a_recipe_shards_trains_resumes_and_exports(trained_model, tiny_world, tmp_path):
    "Two steps through a recipe, two more after a restart: the metrics and the model of one process."
    flags = ["--model", trained_model, "--data", tiny_world / "rl.jsonl", "--out", tmp_path / "sharded",
             "--train.prompts-per-step", 4, "--train.save-every", 2]

    def launch(steps: int, *launcher: object) -> None:
        command = [sys.executable, "-m", "deepvideo_r1", "launch", *launcher, "train", "--preset", "tiny_cpu", *flags,
                   "--steps", steps]
        environment = os.environ | {"PYTHONPATH": str(HOOK), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert "2 processes, FSDP2" in done.stderr

    launch(2, "--recipe", "4gpu_fsdp2", "--processes", 2)
    assert len(list((tmp_path / "sharded/checkpoints/step-000002").glob("*.safetensors"))) == 2  # a slice each
    launch(4, "--recipe", "8gpu_fsdp2", "--processes", 2)

    # The same in one process.
    config = tiny_cpu(str(trained_model), str(tiny_world / "rl.jsonl"))
    train = replace(config.train, steps=4, prompts_per_step=4, save_every=2)
    alone = run_training(replace(config, out=str(tmp_path / "alone"), train=train))
    rows, expected = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("sharded", "alone"))
    assert len(rows) == 4
    for row, other in zip(map(repeatable, rows), map(repeatable, expected), strict=True):
        kept = [name for name in other if not name.startswith("sampler")]
        assert {name: row[name] for name in kept} == pytest.approx({name: other[name] for name in kept}, rel=1e-3, abs=1e-5)
    exported = load_policy(tmp_path / "sharded/model")
    for (name, one), two in zip(exported.named_parameters(), alone.policy.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-4), name


def test_a_sharded_recipe_says_that_it_needs_gpus():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    command = [sys.executable, "-m", "deepvideo_r1", "launch", "--recipe", "8gpu_fsdp2", "train", "--model", "m", "--data", "d"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "this machine has none" in done.stderr
