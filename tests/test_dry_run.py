"""What can fail is told before a run: without writing, all at once, in one line each."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from deepvideo_r1.config import AugmentConfig, ObjectiveConfig, PolicyConfig, tiny_cpu
from deepvideo_r1.dry_run import dry_run, show_dry_run, shrunken_config
from deepvideo_r1.model.families import model_class
from deepvideo_r1.training.scale import BASES, base_config


@pytest.fixture
def config(trained_model, tiny_world, tmp_path):
    return replace(tiny_cpu(str(trained_model), str(tiny_world / "rl.jsonl")), out=str(tmp_path / "run"))


def outcome(config, **settings) -> dict[str, tuple[bool, str]]:
    return {check.name: (check.good, check.text) for check in dry_run(config, every=3, **settings)}


@pytest.mark.parametrize("changes", [
    {}, {"policy": PolicyConfig("bfloat16", lora_rank=4, gradient_checkpointing=True)},
    {"objective": ObjectiveConfig("dpo"), "augment": AugmentConfig(enabled=True, hint_source="stored")}], ids=["toy", "lora", "dpo"])
def test_a_good_run_passes_and_nothing_is_written(config, tmp_path, changes):
    assert all(good for good, _ in outcome(replace(config, **changes)).values())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("base", BASES)
def test_every_base_can_be_shrunken(base):
    import torch

    config = shrunken_config(base_config(base))
    with torch.device("meta"):
        model = model_class(config.model_type)(config)
    assert sum(p.numel() for p in model.parameters()) < 2e8


def test_mistakes_do_not_hide_each_other(config, tmp_path, tiny_world):
    rows = [json.loads(line) for line in (tiny_world / "rl.jsonl").read_text().splitlines()]
    (tmp_path / "rl.jsonl").write_text("\n".join(json.dumps(row | {"video": "gone.mp4"}) for row in rows))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    seen = outcome(replace(config, data=str(tmp_path / "rl.jsonl"), out=str(tmp_path / "other")))
    assert [name for name, (good, _) in seen.items() if not good] == ["clips", "directory", "step"]
    assert "more than train.max_bad_share" in seen["clips"][1] and "is not empty" in seen["directory"][1]
    assert "none of the first" in seen["step"][1]
    wrong = outcome(replace(config, data=str(tmp_path / "no.jsonl"), model=str(tmp_path / "nowhere")))
    assert wrong["step"][1] == "not tried, since the model could not be read"
    assert wrong["clips"][1] == "not tried, since the samples could not be read"


def test_a_run_that_cannot_fit_its_gpus_is_told(config):
    big = replace(config, policy=replace(config.policy, dtype="bfloat16"))
    assert outcome(big, gpu_bytes=10**6)["memory"][0] is False
    assert outcome(big, gpu_bytes=80 * 10**9)["memory"][0] is True


def test_the_command(config, capsys, trained_model, tiny_world, tmp_path):
    assert show_dry_run(config) == 0
    assert "the run: 50 steps of 16 prompts with 4 responses" in capsys.readouterr().out
    command = [sys.executable, "-m", "deepvideo_r1", "launch", "--processes", "2", "train", "--dry-run", "--preset", "tiny_cpu",
               "--model", trained_model, "--data", tmp_path / "no.jsonl", "--out", tmp_path / "out"]
    good = [str(tiny_world / "rl.jsonl") if word == tmp_path / "no.jsonl" else str(word) for word in command]
    done = subprocess.run(good, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("one step of a shrunken model") == 1, done.stderr
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout.count("FAIL questions") == 1 and "Traceback" not in done.stderr, done.stderr
    assert "processes: 2" in done.stdout and not (tmp_path / "out").exists()
