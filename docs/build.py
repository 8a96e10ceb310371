"""The notebooks as pages for Sphinx: writes `_sphinx/` (or the folder given) from `nbs/`.

nbdev's own processors apply its directives (hidden cells, magics, front matter); what they leave in Quarto's dialect
is then written in MyST's. One departure from nbdev: an exported cell keeps its code on the page, under a heading with
the name it defines, because here the code is the lesson. So nothing is executed, and stored outputs are what you see.
"""
import ast
import json
import re
import shutil
import sys
from pathlib import Path

from execnb.nbio import mk_cell, read_nb
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults, _def_names
from widgets import STATE, mount_widget, stored_explorer

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CALLOUT = re.compile(r"^:::+ *\{\.callout-(\w+)[^}]*\}\s*?\n+(?:#+ +(.+?) *\n)?(.*?)^:::+ *$", re.M | re.S)
# The target of [text](target); code and formulas are matched first, so that links are not seen inside them.
LINK = re.compile(r"(?P<literal>^```.*?^```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$)|(?<=\]\()[^)\s]+", re.M | re.S)
ALT = re.compile(r"^#\| *fig-alt: *(.+?) *$", re.M)
HEADING = re.compile(r"^#{2,} +(.+?) *$", re.M)
EXPORT = re.compile(r"^#\| *exporti?\b", re.M)
WINGS = {"data": "Data", "model": "Model", "training": "Training", "evaluation": "Evaluation", "toy": "Toy study",
         "explore": "Explore", "support": "Support"}  # folder of `nbs/` -> its heading in the contents
TAGS = {"echo: false": "remove-input", "code-fold: true": "hide-input", "output: false": "remove-output"}


class PageFilter(FilterDefaults):
    "nbdev's processors, less those that execute code or put a signature in the place of the code."
    skipped = {"add_show_docs", "exec_show_docs", "insert_warning", "add_fold", "mv_exports", "add_links"}

    def base_procs(self):
        return [proc for proc in super().base_procs() if proc.__name__ not in self.skipped]


def notebooks() -> list[Path]:
    "Every notebook of the site: the index, the method and what runs it, then each wing in the order of its numbers."
    found = (path.relative_to(NBS) for path in NBS.rglob("*.ipynb"))
    found = sorted(path for path in found if not any(part[0] in "._" for part in path.parts))
    wings = [*WINGS, *sorted({path.parts[0] for path in found if len(path.parts) > 1} - set(WINGS))]
    place = lambda path: (-1 if len(path.parts) == 1 else wings.index(path.parts[0]), path.stem != "index")
    return [NBS / path for path in sorted(found, key=place)]


def page_name(path: Path) -> str:
    "Where a notebook's page lies in the site, named as nbdev names it: `nbs/00_core.ipynb` -> `core.ipynb`."
    relative = path.relative_to(NBS)
    return relative.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", relative.name.lower())).as_posix()


def read_page(path: Path, nb=None) -> tuple[str, str, list[dict]]:
    """Title, subtitle and cells of a notebook, with nbdev's directives applied.

    Cells have kind, source, tags, outputs, and alt: what a figure shows, in words, from `#| fig-alt: ...` in the cell that draws
    it, else the heading above it.
    """
    nb = nb or read_nb(path)
    # nbdev takes the title's whole cell as front matter: text below title and subtitle would be lost.
    lines = nb.cells[0].source.splitlines()
    head = [line for line in lines if line.startswith(("# ", "> "))]
    rest = [line for line in lines if line not in head]
    nb.cells[:1] = [mk_cell("\n".join(head), "markdown"), mk_cell("\n".join(rest).strip(), "markdown")]
    for cell in nb.cells:
        if not all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.parsed_() or ()):
            cell.source = EXPORT.sub("#| exports", cell.source)  # `exports` stays on the page, `export` does not
    states = nb.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    PageFilter()(nb)

    cells, below_section, topic = [], False, nb.frontmatter_["title"]
    for cell in nb.cells:
        if cell.cell_type == "raw" or not cell.source.strip():
            continue
        if cell.cell_type == "code" and "exports" in cell.directives_:
            heading = "###" if below_section else "##"
            cells += [dict(kind="markdown", source=f"{heading} `{name}`") for name in _def_names(cell, set())]
        if cell.cell_type == "markdown":
            topic = [topic, *HEADING.findall(cell.source)][-1]
        cells.append(_cell(cell, states, topic))
        below_section = below_section or bool(re.search("^## ", cell.source, re.M) and cell.cell_type == "markdown")
    return nb.frontmatter_["title"], nb.frontmatter_.get("description", ""), cells


def _cell(cell, states, topic: str) -> dict:
    if cell.cell_type == "markdown":
        return dict(kind="markdown", source=NbdevLookup().linkify(cell.source))
    options = {f"{key} {' '.join(values)}".lower() for key, values in cell.directives_.items()}
    if re.match("show_doc", cell.source.splitlines()[-1]):
        options.add("echo: false")
    tags = [tag for option, tag in TAGS.items() if option in options]
    outputs = [mount_widget(output, states) for output in cell.outputs]
    if "explorer:" in cell.directives_:  # `#| explorer: vanishing`: as the page of all explorers has stored it
        outputs = [stored_explorer(*cell.directives_["explorer:"])]
    # Markdown that a hidden cell displays is part of the text: headings in the contents, links resolved.
    if "remove-input" in tags and all("text/markdown" in output.get("data", ()) for output in outputs):
        source = "\n\n".join("".join(output["data"]["text/markdown"]) for output in outputs)
        source = re.sub(r"^---\n+(?:\[source\].*\n+)?(#+) (.+)", r"\1 `\2`", source)  # the head of `show_doc`
        return dict(kind="markdown", source=source)
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    alt = [*ALT.findall(cell.source), re.sub("[`*$]", "", topic)][0]
    return dict(kind="code", source=source, tags=tags, outputs=outputs, alt=alt)


def resolve(target: str, page: Path) -> tuple[Path, str] | None:
    "The file in this repository, and the anchor in it, that a link means; None for a link to elsewhere."
    cfg = get_config()
    docs = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    name, _, anchor = target.removeprefix(docs).partition("#")
    if target.startswith(docs):  # nbdev made it, from a name in backticks; a method is found with its class
        named = {page_name(path): path for path in notebooks()}
        return named[name.replace(".html", ".ipynb")], "" if anchor.startswith("_") else anchor.split(".")[0]
    if re.match("[a-z]+:|#", target):
        return None
    path = (page.parent / name).resolve()
    if not path.exists():
        raise ValueError(f"{page.name} links to {target}, and there is no such file")
    return path, anchor


def _site_link(target: str, page: Path, out: Path) -> str:
    found = resolve(target, page)
    if found is None:
        return target
    path, anchor = found
    if path.suffix == ".ipynb":
        return f"/{page_name(path)}" + (f"#{anchor}" if anchor else "")
    if path.is_relative_to(NBS):  # a picture beside the notebook comes along
        copy = out / path.relative_to(NBS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        return f"/{path.relative_to(NBS).as_posix()}"
    cfg = get_config()
    return f"{cfg.git_url}/blob/{cfg.branch}/{path.relative_to(ROOT).as_posix()}"


def _admonition(match: re.Match) -> str:
    kind, title, body = match.groups()
    return f":::{{admonition}} {title or kind.capitalize()}\n:class: {kind}\n\n{body.strip()}\n:::"


def to_myst(source: str, page: Path, out: Path) -> str:
    "Markdown with Quarto's callouts and nbdev's links written as MyST's."
    source = CALLOUT.sub(_admonition, source)
    source = LINK.sub(lambda match: match["literal"] or _site_link(match[0], page, out), source)
    if re.search(r"^:::+ *\{[.#]", source, re.M):
        raise ValueError(f"{page.name}: only callouts are known among Quarto's blocks, got\n{source}")
    return source


def contents() -> str:
    "The table of contents: the method, then each wing under its own name."
    groups: dict[str, list[str]] = {}
    for path in notebooks()[1:]:
        folder = path.parent.relative_to(NBS).as_posix()
        groups.setdefault("Method" if folder == "." else WINGS.get(folder, folder.capitalize()), []).append(
            f"{path.stem} <{page_name(path)}>")
    trees = (f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```"
             for caption, pages in groups.items())
    return "\n\n".join(trees)


def write_page(path: Path, out: Path) -> None:
    "Write one notebook's page into the folder `out`."
    title, subtitle, cells = read_page(path)
    page = [dict(kind="markdown", source=f"# {title}\n\n" + (f"{{.subtitle}}\n{subtitle}" if subtitle else "")), *cells]
    if path == NBS / "index.ipynb":
        page.append(dict(kind="markdown", source=contents()))
    written = []
    for number, cell in enumerate(page):
        cell_id = f"cell-{number}"
        if cell["kind"] == "markdown":
            source = to_myst(cell["source"], path, out)
            written.append(dict(id=cell_id, cell_type="markdown", metadata={}, source=source))
        else:
            shown = dict(tags=cell["tags"], mystnb=dict(image=dict(alt=cell["alt"])))
            written.append(dict(id=cell_id, cell_type="code", metadata=shown, source=cell["source"],
                                outputs=cell["outputs"], execution_count=None))
    metadata = dict(kernelspec=dict(name="python3", display_name="python3", language="python"),
                    language_info=dict(name="python", pygments_lexer="ipython3"))
    notebook = json.dumps(dict(cells=written, metadata=metadata, nbformat=4, nbformat_minor=5))
    target = out / page_name(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(notebook, encoding="utf-8")


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_sphinx"
    shutil.rmtree(out, ignore_errors=True)
    for path in notebooks():
        write_page(path, out)
