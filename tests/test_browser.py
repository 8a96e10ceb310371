"""The site in a browser: quiet pages, explorers that move, a clip of one's own, a search that finds, nothing cut off.

`SITE=_site pytest tests/test_browser.py` looks at a site that is built already.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
AXE = ROOT / ".axe" / "node_modules" / "axe-core" / "axe.min.js"
EVERY = 4  # of the pages that no other test opens, one in so many is looked at
WIDTHS = (390, 1280, 1440)
EXPLORE = "explore/index.html"
EXPLORERS = ("effect", "ownclip", "vanishing", "clip", "regression", "augment")  # all stand on the page of `EXPLORE`
LESSONS = {"advantage.html": "vanishing", "grpo.html": "clip", "reg_grpo.html": "regression",
           "difficulty.html": "augment", "augment.html": "effect"}  # page -> the explorer at its head
FIRST = 6  # pages among which a search must name the right one
# What a reader types -> the page that must be among the first results.
SEARCHES = {
    "AugmentConfig": "config.html", "reg_grpo_loss": "reg_grpo.html", "ReplayBuffer": "difficulty.html",
    "make_hint": "hints.html", "EffectExplorer": "explore/effect.html",
    "vanishing advantage": "advantage.html", "step button": "explore/index.html", "dead zone": "grpo.html",
    "own video": "explore/own_clip.html", "install": "about/installing.html",
}
EXCUSED = ("label-content-name-mismatch",)  # of folds: the theme calls them "Toggle hidden content"
AUDITED = ("index.html", EXPLORE, "advantage.html", "reg_grpo.html", "augment.html", "config.html", "cli.html",
           "explore/own_clip.html")
SURE = dict.fromkeys([*AUDITED, *LESSONS])  # pages that are always looked at

# Number of formulas that still stand there as they were written, by MathJax (in the page) or MathML (before).
RAW = """[...document.querySelectorAll(".math")].filter((one) => !one.closest("mjx-container, math")
    && !one.querySelector("mjx-container, math")).length"""


@pytest.fixture(scope="module")
def site(request):
    "The folder of the built site."
    return (ROOT / os.environ["SITE"]).resolve() if "SITE" in os.environ else request.getfixturevalue("built_site")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    "A tab of Chromium."
    browser = pytest.importorskip("browser", reason="needs websocket-client")
    command = browser.find_chromium()
    if command is None:
        pytest.skip("needs Chromium (apt-get install chromium): the site was not looked at in a browser")
    tab = browser.Page(command, tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def home(tab, site):
    "The site's address."
    import browser

    server, address = browser.serve(site)
    yield address
    server.shutdown()


def test_pages_are_quiet_and_nothing_is_cut_off(tab, home, site):
    "No console error, no request to elsewhere, every formula rendered, nothing wider than the screen."
    troubles = []
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    for page in [*SURE, *[page for page in pages if page not in SURE][::EVERY]]:
        tab.resize(1280)
        tab.open(home + page)
        tab.until(f"({RAW}) === 0", 30)
        wrong = tab.js("document.querySelectorAll('merror, [data-mml-node=merror]').length")
        troubles += [f"{page}: {wrong} formulas with an error"] if wrong else []
        for width in WIDTHS:
            tab.resize(width, mobile=width < 500)
            over = tab.js("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            troubles += [f"{page}: {over} px too wide at {width}"] if over > 0 else []
        outside = {url for url in tab.requests if not url.startswith((home, "data:", "blob:", "about:"))}
        troubles += [f"{page}: asks for {url}" for url in outside]
        troubles += [f"{page}: {error}" for error in tab.errors]
    assert troubles == []


def test_the_landing_page_needs_one_screen_and_three_on_a_phone(tab, home):
    tab.resize(1280)
    tab.open(f"{home}index.html")
    assert tab.js("document.querySelector('#three-doors > ul').getBoundingClientRect().bottom") <= 900
    tab.resize(390, 844, mobile=True)
    tab.open(f"{home}index.html")
    assert tab.js("document.documentElement.scrollHeight") <= 3 * 844


def one(name: str) -> str:
    "JavaScript for the explorer with this name."
    return f"document.querySelector('[data-explorer={name}]')"


def look(tab, name: str) -> str:
    "All that an explorer shows now: texts, drawings, pixels."
    return tab.js(f"""(() => {{
        const root = {one(name)}.querySelector(".dvr"), pixels = [...root.querySelectorAll("canvas")].map((c) => c.toDataURL());
        const texts = [...root.children].filter((child) => child.tagName !== "STYLE").map((child) => child.innerHTML);
        return JSON.stringify([texts, pixels]);
    }})()""")


def ready(tab, url: str, names=EXPLORERS) -> None:
    tab.open(url)
    for name in names:
        tab.until(f"{one(name)}?.querySelector('.dvr')")
        if name in ("effect", "ownclip"):
            tab.until(f"{one(name)}.querySelector('canvas')", 20)


def moves(tab, name: str, slider: str) -> list[str]:
    "What an explorer shows at first, and after a mouse, a key and a finger on a slider."
    seen = [look(tab, name)]
    tab.click(slider, 0.45)
    seen.append(look(tab, name))
    tab.press(slider, "Home")
    seen.append(look(tab, name))
    tab.resize(390, mobile=True, dark=True)
    tab.tap(slider, 0.7)
    tab.until(f"Number({slider}.value) !== Number({slider}.min)")
    seen.append(look(tab, name))
    return seen


@pytest.mark.parametrize("name", EXPLORERS)
def test_an_explorer_moves_by_mouse_key_and_touch(tab, home, name):
    tab.resize(1280)
    ready(tab, home + EXPLORE, [name])
    seen = moves(tab, name, f"{one(name)}.querySelector('input[type=range]')")
    assert all(before != after for before, after in zip(seen, seen[1:])) and tab.errors == []


@pytest.mark.parametrize("page, name", LESSONS.items())
def test_a_lesson_begins_with_its_explorer(tab, home, page, name):
    tab.resize(1280)
    ready(tab, home + page, [name])
    top = tab.js(f"{one(name)}.getBoundingClientRect().top + scrollY")
    assert top < 2000 and top < tab.js("document.querySelector('div.cell_input').getBoundingClientRect().top + scrollY")
    before = look(tab, name)
    tab.click(f"{one(name)}.querySelector('input[type=range]')", 0.3)
    assert look(tab, name) != before


def test_a_training_step_stage_by_stage(tab, home):
    tab.resize(1280)
    ready(tab, home + EXPLORE, ["effect"])
    button = lambda words: f"[...{one('effect')}.querySelectorAll('button')].find((b) => b.textContent.startsWith('{words}'))"
    shown = lambda side: tab.js(f"[...{one('effect')}.querySelectorAll('[aria-label^=\"{side}\"] .dvr-circle')]"
                                ".map((circle) => circle.textContent).join('')")
    stages = []
    tab.press(button("Step"), "Enter")
    for _ in range(5):
        current = tab.js(f"{one('effect')}.querySelector('[aria-current=step]').textContent")
        stages.append((current, len(shown("Before")), len(shown("After"))))
        tab.click(f"{button('Next')} ?? {button('Step')}")
    assert stages == [("1 sample", 0, 0), ("2 score", 8, 0), ("3 difficulty", 8, 0), ("4 change", 8, 0),
                      ("5 sample again", 8, 8)]
    tab.click(f"{one('effect')}.querySelector('.dvr-answers button')")
    assert "<think>" in tab.until(f"{one('effect')}.querySelector('.dvr-text')?.textContent")
    before = tab.js(f"{one('effect')}.querySelector('[aria-current=step]').textContent")
    tab.click(button("Play"))
    tab.until(f"{one('effect')}.querySelector('[aria-current=step]').textContent !== '{before}'", 5)
    tab.click(button("Stop"))
    assert tab.errors == []


def test_a_clip_of_ones_own(tab, home, tmp_path):
    from deepvideo_r1.toy.world import write_video

    pixels = np.random.default_rng(0).integers(0, 256, (24, 36, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "mine.mp4", pixels, fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    tab.resize(1280)
    ready(tab, home + EXPLORE, ["ownclip"])
    says = f"{one('ownclip')}.querySelector('.dvr-says').textContent"
    assert "the clip of this page: 4.0 s, 16 frames" in tab.js(says)
    first = look(tab, "ownclip")

    tab.give_file("[data-explorer=ownclip] input[type=file]", tmp_path / "mine.mp4")
    assert "mine.mp4: 3.0 s, 16 frames" in tab.until(f"{says}.includes('mine.mp4') && {says}")
    sizes = tab.js(f"[...{one('ownclip')}.querySelectorAll('.dvr-grid button')].map((b) => b.getBoundingClientRect().width)")
    assert len(sizes) == 16 and max(sizes) - min(sizes) < 1 and look(tab, "ownclip") != first

    tab.click(f"{one('ownclip')}.querySelectorAll('.dvr-grid button')[4]")
    assert tab.js(f"{one('ownclip')}.querySelector('.dvr-large canvas').getBoundingClientRect().width") > 1.5 * sizes[0]
    tab.give_file("[data-explorer=ownclip] input[type=file]", tmp_path / "broken.mp4")
    assert "broken.mp4 cannot be opened here" in tab.until(f"{says}.includes('broken') && {says}")

    # Dropped: what the browser would hand over, made here.
    content = list((tmp_path / "mine.mp4").read_bytes())
    tab.js(f"""(() => {{
        const data = new DataTransfer(), zone = {one('ownclip')}.querySelector(".dvr-drop");
        data.items.add(new File([new Uint8Array({json.dumps(content)})], "dropped.mp4", {{ type: "video/mp4" }}));
        zone.dispatchEvent(new DragEvent("drop", {{ dataTransfer: data, bubbles: true, cancelable: true }}));
    }})()""")
    assert "dropped.mp4: 3.0 s" in tab.until(f"{says}.includes('dropped') && {says}")
    assert {url for url in tab.requests if not url.startswith((home, "data:", "blob:"))} == set()


def test_the_address_keeps_what_was_moved(tab, home):
    tab.resize(1280)
    tab.open(home + EXPLORE + "#vanishing.accuracy=0.3&effect.question=2&clip.advantage=%22wrong%22")
    slider = f"{one('vanishing')}.querySelector('input')"
    tab.until(f"{one('vanishing')}?.querySelector('.dvr') && {one('effect')}?.querySelector('.dvr')")
    assert tab.js(f"{slider}.value") == "0.3" and tab.js(f"{one('effect')}.querySelector('select').value") == "2"
    tab.press(slider, "End")
    hash = tab.until("decodeURIComponent(location.hash).includes('vanishing.accuracy=1') && location.hash")
    assert "effect.question=2" in hash  # the others stay
    tab.js("location.hash = 'vanishing.accuracy=0.6'")
    tab.until(f"{slider}.value === '0.6'")
    buttons = f"{one('vanishing')}.querySelectorAll('.explorer-bar button')"
    tab.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    tab.click(f"{buttons}[1]")
    tab.until(f"{one('vanishing')}.querySelector('[role=status].said, .explorer-bar [role=status]').textContent")
    tab.click(f"{buttons}[0]")
    assert tab.until(f"{slider}.value === '0.9'") and "vanishing" not in tab.js("location.hash")
    assert tab.errors == []


@pytest.mark.parametrize("words, page", SEARCHES.items())
def test_search_finds(tab, home, words, page):
    tab.open(f"{home}search.html?q={words.replace(' ', '+')}")
    tab.until("document.querySelectorAll('#search-results li a, ul.search li a').length", 20)
    tab.until("/finished|found/i.test(document.querySelector('#search-results').textContent)", 20)
    found = tab.js("[...document.querySelectorAll('#search-results li a, ul.search li a')].map((a) => a.getAttribute('href'))")
    first = list(dict.fromkeys(link.partition("#")[0].partition("?")[0] for link in found))[:FIRST]
    assert page in first


@pytest.mark.parametrize("page", AUDITED)
def test_axe_finds_nothing_serious(tab, home, page):
    if not AXE.exists():
        pytest.skip("needs axe-core (npm install --prefix .axe axe-core@4): accessibility was not looked at")
    tab.resize(1280)
    tab.open(home + page)
    tab.js("document.querySelector('[data-explorer]') && new Promise((done) => setTimeout(done, 500))")
    tab.js(AXE.read_text(encoding="utf-8") + "; 0")
    found = tab.js("axe.run().then(({ violations }) => violations.map(({ id, impact, nodes }) => "
                   "[impact, id, nodes.length, nodes[0].html.slice(0, 120)]))")
    assert [one for one in found if one[0] in ("serious", "critical") and one[1] not in EXCUSED] == []
