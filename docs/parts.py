"""The parts of the site: which page stands where, in reading order, and under which title.

A notebook stands in one part. Learn is chosen by hand, Explore and Train take the notebooks of their folders, and what no
part has chosen stands in the last one, by wing. `docs/titles.toml` has the titles.
"""
import re
import tomllib
from pathlib import Path

from execnb.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
TITLES = tomllib.loads((ROOT / "docs" / "titles.toml").read_text(encoding="utf-8"))
WINGS = {  # folder of `nbs/` -> what it holds
    "": ("Method", "the method, the settings and the commands"),
    "data": ("Data", "from files to frames and questions; the public data sets"),
    "model": ("Model", "prompts, a policy that reads a prompt once for G responses, and sampling"),
    "training": ("Training", "the parts of a training step, its state on disk, launching and planning"),
    "evaluation": ("Evaluation", "figures with intervals, and the public benchmarks"),
    "toy": ("Toy", "the toy study, from its world to its report"),
    "explore": ("Explore", "figures with sliders"),
    "howto": ("How to", "one task on each page"),
    "support": ("Support", "whole files, interrupts, checkpoints, run files, progress, colours, glossaries"),
}
LEARN = ["05_advantage", "06_grpo", "07_reg_grpo", "07a_sigma_floor", "09_difficulty", "11_augment", "12_trainer", "toy/11_effects",
         "toy/13_claims", "toy/16_paper_tables", "04_reward", "08_baselines", "10_hints", "toy/01_world", "00_core"]
# Sections of nbs/index.ipynb that are pages of their own here, or stand elsewhere (None). The rest is the landing page.
SECTIONS = {
    "Words": "about/words", "Installing": "about/installing", "Ten lines of Python": "about/python",
    "What the toy shows": "about/results", "What a step costs": "about/costs", "Commands for your own videos": "train/commands",
    "From the paper to the code": "reference/paper", "Tested versions": "reference/versions", "The map": None,
    "Contributing": None,
}
# Files of the repository that are pages: name of the page -> file. Their first heading is the title.
FILES = {
    "train/recipes": "recipes/README.md", "reference/benchmarks": "benchmarks/README.md", "reference/log": "LOG.md",
    "reference/changelog": "CHANGELOG.md", "reference/contributing": "CONTRIBUTING.md",
}
GENERATED = ["reference/commands", "reference/metrics", "reference/formats", "reference/names"]  # by docs/reference.py
REFERENCE = [*GENERATED, "reference/paper", "reference/report", "reference/benchmarks", "reference/versions",
             "reference/log", "reference/changelog", "reference/contributing", "map"]


def notebooks() -> list[Path]:
    "Every notebook of the site: the index, the method and what runs it, then each wing in the order of its numbers."
    found = (path.relative_to(NBS) for path in NBS.rglob("*.ipynb"))
    found = sorted(path for path in found if not any(part[0] in "._" for part in path.parts))
    folders = [*WINGS, *sorted({path.parent.as_posix() for path in found} - {*WINGS, "."})]
    place = lambda path: (path.stem != "index", folders.index(path.parent.as_posix().removeprefix(".")))
    return [NBS / path for path in sorted(found, key=place)]


def page_name(path: Path) -> str:
    "The page of a notebook, named as nbdev names it: `nbs/00_core.ipynb` -> `core`."
    relative = path.relative_to(NBS)
    name = re.sub(r"^\d+[a-zA-Z0-9]*_", "", relative.stem.lower())
    return relative.with_name(name).as_posix()


def _exports(path: Path) -> bool:
    return bool(re.search(r"#\| *default_exp", path.read_text(encoding="utf-8")))


def page_title(path: Path) -> str:
    "A number, a name and what it is about: `05 Advantage: when siblings agree, nothing is learnt`."
    source = "\n".join(cell.source for cell in read_nb(path).cells)
    heading, subtitle = re.search(r"^# (.+)", source, re.M)[1], re.search(r"^> (.+)", source, re.M)
    number, _, name = path.stem.partition("_")
    titles = TITLES.get(path.parent.relative_to(NBS).name or "method", {})
    if not _exports(path) and path.stem not in titles:
        return heading[0].upper() + heading[1:]
    about = (subtitle[1] if subtitle else "").rstrip(".")
    return f"{number} {titles.get(path.stem) or f'{name.capitalize()}: {about[:1].lower()}{about[1:]}'}"


def parts() -> dict[str, list[str]]:
    "The pages of each part, in order. Those of the last part are pages of wings; `wing_pages` has their notebooks."
    folder = lambda name: [page_name(path) for path in sorted(notebooks(), key=_exports) if path.parent == NBS / name]
    learn = [page_name(NBS / f"{name}.ipynb") for name in LEARN]
    return {
        "Start": ["index", "about/words", "about/installing", "about/results", "about/python", "about/costs"],
        "Learn": learn,
        "Explore": folder("explore"),
        "Train": [*folder("howto"), "train/commands", "train/recipes"],
        "Reference": REFERENCE,
        "All notebooks": [f"notebooks/{wing or 'method'}" for wing in wing_pages()],
    }


def sidebar_names() -> dict[str, str]:
    "The shorter names that some pages have in the sidebar; the others have their title."
    names = {"index": "Overview", "reference/commands": "Commands", "reference/metrics": "Metrics", "reference/names": "Names",
             "reference/formats": "Data formats", "reference/report": "A finished report", "reference/log": "Log",
             "reference/benchmarks": "Benchmarks", "reference/changelog": "Changelog", "reference/contributing": "Contributing",
             "train/recipes": "Recipes", "train/commands": "Commands for your own videos"}
    names |= {f"notebooks/{wing or 'method'}": WINGS.get(wing, (wing.capitalize(),))[0] for wing in wing_pages()}
    return names | {page_name(path): f"{WINGS[path.parent.name][0]} {page_title(path)}"
                    for path in (NBS / f"{name}.ipynb" for name in LEARN) if path.parent != NBS}


def wing_pages() -> dict[str, list[str]]:
    "The notebooks of each wing that no part has chosen; wings without one are left out."
    chosen = {"index", "map", *(page_name(NBS / f"{name}.ipynb") for name in LEARN)}
    wings: dict[str, list[str]] = {}
    for path in notebooks():
        wing = path.parent.relative_to(NBS).as_posix().removeprefix(".")
        if wing not in ("explore", "howto") and page_name(path) not in chosen:
            wings.setdefault(wing, []).append(page_name(path))
    return wings


def reading_order() -> dict[str, list[str]]:
    "The pages of each part as a reader turns them: each wing's page, then its notebooks."
    found = parts()
    found["All notebooks"] = [page for wing, pages in wing_pages().items()
                              for page in (f"notebooks/{wing or 'method'}", *pages)]
    return found
