"""One line that tells weights, or samples, from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cl.strategies.fingerprint import fingerprint

__all__ = ["digest_of", "digest_of_samples"]

_OF_NUMPY = (torch.float16, torch.float32, torch.float64)


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


def digest_of_samples(samples: Iterable[Any]) -> str:
    """Return a digest of the content of a set of samples, in hexadecimal: SHA-256 of the sorted SHA-256 of each.

    It does not depend on their order, and a tensor, an array and a number of one value and dtype are the same. Of what
    is neither text nor number, nor a collection or dataclass of these, the class alone counts.

    Args:
        samples: Samples as a dataset gives them.

    Example:
        >>> import torch
        >>> first, second = {"text": "Ada", "label": 1}, {"text": "Bo", "label": torch.tensor(0)}
        >>> digest_of_samples([first, second]) == digest_of_samples([second, first])
        True
        >>> digest_of_samples([first]) == digest_of_samples([{**first, "text": "Ad"}])
        False
    """
    digests = sorted(hashlib.sha256(_content(sample)).digest() for sample in samples)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _content(value: Any) -> bytes:
    """Return bytes that two values share only if they are equal: a kind, a length and what follows."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value if value.layout == torch.strided else value.to_dense()).resolve_conj().resolve_neg()
        # numpy has neither bfloat16 nor the numbers of one byte
        value = np.asarray(value.float() if value.is_floating_point() and value.dtype not in _OF_NUMPY else value)
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        kind, data = "mapping", b"".join(_content(str(key)) + _content(value[key]) for key in sorted(value, key=str))
    elif isinstance(value, (list, tuple)):
        kind, data = "sequence", b"".join(map(_content, value))
    elif isinstance(value, str):
        kind, data = "text", value.encode(errors="surrogatepass")
    elif isinstance(value, (bytes, bytearray)):
        kind, data = "bytes", bytes(value)
    elif isinstance(value, (bool, int, float, complex)) or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        if array.dtype.hasobject:
            # numpy has no integer that large; what an array holds may be an array itself
            return _content(str(value) if isinstance(value, int) else [str(array.shape), *array.ravel().tolist()])
        kind, data = f"{array.dtype.str} {array.shape}", array.tobytes()
    else:
        kind, data = type(value).__qualname__, b""
    return f"{kind} {len(data)}:".encode() + data
