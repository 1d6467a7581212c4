"""Negation of task vectors serves requests, and trains nothing in between."""

from __future__ import annotations

from contract import Row
from lightning_cl import ContinualCallback
from lightning_cl.unlearning import TaskVectorNegation

ROWS: dict[str, Row] = {}
ELSEWHERE: dict[type[ContinualCallback], str] = {TaskVectorNegation: "unlearning/test_task_vector.py"}
