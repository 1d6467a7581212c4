"""One line that tells weights from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from torch import Tensor

from lightning_cl.strategies.fingerprint import fingerprint

__all__ = ["digest_of"]


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of named tensors, in hexadecimal: SHA-256 of their fingerprints.

    It is the same for any sharding and number of ranks, and nothing is gathered; all ranks must call it.

    Args:
        tensors: Names and tensors, in any order.

    Example:
        >>> import torch
        >>> digest_of([("a", torch.zeros(2))]) == digest_of([("a", torch.zeros(2, 1))])
        False
    """
    prints = fingerprint({name: tensor.detach() for name, tensor in tensors})
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()
