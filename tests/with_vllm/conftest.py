"""Tests of the vLLM engine against vLLM for CPUs: `make test-vllm` installs what they need. Without vLLM they are not there."""
import os
from importlib.util import find_spec

import pytest

HAS_VLLM = find_spec("vllm") is not None

# vLLM for CPUs: no binding to cores, no questions to the hub, no statistics sent.
for name, value in {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                    "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}.items():
    os.environ.setdefault(name, value)


def pytest_ignore_collect(collection_path, config):
    return None if HAS_VLLM else True


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    "A folder of videos and questions."
    from deepvideo_r1.toy.world import WorldConfig, make_world

    return make_world(tmp_path_factory.mktemp("vllm") / "world", WorldConfig(sft_videos=2, rl_videos=4, eval_videos=1))
