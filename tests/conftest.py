"""What all tests share: no network, and reasons to skip."""
import os
from pathlib import Path

import pytest

# A test that asks the hub for a file fails at once, in subprocesses too.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    "The folder of sample videos and data sets that may lie beside the repository."
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the sample files in ../shared")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    "A random tiny Qwen2.5-VL checkpoint in Hugging Face layout."
    from deepvideo_r1.policy import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", hidden_size=48, n_layers=2)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    "A folder with a few videos and the questions about them: 9 for sft, 12 for rl, 4 for each level."
    from deepvideo_r1.world import WorldConfig, make_world

    return make_world(tmp_path_factory.mktemp("world"), WorldConfig(sft_videos=3, rl_videos=6, eval_videos=2))
