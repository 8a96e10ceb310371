"""Comparisons of arms over many runs: who is paired with whom, where curves are compared, and what is kept of a study."""
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepvideo_r1.toy.effects import AXES, CURVES, equal_steps, pack_runs, paired, read_runs, trailing_mean
from deepvideo_r1.toy.made_up import write_made_up_run
from deepvideo_r1.toy.runs import LEVELS

RECORDED = Path(__file__).resolve().parents[1] / "docs" / "recorded"


def run(arm="grpo", cold_start=0, seed=0, n=10, rate=64, level=0.5, **curves):
    base = {"reward_accuracy": [level] * n, "vanishing_original": [0.5] * n, "vanishing_final": [0.4] * n,
            "kl": [0.01 * (i + 1) for i in range(n)], "responses": [rate * (i + 1) for i in range(n)]}
    return {"arm": arm, "cold_start": cold_start, "seed": seed, "accuracy": dict.fromkeys(LEVELS, level), "curves": base | curves}


def test_a_study_is_packed_and_read_again(tmp_path):
    directory = write_made_up_run(tmp_path / "run", arms=("grpo", "grpo_da"), seeds=(0, 1), steps=12)
    runs = pack_runs(directory, digits=3)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in runs))
    assert read_runs(tmp_path / "runs.jsonl") == runs and len(runs) == 4
    results = {(a["arm"], a["seed"]): a for a in json.loads((directory / "results.json").read_text())["arms"]}
    for found in runs:
        assert set(found["curves"]) == set(CURVES) and {len(v) for v in found["curves"].values()} == {12}
        assert found["accuracy"]["L2"] == pytest.approx(results[found["arm"], found["seed"]]["accuracy"]["L2"]["sampled"], abs=5e-4)


def test_cold_starts_are_told_apart(tmp_path):
    directory = write_made_up_run(tmp_path / "run", arms=("grpo",), seeds=(0,), steps=3)
    results = json.loads((directory / "results.json").read_text())
    results["config"]["cold_start"] = {"seed": 7}
    (directory / "results.json").write_text(json.dumps(results))
    assert [r["cold_start"] for r in pack_runs(directory)] == [7]


def test_an_unfinished_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finished"):
        pack_runs(tmp_path)


@settings(max_examples=100, deadline=None)
@given(a=st.lists(st.floats(0.001, 1), min_size=1, max_size=30), b=st.lists(st.floats(0.001, 1), min_size=1, max_size=30),
       axis=st.sampled_from(AXES))
def test_both_runs_have_gone_equally_far_and_one_of_them_all_the_way(a, b, axis):
    pair = [run(n=len(steps), kl=steps, responses=[sum(steps[: i + 1]) for i in range(len(steps))]) for steps in (a, b)]
    found = equal_steps(*pair, axis, window=1)
    assert all(1 <= n <= len(steps) for n, steps in zip(found, (a, b)))
    if axis == "steps":
        assert found[0] == found[1] == min(len(a), len(b))
    else:
        far = [max(p["curves"][axis]) for p in pair]
        for n, p in zip(found, pair):
            reached = [max(p["curves"][axis][: i + 1]) for i in range(len(p["curves"][axis]))]
            assert reached[n - 1] >= min(far) and (n == 1 or reached[n - 2] < min(far))
        assert equal_steps(*pair[::-1], axis, window=1) == found[::-1]


def test_pairs_share_cold_start_and_seed():
    runs = [run("grpo", 0, 0, level=0.5), run("grpo", 0, 1, level=0.6), run("grpo", 1, 0, level=0.1), run("grpo", 1, 5, level=0.0),
            run("reg_grpo", 1, 0, level=0.2), run("reg_grpo", 0, 0, level=0.7), run("reg_grpo", 0, 1, level=0.9), run("reg_grpo", 0, 9)]
    found = paired(runs, "grpo", "reg_grpo", "L1")
    assert found.n == 3 and found.mean == pytest.approx((0.2 + 0.3 + 0.1) / 3)
    half = 4.303 * math.sqrt(sum((d - 0.2) ** 2 for d in (0.2, 0.3, 0.1)) / 2 / 3)  # Student's, two degrees of freedom
    assert (found.low, found.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    assert paired(runs, "reg_grpo", "grpo", "L1").mean == pytest.approx(-found.mean)
    with pytest.raises(ValueError, match="no cold start and seed has both grpo and dpo; arms are grpo, reg_grpo"):
        paired(runs, "grpo", "dpo", "L1")


def test_a_curve_is_compared_where_both_have_sampled_equally_much():
    plain = run("grpo", n=10, rate=64, reward_accuracy=[i / 10 for i in range(10)])
    twice = run("grpo_da", n=10, rate=128, reward_accuracy=[i / 10 for i in range(10)])
    assert paired([plain, twice], "grpo", "grpo_da", "reward_accuracy", window=1).mean == pytest.approx(0.0)
    at_equal = paired([plain, twice], "grpo", "grpo_da", "reward_accuracy", axis="responses", window=1)
    assert at_equal.mean == pytest.approx(0.4 - 0.9)  # 640 responses: the tenth step and the fifth
    assert paired([plain, twice], "grpo", "grpo_da", "reward_accuracy", axis="responses", window=None).mean == pytest.approx(0.2 - 0.45)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=20), window=st.integers(1, 25))
def test_trailing_means(values, window):
    found = trailing_mean(values, window)
    assert len(found) == len(values) and found[0] == values[0]
    assert found[-1] == pytest.approx(sum(values[-window:]) / len(values[-window:]))


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_recorded_runs_are_whole(path):
    runs = read_runs(path)
    setting = "study" if path.stem.endswith("_sweep") else "arm"  # a sweep repeats a run with other settings, each a study
    assert len({(r[setting], r["arm"], r["cold_start"], r["seed"]) for r in runs}) == len(runs) > 1
    for found in runs:
        assert set(found["curves"]) == set(CURVES) and set(found["accuracy"]) == set(LEVELS)
        assert len({len(v) for v in found["curves"].values()}) == 1 and found["curves"]["responses"] == sorted(found["curves"]["responses"])
