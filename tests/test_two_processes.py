"""Two processes give the responses, gradients, metrics and weights of one."""
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from two_processes import CASES, IN_BFLOAT16, run_case, run_to

from deepvideo_r1.model.policy import load_policy
from deepvideo_r1.support.clock import repeatable

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def models(trained_model, tmp_path_factory) -> Path:
    "A folder with the checkpoint, whose head shares the weights of its embeddings, and with one whose head has its own."
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(trained_model, folder / "tied")
    shutil.copytree(trained_model, folder / "untied")
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained_model)
    hf.config.tie_word_embeddings = hf.config.text_config.tie_word_embeddings = False
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.detach() * 1.1)
    hf.save_pretrained(folder / "untied")
    return folder


@pytest.fixture(scope="module", params=["ddp", "sharded"])
def arrangement(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(arrangement, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp(arrangement)


@pytest.fixture(scope="module")
def found(arrangement, directory, models, tiny_world):
    "What each of two processes saw, from one launch for all cases."
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, models / "tied", tiny_world / "rl.jsonl", directory, arrangement], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(directory / f"found-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(models, tiny_world, tmp_path_factory):
    "What one process saw: a function of the case, which runs each case once."
    @functools.cache
    def run(case: str, model: str = "tied"):
        return run_case(case, models / model, tiny_world / "rl.jsonl", tmp_path_factory.mktemp("alone"))

    return run


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    "Of two sets of tensors, relative to the length of the second."
    assert first.keys() == second.keys()
    one, two = (torch.cat([tensors[name].flatten() for name in sorted(tensors)]) for tensors in (first, second))
    return float((one - two).norm() / two.norm())


def figures(rows):
    "The numbers that two processes and one must share; the gap between sampler and scorer is itself a rounding error."
    kept = repeatable(rows[0]).keys() - {"sampler_gap", "sampler_gap_max", "sampler_kl"}
    return [{name: row[name] for name in row if name in kept} for row in rows]


def check_equal(ranks: list[dict], one: dict, arrangement: str, case: str = "") -> None:
    "Asserts that both processes did what one does."
    for rank in ranks:
        assert (rank["processes"], rank["is_ddp"]) == (2, arrangement == "ddp")
        assert (rank["units"] >= 5) == (arrangement == "sharded")  # two decoder layers, encoder blocks, embeddings, head
    assert (one["processes"], one["is_ddp"], one["units"]) == (1, False, 0)

    both = ranks[0]["responses"] | ranks[1]["responses"]
    assert not ranks[0]["responses"].keys() & ranks[1]["responses"].keys()
    assert both == one["responses"]

    for rank in ranks:
        gaps = rank["rows"][:1] if case == "dpo" else rank["rows"]  # its sampler is the reference
        assert all(row["sampler_gap_max"] < 1e-4 and row["sampler_kl"] < 1e-8 for row in gaps)
        assert distance(rank["gradients"], one["gradients"]) < 1e-5
        assert figures(rank["rows"])[0] == pytest.approx(figures(one["rows"])[0], rel=1e-5, abs=1e-7)
        for row, expected in zip(figures(rank["rows"]), figures(one["rows"]), strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)  # Adam divides, and so enlarges, rounding errors
        assert distance(rank["weights"], one["weights"]) < 1e-4
        assert rank["buffer"] == one["buffer"] and rank["bad"] == one["bad"]
    assert figures(ranks[0]["rows"]) == figures(ranks[1]["rows"])
    assert distance(ranks[0]["weights"], ranks[1]["weights"]) == 0


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(found, arrangement, alone, case):
    one = alone(case)
    check_equal([process[case] for process in found], one, arrangement, case)
    assert len({row["reward_mean"] for row in one["rows"]}) > 1


def test_a_head_with_weights_of_its_own(found, arrangement, alone):
    one = alone("grpo", "untied")
    assert "hf.lm_head.weight" in one["weights"] and "hf.lm_head.weight" not in alone("grpo")["weights"]
    check_equal([process["untied"] for process in found], one, arrangement)


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_computation_in_bfloat16(found, name):
    "The reference starts as the policy to the last bit, and what is trained is float32."
    for process in found:
        run = process["bfloat16"][name]
        rows, types, trained = run["rows"], run["types"], run["trained"]
        assert rows[0]["kl"] == 0 < rows[1]["kl"]
        if CASES[IN_BFLOAT16[name]].train.get("inner_updates", 1) == 1:
            assert rows[0]["ratio_mean"] == rows[1]["ratio_mean"] == 1
        assert {types[n] for n in trained} == {"torch.float32"}
        assert {types[n] for n in types.keys() - trained} == {"torch.bfloat16"}
        assert {g.dtype for g in run["gradients"].values()} == {torch.float32}
        assert 0 < rows[0]["sampler_gap"] < 0.05


def test_the_cases_are_what_they_say(found):
    rows = {case: found[0][case]["rows"] for case in CASES}
    assert sum(row["noise_groups"] + row["hint_groups"] for row in rows["reg_grpo, augmented"]) > 0
    changed = [row["noise_groups"] + row["hint_groups"] for row in rows["grpo, one group changed"]]
    assert 1 in changed  # of two: one process samples a second group, and the other none
    assert any((row["noise_groups"] + row["hint_groups"]) % 2 for row in rows["grpo, both groups"])
    assert any(row["groups"] % 2 for row in rows["grpo, a bad clip"])
    assert [row["kl"] > 0 for row in rows["grpo, adapters that were trained before"]] == [False, True]
    assert {row["groups"] for row in rows["reg_grpo, a rank without a group"]} >= {1, 2}
    assert rows["grpo, without truncated responses"][0]["truncated"] > 0
    lengths = [{len(text) for texts in process["grpo"]["responses"].values() for text in texts} for process in found]
    assert lengths[0] != lengths[1]


def test_a_run_of_two_processes_resumes_bit_for_bit(found):
    for process in found:
        whole, parts = process["resumed"]["whole"], process["resumed"]["parts"]
        assert figures(parts["rows"]) == figures(whole["rows"]) and len(whole["rows"]) == 4
        assert distance(parts["weights"], whole["weights"]) == 0 and parts["buffer"] == whole["buffer"]


def test_another_number_of_processes_resumes(found, directory, models, tiny_world, tmp_path):
    "One process continues what two have saved, from the slices of both."
    shutil.copytree(directory / "parts", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    files = sorted(path.name for path in (tmp_path / "run/checkpoints/step-000002").glob("*.safetensors"))
    assert len(files) == (2 if "sharded" in directory.name else 1)
    continued, whole = run_to(4, models / "tied", tiny_world / "rl.jsonl", tmp_path / "run"), found[0]["resumed"]["whole"]
    for row, expected in zip(figures(continued["rows"]), figures(whole["rows"]), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert distance(continued["weights"], whole["weights"]) < 1e-4


def test_the_exported_model_is_the_trained_one(found, directory):
    exported = load_policy(directory / "whole/model")
    assert distance({n: p.detach() for n, p in exported.named_parameters()}, found[0]["resumed"]["whole"]["weights"]) == 0
    adapted, trained = load_policy(directory / "exported/model"), found[0]["exported adapters"]["weights"]
    assert (directory / "exported/model/adapter_model.safetensors").exists()
    assert distance({n: p.detach() for n, p in adapted.named_parameters()},
                    {n: p for n, p in trained.items() if ".start." not in n}) == 0


def test_no_file_of_a_checkpoint_is_a_pickle(found, directory):
    names = {path.name for path in (directory / "parts/checkpoints").rglob("*") if path.is_file()}
    assert names <= {"MANIFEST.json", "trainer.json", "state.json", "state-00000.safetensors", "state-00001.safetensors"}
