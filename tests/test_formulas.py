"""Formulas become MathML when the site is built, each of them, and one that cannot be read ends the build."""
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r"(?P<literal>^```.*?^```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.M | re.S)


@pytest.fixture
def mathml(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from formulas import mathml

    yield mathml
    sys.modules.pop("formulas")


def formulas():
    "Every formula in a text cell: notebook, LaTeX, and whether it is displayed."
    for path in sorted((ROOT / "nbs").rglob("[!.]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                for match in FORMULA.finditer("".join(cell["source"])):
                    if match["block"] or match["inline"]:
                        yield path.stem, match["block"] or match["inline"], bool(match["block"])


def test_every_formula_is_read_whole(mathml):
    found = list(formulas())
    assert len(found) > 250
    for name, latex, block in found:
        written = mathml(re.sub(r"\\tag\{\d+\}", "", latex), block=block)
        assert written.startswith("<math") and not re.search(r"\\|merror|&amp;", written), (name, latex)


def test_what_docutils_lacks(mathml):
    assert "<mover accent=\"true\"><mi>A</mi><mo stretchy=\"false\">^</mo></mover><mi>θ</mi>" in mathml(
        r"\hat A_\theta^{(i)}", block=True)
    assert mathml(r"\bar R_b", block=False).startswith("<math><msub><mover")
    assert mathml(r"\underbrace{x + y}_{\text{sum}}", block=True).endswith("</munder><mtext>sum</mtext></munder></math>")
    assert mathml(r"\big(x\big)", block=False).count('minsize="1.2em"') == 2


@pytest.mark.parametrize("latex", [r"\nosuchcommand{x}", r"\frac{1}{", r"\begin{nosuch}x\end{nosuch}"])
def test_a_formula_that_cannot_be_read_is_named(mathml, latex):
    with pytest.raises(ValueError, match="cannot be read"):
        mathml(latex, block=True)
