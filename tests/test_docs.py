"""The examples on the pages of the methods and the optimizers run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for folder in ("methods", "optimizers") for page in (DOCS / folder).glob("*.md"))
WITHOUT = ("adapters-comparison", "comparison", "index", "replay-sizes", "unlearning-comparison")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in WITHOUT], ids=lambda page: page.stem)
def test_example_of_the_page_runs(page):
    """All ``python`` blocks of a page, one after the other, as a reader would type them."""
    blocks = PYTHON.findall(page.read_text("utf-8"))
    assert blocks, "a method's page shows an example"
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "__main__"})
