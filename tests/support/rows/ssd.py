"""Selective synaptic dampening serves requests, and trains nothing in between."""

from __future__ import annotations

from contract import Row
from lightning_cl import ContinualCallback
from lightning_cl.unlearning import SelectiveSynapticDampening

ROWS: dict[str, Row] = {}
ELSEWHERE: dict[type[ContinualCallback], str] = {SelectiveSynapticDampening: "unlearning/test_ssd.py"}
