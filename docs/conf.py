"""Sphinx configuration: pages show stored outputs and make no request to another host."""
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))  # for the extensions beside this file
ini = ConfigParser(delimiters=["="])
ini.read(here.parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
project, author, release, copyright = cfg["title"], cfg["author"], cfg["version"], cfg["copyright"]

extensions = ["myst_nb", "sphinx_copybutton", "formulas"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block", "deflist"]
myst_heading_anchors = 4  # lets [name](/core.ipynb#name) resolve
suppress_warnings = ["myst.header"]  # a page may go from ## to ####
nb_execution_mode = "off"
nb_merge_streams = True

# Sphinx and myst-nb would load MathJax, require.js and a widget manager from a public host.
html_math_renderer = "mathml"
nb_ipywidgets_js = {}

html_theme, html_title = "furo", cfg["title"]
html_static_path, html_css_files = [str(here / "_static")], ["custom.css"]
html_show_sourcelink = html_copy_source = False
