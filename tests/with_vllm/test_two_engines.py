"""Two processes with a vLLM each sample what one does, and get the weights of a policy that is whole or shared out."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import make_bench

SCRIPT = Path(__file__).with_name("two_engines.py")


@pytest.fixture(scope="module")
def bench(world, tmp_path_factory):
    return make_bench(tmp_path_factory.mktemp("models"), world)


@pytest.mark.parametrize("arrangement", ["ddp", "sharded"])
def test_two_processes_with_an_engine_each(bench, world, tmp_path, arrangement):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    done = subprocess.run([*launch, bench.path, world, tmp_path, arrangement], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(tmp_path / f"{arrangement}-{rank}.pt") for rank in (0, 1)]
    whole = [group.texts for group in bench.sample()]
    for rank, found in enumerate(ranks):
        assert found["processes"] == 2 and (found["units"] > 0) == (arrangement == "sharded")
        assert found["before"]["texts"] == whole[rank::2]
        assert found["before"]["gap"][1] < 1e-4 and found["after"]["gap"][1] < 1e-4
        assert found["stale"] > 0.01 and found["after"]["texts"] != whole[rank::2]
