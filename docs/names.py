"""The public names of the library, read from its modules, and the links from a name in backticks to where it is explained.

A link is made only where the name is meant: `module.name`, `name()`, or a name that no other thing has. A plain word such as
`judge` may be a field or a word of the text, so it stays as it is.
"""
import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from parts import NBS, ROOT, notebooks, page_name

LIBRARY = ROOT / "deepvideo_r1"
# Fenced code, headings and links stay as they are; the group `name` is the text of any other code span.
SPAN = re.compile(r"^(```|~~~).*?^\1|^#+ .*?$|\[[^\]\n]*\]\([^)\n]*\)|(?<!`)`(?P<name>[^`\n]+)`(?!`)", re.M | re.S)


class Name(NamedTuple):
    "A public name of the library."
    name: str  # the name itself
    module: str  # its module, without the package: `data.video`
    kind: str  # function, class or data
    signature: str  # arguments and what is returned, as in the source; empty for data
    summary: str  # first sentence of the docstring; empty where there is none
    page: str  # page of its notebook
    anchor: str  # its heading on the page; empty where it has none


def slug(heading: str) -> str:
    "The anchor of a heading, as MyST makes it."
    text = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower(), flags=re.U)
    return text.strip().replace(" ", "-")


@cache
def modules() -> dict[str, Path]:
    "Name of each module, without the package -> its notebook."
    found = {}
    for path in notebooks():
        export = re.search(r"#\| *default_exp +([\w.]+)", path.read_text(encoding="utf-8"))
        if export:
            found[export[1]] = path
    return found


def module_file(module: str) -> Path:
    "The file of a module."
    return LIBRARY / f"{module.replace('.', '/')}.py"


def _first_sentence(node: ast.AST) -> str:
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0]


def _signature(node: ast.AST) -> str:
    "The arguments of a function, or of what makes an instance of a class."
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                part.args.args = part.args.args[1:]
                return f"({ast.unparse(part.args)})"
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        return f"({', '.join(ast.unparse(field) for field in fields)})" if fields else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def _of_module(module: str, path: Path) -> Iterator[Name]:
    tree = ast.parse(module_file(module).read_text(encoding="utf-8"))
    named: dict[str, ast.AST] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for name in (getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)):
            named[name] = node
    public = ast.literal_eval(named["__all__"].value) if "__all__" in named else []
    for name in public:
        node = named.get(name)
        is_def = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        kind = "class" if isinstance(node, ast.ClassDef) else "function" if is_def else "data"
        signature, summary = (_signature(node), _first_sentence(node)) if is_def else ("", "")
        yield Name(name, module, kind, signature, summary, page_name(path), name.lower() if is_def else "")


@cache
def public_names() -> tuple[Name, ...]:
    "Every public name, by notebook, in the order of the modules."
    return tuple(name for module, path in modules().items() for name in _of_module(module, path))


@cache
def _fields() -> frozenset[str]:
    "Names of the fields of all records, and of all numbers in files: in a text they mean these."
    found = set()
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "Glossary":
                found |= {key.value for key in getattr(node.value, "keys", []) if isinstance(key, ast.Constant)}
    return frozenset(found)


def find_name(
    text: str,  # what stands between backticks
    page: str = "",  # page that it stands on: of several names, its own is meant
) -> Name | None:
    "The public name that is meant; None where there is none, or where the text may mean something else."
    called = text.endswith("()")
    before, _, last = text.removesuffix("()").rpartition(".")
    if not re.fullmatch(r"(?:\w+\.)*[a-zA-Z]\w*", text.removesuffix("()")):
        return None
    named = [name for name in public_names() if name.name == last]
    if before:  # module.name, or a part of a class
        place = before.removeprefix("deepvideo_r1.")
        in_module = [name for name in named if f".{name.module}".endswith(f".{place}")]
        of_class = [name for name in public_names() if name.name == place and name.kind == "class"]
        return (in_module or of_class or [None])[0]
    is_plain = re.fullmatch("[a-z]+", last)
    if not called and (is_plain or last in _fields()):
        return None
    named = [name for name in named if name.page == page] or named
    return named[0] if len(named) == 1 else None


def linkify(source: str, path: Path) -> str:
    "Markdown in which names in backticks are links to their headings; the links are relative to the notebook."
    page = page_name(path) if path.is_relative_to(NBS) else ""

    def link(match: re.Match) -> str:
        found = match["name"] and find_name(match["name"], page)
        if not found:
            return match[0]
        notebook = modules()[found.module]
        target = Path(*[".."] * (len(path.relative_to(NBS).parts) - 1), notebook.relative_to(NBS)).as_posix()
        return f"[{match[0]}]({target}{'#' if found.anchor else ''}{found.anchor})"

    return SPAN.sub(link, source)
