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
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "deepvideo_r1"
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("[!.]*.ipynb") if ".ipynb_checkpoints" not in path.parts)
NUMBERED = [path for path in NOTEBOOKS if re.match(r"\d+[a-z]?_", path.name)]


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


def module_of(path: Path) -> str:
    "The module that a notebook exports: `nbs/data/06_video.ipynb` -> `data.video`."
    return ".".join([*path.relative_to(ROOT / "nbs").parent.parts, path.stem.partition("_")[2]])


HOW_TO = [path for path in NUMBERED if path.parent.name == "howto"]  # a task on each page, and no module
PAGES = [*HOW_TO, ROOT / "nbs" / "07a_sigma_floor.ipynb"]  # nothing is exported there
MODULES = {module_of(path): path for path in NUMBERED if path not in PAGES}


def own_imports(code: str) -> set[str]:
    "Modules of this library that the code imports."
    imported = set()
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*", "", code, flags=re.M))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("deepvideo_r1.") for name in imported} & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_notebook_exports_the_module_of_its_name(name):
    code = "\n".join(cells(MODULES[name], "code"))
    assert re.findall(r"^#\| *default_exp +(\S+)", code, re.M) == [name]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_without_a_module_exports_nothing(path):
    assert not re.search(r"^#\| *(default_exp|exports?|exporti)\b", "\n".join(cells(path, "code")), re.M)


@pytest.mark.parametrize("path", HOW_TO, ids=lambda path: path.stem)
def test_a_how_to_says_what_to_do_when_it_fails(path):
    words = "\n".join(cells(path, "markdown"))
    assert re.findall(r"^## (.+)", words, re.M)[-1] == "When it fails" and "You need this page" in words


def test_numbers_restart_in_each_folder_and_have_no_gaps():
    for folder in {path.parent for path in NUMBERED}:
        numbers = sorted({int(re.match(r"\d+", path.name)[0]) for path in NUMBERED if path.parent == folder})
        assert numbers == list(range(len(numbers))), folder.name


def test_notebooks_import_only_lower_numbers_of_their_folder():
    for name, path in MODULES.items():
        for other in own_imports("\n".join(cells(path, "code"))):
            if MODULES[other].parent == path.parent:
                assert MODULES[other].name < path.name, f"{name} imports {other}"


def test_arrows_between_wings_run_one_way():
    "The wings, and the modules beside them, can be put in an order in which every module imports only from before."
    room = lambda name: name.split(".")[0]
    arrows = {room(name): set() for name in MODULES}
    for name, path in MODULES.items():
        exported = "\n".join(cell for cell in cells(path, "code") if re.match(r"#\| *exporti?\b", cell))
        arrows[room(name)] |= {room(other) for other in own_imports(exported)} - {room(name)}
    left = dict(arrows)
    while free := [name for name, needed in left.items() if not needed & set(left)]:
        for name in free:
            del left[name]
    assert left == {}, "these import one another"
    # The idea stands on nothing but itself, what it is written with, and the settings.
    idea = {"core", "fields", "config", "spelling", "answers", "judges", "reward", "advantage", "grpo", "reg_grpo", "baselines", "difficulty",
            "hints", "augment", "sampler_weights"}
    assert {other for name in idea for other in arrows[name]} <= idea


def test_the_settings_need_no_library():
    for name in ("config", "toy.config", "cli"):
        done = run(sys.executable, "-c", f"import sys, deepvideo_r1.{name}; print(*sys.modules)")
        assert not {"torch", "transformers", "accelerate", "numpy"} & set(done.split()), name


def test_every_notebook_has_title_and_subtitle():
    assert [path.name for path in NOTEBOOKS if not re.match(r"# .+\n\n> .+", cells(path, "markdown")[0])] == []


def test_what_was_left_out_comes_last():
    for path in NUMBERED:
        headings = re.findall(r"^## (.+)", "\n".join(cells(path, "markdown")), re.M)
        assert "What we left out, and where we depart from the paper" not in headings[:-1], path


def test_stored_outputs():
    assert [path.name for path in NOTEBOOKS if path.stat().st_size >= 500_000] == []
    assert [path.name for path in NOTEBOOKS if '"output_type": "error"' in path.read_text()] == []


def test_stored_outputs_hold_no_warnings_and_no_random_paths():
    noise = re.compile(r"site-packages/|/tmp/|Warning|\[RANK \d|object at 0x")
    found = []
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            for output in cell.get("outputs", ()):
                texts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
                found += [f"{path.name}: {m[0]}" for text in texts for m in noise.finditer("".join(text))]
    assert found == []


def test_lines_stay_within_their_width():
    for path in LIBRARY.rglob("[!_]*.py"):
        lines = path.read_text().splitlines()
        wide = [n for n, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("__all__")]  # nbdev's own
        assert wide == [], f"{path.relative_to(LIBRARY)}: lines {wide}"
    for path in NOTEBOOKS:
        lessons = [cell for cell in cells(path, "code") if not re.match(r"#\| *exporti?\b", cell)]
        wide = [line for cell in lessons for line in cell.splitlines() if len(line) > 100]
        assert wide == [], path.name


def test_long_functions_have_landmarks():
    "A body of 20 lines or more holds at least two comments or blank lines for a reader to navigate by."
    bare = []
    for path in LIBRARY.rglob("[!_]*.py"):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                start, end = node.body[0].lineno, node.end_lineno
                body = lines[start - 1 : end]
                if len(body) >= 20 and sum(bool(re.match(r"\s*(#|$)", line)) for line in body) < 2:
                    bare.append(f"{path.relative_to(LIBRARY)}: {node.name}")
    assert bare == []


def test_modules_and_functions_stay_small():
    for path in LIBRARY.rglob("[!_]*.py"):
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


def test_the_readme_names_the_versions_that_the_commands_test():
    commands = {f"make {name}": run("make", "-n", name) for name in ("test-oldest", "test-newest")}
    versions = {name: re.search(r"transformers==([\d.]+)", lines)[1] for name, lines in commands.items()}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    versions["make test"] = pinned["transformers"]

    rows = re.findall(r"^\| ([\d.]+) \| (\w+) \| (.+) \| `(make test\S*)` \|$", (ROOT / "README.md").read_text(), re.M)
    assert {command: number for number, _, _, command in rows} == versions
    oldest, middle, newest = (Version(versions[name]) for name in ("make test-oldest", "make test", "make test-newest"))
    assert oldest <= middle <= newest and [which for _, which, _, _ in rows] == ["oldest", "pinned", "newest"]
    for _, _, beside, _ in rows:
        assert all(f"{name} {pinned[name]}" in beside for name in ("torch", "accelerate", "peft"))

    # A version is in the table only after a run that the log tells of, and the requirement is the oldest one.
    log, settings = ((ROOT / name).read_text() for name in ("LOG.md", "settings.ini"))
    assert all(f"transformers {number}" in log for number in versions.values())
    assert f"transformers>={versions['make test-oldest']}" in settings.split()
