"""Linear probes: what can still be read out of the layers of a model that no longer says it?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import OutputCapture, undisturbed
from lightning_cl.core.checks import check_choice
from lightning_cl.core.imports import require

__all__ = ["LayerProbe", "linear_probe", "probe_layers"]


class LayerProbe(NamedTuple):
    """What a linear classifier reads out of features, on samples it was not fitted on."""

    accuracy: float
    """Share of right labels, from 0 to 1; high = the features hold the label."""
    chance: float
    """Share of the most frequent label: what is right without any feature."""


def linear_probe(features: Tensor, labels: Tensor, *, seed: int = 0) -> LayerProbe:
    r"""Fit a logistic regression to half of the samples, and score it on the other half.

    Alain & Bengio 2017, arXiv:1610.01644. Features are standardised by the first half; the regression is scikit-learn's
    with its default L2 penalty. The halves hold as many of each label, up to one.

    Args:
        features: ``[N, D]``.
        labels: int64 ``[N]``, what to read out: the class, the author, the answer chosen.
        seed: Draws the halves.

    Raises:
        ValueError: If the shapes do not fit, a feature is not finite, there are fewer than two labels, or a label has
            fewer than two samples.
        ImportError: If scikit-learn is not installed.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.3], [1.0], [1.1], [1.2], [1.3]])
        >>> linear_probe(features, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
        LayerProbe(accuracy=1.0, chance=0.5)
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            "`features` must be Tensor[N, D] and `labels` Tensor[N], got shapes"
            f" {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not features.isfinite().all():
        raise ValueError("`features` must be finite.")
    kinds, counts = labels.cpu().unique(return_counts=True)
    if len(kinds) < 2 or int(counts.min()) < 2:
        given = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
        raise ValueError(f"A probe needs at least two labels with at least two samples each, got {given}.")
    linear = require("sklearn.linear_model", extra="metrics")
    pipeline = require("sklearn.pipeline", extra="metrics")
    preprocessing = require("sklearn.preprocessing", extra="metrics")
    fitted, tested = _halves(labels.cpu(), seed)
    x, y = features.detach().double().cpu(), labels.cpu()
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), linear.LogisticRegression(max_iter=2000))
    probe.fit(x[fitted].numpy(), y[fitted].numpy())
    accuracy = float(probe.score(x[tested].numpy(), y[tested].numpy()))
    return LayerProbe(accuracy, float(y[tested].unique(return_counts=True)[1].max()) / len(tested))


def _halves(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows of two halves, each label shared out by turns."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    position = torch.cat([torch.arange(int(count)) for count in labels.unique(return_counts=True)[1]])
    return grouped[position % 2 == 0], grouped[position % 2 == 1]


def probe_layers(
    pl_module: LightningModule,
    batches: Iterable[Any],
    labels: Tensor,
    *,
    layers: Sequence[str],
    pooling: Literal["mean", "last"] = "mean",
    seed: int = 0,
    batch_adapter: BatchAdapter | None = None,
) -> dict[str, LayerProbe]:
    """Probe what submodules return, each with a classifier of its own.

    A layer whose accuracy is far above that of the retrained model's same layer holds what the output hides: it was
    suppressed, not erased. Above ``chance`` alone says less, because features of a model that never saw the samples can
    tell classes apart as well: probe that model too.

    Args:
        pl_module: The module, run by its own ``forward`` in evaluation mode; it stays as it is.
        batches: Batches of N samples in all, as the module's steps get them.
        labels: int64 ``[N]``, what to read out of each sample, in the order of the batches.
        layers: Names of submodules, such as ``"model.transformer.h.3"``. Of their outputs ``[B, D]`` is taken as it is,
            ``[B, T, D]`` is pooled over the positions of the attention mask, ``[B, D, H, W]`` is averaged over places.
        pooling: Of positions: their mean, or the last one.
        seed: Draws the halves, the same for all layers.
        batch_adapter: Reads inputs and attention masks of batches of an uncommon structure.

    Returns:
        The result for each layer, in the order given.

    Raises:
        ValueError: If no layer is named or a name is unknown, a layer returned nothing to probe, ``labels`` has another
            length than the batches, or as for :func:`linear_probe`.

    Example:
        >>> from lightning_cl.modules import MLP, Classifier
        >>> module, x = Classifier(MLP(2, 2)), torch.tensor([[0.0, 1.0]] * 4 + [[1.0, 0.0]] * 4)
        >>> probe_layers(module, [(x, None)], torch.tensor([0] * 4 + [1] * 4), layers=["network"])["network"].accuracy
        1.0
    """
    check_choice("pooling", pooling, ("mean", "last"))
    if not layers:
        raise ValueError("`layers` names no submodule to probe.")
    adapter = batch_adapter or BatchAdapter()
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as stack:
        captures = {name: stack.enter_context(OutputCapture(pl_module, name, _features)) for name in layers}
        for batch in batches:
            batch = move_data_to_device(batch, pl_module.device)
            inputs, mask = adapter.inputs(batch), adapter.padding_mask(batch)
            with undisturbed(pl_module, seed=0), torch.no_grad():
                pl_module(**inputs) if isinstance(inputs, Mapping) else pl_module(inputs)
            for name, capture in captures.items():
                found[name].append(_pooled(capture.output, mask, pooling).float().cpu())
                capture.clear()
    return {name: linear_probe(torch.cat(parts), labels, seed=seed) for name, parts in found.items()}


def _features(output: Any) -> Tensor | None:
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    value = getattr(value, "last_hidden_state", value)
    return value if isinstance(value, Tensor) and value.is_floating_point() and 2 <= value.ndim <= 4 else None


def _pooled(output: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Return features [B, D] of an output."""
    if output.ndim == 4:
        return output.mean(dim=(2, 3))
    if output.ndim == 2:
        return output
    mask = output.new_ones(output.shape[:2], dtype=torch.bool) if mask is None else mask
    if pooling == "mean":
        return torch.where(mask.unsqueeze(-1), output, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, 0).amax(1)
    return output[torch.arange(len(output), device=output.device), last]
