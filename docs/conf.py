"""Sphinx configuration: pages show stored outputs and make no request to another host."""
import json
import sys
from configparser import ConfigParser
from pathlib import Path

from sphinx.util.osutil import relative_uri

here = Path(__file__).parent
sys.path.insert(0, str(here))  # for the extensions beside this file
ini = ConfigParser(delimiters=["="])
ini.read(here.parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
project, author, release, copyright = cfg["title"], cfg["author"], cfg["version"], cfg["copyright"]

extensions = ["myst_nb", "sphinx_copybutton", "formulas"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "deflist"]
myst_heading_anchors = 4  # lets [name](/core.ipynb#name) resolve
# A page may go from ## to ####; a type in a signature may be a name of several modules.
suppress_warnings = ["myst.header", "ref.python"]
exclude_patterns = ["extra"]
python_maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"
nb_execution_mode = "off"
nb_merge_streams = True
smartquotes = False  # a flag keeps its two hyphens
nb_render_markdown_format = "myst"  # the default knows no tables

# Sphinx and myst-nb would load MathJax, require.js and a widget manager from a public host.
html_math_renderer = "mathml"
nb_ipywidgets_js = {}

html_theme, html_title = "furo", cfg["title"]
html_static_path, html_css_files = [str(here / "_static")], ["custom.css"]
html_js_files, html_favicon = ["site.js"], str(here / "_static" / "favicon.svg")
html_show_sourcelink = html_copy_source = False


def add_files(app, config):
    "Files that the pages come with: a finished report."
    config.html_extra_path = [str(Path(app.srcdir) / "extra")]


def turn_pages(app, name, template, context, doctree):
    "Previous and Next stay within a part of the site; the landing page leads to the idea."
    order = json.loads((Path(app.srcdir) / "order.json").read_text(encoding="utf-8"))
    found = {"prev": None, "next": None}
    for part, pages in order.items():
        if name in pages:
            place = pages.index(name)
            found = {"prev": pages[place - 1] if place else "index",
                     "next": (pages + [None])[place + 1]}
    if name == "index":
        found = {"prev": None, "next": order["Learn"][0]}
    here = app.builder.get_target_uri(name)
    for turn, page in found.items():
        link = page and {"link": relative_uri(here, app.builder.get_target_uri(page)), "title": app.env.titles[page].astext()}
        context[turn] = link or None
    # The theme calls a caption a heading without saying of which level.
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app):
    app.connect("config-inited", add_files)
    app.connect("html-page-context", turn_pages, priority=900)
