"""A run belongs to its config, model and data; a longer one continues; damage is named; the launcher changes nothing."""
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from deepvideo_r1.config import PromptConfig, RolloutConfig, RunConfig, TrainConfig
from deepvideo_r1.experiment import run_training
from deepvideo_r1.support.clock import repeatable
from deepvideo_r1.support.files import DamagedFileError, read_jsonl
from deepvideo_r1.support.locks import InUseError, directory_lock
from deepvideo_r1.training.launch import check_launcher


@pytest.fixture
def config(trained_model, tiny_world, tmp_path) -> RunConfig:
    "A run of one step on copies of model and questions, which a test may change."
    shutil.copytree(trained_model, tmp_path / "model")
    shutil.copy(tiny_world / "rl.jsonl", tmp_path / "rl.jsonl")
    return RunConfig(str(tmp_path / "model"), str(tmp_path / "rl.jsonl"), str(tmp_path / "run"), root=str(tiny_world),
                     prompt=PromptConfig("plain"), rollout=RolloutConfig(2, max_tokens=4),
                     train=TrainConfig(steps=2, prompts_per_step=2, prompts_per_forward=2, save_every=1))


def longer(config, steps):
    return replace(config, train=replace(config.train, steps=steps))


def rows_of(config):
    return [repeatable(row) for row in read_jsonl(f"{config.out}/metrics.jsonl")]


def test_a_longer_run_continues_and_equals_one_of_that_length(config, tmp_path):
    run_training(config)
    run_training(longer(config, 4))
    whole = replace(longer(config, 4), out=str(tmp_path / "whole"))
    run_training(whole)
    assert rows_of(config) == rows_of(whole) and len(rows_of(whole)) == 4
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["steps"] == 4
    with pytest.raises(ValueError, match="train.steps was 4, is 3; train.steps may only grow"):
        run_training(longer(config, 3))


def test_other_weights_under_the_same_name_are_refused(config, tmp_path):
    run_training(config)
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "layers.0" in name)
    save_file(weights | {name: weights[name] + 0.01}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="begun with another model.*: the weights are others"):
        run_training(longer(config, 3))


def test_a_changed_answer_is_refused(config, tmp_path):
    run_training(config)
    first, *rest = (tmp_path / "rl.jsonl").read_text().splitlines()
    changed = json.dumps(json.loads(first) | {"question": "another question ?"})
    (tmp_path / "rl.jsonl").write_text("\n".join([changed, *rest]) + "\n")
    with pytest.raises(ValueError, match="of its questions, 1 changed"):
        run_training(longer(config, 3))


def test_a_directory_in_use_is_refused(config):
    script = ("import sys, time; from deepvideo_r1.support.locks import directory_lock\n"
              "with directory_lock(sys.argv[1]): print('locked', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", script, config.out], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(InUseError, match=f"in use by process {other.pid} on"):
            run_training(config)
        other.kill()
    run_training(config)
    assert len(rows_of(config)) == 2
    with directory_lock(config.out):
        pass


@pytest.mark.parametrize("name", ["state-00000.safetensors", "state.json", "trainer.json"])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_used(config, tmp_path, name):
    run_training(longer(config, 3))
    expected = rows_of(config)
    file = tmp_path / "run/checkpoints/step-000003" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"step-000003.* is damaged \({name} has another checksum"):
        run_training(longer(config, 3))
    assert rows_of(config) == expected
    assert (tmp_path / "run/checkpoints/damaged-step-000003").is_dir()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*damaged")
        run_training(longer(config, 4))


def test_a_checkpoint_that_cannot_be_loaded_is_passed_over(config, tmp_path):
    run_training(longer(config, 3))
    newest = tmp_path / "run/checkpoints/step-000003"
    (newest / "state-00000.safetensors").write_bytes(b"not a checkpoint")  # and a manifest without checksums, as of older runs
    sizes = {path.name: path.stat().st_size for path in newest.iterdir() if path.name != "MANIFEST.json"}
    (newest / "MANIFEST.json").write_text(json.dumps(sizes))
    with pytest.warns(UserWarning, match="cannot be loaded .* the one before it is used"):
        run_training(longer(config, 3))
    assert len(rows_of(config)) == 3


def test_without_any_good_checkpoint_the_run_says_so(config, tmp_path):
    run_training(config)
    for path in (tmp_path / "run/checkpoints").glob("step-*/state-00000.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning), pytest.raises(DamagedFileError, match="no checkpoint is undamaged"):
        run_training(longer(config, 3))


def test_damaged_metrics_are_named_and_lost_rows_are_said(config, tmp_path):
    run_training(longer(config, 4))
    path = tmp_path / "run/metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[3]]) + "\n")
    with pytest.warns(UserWarning, match="the rows of 2 steps are lost, the first is step 1"):
        run_training(longer(config, 4))
    for damaged in ("{]", '{"loss": 1.0}', "[1]"):
        path.write_text("\n".join([lines[0], damaged, *lines[2:]]) + "\n")
        with pytest.raises(DamagedFileError, match=re.escape(f"{path}, line 2: the file is damaged")):
            run_training(longer(config, 4))


def test_no_directory_is_left_by_a_run_that_cannot_begin(config, tmp_path):
    with pytest.raises(ValueError):
        run_training(replace(config, data=str(tmp_path / "no.jsonl")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, value, message", [
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps is 4"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed")])
def test_settings_of_the_launcher_that_would_change_gradients_are_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        check_launcher()


def test_mixed_precision_of_the_launcher_is_not_used(config, tmp_path, monkeypatch):
    run_training(config)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    mixed = replace(config, out=str(tmp_path / "mixed"))
    with pytest.warns(UserWarning, match="mixed_precision bf16 is not used"):
        run_training(mixed)
    assert rows_of(mixed) == rows_of(config)
