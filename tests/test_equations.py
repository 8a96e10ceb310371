"""Every equation of the paper has a row in the index, and no row points to nothing."""
import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INDEX = json.loads((ROOT / "nbs" / "index.ipynb").read_text())
TEXT = "\n".join("".join(cell["source"]) for cell in INDEX["cells"] if cell["cell_type"] == "markdown")
ROWS = re.findall(r"^\| ([\d-]+) \| [^|]+ \| \[\w+\]\(([\w/]+)\.ipynb\), ([^|]+) \| (`[\w.]+`)? ?\| `([\w.]+)::(\w+)` \|$", TEXT, re.M)
OTHERS = re.findall(r"^\| [^|]+ \| ((?:(?:, )?\[\w+\]\([\w/]+\.ipynb\))+) \| `([\w.]+)` \|$", TEXT, re.M)


def resolve(name: str):
    "What a name such as `grpo.grpo_loss` stands for in the library."
    module, _, attribute = name.strip("`").rpartition(".")
    return getattr(importlib.import_module(f"deepvideo_r1.{module}"), attribute)


def test_all_equations_have_a_row():
    numbers = [range(int(a), int(b or a) + 1) for a, _, b in (row[0].partition("-") for row in ROWS)]
    assert sorted(n for row in numbers for n in row) == list(range(1, 25))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"eq{row[0]}")
def test_a_row_points_to_something(row):
    _, notebook, section, function, test_file, test_name = row
    cells = json.loads((ROOT / "nbs" / f"{notebook}.ipynb").read_text())["cells"]
    headings = [line.lstrip("# ") for cell in cells if cell["cell_type"] == "markdown"
                for line in "".join(cell["source"]).splitlines() if line.startswith("#")]
    assert section.strip() in headings
    assert not function or callable(resolve(function))
    tests = ast.parse((ROOT / "tests" / test_file).read_text())
    assert test_name in [node.name for node in ast.walk(tests) if isinstance(node, ast.FunctionDef)]


def test_the_tables_point_to_something():
    assert len(OTHERS) == 10
    for links, name in OTHERS:
        assert all((ROOT / "nbs" / notebook).is_file() for notebook in re.findall(r"\(([\w/.]+)\)", links)) and resolve(name)
