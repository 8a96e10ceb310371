"""A command that is killed at any file operation: the same command again gives the same files, and nothing is left over."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
KILLED = 99
VARYING = ("MANIFEST.json", "state.pt", "random_states_0.pkl", "scheduler.bin", "optimizer.bin")  # times, or zip files with names


class Runs:
    "Runs of one command in one folder, through `kill_server.py`."

    def __init__(self, folder: Path):
        self.folder = folder
        server = [sys.executable, str(Path(__file__).with_name("kill_server.py"))]
        self.server = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def run(self, command: list, root: Path, kill_at: int = 0) -> int:
        request = dict(command=[str(part) for part in command], root=str(root), kill_at=kill_at,
                       output=str(self.folder / "output"))
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    @property
    def said(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def operations(self) -> list[str]:
        return json.loads((self.folder / "output.operations").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    started = Runs(tmp_path_factory.mktemp("kills"))
    yield started
    started.server.stdin.close()
    started.server.wait(10)


def content(path: Path) -> str:
    "What a file holds, without the seconds that something took."
    if path.suffix in (".json", ".jsonl"):
        return re.sub(r'"(seconds\w*|tokens_per_second|peak_memory_gb)": [\d.e-]+', "", path.read_text())
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def snapshot(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    folders = {f"{path.relative_to(root)}/": "" for path in root.rglob("*") if path.is_dir()}
    return folders | {str(path.relative_to(root)): "" if path.name in VARYING else content(path) for path in files}


def check_every_kill(runs: Runs, root: Path, command: list, every: int) -> int:
    "Kills the command at every k-th operation and runs it again; returns the number of operations."
    def begin() -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()

    begin()
    assert runs.run(command, root) == 0, runs.said
    whole, operations = snapshot(root), runs.operations
    begin()
    assert runs.run(command, root) == 0 and snapshot(root) == whole, "the command does not repeat itself"
    assert not [name for name in whole if re.search(r"\.tmp$|\.aside|\.replaced|\.begun|\.lock", name)]

    for number in range(1, len(operations) + 1, every):
        begin()
        assert runs.run(command, root, kill_at=number) == KILLED
        where = f"killed at operation {number} of {len(operations)}, {operations[number - 1]}"
        assert runs.run(command, root) == 0, f"{where}: {runs.said}"
        after = snapshot(root)
        assert after == whole, f"{where}: {[n for n in {**after, **whole} if after.get(n) != whole.get(n)]}"
        assert "Traceback" not in runs.said, where
    return len(operations)


@pytest.fixture(params=["some", pytest.param("all", marks=pytest.mark.slow)])
def share(request):
    "A function that gives the distance between two kills: all operations, or a share of them."
    return lambda distance: 1 if request.param == "all" else distance


def test_world(runs, tmp_path, share):
    command = ["world", "--out", tmp_path / "root/w", "--sft-videos", 1, "--rl-videos", 1, "--eval-videos", 1]
    assert check_every_kill(runs, tmp_path / "root", command, share(3)) > 30


def test_evaluate(runs, tiny_model, tiny_world, tmp_path, share):
    command = ["evaluate", "--model", tiny_model, "--data", tiny_world / "L1.jsonl", "--out", tmp_path / "root/e",
               "--max-tokens", 4, "--prompt.template", "plain", "--prompt.max-frames", 4, "--batch-prompts", 2]
    assert check_every_kill(runs, tmp_path / "root", command, share(3)) > 10


def test_cold_start(runs, tmp_path, share):
    assert check_every_kill(runs, tmp_path / "root", ["cold start"], share(19)) > 60


def test_train(runs, tiny_model, tiny_world, tmp_path, share):
    command = ["train", "--preset", "tiny_cpu", "--model", tiny_model, "--data", tiny_world / "rl.jsonl", "--out",
               tmp_path / "root/t", "--steps", 3, "--train.save-every", 1, "--rollout.max-tokens", 4,
               "--rollout.group-size", 2, "--train.prompts-per-step", 2, "--prompt.max-frames", 4]
    assert check_every_kill(runs, tmp_path / "root", command, share(17)) > 60


def test_train_with_held_out_questions(runs, tiny_model, tiny_world, tmp_path, share):
    command = ["train", "--preset", "tiny_cpu", "--model", tiny_model, "--data", tiny_world / "rl.jsonl", "--out",
               tmp_path / "root/t", "--steps", 3, "--train.save-every", 2, "--rollout.max-tokens", 4,
               "--rollout.group-size", 2, "--train.prompts-per-step", 2, "--prompt.max-frames", 4,
               "--eval.data", tiny_world / "L1.jsonl", "--eval.every", 1, "--eval.metric", "format"]
    assert check_every_kill(runs, tmp_path / "root", command, share(17)) > 100
