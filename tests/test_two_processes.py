"""Two processes give the responses, gradients, metrics and weights of one."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import CASES, run_case

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def found(trained_model, tiny_world, tmp_path_factory):
    "What each of two processes saw, from one launch for all cases."
    directory = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, trained_model, tiny_world / "rl.jsonl", directory], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(directory / f"found-{rank}.pt") for rank in (0, 1)]


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    "Of two sets of tensors, relative to the length of the second."
    assert first.keys() == second.keys()
    one, two = (torch.cat([tensors[name].flatten() for name in sorted(tensors)]) for tensors in (first, second))
    return float((one - two).norm() / two.norm())


def figures(rows):
    "The numbers that two processes and one must share; the gap between sampler and scorer is itself a rounding error."
    assert all(row["sampler_gap_max"] < 1e-4 and row["sampler_kl"] < 1e-8 for row in rows)
    kept = rows[0].keys() - {"seconds", "sampler_gap", "sampler_gap_max", "sampler_kl"}
    return [{name: row[name] for name in row if name in kept} for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(found, trained_model, tiny_world, tmp_path, case):
    ranks = [process[case] for process in found]
    one = run_case(case, trained_model, tiny_world / "rl.jsonl", tmp_path)
    assert [(rank["processes"], rank["is_ddp"]) for rank in ranks] == [(2, True)] * 2
    assert (one["processes"], one["is_ddp"]) == (1, False)

    both = ranks[0]["responses"] | ranks[1]["responses"]
    assert not ranks[0]["responses"].keys() & ranks[1]["responses"].keys()
    assert both == one["responses"]
    assert len({row["reward_mean"] for row in one["rows"]}) > 1

    for rank in ranks:
        assert distance(rank["gradients"], one["gradients"]) < 1e-5
        assert figures(rank["rows"])[0] == pytest.approx(figures(one["rows"])[0], rel=1e-5, abs=1e-7)
        for row, expected in zip(figures(rank["rows"]), figures(one["rows"]), strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)  # Adam divides, and so enlarges, rounding errors
        assert distance(rank["weights"], one["weights"]) < 1e-4
        assert rank["buffer"] == one["buffer"] and rank["bad"] == one["bad"]
    assert figures(ranks[0]["rows"]) == figures(ranks[1]["rows"])
    assert distance(ranks[0]["weights"], ranks[1]["weights"]) == 0


def test_the_cases_are_what_they_say(found):
    rows = {case: found[0][case]["rows"] for case in CASES}
    assert sum(row["noise_groups"] + row["hint_groups"] for row in rows["reg_grpo, augmented"]) > 0
    assert any((row["noise_groups"] + row["hint_groups"]) % 2 for row in rows["grpo, both groups"])
    assert any(row["groups"] % 2 for row in rows["grpo, a bad clip"])
    assert [row["kl"] > 0 for row in rows["grpo, adapters that were trained before"]] == [False, True]
    assert {row["groups"] for row in rows["reg_grpo, a rank without a group"]} >= {1, 2}


def test_a_run_of_two_processes_resumes_bit_for_bit(found):
    for process in found:
        whole, parts = process["resumed"]["whole"], process["resumed"]["parts"]
        assert figures(parts["rows"]) == figures(whole["rows"]) and len(whole["rows"]) == 4
        assert distance(parts["weights"], whole["weights"]) == 0 and parts["buffer"] == whole["buffer"]
