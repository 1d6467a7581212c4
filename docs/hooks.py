"""Hooks of the documentation build: reference pages and formulas.

Formulas become MathML while the site is built, so that its pages need no script from a network.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

# What arithmatex makes of `$...$` and `$$...$$`
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add one reference page for each subpackage of lightning_cl that has names of its own."""
    root = Path(config.config_file_path).parent / "lightning_cl"
    for init in sorted([*root.glob("*/__init__.py"), *root.glob("*/unlearning/__init__.py")]):
        name = ".".join(init.parent.relative_to(root).parts)
        content = f"# lightning_cl.{name}\n\n::: lightning_cl.{name}\n    options: {{show_root_heading: false}}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_content(page_html: str, /, **_: Any) -> str:
    """Set the formulas of a page."""
    page_html = _DISPLAY.sub(lambda match: _mathml(match[1], "block"), page_html)
    return _INLINE.sub(lambda match: _mathml(match[1], "inline"), page_html)


def _mathml(latex: str, display: str) -> str:
    return convert(html.unescape(latex).strip(), display=display)
