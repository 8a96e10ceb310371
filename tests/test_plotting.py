"""Figures and report: drawn values against the files, small files, no state, verdicts both ways, text that stays text."""

import base64
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepvideo_r1.toy import plotting
from deepvideo_r1.toy.report import write_report
from deepvideo_r1.toy.made_up import write_made_up_run
from deepvideo_r1.toy.runs import ARM_NAMES, LEVELS, TABLE_4_ARMS, read_results, stack_metric
from deepvideo_r1.evaluation.intervals import over_seeds
from deepvideo_r1.toy.verdicts import compare_arms, judge, judge_gain


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_made_up_run(tmp_path_factory.mktemp("run"), seeds=(0, 7), steps=25)


@pytest.fixture(scope="module")
def report(run_dir):
    return write_report(run_dir).read_text()


def line(ax, gid):
    return next(found for found in ax.lines if found.get_gid() == gid)


def rows_of(run_dir, arm, seed, name):
    path = run_dir / "arms" / f"{arm}-seed{seed}" / "metrics.jsonl"
    return [json.loads(row)[name] for row in path.read_text().splitlines()]


@pytest.mark.parametrize("plot, panel, metric", [
    (plotting.plot_learning, 0, "reward_accuracy"), (plotting.plot_learning, 1, "reward_accuracy"),
    (plotting.plot_vanishing, 0, "vanishing_original"), (plotting.plot_vanishing, 1, "vanishing_final"),
    (plotting.plot_kl, 0, "kl"),
])
def test_curves_are_the_means_of_the_files(run_dir, plot, panel, metric):
    ax = plot(run_dir, window=1).axes[panel]
    for arm in TABLE_4_ARMS:
        expected = np.mean([rows_of(run_dir, arm, seed, metric) for seed in (0, 7)], axis=0)
        np.testing.assert_allclose(line(ax, f"{arm}-dots").get_ydata(), expected)
        np.testing.assert_allclose(line(ax, f"{arm}-line").get_ydata(), expected)


def test_accuracy_is_that_of_the_file(run_dir):
    panels, results = plotting.plot_accuracy(run_dir).axes, json.loads((run_dir / "results.json").read_text())
    for ax, mode in zip(panels, ("sampled", "greedy")):
        for level in LEVELS:
            for arm in TABLE_4_ARMS:
                found = [a["accuracy"][level] for a in results["arms"] if a["arm"] == arm]
                assert list(line(ax, f"{arm}-{level}").get_ydata()) == [acc[mode] for acc in found]
                bars = next(c for c in ax.collections if c.get_gid() == f"{arm}-{level}-ci")
                assert [s[:, 1].tolist() for s in bars.get_segments()] == [acc[f"{mode}_ci"] for acc in found]


def test_arms_keep_their_colour_without_the_others(run_dir, tmp_path):
    alone = write_made_up_run(tmp_path, arms=["reg_grpo"], seeds=[0], extras=False)
    colours = [line(plotting.plot_kl(where).axes[0], "reg_grpo-line").get_color() for where in (run_dir, alone)]
    assert colours[0] == colours[1] == plotting.LIGHT.arms["reg_grpo"]


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=30), window=st.integers(1, 40))
def test_smoothing_is_the_mean_of_the_neighbours(values, window):
    smoothed = plotting.smooth(np.array(values), window)
    for i, value in enumerate(smoothed):
        near = values[max(0, i - (window - 1) // 2) : i + window // 2 + 1]
        assert value == pytest.approx(np.mean(near), abs=1e-9)


def test_figures_are_small_and_leave_matplotlib_alone(run_dir):
    before = dict(matplotlib.rcParams)
    paths = plotting.save_figures(run_dir)
    assert [path.stem for path in paths] == ["learning", "vanishing", "accuracy", "knobs", "kl", "examples"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size <= 100_000 for path in paths)
    assert dict(matplotlib.rcParams) == before


def test_curves_of_a_run_in_progress(run_dir, tmp_path):
    going = write_made_up_run(tmp_path, arms=["grpo"], seeds=[0, 1], steps=12, extras=False)
    path = going / "arms/grpo-seed1/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]) + '{"step": 5, "kl"')
    assert len(line(plotting.plot_kl(going).axes[0], "grpo-dots").get_ydata()) == 5
    with pytest.raises(ValueError, match="no metric 'nothing'"):
        stack_metric({0: [{"step": 0}]}, "nothing")


class Tags(HTMLParser):
    "Counts elements and checks that they are closed in order."

    def __init__(self, html):
        super().__init__()
        self.open, self.seen, self.links = [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_whole_and_asks_nobody(report):
    tags = Tags(report)
    assert tags.open == [] and not {"script", "link", "iframe"} & set(tags.seen)
    assert len(tags.links) == 5 * 2 + 2 and all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert all(base64.b64decode(link.split(",")[1]).startswith(b"\x89PNG") for link in tags.links)
    assert not re.search(r"http|url\(|@import", re.sub(r"base64,[^\"]+", "", report))


def test_the_report_tells_what_the_files_say(run_dir, report):
    results = read_results(run_dir)
    for verdict in judge(results):
        assert verdict.question in report and verdict.sentence in report
    for arm in results["arms"]:
        for level in LEVELS:
            assert f"{100 * arm['accuracy'][level]['sampled']:.1f}" in report
    assert all(ARM_NAMES[arm] in report for arm in TABLE_4_ARMS) and "Made-up data." in report


def test_text_of_files_is_never_markup(tmp_path):
    evil = "<script>alert(1)</script>\"'{{ 7 * 7 }}"
    run_dir = write_made_up_run(tmp_path, arms=["grpo", "<b>x"], seeds=[0])
    (run_dir / "config.json").write_text(json.dumps({evil: {"a": evil}}))
    example = {"video": evil, "question": evil, "answer": evil, "cold_start": evil, "arms": {"grpo": evil}, "level": evil,
               "contrast": 0.5}
    (run_dir / "examples.json").write_text(json.dumps([example]))
    html = write_report(run_dir).read_text()
    tags = Tags(html)
    assert "script" not in tags.seen and "<b>x" not in html
    assert "{{ 7 * 7 }}" in html and "no such file" in html  # no template either, and a missing video is named


def arms(**values):
    "Entries whose L1 accuracy is given for each seed."
    return {"arms": [{"arm": arm, "seed": seed, "responses": 10, "x": value} for arm, row in values.items()
                     for seed, value in enumerate(row)]}


@pytest.mark.parametrize("base, other, answer", [
    ((0.5, 0.6, 0.7), (0.6, 0.7, 0.801), "yes"), ((0.6, 0.7, 0.801), (0.5, 0.6, 0.7), "no"),
    ((0.5, 0.6, 0.7), (0.8, 0.61, 0.71), "open"), ((0.5,), (0.9,), "open"), ((0.5, 0.5), (0.6, 0.5), "open"),
])
def test_verdicts_fall_whichever_way_the_numbers_do(base, other, answer):
    ask = lambda results, wanted: compare_arms(results, "?", [("grpo", "reg_grpo")], {"x": lambda a: a["x"]}, wanted=wanted)
    verdict = ask(arms(grpo=base, reg_grpo=other), 1)
    assert verdict.answer == answer
    assert ask(arms(grpo=base, reg_grpo=other), -1).answer == {"yes": "no", "no": "yes", "open": "open"}[answer]
    assert ("cannot be given" in verdict.sentence) == (len(base) == 1)


@pytest.mark.parametrize("ci, answer", [((0.10, 0.2), "yes"), ((0.09, 0.2), "open"), ((-0.1, 0.0999), "no")])
def test_a_gain_needs_its_whole_interval(ci, answer):
    run = {"arm": "grpo", "seed": 0, "gain": {"L1": {"sampled": sum(ci) / 2, "ci": list(ci)}}}
    assert judge_gain({"arms": [run]}).answer == answer


def test_the_interval_over_seeds_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        draws = [over_seeds(rng.normal(0.02, 0.01, n).tolist()) for _ in range(4000)]
        assert np.mean([e.low <= 0.02 <= e.high for e in draws]) == pytest.approx(0.95, abs=0.012)
