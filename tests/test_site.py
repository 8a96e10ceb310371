"""The site's parts, titles and look-up pages: each page has its place, and what is looked up is what the library has."""
import dataclasses
import importlib
import json
import re
import sys
import warnings
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from deepvideo_r1.cli import COMMANDS
from deepvideo_r1.config import PRESETS, RunConfig
from deepvideo_r1.data.datasets import FIELDS, FORMATS, load_samples
from deepvideo_r1.training.step_metrics import STEP_METRICS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def docs():
    "A function that imports a module of docs/."
    sys.path.insert(0, str(ROOT / "docs"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "docs"))


def text_of(page: Path) -> str:
    "The text of the article of a page."
    article = re.search(r'<article role="main".*?</article>', page.read_text(encoding="utf-8"), re.S)[0]
    return unescape(re.sub(r"<[^>]+>", "", article))


def turn(page: Path, way: str) -> Path | None:
    "The page that Next or Previous leads to."
    link = re.search(rf'<a class="{way}-page" href="([^"]+)"', page.read_text(encoding="utf-8"))
    return (page.parent / link[1]).resolve() if link else None


def test_every_page_stands_in_one_part(site, docs):
    order = docs("parts").reading_order()
    assert list(order) == ["Start", "Learn", "Explore", "Train", "Reference", "All notebooks"]
    placed = [page for pages in order.values() for page in pages]
    assert len(placed) == len(set(placed))
    written = {page.relative_to(site).with_suffix("").as_posix() for page in site.rglob("*.html")}
    others = {name for name in written if re.match(r"genindex|search|py-modindex|toy_report|reference/names_", name)}
    assert written - others == set(placed)


def test_next_and_previous_stay_within_a_part(site, docs):
    for part, pages in docs("parts").reading_order().items():
        files = [(site / f"{page}.html").resolve() for page in pages]
        for before, after in zip(files, files[1:]):
            assert turn(after, "prev") == before
            assert turn(before, "next") == after or before.stem == "index"
        assert turn(files[-1], "next") is None, part
    assert turn(site / "index.html", "next").stem == "advantage"


def test_titles_have_notebooks_and_say_what_a_page_is_about(site, docs):
    parts = docs("parts")
    for wing, titles in parts.TITLES.items():
        folder = parts.NBS if wing == "method" else parts.NBS / wing
        assert [name for name in titles if not (folder / f"{name}.ipynb").exists()] == []
    titles = {path: parts.page_title(path) for path in parts.notebooks() if re.match(r"\d", path.name)}
    assert len(set(titles.values())) == len(titles)
    for path, title in titles.items():
        page = (site / f"{parts.page_name(path)}.html").read_text(encoding="utf-8")
        heading = unescape(re.sub("<[^>]+>", "", re.search("<h1>(.*?)<a", page, re.S)[1]))
        assert heading.replace("’", "'") == title and len(title) < 75
        assert ": " in title or path.parent.name == "howto"  # a task is its own title
        source = re.search(r'<p class="source">.*?</p>', page, re.S)[0]
        assert f"/blob/main/{path.relative_to(ROOT).as_posix()}" in source
        assert len(re.findall("<a ", source)) == 1 + bool(re.search("#\\\\*\\| *default_exp", path.read_text()))


def test_links_within_the_site_lead_somewhere(site):
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    lost = []
    for page, text in pages.items():
        for link in re.findall(r'<a [^>]*href="([^"]+)"', text):
            name, _, anchor = unescape(link).partition("#")
            if re.match("[a-z]+:", link):
                continue
            target = (page.parent / unquote(name)).resolve() if name else page
            if not target.exists() or (anchor and target in anchors and unquote(anchor) not in anchors[target]):
                lost.append((page.name, link))
    assert lost == []


def flags(record, before: str = "") -> list[tuple[str, object]]:
    found = []
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{before}{field.name}"
        found += flags(value, f"{name}.") if dataclasses.is_dataclass(value) else [("--" + name.replace("_", "-"), value)]
    return found


def test_the_page_of_commands_has_every_flag_with_its_default(site):
    page = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    rows = {tuple(unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in re.findall(r"<td>(.*?)</td>", row, re.S))
            for row in re.findall(r"<tr.*?</tr>", page, re.S)}
    defaults = {flag.strip(): default for names, _, default, *_ in (row for row in rows if len(row) == 4)
                for flag in names.split(",")}
    for flag, value in flags(RunConfig("MODEL", "DATA")):
        if flag not in ("--model", "--data", "--trackers"):
            assert flag in defaults, flag
    assert {("--train.beta2", "FLOAT", "0.99", "AdamW beta2"), ("--reward.format-weight", "FLOAT", "1.0",
            "weight of the format reward (Eq. 19)")} <= rows
    assert ("--policy.dtype", "float32, bfloat16", "float32", "number type of computation; trained weights are float32") in rows
    text = text_of(site / "reference" / "commands.html")
    for name in [*COMMANDS, *PRESETS]:
        assert re.search(rf"^{name}¶?#?$", text, re.M), name
    assert "--patience" in text and "--recipe" in text and "None" in text and "%%" not in text


def test_the_page_of_metrics_has_every_name_of_every_glossary(site, docs):
    text = text_of(site / "reference" / "metrics.html")
    found = docs("reference").glossaries()
    assert {"STEP_METRICS", "EVALUATION_FIELDS", "SAMPLE_FIELDS", "ROW_FIELDS", "RESULT_FIELDS"} <= set(found)
    for glossary, module in found.items():
        for name, meaning in getattr(importlib.import_module(module), glossary).items():
            assert name in text and meaning.meaning.replace("`", "")[:20] in text.replace("’", "'"), name


def test_every_format_has_an_example_row_that_is_read(site, docs, tmp_path):
    text = text_of(site / "reference" / "formats.html")
    assert set(docs("example_rows").ROWS) == set(FORMATS) and all(name in text for name in (*FORMATS, *FIELDS))
    for name in FORMATS:
        with warnings.catch_warnings(action="ignore"):
            sample, = load_samples(docs("reference").write_example(name, tmp_path), format=name, root="videos")
        assert repr(sample.question) in text.replace("‘", "'").replace("’", "'"), name


def test_every_public_name_can_be_looked_up(site, docs):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, name: name)
    objects = {name for kind, found in inventory.items() if kind.startswith("py:") for name in found}
    index = (site / "genindex.html").read_text(encoding="utf-8")
    for module in docs("names").modules():
        library = importlib.import_module(f"deepvideo_r1.{module}")
        for name in getattr(library, "__all__", ()):
            assert f"deepvideo_r1.{module}.{name}" in objects and name in index
            thing = getattr(library, name)
            if dataclasses.is_dataclass(thing) and isinstance(thing, type):
                signature = next(one.signature for one in docs("names").public_names() if (one.name, one.module) == (name, module))
                assert all(field.name in signature for field in dataclasses.fields(thing))
    entry = re.sub(r"\s+", "", text_of(site / "reference" / "names_method.html"))
    assert "group_advantages(rewards:Tensor" in entry and "Derivedhere" in entry


def test_every_equation_leads_to_its_section_and_function(site):
    page = (site / "reference" / "paper.html").read_text(encoding="utf-8")
    rows = [re.findall(r"<td>(.*?)</td>", row, re.S) for row in re.findall(r"<tr.*?</tr>", page, re.S)]
    rows = [row for row in rows if len(row) == 5]
    assert len(rows) == 18
    for row in rows:
        assert re.search(r'href="[^"]+html#[^"]+"', row[2]) and "/tests/test_" in row[4]
        assert not re.sub("<[^>]+>", "", row[3]).strip() or re.search(r'href="[^"]+html#[^"]+"', row[3]), row[3]


def test_drawings_are_told_from_pictures(site):
    tag = lambda page: re.findall(r"<img[^>]*>", (site / f"{page}.html").read_text(encoding="utf-8"))
    assert tag("toy/claims") and all("drawing" in image for image in tag("toy/claims"))
    assert any("drawing" not in image for image in tag("augment"))  # noisy frames keep their colours


def test_no_link_is_left_as_it_was_written(site):
    left = {}
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script|style|title)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
        if found := re.findall(r"\S*\]\([\w/.#]\S*", re.sub(r"<[^>]+>", "", text)):
            left[page.name] = found
    assert not left


@pytest.mark.parametrize("name", ["toy_report", "toy_report_frequent"])
def test_a_finished_report_is_there(site, name):
    report = (site / f"{name}.html").read_text(encoding="utf-8")
    assert "cold start" in report and not re.search(r'(src|href)="https?:', report)
    assert f"{name}.html" in (site / "reference" / "report.html").read_text(encoding="utf-8")


def test_pages_are_light_but_for_stored_pictures(site):
    for page in site.rglob("*.html"):
        text = re.sub(r"data:image/[^\"')]+|\"[A-Za-z0-9+/=]{500,}\"", "", page.read_text(encoding="utf-8"))
        assert len(text.encode()) < 600_000, page.name
        assert not re.search(r"<script[^>]*mathjax", text, re.I), page.name
    assert "<math" in (site / "grpo.html").read_text(encoding="utf-8")


def test_no_figure_is_named_by_its_file(site):
    for page in site.rglob("*.html"):
        for words in re.findall(r'<img[^>]*alt="([^"]*)"', page.read_text(encoding="utf-8")):
            assert not re.search(r"[0-9a-f]{16}|\.png", words) and len(words) > 5, (page.name, words)


# Names that are something else as well, and may be links: the functions that read a format, and the presets, are what is meant.
ALLOWED = {*FORMATS, *PRESETS}


def test_a_name_in_backticks_is_a_link_only_where_the_name_is_meant(docs):
    find = docs("names").find_name
    for word in ("judge", "points", "accuracy", "evaluate", "world", "train", "plan", "reward", "policy"):
        assert find(word) is None, word
    assert find("group_advantages").module == "advantage" and find("AugmentConfig").page == "config"
    assert find("evaluation.evaluate.accuracy").module == "evaluation.evaluate" and find("toy.config.ARMS").anchor == ""
    assert find("plan") is None and find("nosuchthing()") is None and find("x + y") is None
    assert docs("names").linkify("## `AugmentConfig`\n\n`judge`", ROOT / "nbs" / "12_trainer.ipynb") == "## `AugmentConfig`\n\n`judge`"

    other = {flag.rpartition(".")[2].lstrip("-").replace("-", "_") for flag, _ in flags(RunConfig("MODEL", "DATA"))}
    other |= {*STEP_METRICS, *COMMANDS, *FIELDS, *FORMATS, *PRESETS, "format", "accuracy", "iou"}
    linked = {name.name for name in docs("names").public_names() if find(name.name)}
    assert linked & other <= ALLOWED


def test_no_row_of_a_table_is_cut_by_a_bar(site):
    for page in (site.parent / "pages").rglob("*.*"):
        if page.suffix == ".md":
            sources = [page.read_text(encoding="utf-8")]
        elif page.suffix == ".ipynb":
            sources = [cell["source"] for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]
                       if cell["cell_type"] == "markdown"]
        else:
            continue
        for table in re.findall(r"(?:^\|.*\|? *\n?)+", re.sub(r"^```.*?^```", "", "\n\n".join(sources), flags=re.M | re.S), re.M):
            widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().splitlines()}
            assert len(widths) == 1, (page.name, table[:300])


def test_every_table_is_drawn_as_one(site):
    "A row of dashes that is read as text stands for a table that is not drawn."
    for page in site.rglob("*.html"):
        text = re.sub(r"(?s)<(pre|code|script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"))
        assert not re.search(r"\|\s*(:?-{2,}:?|[\u2013\u2014:]+)\s*\|", text), page.name
