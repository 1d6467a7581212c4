"""Where the frame of all forget losses is asked what a method owes."""

from __future__ import annotations

from typing import Any

from lightning_cl import Unlearn

ROWS: dict[str, Any] = {}
ELSEWHERE = {Unlearn: "unlearning/test_losses_contract.py"}
