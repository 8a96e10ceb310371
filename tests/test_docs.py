"""The site builds without a warning, and its pages ask no other host for anything."""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Requests(HTMLParser):
    """Collects the addresses that a browser fetches to show a page, and the words that stand for its pictures.

    Links that a reader may follow are not among the addresses.
    """

    def __init__(self):
        super().__init__()
        self.found, self.words = [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.found += [attrs.get("src"), attrs.get("srcset"), attrs.get("poster"), attrs.get("data")]
        if tag == "img":
            self.words.append(attrs.get("alt") or "")
        if tag == "link" and not {"canonical", "next", "prev"} & set((attrs.get("rel") or "").split()):
            self.found.append(attrs.get("href"))


def test_site_builds_and_needs_no_other_host(site):
    assert len(list(site.rglob("*.html"))) > len(list((ROOT / "nbs").rglob("[0-9]*.ipynb")))
    outside = re.compile(r"\s*(https?:)?//")
    for page in site.rglob("*.html"):
        requests = Requests()
        requests.feed(page.read_text(encoding="utf-8"))
        assert [address for address in requests.found if address and outside.match(address)] == [], page.name
        assert [words for words in requests.words if not re.search(r"\w \w", words) or "_images" in words] == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_a_figure_has_words_from_its_cell_or_else_its_heading(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from execnb.nbio import read_nb
    from readme import readme

    def cell(kind, source):
        picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "aGk="}}
        shown = {"outputs": [picture], "execution_count": None} if kind == "code" else {}
        return {"cell_type": kind, "metadata": {}, "source": source, **shown}

    cells = [cell("markdown", "# index\n\n> A page."), cell("markdown", "## The `reward` [of old]\n\nText."),
             cell("code", "x = 1"), cell("code", "#| echo: false\n#| fig-alt: Two lines: one rises, $5 apart\nx")]
    (tmp_path / "index.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    text, pictures = readme(read_nb(tmp_path / "index.ipynb"))
    assert "![The reward \\[of old\\]](docs/images/index_0.png)" in text
    assert "![Two lines: one rises, $5 apart](docs/images/index_1.png)" in text and len(pictures) == 2
    assert "fig-alt" not in text
