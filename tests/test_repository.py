"""The repository keeps its own rules: in sync, clean, in order, in size."""
import ast
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "deepvideo_r1"
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("[!.]*.ipynb") if ".ipynb_checkpoints" not in path.parts)
NUMBERED = [path for path in NOTEBOOKS if re.match(r"\d+[a-z]?_", path.name) and path.parent.name == "nbs"]


def run(*command, cwd=ROOT) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cells(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def texts(folder: Path, pattern: str) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob(pattern))}


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory) -> Path:
    "A copy of the notebooks in which `nbdev_export` and `nbdev_clean` have run."
    folder = tmp_path_factory.mktemp("rebuilt")
    shutil.copy(ROOT / "settings.ini", folder)
    for path in NOTEBOOKS:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for command in ("nbdev_export", "nbdev_clean"):
        run(Path(sys.executable).parent / command, cwd=folder)
    return folder


def test_modules_are_what_the_notebooks_export(rebuilt):
    exported, present = texts(rebuilt / "deepvideo_r1", "*.py"), texts(LIBRARY, "*.py")
    assert sorted(exported) == sorted(present)
    assert [name for name in exported if exported[name] != present[name]] == [], "run nbdev_export"


def test_notebooks_are_clean(rebuilt):
    changed = [path.name for path in NOTEBOOKS if path.read_text() != (rebuilt / path.relative_to(ROOT)).read_text()]
    assert changed == [], "run nbdev_clean"


def test_notebooks_import_only_lower_numbers():
    modules = {path.stem.partition("_")[2]: place for place, path in enumerate(NUMBERED)}
    assert len(modules) == len(NUMBERED), "two notebooks have the same name"
    for path in NUMBERED:
        code = "\n".join(cells(path, "code"))
        name = path.stem.partition("_")[2]
        assert re.findall(r"^#\| *default_exp +(\S+)", code, re.M) == [name], path.name
        imported = set()
        for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*", "", code, flags=re.M))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        own = {full.split(".")[1] for full in imported if full.startswith("deepvideo_r1.")}
        assert [other for other in own if modules[other] >= modules[name]] == [], path.name


def test_every_notebook_has_title_and_subtitle():
    assert [path.name for path in NOTEBOOKS if not re.match(r"# .+\n\n> .+", cells(path, "markdown")[0])] == []


def test_stored_outputs():
    assert [path.name for path in NOTEBOOKS if path.stat().st_size >= 500_000] == []
    assert [path.name for path in NOTEBOOKS if '"output_type": "error"' in path.read_text()] == []
    # A warning in an output tells where the environment lies on the machine that ran the notebook.
    assert [path.name for path in NOTEBOOKS if "site-packages/" in path.read_text()] == []


def test_modules_and_functions_stay_small():
    for path in LIBRARY.glob("[!_]*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 350, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_readme_is_what_the_index_gives_today(tmp_path):
    run(sys.executable, "docs/readme.py", tmp_path)
    same = (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert same, "run make readme"


def test_constraints_cover_the_requirements():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in map(Requirement, lines)}
    for one in map(Requirement, f"{ini['DEFAULT']['requirements']} {ini['DEFAULT']['dev_requirements']}".split()):
        assert one.specifier.contains(pinned[canonicalize_name(one.name)]), one


def test_make_help_lists_every_target():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert re.findall(r"^([a-z-]+) ", run("make", "help"), re.M) == targets
