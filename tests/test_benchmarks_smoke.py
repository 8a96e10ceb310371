"""The benchmarks run, on sizes of seconds: their files have the documented fields, and their checks of equality are on."""
import json
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIDES = {"repeated_vs_packed": {"repeated", "vision_once", "packed"}, "rollout_vs_generate": {"generate", "rollout"},
         "step_vs_trl": {"trl", "packed", "repeated"}, "growth": {"repeated", "packed"}}


@pytest.fixture()
def benchmark(monkeypatch):
    "The module of a benchmark, by its name."
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def check_fields(found: dict, name: str) -> None:
    assert found["name"] == name and found["options"]["quick"]
    assert {"date", "processor", "cores", "threads", "torch", "transformers", "commit"} <= found["machine"].keys()
    assert found["cases"]
    for case in found["cases"]:
        assert {"P", "C", "G", "sides", "speedup"} <= case.keys()
        assert case["sides"].keys() == SIDES[name]
        for side in case["sides"].values():
            assert side["cpu_s"] > 0 and side["wall_s"] > 0
            assert (side["peak_mib"] is not None) == sys.platform.startswith("linux")


def test_the_readme_names_every_field():
    text = (BENCHMARKS / "README.md").read_text()
    names = {"cpu_s", "wall_s", "peak_mib", "gflop", "of_minimum", "speedup", "memory_ratio", "vision_share", "greedy_equal",
             "videos_encoded", "logp_difference", "gradient_difference", "speedup_by_sharing", "utilisation",
             "response_ratio", "time_ratio", "tokens_per_second", "measured_gb", "planned_gb", "of_plan", "vanishing", "no_trace", "decord_is_right", "plain",
             "files_decoded", "prompts_read", "generation_s", "speedup_each", "cpu_s_each", "speedup_over_lean", "ms_swift_lean",
             "logp_difference_own_positions", "left_out"}
    assert {name for name in names if f"`{name}`" not in text} == set()
    assert {path.name for path in BENCHMARKS.glob("*.py") if path.name not in text} == set()


def test_repeated_rows_against_the_packed_row(benchmark, tmp_path):
    module = benchmark("repeated_vs_packed")
    module.main(module.Settings(quick=True, out=tmp_path))
    found = read(tmp_path, "repeated_vs_packed")
    check_fields(found, "repeated_vs_packed")
    sides = found["cases"][0]["sides"]
    assert sides["packed"]["logp_difference"] < 1e-4 and sides["packed"]["gradient_difference"] < 1e-4
    assert 1 < sides["packed"]["of_minimum"] < 1.15 < sides["vision_once"]["of_minimum"] < sides["repeated"]["of_minimum"]


def test_unequal_sides_are_not_timed(benchmark, tmp_path, monkeypatch):
    module, rollouts = benchmark("repeated_vs_packed"), benchmark("rollout_vs_generate")
    right, complete = module.group_logps, rollouts.complete
    monkeypatch.setattr(module, "group_logps", lambda policy, rollout: right(policy, rollout) + 1e-3)
    with pytest.raises(SystemExit, match="packed.*logp_difference"):
        module.main(module.Settings(quick=True, out=tmp_path))
    monkeypatch.setattr(module, "group_logps", lambda policy, rollout: 1.01 * right(policy, rollout) - 0.01 * right(
        policy, rollout).detach())
    with pytest.raises(SystemExit, match="packed.*gradient_difference"):
        module.main(module.Settings(quick=True, out=tmp_path))
    for change in (dict(ids=1), dict(logps=1e-3)):
        monkeypatch.setattr(rollouts, "complete", lambda *args, change=change, **how: (done := complete(*args, **how))._replace(
            **{name: getattr(done, name) + shift for name, shift in change.items()}))
        with pytest.raises(SystemExit, match="greedy"):
            rollouts.main(rollouts.Settings(quick=True, out=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_packed_path_counts_as_many_flops_as_by_hand(benchmark):
    harness, flops = benchmark("harness"), benchmark("flops")
    policy = harness.make_policy(harness.Options(quick=True))
    p, c, g = 20, 5, 3
    rollout = harness.make_rollout(policy, harness.make_prompt(policy, p), g, c)
    with flops.counter() as count:
        harness.use_attention(policy, True)
        policy(benchmark("deepvideo_r1.model.policy").rollout_batch(policy, [rollout])).sum().backward()
    width, mlp, layers, heads, kv_heads, words, _ = harness.SIZES["quick"][0]
    linear = layers * (2 * width**2 + 2 * width * width * kv_heads // heads + 3 * width * mlp)
    head, tokens = 6 * width * words * g * c, p + g * c
    least = flops.minimum_flops(policy.base, p, c, g)
    assert least == dict(linear=6 * linear * tokens, head=head, vision=0,
                         attention=12 * layers * width * (p * (p + 1) // 2 + g * (c * p + c * (c + 1) // 2)))
    # The kernels attend to half of the prompt's square and to the whole of a response's, and compute the scores again in the backward pass: 7 products of which 6 are needed.
    whole = 14 * layers * width * (p**2 // 2 + g * c * (p + c))
    assert count.get_total_flops() == 6 * linear * tokens + head + whole


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory on the CPU is read from Linux")
def test_peak_memory_sees_what_is_freed_again(benchmark):
    harness = benchmark("harness")
    for _ in range(2):  # the mark of the first run is gone in the second
        assert 63 < harness.peak_memory(lambda: torch.ones(16 * 2**20).sum(), harness.Options(quick=True)) < 70
    assert harness.peak_memory(lambda: torch.ones(2**20).sum(), harness.Options(quick=True)) < 10


def test_growth_draws_a_small_figure(benchmark, tmp_path):
    module = benchmark("growth")
    module.main(module.Settings(quick=True, out=tmp_path))
    found = read(tmp_path, "growth")
    check_fields(found, "growth")
    assert 5_000 < (tmp_path / found["figure"]).stat().st_size < 150_000


def test_the_rollout_as_a_command(tmp_path):
    command = [sys.executable, "rollout_vs_generate.py", "--quick", "--out", tmp_path]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "videos encoded" in done.stdout
    found = read(tmp_path, "rollout_vs_generate")
    check_fields(found, "rollout_vs_generate")
    assert found["cases"][0]["greedy_equal"] == 1 and found["cases"][0]["logp_difference"] < 1e-4


@pytest.mark.parametrize("name", ["repeated_vs_packed", "rollout_vs_generate"])
def test_bfloat16(benchmark, tmp_path, name):
    module = benchmark(name)
    module.main(module.Settings(quick=True, dtype="bfloat16", peak_tflops=1.0, out=tmp_path))
    check_fields(read(tmp_path, name), name)


def test_what_augmentation_costs(benchmark, tmp_path):
    module = benchmark("augmentation_cost")
    module.main(module.Settings(quick=True, out=tmp_path, cache=tmp_path / "cache"))
    found = read(tmp_path, "augmentation_cost")
    cases = {case["variant"]: case for case in found["cases"]}
    assert {"responses", "videos_encoded", "cpu_s", "response_ratio", "time_ratio", "vanishing", "no_trace"} <= cases["second draw"].keys()
    assert cases["no augmentation"]["responses"] == 64 and cases["no augmentation"]["response_ratio"] == 1
    assert cases["no augmentation"]["videos_encoded"] == cases["stored hints alone"]["videos_encoded"] == 16  # each video once


def test_reading_in_the_most_common_containers(benchmark, tmp_path):
    module = benchmark("reading")
    module.main(module.Settings(quick=True, out=tmp_path))
    found = read(tmp_path, "reading")
    assert len(found["cases"]) == 10  # that ours are right is checked before anything is timed
    for case in found["cases"]:
        assert case["plain"] == ("decord" if case["decord_is_right"] else "pyav") and case["time_ratio"] > 0
        assert case["sides"].keys() == {"plain", "ours"}


def test_the_report_for_a_gpu_on_a_cpu(benchmark, tmp_path):
    module = benchmark("gpu_report")
    module.main(module.Settings(quick=True, out=tmp_path))
    found = read(tmp_path, "gpu_report")
    assert found["sections"].keys() == set(module.SECTIONS) and not any(s["error"] for s in found["sections"].values())
    sections = {name: [case for case in found["cases"] if case["section"] == name] for name in module.SECTIONS}
    assert all(case["error"] < 1e-5 and case["milliseconds"] > 0 for case in sections["kernels"])
    assert all(case["logp_difference"] < 1e-4 and case["gradient_difference"] < 1e-4 for case in sections["packed"])
    sampling = [case for case in sections["sampling"] if case["cache"] != "generate"]
    assert [case["case"] for case in sampling] == 2 * ["quick, 4 rows"] + 2 * ["quick, 8 rows"]
    assert [case["cache"] for case in sections["sampling"]] == ["growing", "static", "generate", "growing", "static"]
    assert all(case["equal_ids"] == 1 and case["logp_difference"] < 1e-4 for case in sampling)
    for case in sampling + sections["update with adapters"] + sections["update of all weights"]:
        assert 0.85 < case["of_plan"] < 1.15, case


def test_a_training_run_at_the_size_of_a_real_model_on_a_cpu(benchmark, tmp_path):
    module = benchmark("train_at_scale")
    module.main(module.Settings(quick=True, out=tmp_path, folder=tmp_path / "run"))
    found = read(tmp_path, "train_at_scale")
    assert [case["case"] for case in found["cases"]] == ["quick, growing", "quick, static"]
    assert all(case["seconds_per_step"] > 0 and case["sampler_gap"] < 1e-4 for case in found["cases"])
    assert not (tmp_path / "run").exists()


def test_a_section_that_fails_or_takes_too_long_does_not_end_the_report(benchmark, tmp_path, monkeypatch):
    module = benchmark("gpu_report")

    def broken(settings):
        yield dict(case="first")
        raise RuntimeError("no such kernel")

    def endless(settings):
        yield dict(case="first")
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(module, "WORK", module.WORK | {"sampling": broken, "packed": endless})
    monkeypatch.setattr(module, "SECTIONS", {"sampling": 5.0, "packed": 0.3, "kernels": 5.0})
    module.main(module.Settings(quick=True, out=tmp_path))
    found = read(tmp_path, "gpu_report")
    assert found["sections"]["sampling"]["error"] == "RuntimeError: no such kernel"
    assert found["sections"]["packed"]["error"].startswith("TimeoutError") and found["sections"]["packed"]["seconds"] < 5
    assert found["sections"]["kernels"]["error"] is None
    assert [case["section"] for case in found["cases"]][:2] == ["sampling", "packed"] and len(found["cases"]) > 2


def test_the_report_ends_within_eight_minutes(benchmark):
    module = benchmark("gpu_report")
    assert sum(module.SECTIONS.values()) <= 450 == module.Settings(device="cpu").out_of


def test_reading_ahead(benchmark, tmp_path):
    module = benchmark("read_ahead")
    module.main(module.Settings(quick=True, out=tmp_path))
    cases = read(tmp_path, "read_ahead")["cases"]  # that all feeds give the same frames is checked before they are written
    assert [(case["work"], case["workers"]) for case in cases] == [(work, n) for work in ("sleep", "matmul") for n in (0, 1, 2)]
    assert all(case["step_s"] >= 0.2 and 0 <= case["waiting_share"] < 1 for case in cases)


@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install trl")
def test_the_step_against_trl(benchmark, tmp_path):
    module = benchmark("step_vs_trl")
    module.main(module.Settings(quick=True, out=tmp_path))
    found = read(tmp_path, "step_vs_trl")
    check_fields(found, "step_vs_trl")
    case = found["cases"][0]
    assert max(case["differences"].values()) < 1e-3
    assert case["logp_difference_after"] < 1e-4 < 1e-2 < case["logp_change"]  # both learnt, and the same


def test_without_trl_its_benchmark_says_what_to_install(benchmark, tmp_path, monkeypatch):
    module = benchmark("step_vs_trl")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install"):
        module.main(module.Settings(quick=True, out=tmp_path))


def test_a_step_on_a_video_without_peers_counts_what_ours_does(benchmark, tmp_path):
    module = benchmark("video_step_vs_peers")
    module.main(module.Settings(quick=True, out=tmp_path, environments=tmp_path))
    found = read(tmp_path, "video_step_vs_peers")
    assert found["left_out"].keys() == {"ms_swift", "video_r1"} and "make bench-peers" in found["left_out"]["ms_swift"]
    assert [case["B"] for case in found["cases"]] == [1, 2]
    for case in found["cases"]:
        side = case["sides"]["ours"]
        assert (side["files_decoded"], side["videos_encoded"], side["prompts_read"]) == (case["B"], case["B"], 3 * case["B"])
        assert side["cpu_s"] > side["generation_s"] > 0


def test_a_peer_that_computes_something_else_is_not_timed(benchmark, tmp_path, monkeypatch):
    module, sides = benchmark("video_step_vs_peers"), benchmark("peers.our_side")
    case = module.make_inputs(tmp_path, module.Settings(quick=True), 128, 6, 2)
    kept = []

    def check(change=lambda groups, gradients: None):
        "Trains on two groups that a peer might have sampled, with the gradients of the first call."
        ours = sides.OurSide(case, tmp_path)
        policy, sample = ours.trainer.policy, ours.trainer.samples[0]
        prompt = ours.trainer.ask(sample, sides.visuals_loader(ours.trainer.config.prompt)(sample, ours.trainer.processor))
        ids = torch.randint(10, 200, (2, case.G, case.C), generator=torch.Generator().manual_seed(0))
        places, following = policy.positions(prompt)
        groups = [dict(prompt_ids=prompt.prompt_ids, patches=prompt.patches, grid=prompt.grid_thw, seconds=1.0, ids=group,
                       positions=places, next=following + 3, rewards=torch.arange(4.0), logps=None) for group in ids]
        banned, policy.banned = policy.banned, policy.banned[:0]
        with torch.no_grad(), sides.at_positions(policy, groups):
            for group in groups:
                group["logps"] = sides.group_logps(policy, sides.as_rollout(group, sample))
        policy.banned = banned
        gradients = dict(kept[0]) if kept else {}
        change(groups, gradients)
        return ours.check("a peer", groups, gradients)

    with monkeypatch.context() as patch:
        patch.setattr(sides, "check_equal", lambda name, logps, gradients, options: kept.append(gradients[0]) or {})
        check()
    found = check()
    assert found["logp_difference"] < 1e-6 and found["gradient_difference"] < 1e-6 and found["logp_difference_own_positions"] > 1e-3
    with pytest.raises(SystemExit, match="a peer and ours: logp_difference"):
        check(lambda groups, gradients: groups[1]["logps"].add_(1e-3))
    with pytest.raises(SystemExit, match="a peer and ours: gradient_difference"):
        check(lambda groups, gradients: gradients.update({name: 1.01 * value for name, value in gradients.items()}))
    with pytest.raises(SystemExit, match="gradient_difference"):  # rewards that the peer did not have
        check(lambda groups, gradients: groups[0].update(rewards=torch.arange(4.0).flip(0)))


@pytest.mark.slow
@pytest.mark.parametrize("peer, reads", [("ms_swift", 4), ("video_r1", 3)])
def test_a_step_on_a_video_beside_its_peers(benchmark, tmp_path, peer, reads):
    module = benchmark("video_step_vs_peers")
    settings = module.Settings(quick=True, out=tmp_path, peers=(peer,))
    if why := module.missing(peer, settings):
        pytest.skip(why)
    module.main(settings)
    found = read(tmp_path, "video_step_vs_peers")
    assert found["left_out"] == {} and found["cases"]
    for case in found["cases"]:
        assert case["logp_difference"] < 1e-4 and case["gradient_difference"] < 1e-4 and case["speedup"] > 0
        assert case["sides"][peer]["prompts_read"] == case["sides"][peer]["videos_encoded"] == reads * case["G"] * case["B"]
        assert case["sides"]["ours"]["prompts_read"] == 3 * case["B"]
