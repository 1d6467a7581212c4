"""Block expansion needs a network of residual blocks."""

from __future__ import annotations

from contract import Row
from lightning_cl import BlockExpansion, ContinualCallback

ROWS: dict[str, Row] = {}
ELSEWHERE: dict[type[ContinualCallback], str] = {BlockExpansion: "adapters/test_block_expansion.py"}
