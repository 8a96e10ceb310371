"""A Sphinx extension that writes formulas as MathML when the site is built, so that a page needs no script for them.

docutils reads the LaTeX, and a command that it does not know ends the build. What it lacks is put right here: delimiters of
a given size, subscripts below an accent, the words under a brace. A number from `\\tag{...}` stands beside its formula.
"""
import re
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

TAG = re.compile(r"\\tag\{([^}]*)\}")
SIZED = re.compile(r"\\([bB]igg?)\s*([][(){}|])")


def _sized(match: re.Match) -> str:
    "`\\big(` as `\\bigl(`, and `\\big)` as `\\bigr)`."
    size, delimiter = match.groups()
    return rf"\{size}{'r' if delimiter in ')]}' else 'l'}{delimiter}"


def _mend(root: ElementTree.Element) -> None:
    "Puts the words under a brace below it, and a subscript of an accented letter beside it: docutils swaps the two."
    for part in root.iter():
        if part.tag == "msub" and part[0].tag == "munder" and part[0][-1].text == "⏟":
            part.tag = "munder"
        if part.tag == "munderover" and part[2].get("stretchy") == "false":
            letter, below, accent = part
            accented = ElementTree.Element("mover", accent="true")
            accented.extend([letter, accent])
            part.tag, part[:] = "msub", [accented, below]
        if part.tag == "msup" and part[0].tag == "munderover":  # with an exponent as well
            inner, exponent = part
            _mend(inner)
            part.tag, part[:] = "msubsup", [*inner, exponent]


def mathml(
    latex: str,  # formula, without the dollars around it
    *,
    block: bool,  # displayed on a line of its own
) -> str:
    "The formula as MathML; raises `ValueError` for one that cannot be read."
    source = SIZED.sub(_sized, latex.strip()).replace(r"\texttt", r"\mathtt")
    braces = re.findall(r"(?<!\\)[{}]", source)
    if braces.count("{") != braces.count("}"):
        raise ValueError(f"the formula {latex.strip()!r} cannot be read: its braces do not match")
    try:
        found = tex2mathml(source, as_block=block)
    except (MathError, SyntaxError) as error:
        raise ValueError(f"the formula {latex.strip()!r} cannot be read: {error}") from error
    found = found.replace("&ApplyFunction;", "\u2061").replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    root = ElementTree.fromstring(found)
    _mend(root)
    for part in root.iter():  # without the indents between tags; the hat that fonts for formulas have
        part.text, part.tail = ((text or "").strip("\n ").replace("ˆ", "^") for text in (part.text, part.tail))
    return ElementTree.tostring(root, encoding="unicode")


def _convert(latex: str, node: nodes.Node, *, block: bool) -> str:
    try:
        return mathml(latex, block=block)
    except ValueError as error:
        raise ExtensionError(f"{node.source}: {error}") from error


def visit_math(self, node):
    self.body.append(_convert(node.astext(), node, block=False))
    raise nodes.SkipNode


def visit_math_block(self, node):
    latex, numbers = TAG.sub("", node.astext()), TAG.findall(node.astext())
    parts = [latex] if r"\begin" in latex else re.split(r"\\q?quad\b", latex)  # these may stand below one another
    formulas = "".join(_convert(part, node, block=True) for part in parts)
    number = "".join(f'<span class="equation-number">({number})</span>' for number in numbers)
    self.body.append(f'<div class="formula">{formulas}{number}</div>\n')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
