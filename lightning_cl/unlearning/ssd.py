"""Selective synaptic dampening: weights that matter for the forget set far more than for all data are made small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import Unpack, override

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice, check_count, check_positive, select_parameters
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence, RequestStream
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import ParameterState, local, reshard, sum_over_shards
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import task_batches
from lightning_cl.functional.unlearning import dampen_weights_, subtract_importance_
from lightning_cl.unlearning.importances import (
    Importance,
    SteppedModule,
    importance_estimator,
    importance_sums,
    numbered,
)
from lightning_cl.unlearning.request_callback import RequestCallback, RequestSettings

__all__ = ["SelectiveSynapticDampening", "dampen_"]


def dampen_(
    module: nn.Module,
    forget: Iterable[Any],
    full: Iterable[Any],
    *,
    alpha: float = 10.0,
    lambda_: float = 1.0,
    importance: Importance = "fisher",
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    logits: str | None = None,
    batch_adapter: BatchAdapter | None = None,
) -> int:
    r"""Make weights small that matter for the forget set far more than for all data, in place and without training.

    .. math:: \theta_i \leftarrow \min\left( \lambda \frac{I_{D,i}}{I_{f,i}}, 1 \right) \theta_i
        \quad \text{where } I_{f,i} > \alpha I_{D,i}

    An importance is a mean over samples of a per-sample gradient, squared or absolute, in evaluation mode and in
    float32: it does not depend on the batch size, and published numbers of alpha, which come from squared gradients of
    batches, are not exactly ours. Buffers stay; what is frozen stays; a tied weight is dampened once.

    Args:
        module: A LightningModule, whose own ``training_step`` gives the loss, or any module.
        forget: Batches of the forget set, such as a DataLoader. On several ranks each gives its own share.
        full: Batches of all data, the forget set included.
        alpha: How many times more a weight must matter for the forget set; above 0. All data hold the forget set, so
            from (all samples) / (samples to forget) on it selects nothing; infinite says so without a warning.
        lambda_: :math:`\lambda`, how much of a selected weight stays; above 0.
        importance: ``"fisher"``: squared gradients of the loss (SSD). ``"sensitivity"``: absolute gradients of the
            squared norm of the output, without labels (LFSSD).
        loss: The loss of a batch, a mean over its samples, called with the module and the batch. By default that of the
            ``training_step``; of other modules ``module(**batch).loss`` for a mapping, and else the cross-entropy.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to dampen; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave alone.
        logits: Name of the submodule that returns the class scores; found by itself in most modules.
        batch_adapter: Reads batches of an uncommon structure.

    Returns:
        How many weights were dampened.

    Raises:
        ValueError: For a setting out of range, and for an empty iterable.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> inputs, labels = torch.eye(3).repeat(8, 1), torch.arange(3).repeat(8)
        >>> module = nn.Linear(3, 3, bias=False)
        >>> _ = module.load_state_dict({"weight": 4 * torch.eye(3)})
        >>> full = [(inputs, labels)]
        >>> dampen_(module, [(inputs[labels == 2], labels[labels == 2])], full, alpha=2.0)
        3
        >>> module.weight.detach().diagonal()  # the rows of one sample in three: a third of the importance for all
        tensor([4.0000, 4.0000, 1.3333])
    """
    _check_settings(alpha, lambda_)
    parameters = select_parameters(module, include, exclude)
    adapter = batch_adapter or BatchAdapter()
    stepped = module
    if loss is not None or not isinstance(module, LightningModule):
        stepped = SteppedModule(module, loss, adapter, labelled=importance == "fisher")
        parameters = {f"module.{name}": parameter for name, parameter in parameters.items()}
        logits = None if logits is None else f"module.{logits}"
    assert isinstance(stepped, LightningModule)
    estimator = importance_estimator(importance, adapter, logits)
    means: list[dict[str, Tensor]] = []
    counts: list[float] = []
    for batches in (forget, full):
        moved = (move_data_to_device(batch, stepped.device) for batch in batches)
        sums, count = importance_sums(estimator, numbered(moved, adapter), stepped, parameters, seed=0)
        means.append({name: value.div_(count) for name, value in sums.items()})
        counts.append(count)
    _warn_of_bound(alpha, counts[0], counts[1])
    return _dampen(parameters, means[0], means[1], alpha, lambda_)


class SelectiveSynapticDampening(RequestCallback):
    r"""Serve a request by one edit: make weights small that matter for its samples far more than for all data.

    .. math:: \theta_i \leftarrow \min\left( \lambda \frac{I_{D,i}}{I_{f,i}}, 1 \right) \theta_i
        \quad \text{where } I_{f,i} > \alpha I_{D,i}

    with importances as :func:`dampen_` measures them, :math:`I_D` over all that was learned and not forgotten before,
    the samples of this request included. No step is trained. Without a stream, all data are the batches to forget and
    to retain that the loader yields in an epoch.

    Args:
        alpha: How many times more a weight must matter for the forget set; above 0. From (all samples) / (samples to
            forget) on it selects nothing, which a warning says.
        lambda_: :math:`\lambda`, how much of a selected weight stays; above 0.
        importance: ``"fisher"`` (SSD) or ``"sensitivity"`` (LFSSD, without labels).
        full: How :math:`I_D` comes about at a second request. ``"recomputed"``: from all samples anew.
            ``"reduced"``: the sums of the last request are kept, less what it forgot. Only samples that were learned
            since are read; those of older ones are gradients of the weights then.
        n_samples: Retained samples to measure on, over all ranks; all if ``None``. They stand for the others.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to dampen; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave alone.
        settings: Those of :class:`~lightning_cl.unlearning.RequestSettings`.

    Attributes:
        num_dampened: Weights that the last request dampened.

    Raises:
        ValueError: For a setting out of range; at a request for a pattern that matches nothing, and if nothing is
            retained.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="ssd",
        family="unlearning",
        paper="Foster et al. 2024, arXiv:2308.07707; without labels arXiv:2402.19308",
        needs="all learned samples once per request; class scores where labels are left out",
        state="the ledger; 1 float32 per parameter where reduced",
    )
    edits_at_once: ClassVar[bool] = True

    def __init__(
        self,
        alpha: float = 10.0,
        *,
        lambda_: float = 1.0,
        importance: Importance = "fisher",
        full: Literal["recomputed", "reduced"] = "recomputed",
        n_samples: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        **settings: Unpack[RequestSettings],
    ) -> None:
        super().__init__(**settings)
        _check_settings(alpha, lambda_)
        check_choice("full", full, ("recomputed", "reduced"))
        if n_samples is not None:
            check_count("n_samples", n_samples)
        self.alpha = alpha
        self.lambda_ = lambda_
        self.importance = importance
        self.full = full
        self.n_samples = n_samples
        self.include = include
        self.exclude = exclude
        self.num_dampened = 0
        self.estimator = importance_estimator(importance, self.adapter, self.logits)
        # of "reduced": sums over the samples that the last request left, and which these are
        self._sums = ParameterState()
        self._covered = torch.empty(0, dtype=torch.int64)

    @override
    def serve_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        # the weights of sharded units that the measurement before gathered are no shards
        reshard(pl_module)
        parameters = select_parameters(pl_module, self.include, self.exclude)
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(stream, RequestStream):
            forget, full = self._of_stream(trainer, pl_module, task, stream, parameters)
        else:
            forget, full = self._of_loader(trainer, pl_module, parameters)
        self.num_dampened = _dampen(parameters, forget, full, self.alpha, self.lambda_)

    def _of_stream(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        task: Task,
        stream: RequestStream,
        parameters: Mapping[str, Parameter],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the importances of the request's samples and of all, and keep what the next request needs."""
        forgotten, retained = stream.forgotten_ids(task), stream.retained_ids(task)
        if not len(retained):
            raise ValueError(
                f"Request {task.name!r} leaves nothing that was learned, so no weight matters for it more than for all"
                " data. Train the module anew."
            )
        self._sums.place(parameters, f"The importances kept by `{type(self).__name__}`")
        seed = derived_seed(self.seed, "importance", task.index)

        def sums_over(sample_ids: Tensor, n_samples: int | None = None) -> dict[str, Tensor]:
            if not len(sample_ids):
                return {n: torch.zeros_like(local(p.detach()), dtype=torch.float32) for n, p in parameters.items()}
            batches = task_batches(trainer, pl_module, self.adapter, n_samples, sample_ids)
            sums, count = importance_sums(self.estimator, batches, pl_module, parameters, seed)
            return {name: value.mul_(len(sample_ids) / count) for name, value in sums.items()}

        known = torch.isin(forgotten, self._covered)
        older, newer = sums_over(forgotten[known]), sums_over(forgotten[~known])
        kept = sums_over(retained[~torch.isin(retained, self._covered)], self.n_samples)
        for name, value in self._sums.items():
            kept[name] += value
        forget = {name: (older[name] + newer[name]) / len(forgotten) for name in parameters}
        # what was known stands in what is kept, with the gradients of then
        full = {name: (kept[name] + newer[name]) / (len(forgotten) + len(retained)) for name in parameters}
        _warn_of_bound(self.alpha, len(forgotten), len(forgotten) + len(retained))
        if self.full == "reduced":
            subtract_importance_([kept[name] for name in parameters], [older[name] for name in parameters])
            self._sums.set(kept, parameters)
            self._covered = retained
        return forget, full

    def _of_loader(
        self, trainer: Trainer, pl_module: LightningModule, parameters: Mapping[str, Parameter]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the importances of the batches to forget and of all, from a loader of the user's own."""
        if self.full == "reduced" or self.n_samples is not None:
            raise ValueError(
                f"`{type(self).__name__}(full={self.full!r}, n_samples={self.n_samples})` needs samples with"
                " identities. Use `UnlearningDataModule`, or leave both at their defaults."
            )
        sums, counts = [], []
        for part in ("forget", "retain"):
            of_part = self._parts(trainer, pl_module, part)
            found, count = importance_sums(self.estimator, of_part, pl_module, parameters, self.seed)
            sums.append(found)
            counts.append(count)
        _warn_of_bound(self.alpha, counts[0], sum(counts))
        full = {name: (sums[0][name] + sums[1][name]) / sum(counts) for name in parameters}
        return {name: value.div_(counts[0]) for name, value in sums[0].items()}, full

    def _parts(self, trainer: Trainer, pl_module: LightningModule, part: str) -> Iterator[tuple[Any, Tensor]]:
        """Yield the batches to forget, or to retain, of an epoch of the loader."""

        def read() -> Iterator[Any]:
            for batch, _ in task_batches(trainer, pl_module, self.adapter):
                if not isinstance(batch, Mapping) or part not in batch:
                    raise ValueError(
                        f"`{type(self).__name__}` needs batches of the form {{'forget': batch, 'retain': batch}}: what"
                        " is important is so beside what stays. Give loaders of both, or use `UnlearningDataModule`."
                    )
                if batch[part] is not None:
                    yield batch[part]

        return numbered(read(), self.adapter)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if self.full != "reduced":
            return []
        # what was taken off are the gradients of now, not those that had been added
        return [Influence(type(self).__name__, "sums of importances", "remains")]

    # ------------------------------------------------------------------ memory and checkpoints

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        parameters = select_parameters(pl_module, self.include, self.exclude)
        return Footprint(device=4 * sum(local(p).numel() for p in parameters.values()) * (self.full == "reduced"))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "by_sample": self.estimator.by_sample,
            "sums": self._sums.state_dict(),
            "covered": self._covered,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.estimator.by_sample = state_dict["by_sample"]
        self._sums.load_state_dict(state_dict["sums"])
        self._covered = state_dict["covered"]


def _check_settings(alpha: float, lambda_: float) -> None:
    check_positive("alpha", alpha)
    check_positive("lambda_", lambda_)


def _warn_of_bound(alpha: float, num_forgotten: float, num_all: float) -> None:
    """Warn where the forget set is so large a part of all data that its importance cannot exceed theirs by alpha."""
    if num_all / num_forgotten <= alpha < math.inf:
        share = num_all / num_forgotten
        rank_zero_warn(
            f"`alpha={alpha}` selects nothing: the samples to forget are 1 in {share:.3g} of all, so no weight matters"
            f" for them more than {share:.3g} times as much as for all. Use a smaller `alpha`."
        )


def _dampen(
    parameters: Mapping[str, Parameter],
    forget: Mapping[str, Tensor],
    full: Mapping[str, Tensor],
    alpha: float,
    lambda_: float,
) -> int:
    """Dampen parameters, or this rank's shards of them, by local importances; return how many weights of all ranks."""
    counts = {
        name: torch.tensor(
            dampen_weights_([local(p.detach())], [full[name]], [forget[name]], alpha=alpha, lambda_=lambda_),
            device=p.device,
        )
        for name, p in parameters.items()
    }
    return int(sum_over_shards(counts, parameters))
