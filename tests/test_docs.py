"""The site builds without a warning, and its pages ask no other host for anything."""
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Requests(HTMLParser):
    "Collects the addresses that a browser fetches to show a page; links that a reader may follow are not among them."

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.found += [attrs.get("src"), attrs.get("srcset"), attrs.get("poster"), attrs.get("data")]
        if tag == "link" and not {"canonical", "next", "prev"} & set((attrs.get("rel") or "").split()):
            self.found.append(attrs.get("href"))


def test_site_builds_and_needs_no_other_host(tmp_path):
    pages, site = tmp_path / "pages", tmp_path / "site"
    sphinx = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", "docs", pages, site]
    for command in (["docs/build.py", pages], sphinx):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    assert len(list(site.rglob("*.html"))) > len(list((ROOT / "nbs").rglob("[0-9]*.ipynb")))
    outside = re.compile(r"\s*(https?:)?//")
    for page in site.rglob("*.html"):
        requests = Requests()
        requests.feed(page.read_text(encoding="utf-8"))
        assert [address for address in requests.found if address and outside.match(address)] == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name
