"""What the how-to pages share: a line of the terminal that runs in this process, and a tiny model with its world."""
import contextlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from deepvideo_r1.cli import main
from deepvideo_r1.support.progress import quiet
from deepvideo_r1.toy.cold_start import cold_start
from deepvideo_r1.toy.config import ColdStartConfig, ToyConfig, WorldConfig

ROOT = Path(__file__).resolve().parents[2]


def run(command: str, code: int = 0, last: int = 0) -> None:
    "Runs a line of the terminal here, shows its (last) lines, and checks how it ends."
    plain = patch("rich.console._is_jupyter", lambda: False)
    with io.StringIO() as page, plain, patch.dict(os.environ, COLUMNS="96", FORCE_COLOR=""):
        with contextlib.redirect_stdout(page), contextlib.redirect_stderr(page):
            try:
                ended = main(shlex.split(command)[1:])
            except SystemExit as stop:  # the parser's own page
                ended = stop.code
        text = page.getvalue().replace(f"{Path.cwd()}/", "").replace(f"{ROOT}/", "")
    lines = [line for line in text.splitlines() if line.strip()][-last:]  # all of them for 0
    print(*lines, *([f"exit code {ended}"] if ended else []), sep="\n")
    assert ended == code, ended


def start_apart(command: str) -> subprocess.Popen:
    "Starts a line of the terminal in a process of its own, without GPUs, that heeds Ctrl-C."
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "96", "FORCE_COLOR": ""}
    return subprocess.Popen([sys.executable, "-m", "deepvideo_r1", *shlex.split(command)[1:]], env=environment,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def show_end(process: subprocess.Popen) -> None:
    "Waits for a process of `start_apart`, and shows what it printed and an exit code other than 0."
    page, _ = process.communicate(timeout=240)
    lines = [line for line in page.splitlines() if line.strip()]
    print(*lines, *([f"exit code {process.returncode}"] if process.returncode else []), sep="\n")


def begin() -> None:
    "Goes to a new directory with `tiny`, a model that has seen a few examples, and `world`, some clips."
    quiet()
    os.chdir(tempfile.mkdtemp())
    small = ToyConfig(
        world=WorldConfig(sft_videos=8, rl_videos=8, eval_videos=4),
        cold_start=ColdStartConfig(vision_steps=1, sft_steps=40, sft_batch=24, warmup_steps=1, learning_rate=1e-2,
                                   hidden_size=48, n_layers=2))
    world, model, _ = cold_start(small, "cache")
    shutil.copytree(model, "tiny")
    shutil.copytree(world, "world")
