"""The explorers: their JavaScript gives the numbers of the Python functions, and their modules stand alone."""

import itertools
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from deepvideo_r1.advantage import group_advantages, is_vanishing
from deepvideo_r1.explore.explorers import (
    ClipExplorer, RegressionExplorer, VanishingExplorer, look_at_group, move_one, read_module,
)
from deepvideo_r1.grpo import grpo_loss
from deepvideo_r1.reg_grpo import reg_grpo_loss

ROOT = Path(__file__).resolve().parents[1]
EXPLORERS = {"vanishing": VanishingExplorer, "clip": ClipExplorer, "regression": RegressionExplorer}
SCRIPT = """
import * as explorer from %s;
const calls = JSON.parse(await new Response(process.stdin).text());
console.log(JSON.stringify(calls.map(([name, ...values]) => explorer[name](...values))));
"""


@pytest.fixture
def run_js(tmp_path):
    """Results of calls, each a function's name and its arguments, to the module as the browser gets it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node to run the explorers' JavaScript")

    def run(module, calls):
        path = tmp_path / f"{module}.mjs"
        path.write_text(read_module(module), encoding="utf-8")
        command = [node, "--input-type=module", "--eval", SCRIPT % json.dumps(path.as_uri())]
        done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def draws(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_share_of_vanishing_groups(run_js):
    cases = [(p, G) for p in (0.0, 0.01, 0.3, 0.5, 0.9, 1.0) for G in (2, 3, 8)]
    found = run_js("vanishing", [("vanishingProbability", p, G) for p, G in cases])
    for (p, G), share in zip(cases, found):
        groups = torch.tensor(list(itertools.product([0.0, 1.0], repeat=G)), dtype=torch.float64)  # all there are
        right = groups.sum(-1)
        chances = torch.tensor(p).double() ** right * (1 - torch.tensor(p).double()) ** (G - right)
        assert share == pytest.approx(chances[is_vanishing(groups)].sum().item(), abs=1e-7)


def test_sampled_groups_follow_their_probability(run_js):
    groups = run_js("vanishing", [("sampleGroup", 0.3, 10, seed) for seed in range(500)])
    again = run_js("vanishing", [("sampleGroup", 0.3, 10, seed) for seed in range(500)])
    assert groups == again and {reward for group in groups for reward in group} == {0, 1}
    assert sum(map(sum, groups)) / 5000 == pytest.approx(0.3, abs=0.03)


def test_advantages(run_js):
    groups = [[0, 0, 1, 1], [2, 1, 1, 0], [1, 1, 1], [0.1] * 8, [0.5, 0.5 + 1e-7], (2 * draws(0, 16)).tolist()]
    for group, found in zip(groups, run_js("group", [("groupAdvantages", group) for group in groups])):
        expected = group_advantages(torch.tensor([group], dtype=torch.float64))[0].tolist()
        assert found == pytest.approx(expected, abs=1e-12)


def test_one_response_moves(run_js):
    settings = list(itertools.product((-2.6, -1.0, 0.0, 0.3, 2.0), (-1.5, -0.3, 0.0, 0.1, 1.4), (0.1, 0.2), (0.1, 1.0)))
    grpo = run_js("clip", [("grpoTerm", a, x, clip_eps) for a, x, clip_eps, _ in settings])
    reg = run_js("clip", [("regGrpoTerm", a, x, floor) for a, x, _, floor in settings])
    for (a, x, clip_eps, floor), found, found_reg in zip(settings, grpo, reg):
        expected = move_one(grpo_loss, a, x, clip_eps=clip_eps)
        assert (found["loss"], found["gradient"]) == pytest.approx(expected, abs=1e-9), (a, x, clip_eps)
        expected = move_one(reg_grpo_loss, a, x, sigma_floor=floor)
        assert (found_reg["loss"], found_reg["gradient"]) == pytest.approx(expected, abs=1e-9), (a, x, floor)


def test_a_group_is_regressed(run_js):
    cases = [([2, 1, 1, 0], [0, 0, 0, 0], 1.0), ([1, 1, 1], [0.5, -1, 2], 0.5), ([0.1] * 4, [0.0, 1.0, 2.0, 3.0], 1.0)]
    for seed in range(20):
        G = 2 + seed % 7
        cases.append(((2 * draws(seed, G)).tolist(), (6 * draws(seed + 99, G) - 3).tolist(), 0.05 + seed / 10))
    for case, found in zip(cases, run_js("regression", [("regress", *case) for case in cases])):
        expected = look_at_group(*case)
        assert set(found) == set(expected)
        for key in expected:
            assert found[key] == pytest.approx(expected[key], abs=1e-9), (key, case)


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_module_stands_alone(name):
    text = read_module(name)
    assert not re.search(r"^\s*import\b|\bimport\(", text, re.M) and len(text) < 20_000
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(fetch|eval|XMLHttpRequest|localStorage|innerHTML)\b", text)
    assert read_module(name).count("export default") == 1


@pytest.mark.parametrize("name", EXPLORERS)
def test_a_widget_and_its_script_agree_on_names(name):
    widget = EXPLORERS[name]()
    own = {key for key in widget.keys if key[0] != "_" and key not in ("layout", "tabbable", "tooltip")}
    used = set(re.findall(r'"([a-z]+(?:_[a-z]+)?)"', read_module(name)))
    assert own <= used
    bundle, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and len(bundle["image/png"]) < 100_000
    widget.close()


def test_every_module_is_packaged():
    names = {path.name for path in (files("deepvideo_r1.explore") / "esm").iterdir()}
    shared = {"group.js", "kit.js", "pixels.js", "plan.js"}
    assert names == shared | {"augment.js", "effect.js", "own_clip.js", *(f"{name}.js" for name in EXPLORERS)}
    packaged = {path.name for path in files("deepvideo_r1.explore").iterdir() if path.name in ("answers.json", "scene.mp4")}
    assert len(packaged) == 2 and all(name in (ROOT / "setup.py").read_text() for name in packaged)


def test_a_page_runs_each_widget_without_a_kernel(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from widgets import STATE, VIEW, mount_widget

    notebook = json.loads((ROOT / "nbs" / "explore" / "00_explorers.ipynb").read_text(encoding="utf-8"))
    states = notebook["metadata"]["widgets"][STATE]["state"]
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    outputs = [output for output in outputs if VIEW in output.get("data", {})]
    assert len(outputs) == len(EXPLORERS)
    for output, name in zip(outputs, EXPLORERS):
        html = mount_widget(output, states)["data"]["text/html"]
        assert html.count("</script>") == 1 and "data:image/png;base64," in html
        source = json.loads(re.search(r"new Blob\(\[(.*)\], ", html)[1])
        assert source == read_module(name), "run the notebook again: it stores an older module"
    assert mount_widget({"data": {"text/plain": "1"}}, {}) == {"data": {"text/plain": "1"}}
