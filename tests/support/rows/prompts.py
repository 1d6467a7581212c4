"""Prompts need tokens, which the toy module has not."""

from __future__ import annotations

from contract import Row
from lightning_cl import L2P, CODAPrompt, ContinualCallback, DualPrompt, ProgressivePrompts, SPrompts

ROWS: dict[str, Row] = {}
ELSEWHERE: dict[type[ContinualCallback], str] = dict.fromkeys(
    (L2P, DualPrompt, CODAPrompt, ProgressivePrompts, SPrompts), "adapters/test_prompt_contract.py"
)
