"""Extension of the documentation build: docstrings are written with Sphinx roles, the site is Markdown."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

import griffe

# `.. math:: x` with what follows on the line, and the indented lines under it
_MATH_BLOCK = re.compile(
    r"^(?P<margin> *)\.\. math::(?P<line>.*)\n(?P<body>(?:(?:(?P=margin) +\S.*| *)\n)*)", re.MULTILINE
)
_MATH = re.compile(r":math:`([^`]+)`")
# griffe reads doctests under the plural only
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
# Other roles, such as :class:`Task`, are shown as the code they name
_ROLE = re.compile(r":(?:py:)?(?:mod|class|func|meth|attr|data|exc|obj):(?=`)")


class SphinxToMarkdown(griffe.Extension):
    """Rewrites the formulas and roles of every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """Return a docstring with its formulas between the delimiters of arithmatex and its roles left out."""
    docstring = _MATH_BLOCK.sub(_display, docstring + "\n")
    docstring = _MATH.sub(r"\\(\1\\)", docstring)
    docstring = _EXAMPLE.sub(r"\1Examples:", docstring)
    return _ROLE.sub("", docstring).rstrip()


def _display(match: re.Match[str]) -> str:
    formula = f"{match['line'].strip()}\n{dedent(match['body'])}".strip()
    return indent(f"\n$$\n{formula}\n$$\n\n", match["margin"])
