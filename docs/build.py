"""The notebooks as pages for Sphinx: writes `_sphinx/` (or the folder given) from `nbs/`.

nbdev's own processors apply its directives (hidden cells, magics, front matter); what they leave in Quarto's dialect
is then written in MyST's. One departure from nbdev: an exported cell keeps its code on the page, under a heading with
the name it defines, because here the code is the lesson. So nothing is executed, and stored outputs are what you see.
`docs/parts.py` says where each page stands, and `docs/reference.py` makes the pages to look things up.
"""
import ast
import json
import re
import shutil
import sys
from pathlib import Path

from execnb.nbio import mk_cell, read_nb
from names import linkify, module_file, modules, slug
from nbdev.config import get_config
from nbdev.processors import FilterDefaults, _def_names
from parts import (
    FILES, NBS, ROOT, SECTIONS, WINGS, notebooks, page_name, page_title, parts, reading_order, sidebar_names, wing_pages,
)
from pictures import is_drawing
from reference import write_reference
from widgets import STATE, mount_widget, stored_explorer

CALLOUT = re.compile(r"^:::+ *\{\.callout-(\w+)[^}]*\}\s*?\n+(?:#+ +(.+?) *\n)?(.*?)^:::+ *$", re.M | re.S)
# The target of [text](target); code and formulas are matched first, so that links are not seen inside them.
LINK = re.compile(r"(?P<literal>^```.*?^```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$)|(?<=\]\()[^)\s]+", re.M | re.S)
ALT = re.compile(r"^#\| *fig-alt: *(.+?) *$", re.M)
HEADING = re.compile(r"^#{2,} +(.+?) *$", re.M)
EXPORT = re.compile(r"^#\| *exporti?\b", re.M)
TAGS = {"echo: false": "remove-input", "code-fold: true": "hide-input", "output: false": "remove-output"}
INDEX = NBS / "index.ipynb"


class PageFilter(FilterDefaults):
    "nbdev's processors, less those that execute code or put a signature instead of the code."
    skipped = {"add_show_docs", "exec_show_docs", "insert_warning", "add_fold", "mv_exports", "add_links"}

    def base_procs(self):
        return [proc for proc in super().base_procs() if proc.__name__ not in self.skipped]


def read_page(path: Path, nb=None) -> tuple[str, str, list[dict]]:
    """Title, subtitle and cells of a notebook, with nbdev's directives applied.

    Cells have kind, source, tags, outputs, and alt: what a figure shows, in words, from `#| fig-alt: ...` in the cell that draws
    it (a second line goes on), else the heading above it.
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
        cells.append(_cell(cell, states, topic, path))
        below_section = below_section or bool(re.search("^## ", cell.source, re.M) and cell.cell_type == "markdown")
    return nb.frontmatter_["title"], nb.frontmatter_.get("description", ""), cells


def _cell(cell, states, topic: str, path: Path) -> dict:
    if cell.cell_type == "markdown":
        return dict(kind="markdown", source=linkify(cell.source, path))
    options = {f"{key} {' '.join(values)}".lower() for key, values in cell.directives_.items()}
    if re.match("show_doc", cell.source.splitlines()[-1]):
        options.add("echo: false")
    tags = [tag for option, tag in TAGS.items() if option in options]
    words = " ".join(ALT.findall(cell.source))
    outputs = [_as_text(mount_widget(output, states, words)) for output in cell.outputs]
    if "explorer:" in cell.directives_:  # `#| explorer: vanishing`: as the page of all explorers has stored it
        outputs = [stored_explorer(*cell.directives_["explorer:"])]
    # Markdown that a hidden cell displays is part of the text: headings in the contents, links resolved.
    if "remove-input" in tags and all("text/markdown" in output.get("data", ()) for output in outputs):
        source = "\n\n".join("".join(output["data"]["text/markdown"]) for output in outputs)
        source = re.sub(r"^---\n+(?:\[source\].*\n+)?(#+) (.+)", r"\1 `\2`", source)  # the head of `show_doc`
        return dict(kind="markdown", source=source)
    source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    alt = words or re.sub("[`*$]", "", topic)
    lesson = "exports" not in cell.directives_ and not tags
    return dict(kind="code", source=source, tags=tags, outputs=outputs, alt=alt, lesson=lesson)


def _as_text(output: dict) -> dict:
    "What rich printed as it stands in a terminal, instead of as HTML with a style of its own."
    data = output.get("data", {})
    if not "".join(data.get("text/html", "")).startswith("<pre style"):
        return output
    return dict(output_type="stream", name="stdout", text=re.sub(r"\x1b\[[\d;]*m", "", "".join(data["text/plain"])))


def _is_test(node: ast.stmt) -> bool:
    if isinstance(node, ast.For):
        return all(map(_is_test, node.body))
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return isinstance(node, ast.Assert) or (is_call and ast.unparse(node.value.func).startswith("test_"))


def split_tests(
    source: str,  # code of a lesson cell
    *,
    least: int = 3,  # fewest lines of tests that are worth a fold, beside other code
) -> tuple[str, str]:
    "The code without its tests, and the tests with the comments above them, which are folded on the page."
    lines = source.splitlines()
    try:
        body = ast.parse(re.sub(r"^\s*[%!].*", "pass", source, flags=re.M)).body
    except SyntaxError:
        return source, ""
    tests: set[int] = set()
    for node in filter(_is_test, body):
        first = node.lineno - 1
        while first and lines[first - 1].startswith("#") and first - 1 not in tests:
            first -= 1
        tests |= set(range(first, node.end_lineno))
    if len(tests) < least and not all(map(_is_test, body)):
        return source, ""
    kept, folded = ("\n".join(line for n, line in enumerate(lines) if (n in tests) == is_test) for is_test in (False, True))
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n"), folded.strip("\n")


def resolve(target: str, page: Path) -> tuple[Path, str] | None:
    "The file in this repository, and the anchor in it, that a link means; None for a link to elsewhere."
    name, _, anchor = target.partition("#")
    if re.match("[a-z]+:|#", target):
        return None
    path = (page.parent / name).resolve()
    if not path.exists():
        raise ValueError(f"{page.name} links to {target}, and there is no such file")
    return path, anchor


def repository_link(path: Path) -> str:
    "The address of a file where the repository is browsed."
    cfg = get_config()
    return f"{cfg.git_url}/blob/{cfg.branch}/{path.relative_to(ROOT).as_posix()}"


def _site_link(target: str, page: Path, out: Path) -> str:
    found = (page, target[1:]) if target.startswith("#") and page == INDEX else resolve(target, page)
    if found is None:
        return target
    path, anchor = found
    files = {ROOT / file: name for name, file in FILES.items()}
    sections = {slug(heading): name for heading, name in SECTIONS.items() if name}
    if path == INDEX and anchor in sections:
        return f"/{sections[anchor]}.ipynb"
    if path.suffix == ".ipynb":
        return f"/{page_name(path)}.ipynb" + (f"#{anchor}" if anchor else "")
    if path in files:
        return f"/{files[path]}.md" + (f"#{anchor}" if anchor else "")
    if path.is_relative_to(NBS) or path.suffix in (".png", ".svg", ".jpg"):  # a picture comes along
        copy = out / path.relative_to(NBS if path.is_relative_to(NBS) else ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
        return f"/{copy.relative_to(out).as_posix()}"
    return repository_link(path)


def _admonition(match: re.Match) -> str:
    kind, title, body = match.groups()
    return f":::{{admonition}} {title or kind.capitalize()}\n:class: {kind}\n\n{body.strip()}\n:::"


def to_myst(source: str, page: Path, out: Path) -> str:
    "Markdown with Quarto's callouts and links to files written as MyST's."
    source = CALLOUT.sub(_admonition, source)
    source = LINK.sub(lambda match: match["literal"] or _site_link(match[0], page, out), source)
    if re.search(r"^:::+ *\{[.#]", source, re.M):
        raise ValueError(f"{page.name}: only callouts are known among Quarto's blocks, got\n{source}")
    return source


def toctree(pages: list[str], caption: str = "") -> str:
    "A table of contents that is not shown on its page, only beside it."
    options = f":hidden:\n{f':caption: {caption}' if caption else ''}".rstrip()
    short = sidebar_names()
    names = (f"{short[page]} </{page}>" if page in short else f"/{page}" for page in pages)
    return f"```{{toctree}}\n{options}\n\n" + "\n".join(names).replace("</index>", "<self>") + "\n```"


def link_sections(source: str) -> str:
    "The table of equations with each section, and each test, as a link."
    source = re.sub(r"\[\w+\]\(([\w/]+\.ipynb)\), ([^|[]+?) \|",
                    lambda match: f"[{match[2]}]({match[1]}#{slug(match[2])}) |", source)
    return re.sub(r"`(test_\w+\.py)::(\w+)`", r"[`\2`](../tests/\1)", source)


def split_index(cells: list[dict]) -> dict[str, tuple[str, list[dict]]]:
    "The landing page, and the sections of the index that are pages of their own: name -> title and cells."
    pages, page = {"index": ("", [])}, "index"
    for cell in cells:
        heading = re.match(r"## (.+?) *\n", cell["source"] + "\n") if cell["kind"] == "markdown" else None
        if heading:
            page = SECTIONS.get(heading[1], "index")
            if page not in ("index", None):
                pages[page] = (heading[1], [])
                source = re.sub("^#(#+ )", r"\1", cell["source"].removeprefix(heading[0]), flags=re.M)
                cell = cell | dict(source=link_sections(source) if page == "reference/paper" else source)
        if page and cell["source"].strip():
            pages[page][1].append(cell)
    return pages


def _head(path: Path, subtitle: str) -> str:
    "Title, subtitle, and where the page comes from."
    parts = [f"# {page_title(path)}"] + ([f"{{.subtitle}}\n{subtitle}"] if subtitle else [])
    module = {notebook: name for name, notebook in modules().items()}.get(path)
    files = [("notebook", path), *([("module", module_file(module))] if module else [])]
    links = (f"{kind} [{file.relative_to(ROOT)}]({repository_link(file)})" for kind, file in files)
    return "\n\n".join([*parts, "{.source}\n" + " | ".join(links)]).replace("__main__.ipynb]", r"\_\_main\_\_.ipynb]")


def _code_cells(cell: dict) -> list[dict]:
    "A code cell as the page shows it: its code and outputs, then its tests, folded."
    image = dict(alt=cell["alt"]) | (dict(classes="drawing") if any(map(is_drawing, cell["outputs"])) else {})
    widths = [size["width"] for output in cell["outputs"]
              if "width" in (size := output.get("metadata", {}).get("image/png", {}))]
    settings = dict(image=image | (dict(width=f"{widths[0]}px") if widths else {}))
    settings |= dict(code_prompt_show="Show the code", code_prompt_hide="Hide the code")
    code, tests = split_tests(cell["source"]) if cell["lesson"] else (cell["source"], "")
    shown = [dict(metadata=dict(tags=cell["tags"] if code else ["remove-input"], mystnb=settings), source=code or "pass",
                  outputs=cell["outputs"])]
    folded = dict(code_prompt_show="Show the tests", code_prompt_hide="Hide the tests")
    folds = [dict(metadata=dict(tags=["hide-input"], mystnb=folded), source=tests, outputs=[])]
    return (shown if code or cell["outputs"] else []) + (folds if tests else [])


def _write_cells(name: str, cells: list[dict], path: Path, out: Path) -> None:
    "Write cells of a notebook as the page `name`."
    written = []
    for cell in cells:
        if cell["kind"] == "markdown":
            written.append(dict(cell_type="markdown", metadata={}, source=to_myst(cell["source"], path, out)))
        else:
            written += [dict(cell_type="code", execution_count=None, **part) for part in _code_cells(cell)]
    written = [dict(id=f"cell-{number}", **cell) for number, cell in enumerate(written)]
    metadata = dict(kernelspec=dict(name="python3", display_name="python3", language="python"),
                    language_info=dict(name="python", pygments_lexer="ipython3"))
    notebook = json.dumps(dict(cells=written, metadata=metadata, nbformat=4, nbformat_minor=5))
    target = out / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(notebook, encoding="utf-8")


def write_page(path: Path, out: Path) -> None:
    "Write one notebook's page into the folder `out`; the index gives several."
    title, subtitle, cells = read_page(path)
    if path != INDEX:
        _write_cells(page_name(path), [dict(kind="markdown", source=_head(path, subtitle)), *cells], path, out)
        return
    for name, (heading, section) in split_index(cells).items():
        head = f"# {heading}" if heading else f"# {title}\n\n{{.subtitle}}\n{subtitle}"
        trees = [toctree(pages, caption) for caption, pages in parts().items()] if name == "index" else []
        _write_cells(name, [dict(kind="markdown", source=source) for source in [head]] + section
                     + [dict(kind="markdown", source=tree) for tree in trees], path, out)


def write_wing(wing: str, pages: list[str], out: Path) -> None:
    "Write the page of a wing: every notebook in it, and the contents of those that no part has chosen."
    name, text = WINGS.get(wing, (wing.capitalize(), f"notebooks in {wing}"))
    rows = ["| Page | What it holds |", "| --- | --- |"]
    for path in notebooks():
        if path.parent == NBS / wing and path.stem not in ("index", "map"):
            rows.append(f"| [{page_title(path)}](/{page_name(path)}.ipynb) | {read_page(path)[1].replace('|', chr(92) + '|')} |")
    page = out / f"notebooks/{wing or 'method'}.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(f"# {name}: {text}\n\n" + "\n".join(rows) + f"\n\n{toctree(pages)}\n", encoding="utf-8")


def write_site(out: Path) -> None:
    "Write all pages, and the order in which a reader turns them."
    shutil.rmtree(out, ignore_errors=True)
    for path in notebooks():
        write_page(path, out)
    for wing, pages in wing_pages().items():
        write_wing(wing, pages, out)
    write_reference(out)
    for name, file in FILES.items():
        page = out / f"{name}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(to_myst((ROOT / file).read_text(encoding="utf-8"), ROOT / file, out), encoding="utf-8")
    (out / "order.json").write_text(json.dumps(reading_order()), encoding="utf-8")


if __name__ == "__main__":
    write_site(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_sphinx")
