"""The playground: its JavaScript gives the library's schedules and hints, its widget the library's frames."""
import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_explorers import run_js  # noqa: F401, a fixture

from deepvideo_r1.augment import add_noise, make_hint, mask_frames, plan_augmentation
from deepvideo_r1.config import AugmentConfig
from deepvideo_r1.core import make_generator
from deepvideo_r1.explore.explorers import read_module
from deepvideo_r1.explore.playground import (
    AugmentExplorer, infer_accuracy, mask_order, picture_url, place_hint, seen_frames, strengths,
    toy_question, vanishing_share,
)
from deepvideo_r1.toy.config import VARIANTS
from deepvideo_r1.toy.world import write_video

ROOT = Path(__file__).resolve().parents[1]
FIXED = {"schedule": "fixed"}
SMALL = {"n_levels": 1}  # most tests need no frames drawn ahead
CONFIGS = [AugmentConfig(**how) for how in (
    {}, {"harder": "mask"}, FIXED, FIXED | {"harder": "mask", "fixed_mask": 0.3}, {"redraw_only": True},
    {"hint_fade_steps": 10}, {"noise_scale": 0.0, "hint_scale": 0.0}, {"dead_zone": 0.25, "noise_scale": 1.7},
    FIXED | {"hint_scale": 0.0})]


def test_schedules(run_js):  # noqa: F811
    cases = [(d / 20, config, step) for d in range(-40, 41, 3) for config in CONFIGS for step in (0, 7, 12)]
    cases += [(edge, config, 0) for config in CONFIGS for edge in (-config.dead_zone, 0.0, config.dead_zone)]
    found = run_js("augment", [("planAugmentation", d, asdict(config), step) for d, config, step in cases])
    expected = [plan_augmentation(d, config, step=step) for d, config, step in cases]
    assert found == expected
    assert run_js("augment", [("strengths", plan) for plan in expected]) == [strengths(plan) for plan in expected]


def test_the_fixed_schedule_is_that_of_the_study():
    assert FIXED == VARIANTS["_fixed"]


def test_hints(run_js):  # noqa: F811
    traces = ["t1 red 0\nt2 green 2\n\nt3 blue 3\nt4 red 3", "A man cuts. He turns! Is he done? Yes.",
              "so the onion falls", "onion", "  two lines\nand blanks  ",
              "caf\u00e9 \u4e2d\u6587. \U0001f600 then. End.", "v1.5 is one word. Two."]
    cases = [(trace, k / 20) for trace in traces for k in range(21)]
    assert run_js("augment", [("makeHint", *case) for case in cases]) == [make_hint(*case) for case in cases]
    assert run_js("augment", [("makeHint", "", 0.5)]) == [""]
    cases = [(hint, hint_as) for hint in ("", "t1 red 0\nt2") for hint_as in ("prompt", "prefix")]
    assert run_js("augment", [("placeHint", *case) for case in cases]) == [place_hint(*case) for case in cases]


SCRIPTS = {
    "Chinese": ["一个男人在切洋葱。他转身！“他做完了吗？”是的。", "他切洋葱，然后洗手；最后（大概）离开", "第一步。第二步"],
    "Japanese": ["男が玉ねぎを切る。「終わったか？」はい。おわり", "切る、洗う、食べる", "玉ねぎ｡手を洗う｡"],
    "Hindi": ["एक आदमी प्याज काटता है। वह मुड़ता है॥ क्या वह समाप्त हुआ? हाँ।", "प्याज काटो।फिर धोओ।"],
    "Arabic": ["رجل يقطع البصل. ثم يلتفت! هل انتهى؟ نعم۔ وداعا", "يقطع، ثم يغسل؛ ثم يذهب", "هل؟نعم"],
    "others": ["ሰላም። ደህና፧ አዎ", "မင်္ဂလာပါ။ ဟုတ်ကဲ့", "One。\n。Two。 。Three", "。first。last。", "a.b。c.）d」 e", "（全。）部。》end",
               "\u3000ideographic\u3000space\x85next\ufeffline\u2028x\x1f", "\x1c.。.! ?x…。y"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_hints_of_every_script(run_js, script):  # noqa: F811
    cases = [(trace, k / 20) for trace in SCRIPTS[script] for k in range(21)]
    hints = [make_hint(*case) for case in cases]
    assert run_js("augment", [("makeHint", *case) for case in cases]) == hints
    assert all(len(set(hints[21 * i : 21 * i + 21])) > 1 for i in range(len(SCRIPTS[script])))  # each can be cut


def test_accuracy_and_vanishing(run_js):  # noqa: F811
    cases = [(d / 10, mean) for d in range(-12, 13) for mean in (0.8, 1.0, 1.35, 2.0)]
    found = run_js("augment", [("inferAccuracy", *case) for case in cases])
    assert found == pytest.approx([infer_accuracy(*case) for case in cases], abs=1e-12)
    cases = [(p / 8, G) for p in range(9) for G in (2, 8, 16)]
    found = run_js("augment", [("vanishingShare", *case) for case in cases])
    assert found == pytest.approx([vanishing_share(*case) for case in cases], abs=1e-12)


def test_masks(run_js):  # noqa: F811
    assert run_js("augment", [("roundHalfEven", k / 4) for k in range(30)]) == [round(k / 4) for k in range(30)]
    cases = [(T, k / 20) for T in (1, 2, 5, 6, 8) for k in range(21)]
    found = run_js("augment", [("maskedFrames", mask_order(T), share) for T, share in cases])
    for (T, share), grey in zip(cases, found):
        frames = seen_frames(torch.zeros(T, 3, 2, 2, dtype=torch.uint8), 0.0, share)
        assert sorted(grey) == [k for k in range(T) if frames[k, 0, 0, 0]], (T, share)
    assert run_js("augment", [("nearestLevel", [0, 0.1, 0.2], s) for s in (0, 0.04, 0.16, 0.9)]) == [0, 0, 2, 2]


def test_a_widget_shows_what_the_library_makes():
    frames, _, trace = toy_question()
    explorer = AugmentExplorer(**SMALL)
    for schedule, harder, difficulty in (
            ("adaptive", "noise", -0.37), ("adaptive", "mask", -0.4), ("fixed", "noise", -0.1), ("fixed", "mask", -0.9),
            ("adaptive", "noise", 0.0), ("adaptive", "mask", 0.3), ("fixed", "noise", 0.9)):
        explorer.schedule, explorer.harder, explorer.difficulty = schedule, harder, difficulty
        fixed = FIXED if schedule == "fixed" else {}
        plan = plan_augmentation(difficulty, AugmentConfig(**fixed | {"harder": harder}))
        expected = frames
        if plan.get("change") == "noise":
            expected = add_noise(frames, plan["sigma"], generator=make_generator("playground", "noise"))
        elif plan.get("change") == "mask":
            expected = mask_frames(frames, plan["fraction"], generator=make_generator("playground", "mask"))
        assert explorer.frames == [picture_url(frame) for frame in expected], (schedule, harder, difficulty)
        assert explorer.hint == (make_hint(trace, plan["fraction"]) if plan.get("change") == "hint" else "")
    explorer.difficulty = 0.0
    explorer.sigma, explorer.masked_share, explorer.hint_share = 0.1, 0.5, 0.6  # by themselves, and all at once
    assert explorer.frames == [picture_url(frame) for frame in seen_frames(frames, 0.1, 0.5)]
    assert explorer.frames_at == [0.1, 0.5] and explorer.hint == make_hint(trace, 0.6)
    explorer.trace = "One. Two. Three."
    assert explorer.hint == "One. Two."


def test_a_page_without_a_kernel_has_the_frames_of_every_step():
    explorer = AugmentExplorer()
    for k, level in enumerate(explorer.levels):
        explorer.sigma = level
        assert explorer.frames == explorer.noisy[k]
    of_the_slider = [strengths(plan_augmentation(-step / 10, AugmentConfig()))["sigma"] for step in range(9)]
    assert explorer.levels == pytest.approx(of_the_slider)
    assert len(json.dumps(explorer.get_state())) < 300_000


def test_a_message_from_the_page_keeps_what_was_moved_by_hand():
    explorer = AugmentExplorer(**SMALL)
    explorer.set_state({"difficulty": -0.3, "sigma": 0.15, "masked_share": 0, "hint_share": 0, "hint": ""})
    assert (explorer.sigma, explorer.frames_at) == (0.15, [0.15, 0.0])
    explorer.set_state({"sigma": 0.3})
    assert (explorer.difficulty, explorer.sigma, explorer.frames_at) == (-0.3, 0.3, [0.3, 0.0])


def test_a_video_of_ones_own(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 28, 56, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", pixels)
    explorer = AugmentExplorer(tmp_path / "clip.mp4", max_frames=4, question="What happens?", difficulty=0.5,
                               config=replace(AugmentConfig(), hint_scale=0.5))
    assert explorer.clip.shape[0] == 4 and explorer.frames[0].startswith("data:image/jpeg;base64,")
    assert (explorer.hint_share, explorer.hint) == (0.25, "")  # no trace, no hint
    explorer.difficulty = -0.6
    assert explorer.frames == [picture_url(frame) for frame in seen_frames(explorer.clip, 0.3, 0.0)]
    assert explorer.picture().startswith(b"\x89PNG")


def test_what_cannot_be_shown():
    with pytest.raises(ValueError, match="missing.mp4: no such file"):
        AugmentExplorer("missing.mp4")
    with pytest.raises(ValueError, match="without tags"):
        AugmentExplorer(trace="<think> red", **SMALL)


def test_the_module_stands_alone_and_knows_the_widgets_names():
    text, widget = read_module("augment"), AugmentExplorer(**SMALL)
    assert not re.search(r"^\s*import\b|\bimport\(", text, re.M) and len(text) < 22_000
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(fetch|eval|XMLHttpRequest|localStorage|innerHTML)\b", text)
    own = {key for key in widget.keys if key[0] != "_" and key not in ("layout", "tabbable", "tooltip")}
    assert own <= set(re.findall(r'"([a-z]+(?:_[a-z]+)?)"', text))
    bundle, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and len(bundle["image/png"]) < 100_000


DRIVE = """
<pre id="report"></pre>
<script type="module">
const wait = () => new Promise((done) => setTimeout(done, 50));
while (!document.querySelector(".dvr")) await wait();
const control = (name) => document.querySelector(`[aria-label="${name}"]`), report = [];
const move = (name, value, event = "input") => {
  const node = control(name);
  node.value = value;
  node.dispatchEvent(new Event(event));
  report.push({
    frames: [...document.querySelector(".dvr-strip").children].map((one) => one.getAttribute("src")),
    turns: [...document.querySelectorAll(".dvr-turn pre")].map((one) => one.textContent),
    says: document.querySelector(".dvr-says").textContent,
  });
};
for (const [name, value, event] of %s) move(name, value, event);
document.getElementById("report").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(report))));
</script>
"""


@pytest.mark.slow
def test_a_browser_without_a_kernel(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from widgets import mount_widget
    finally:
        sys.path.remove(str(ROOT / "docs"))
    explorer = AugmentExplorer()
    output = {"data": explorer._repr_mimebundle_()[0]}
    html = mount_widget(output, {explorer.model_id: {"state": explorer.get_state()}})["data"]["text/html"]
    moves = [("difficulty dR", -0.6), ("share of masked frames", 0.5), ("difficulty dR", 0.3),
             ("hint", "prefix", "change"), ("share of the trace as hint", 1)]
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{html}{DRIVE % json.dumps(moves)}")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
               (tmp_path / "page.html").as_uri()]
    page = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    report = base64.b64decode(re.search(r'<pre id="report">(.+?)</pre>', page)[1])
    noisy, masked, hinted, begun, most = json.loads(report)
    explorer.difficulty = -0.6
    assert noisy["frames"] == explorer.frames and "vanishes with probability 1.000" in noisy["says"]
    explorer.masked_share = 0.5
    grey = picture_url(torch.full((3, 28, 28), 128, dtype=torch.uint8))
    assert [url or grey for url in masked["frames"]] == explorer.frames and "Moved away" in masked["says"]
    explorer.difficulty = 0.3
    assert hinted["frames"] == explorer.frames
    assert hinted["turns"][0].startswith(f"Hint: {explorer.hint}\n") and explorer.hint not in hinted["turns"][1]
    assert begun["turns"][1].startswith(f"<think>\n{explorer.hint}") and explorer.hint not in begun["turns"][0]
    assert make_hint(explorer.trace, 1.0) in most["turns"][1] and explorer.trace not in most["turns"][1]
