"""What the pages of all reports share: templates, and figures inside the page in both themes."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from lightning_cl.core.imports import require
from lightning_cl.report.style import DARK, LIGHT, Theme, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Image", "draw", "render", "slug"]


def render(template: str, **values: Any) -> str:
    """Return a page made of a template of this package; all values are escaped.

    Raises:
        ImportError: If the extra ``report`` is not installed.
    """
    require("jinja2", extra="report")
    from jinja2 import Environment, FunctionLoader

    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(
            lambda name: resources.files("lightning_cl.report").joinpath(name).read_text(encoding="utf-8")
        ),
    )
    return environment.get_template(template).render(**values)


@dataclass(frozen=True)
class Image:
    """A figure in both themes, with its text for those who do not see it."""

    file: str
    alt: str
    light: bytes
    dark: bytes

    @property
    def light_uri(self) -> str:
        """The light figure as a data URI."""
        return _data_uri(self.light)

    @property
    def dark_uri(self) -> str:
        """The dark one."""
        return _data_uri(self.dark)

    @property
    def width(self) -> int:
        """Width in CSS pixels: the PNG has two for each."""
        return int.from_bytes(self.light[16:20], "big") // 2

    @property
    def height(self) -> int:
        """Height in CSS pixels."""
        return int.from_bytes(self.light[20:24], "big") // 2


def draw(file: str, alt: str, figure: Callable[[Theme], Figure | None]) -> Image:
    """Return the image of a figure that is drawn for a theme."""
    light, dark = figure(LIGHT), figure(DARK)
    assert light is not None
    assert dark is not None
    return Image(file, alt, png(light), png(dark))


def slug(name: str) -> str:
    """Return a name as a part of a file name.

    Example:
        >>> slug("digits 0/1: <new>")
        'digits-0-1-new'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:40].strip(".-")


def _data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"
