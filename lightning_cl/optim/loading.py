"""What a spike-aware optimizer goes on from, and what it refuses, before anything has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter

from lightning_cl.optim.moments import MOMENTS, Storage

__all__ = ["adopted_groups", "check_moments"]

# what another Adam's groups say of the training, and not of its implementation
_OF_ADAM = {"params", "lr", "initial_lr", "betas", "eps", "weight_decay"}


def adopted_groups(saved: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the groups of a checkpoint; those of torch's Adam or AdamW with the further settings of ``own``.

    Raises:
        ValueError: If such a group says what the optimizer of this ``name`` does not do.
    """
    adopted = []
    for group, mine in zip(saved, own, strict=True):
        if group.keys() >= mine.keys() - {"initial_lr"}:
            adopted.append(group)
            continue
        if group.get("maximize"):
            raise ValueError(f"The checkpoint's optimizer has `maximize=True`, and `{name}` only minimizes.")
        if group.get("weight_decay") and not group.get("decoupled_weight_decay", True):
            raise ValueError(
                f"The checkpoint's Adam adds its weight decay of {group['weight_decay']} to the gradient, and `{name}`"
                " decays the weights themselves, as AdamW. Load the weights alone (`load_from_checkpoint`)."
            )
        adopted.append({**mine, **{key: group[key] for key in _OF_ADAM & group.keys()}})
    return adopted


def check_moments(parameter: Parameter, storage: Storage, values: dict[str, Any], *, name: str, ours: bool) -> None:
    """Refuse the state of a parameter that is not of Adam's kind, of another shape, or kept in other bits.

    Args:
        parameter: The parameter.
        storage: How its moments will be kept.
        values: Its state in the checkpoint.
        name: Of the optimizer that loads it.
        ours: Whether the checkpoint's groups are of that optimizer.

    Raises:
        ValueError: As said.
    """
    if missing := {"step", *MOMENTS} - values.keys():
        raise ValueError(
            f"The checkpoint's optimizer has no {sorted(missing)}: `{name}` goes on from its own state or that of Adam"
            " or AdamW. Load the weights alone (`load_from_checkpoint`) to begin with new moments."
        )
    for key in MOMENTS:
        shape = torch.Size(values[key].shape)
        if shape != parameter.shape:
            raise ValueError(
                f"The checkpoint has {key!r} of shape {tuple(shape)} for a parameter of shape"
                f" {tuple(parameter.shape)}. Go on with the model and the parameter groups of the run before."
            )
        in_8_bits = values[key].dtype == torch.uint8
        if in_8_bits != bool(storage.block) and (in_8_bits or ours):
            raise ValueError(
                f"The checkpoint has {key!r} in {'8 bits' if in_8_bits else 'full precision'}, and this run reads it"
                f" {'in full' if in_8_bits else 'in 8 bits'}: go on with the `state_dtype` of the run before."
            )
