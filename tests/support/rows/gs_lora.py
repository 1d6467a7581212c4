"""GS-LoRA serves requests, which the toy stream of the contract has none of."""

from __future__ import annotations

from contract import Row
from lightning_cl import ContinualCallback
from lightning_cl.adapters import GSLoRA

ROWS: dict[str, Row] = {}
ELSEWHERE: dict[type[ContinualCallback], str] = {GSLoRA: "adapters/test_gs_lora.py"}
