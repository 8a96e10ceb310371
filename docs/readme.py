"""README.md, written from a fresh run of `nbs/index.ipynb`.

`python docs/readme.py` writes README.md and its pictures in docs/images/. It also stores fresh outputs in the notebook and in
`nbs/map.ipynb`. `python docs/readme.py DIRECTORY` writes README.md and docs/images/ there and leaves this repository as it is.
"""
import re
import shutil
import sys
from base64 import b64decode
from pathlib import Path

from build import CALLOUT, INDEX, LINK, NBS, ROOT, read_page, resolve
from execnb.nbio import dict2nb, nb2dict, read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb

MAP = NBS / "map.ipynb"


def _link(target: str) -> str:
    found = resolve(target, INDEX)
    if found is None:
        return target
    path, anchor = found
    keeps_anchor = anchor and path.suffix != ".ipynb"  # a notebook has no anchors where repositories are browsed
    return path.relative_to(ROOT).as_posix() + (f"#{anchor}" if keeps_anchor else "")


def _alert(match: re.Match) -> str:
    kind, title, body = match.groups()
    lines = [f"[!{kind.upper()}]", *([f"**{title}**", ""] if title else []), *body.strip().splitlines()]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def _markdown(source: str) -> str:
    return LINK.sub(lambda match: match["literal"] or _link(match[0]), CALLOUT.sub(_alert, source))


def _output(output: dict, alt: str, pictures: dict[str, bytes]) -> str:
    "One output as Markdown; a picture, whose words are `alt`, is added to `pictures`."
    data = output.get("data", {})
    if "image/png" in data:
        name = f"index_{len(pictures)}.png"
        pictures[name] = b64decode("".join(data["image/png"]))
        words = re.sub(r"([][])", r"\\\1", alt)
        return f"![{words}](docs/images/{name})"
    if "text/markdown" in data:
        return _markdown("".join(data["text/markdown"]))
    text = "".join(output.get("text") or data["text/plain"])
    return f"```text\n{text.rstrip()}\n```"


def readme(nb) -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and its pictures by file name."
    title, subtitle, cells = read_page(INDEX, nb)
    pictures: dict[str, bytes] = {}
    warning = "<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook. -->"
    parts = [warning, f"# {title}", f"> {subtitle}"]
    for cell in cells:
        if cell["kind"] == "markdown":
            parts.append(_markdown(cell["source"]))
            continue
        if "remove-input" not in cell["tags"]:
            parts.append(f"```python\n{cell['source']}\n```")
        parts += [_output(output, cell["alt"], pictures) for output in cell["outputs"]]
    return "\n\n".join(part.strip() for part in parts) + "\n", pictures


def execute(nb):
    "The notebook with the outputs of a fresh run."
    with working_directory(NBS):
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = []
        CaptureShell(mpl_format="png").run_all(nb, exc_stop=True)
    clean_nb(nb)
    fresh = dict2nb(nb2dict(nb))
    fresh["path_"] = nb.path_
    return fresh


if __name__ == "__main__":
    nb = execute(read_nb(INDEX))
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    if root == ROOT:
        write_nb(nb, INDEX)
        write_nb(execute(read_nb(MAP)), MAP)
    text, pictures = readme(nb)
    shutil.rmtree(root / "docs" / "images", ignore_errors=True)
    for name, picture in pictures.items():
        (root / "docs" / "images").mkdir(parents=True, exist_ok=True)
        (root / "docs" / "images" / name).write_bytes(picture)
    (root / "README.md").write_text(text, encoding="utf-8")
