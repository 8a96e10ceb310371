"""The pages to look things up, written from the library itself: commands, metrics, formats, names, a finished report."""
import argparse
import ast
import csv
import importlib
import inspect
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from unittest import mock

import tyro
from example_rows import INTERVALS, ROWS
from execnb.nbio import read_nb
from names import LIBRARY, Name, public_names
from parts import NBS, ROOT, WINGS

REPORTS = {"toy_report": "one_seed", "toy_report_frequent": "three_seeds"}  # page of the site -> recorded run
FILES = {  # glossary -> the file with these numbers, and who writes it
    "STEP_METRICS": ("metrics.jsonl", "one row for each training step"),
    "EVALUATION_FIELDS": ("evaluations.jsonl", "one row for each evaluation while a run trains"),
    "SAMPLE_FIELDS": ("samples.jsonl", "a few responses of each evaluation while a run trains"),
    "ROW_FIELDS": ("rows.jsonl", "one row for each question of the command evaluate"),
    "RESULT_FIELDS": ("results.json", "what the toy study found"),
}

# Not shown: what every parser has, and what `launch` refuses.
UNUSED = ("help", "training_script", "training_script_args", "module", "no_python", "run_path", "shutdown_timeout")


def table(head: list[str], rows: list[list[str]]) -> str:
    "A table in Markdown; bars in its cells do not end them."
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _parser(name: str, function) -> argparse.ArgumentParser:
    "The parser of a command."
    if name != "launch":
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return tyro.extras.get_parser(function)
    from deepvideo_r1.training import launcher

    made: list[argparse.ArgumentParser] = []
    make = launcher.get_args_parser
    with mock.patch.object(launcher, "get_args_parser", lambda: made.append(make()) or made[0]):
        launcher.parse_options(["train"])
    return made[0]


def _flag(action: argparse.Action) -> list[str]:
    "Flag, values, default and meaning of an option."
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.dest.rpartition('.')[2].upper()}`"
    text = (action.help or "").strip().replace("%%", "%").replace("<", "&lt;")
    default = re.search(r"\s*(?:\((?:default: (.*)|(required))\)|Default: (.*)\.)$", text)
    meaning = text[: default.start()] if default else text
    values = str(action.metavar or (action.type.__name__.upper() if action.type else "STR"))
    words = dict.fromkeys(word for word in re.split(r"[\s{}\[\]|,]+", values) if word not in ("", "..."))
    values = ", ".join(word if word.isupper() else f"`{word}`" for word in words)
    values = "switch" if action.nargs == 0 else values + (", several" if action.nargs == "*" else "")
    given = action.default if isinstance(action.default, int | float) and action.default != argparse.SUPPRESS else None
    known = (default[1] or default[3] or default[2]) if default else given
    known = known.partition(". ")[0] if isinstance(known, str) else known  # torch adds a sentence to a default
    return [names, values, "required" if known == "required" else f"`{known}`" if known not in (None, "") else "", meaning]


def _groups(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, list[list[str]]]]:
    "The options of a command: name and meaning of each group, and its rows."
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest not in UNUSED and action.help != argparse.SUPPRESS]
        if actions:
            yield group.title or "options", group.description or "", [_flag(action) for action in actions]


def _changes(record, default, before: str = "") -> Iterator[tuple[str, object]]:
    "The fields of a record that differ from the default's, by their flag."
    for field in fields(record):
        value, other = getattr(record, field.name), getattr(default, field.name)
        if is_dataclass(value):
            yield from _changes(value, other, f"{before}{field.name}.")
        elif value != other:
            yield f"--{before}{field.name}".replace("_", "-"), value


def _model_of(preset) -> list[tuple[str, object]]:
    "The model that a preset names, as a flag; nothing where it names none."
    model = inspect.signature(preset).parameters["model"].default
    return [("--model", model)] if isinstance(model, str) else []


def commands_page() -> str:
    "Every command with its flags, their values and defaults, and what the presets change."
    from deepvideo_r1.cli import COMMANDS
    from deepvideo_r1.config import PRESETS, RunConfig
    from deepvideo_r1.toy.config import FIRST_PRESET, TOY_PRESETS

    head = ["Flag", "Values", "Default", "Meaning"]
    parts = ["# Commands: every flag, its values and its default",
             "Written from the parsers themselves. `deepvideo-r1 COMMAND --help` prints the same in a terminal. "
             "[14 Command line](/cli.ipynb) shows each command at work, [01 Config](/config.ipynb) the records behind the flags.",
             "`train`, `plan`, `evaluate` and `toy` also take `--config FILE`: values from a TOML, YAML or JSON file. `train`, `plan` "
             "and `toy` take `--preset NAME`, which may name the model too; flags come after both. `train --dry-run` tries what can "
             "fail and trains nothing."]
    for name, function in COMMANDS.items():
        text = re.sub(r"(?<!\S)--[a-z-]+", r"`\g<0>`", " ".join((function.__doc__ or "").partition("Args:")[0].split()))
        parts += [f"## {name}", text]
        for title, about, rows in _groups(_parser(name, function)):
            if title not in ("options", "positional arguments"):
                parts.append(f"### {name}: {title}\n\n{about[:1].upper()}{about[1:]}.")
            parts.append(table(head, rows))
    parts.append("## Presets\n\nWhat each changes in the defaults of `train`, and for `toy` in its own, which are those of "
                 f"`{FIRST_PRESET}`.")
    default, first = RunConfig("MODEL", "DATA"), TOY_PRESETS[FIRST_PRESET]()
    changes = {name: [*_model_of(preset), *_changes(preset("MODEL", "DATA"), default)] for name, preset in PRESETS.items()}
    changes |= {f"toy: {name}": _changes(preset(), first) for name, preset in TOY_PRESETS.items() if name != FIRST_PRESET}
    for name, rows in changes.items():
        cells = [[f"`{flag}`", f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"] for flag, value in rows]
        parts.append(f"### {name}\n\n" + table(["Flag", "Value"], cells))
    return "\n\n".join(parts)


def glossaries() -> dict[str, str]:
    "Every glossary of the library: its name -> its module."
    found = {}
    for path in sorted(LIBRARY.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "Glossary":
                found[node.target.id] = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return found


def metrics_page() -> str:
    "Every number in a file, with its meaning."
    from deepvideo_r1.support.glossary import glossary_table

    found = glossaries()
    assert set(found) == set(FILES), "a glossary without its file, or a file without its glossary"
    parts = ["# Metrics: the meaning of every number in a run's files",
             "A name with `<part>` stands for several. *Over* says what a number is averaged or summed over. Each table is the "
             "glossary beside the function that writes the file; a test compares it with what is written. The figures of a benchmark "
             "(`benchmark.json`) are those of [03 Metrics](/evaluation/metrics.ipynb)."]
    for name, (file, about) in FILES.items():
        glossary = getattr(importlib.import_module(found[name]), name)
        parts.append(f"## {file}\n\n{about[:1].upper()}{about[1:]}.\n\n{glossary_table(glossary)}")
    return "\n\n".join(parts)


def write_example(name: str, folder: Path) -> Path:
    "A file with the example row of a format; returns its path."
    row = ROWS[name]
    if name != "nextgqa":
        file = folder / f"{name}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        return file
    file = folder / "val.csv"
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(row))
        writer.writeheader()
        writer.writerow(row)
    (folder / "gsub_val.json").write_text(json.dumps(INTERVALS))
    return file


def _shown(sample) -> str:
    "The fields of a sample that hold something, one on each line."
    lines = (f"{field.name}: {getattr(sample, field.name)!r}" for field in fields(sample) if getattr(sample, field.name))
    return "\n".join(lines)


def formats_page() -> str:
    "Every data format: its files, an example row, and the sample that is read from it."
    from deepvideo_r1.data.datasets import FORMATS, SPLIT_FILES, load_samples

    source = "\n".join(cell.source for cell in read_nb(NBS / "data" / "11_datasets.ipynb").cells)
    fields_table = re.search(r"^\| Field \|.*?(?=\n\n)", source, re.M | re.S)[0]
    about = {function.__name__: function.__doc__ for function in FORMATS.values()}
    parts = ["# Data formats: an example row of each",
             "`--format NAME` reads a file, or a folder with `--split`. A row becomes a `Sample`; the second box shows its "
             "fields. The examples are read with `--root videos`; without it, paths start from the folder of the file (of the data set, "
             "for a file in `annotations`). A row that cannot be read is named with file, line and field: `deepvideo-r1 data check` lists them all. "
             "[11 Data sets](/data/datasets.ipynb) and [10 Formats](/data/formats.ipynb) derive what follows."]
    for name, function in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            sample, = load_samples(write_example(name, Path(folder)), format=name, root="videos")
        words = "Questions of your own: a row is a JSON object in a line." if name == "jsonl" else about[function.__name__]
        parts.append(f"## {name}\n\n{words.splitlines()[0]}")
        if name == "jsonl":
            parts.append(f"{fields_table}\n\nA field with `null` is absent.")
        if SPLIT_FILES[name]:
            parts.append(table(["Split", "File"], [[f"`{split}`", f"`{file}`"] for split, file in SPLIT_FILES[name].items()]))
        kind = "A row of the table; `gsub_val.json` beside it has the intervals" if name == "nextgqa" else "A row"
        parts.append(f"{kind}:\n\n```json\n{json.dumps(ROWS[name], indent=1)}\n```\n\nis read as:\n\n```text\n{_shown(sample)}\n```")
    return "\n\n".join(parts)


def _entry(name: Name) -> str:
    "A name as an object of Sphinx: signature, first sentence, and a link to where it is derived."
    target = f"/{name.page}.ipynb" + (f"#{name.anchor}" if name.anchor else "")
    text = name.summary or ("A constant." if name.kind == "data" else "")
    signature = re.sub(r"\s+", " ", name.signature)
    return (f"`````{{py:{name.kind}}} {name.name}{signature}\n:module: deepvideo_r1.{name.module}\n\n"
            f"{text} [Derived here]({target}).\n`````")


def names_pages() -> dict[str, str]:
    "Every public name, on one page for each wing, and the page that leads to them."
    wings: dict[str, dict[str, list[Name]]] = {}
    for name in public_names():
        wing = name.module.rpartition(".")[0]
        wings.setdefault(wing, {}).setdefault(name.module, []).append(name)
    pages, rows = {}, []
    for wing, modules in wings.items():
        title, about = WINGS.get(wing, (wing.capitalize(), f"notebooks in {wing}"))
        parts = [f"# Names: {title.lower()}", f"{about[:1].upper()}{about[1:]}."]
        for module, found in modules.items():
            parts += [f"## deepvideo_r1.{module}", *map(_entry, found)]
        page = f"reference/names_{wing or 'method'}"
        pages[page] = "\n\n".join(parts)
        rows.append([f"[{title}](/{page}.md)", about, str(sum(map(len, modules.values())))])
    pages["reference/names"] = "\n\n".join([
        "# Names: every function, class and constant", "With signature, first sentence, and a link to the lesson that derives it. "
        "The [index](genindex) has them by letter. Other Sphinx projects can refer to them through `objects.inv`.",
        table(["Wing", "What it holds", "Names"], rows),
        "```{toctree}\n:hidden:\n\n" + "\n".join(f"/{page}" for page in pages) + "\n```"])
    return pages


def report_page(out: Path) -> str:
    "Two finished reports of the toy study, copied into the site, and the page that leads to them."
    from deepvideo_r1.toy.report import write_report

    (out / "extra").mkdir(parents=True, exist_ok=True)
    for name, recorded in REPORTS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = shutil.copytree(ROOT / "docs" / "recorded" / recorded, Path(folder) / recorded)
            shutil.copy(write_report(run), out / "extra" / f"{name}.html")
    return "\n\n".join([
        "# Finished reports of the toy study",
        "`make toy` ends with one HTML file that holds verdicts, tables and figures, and loads nothing else. Both reports are made "
        "from runs that are recorded in the repository.",
        '<p><a href="../toy_report.html">What <code>make toy</code> ends with</a>: right answers are rare at first; six arms, '
        "one seed.</p>",
        '<p><a href="../toy_report_frequent.html">The regime in which they are frequent</a> '
        "(<code>deepvideo-r1 toy --preset frequent_success --seeds 0 1 2</code>): four arms, three seeds, without examples of "
        "responses.</p>",
        "[09 Report](/toy/report.ipynb) says how it is made, and [07 Verdicts](/toy/verdicts.ipynb) by which rules it judges."])


def write_reference(out: Path) -> None:
    "Write the pages into the folder `out`."
    pages = {"reference/commands": commands_page(), "reference/metrics": metrics_page(), "reference/formats": formats_page(),
             "reference/report": report_page(out), **names_pages()}
    for name, text in pages.items():
        page = out / f"{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text + "\n", encoding="utf-8")
