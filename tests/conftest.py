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
