"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796; online form Schwarz et al. 2018)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.callbacks.fisher import Estimator, FisherEstimator
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice, check_gradients, check_positive, select_parameters
from lightning_cl.core.events import ContinualCallback
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import ParameterState, local, reshard, sum_over_shards
from lightning_cl.core.task import Task
from lightning_cl.functional.ewc import ewc_gradient_, ewc_penalty, merge_online_, merge_separate_

__all__ = ["EWC"]

# parameters, anchors and Fisher terms that one optimizer steps, matched by position
_Owned = tuple[list[torch.nn.Parameter], list[Tensor], list[Tensor]]


class EWC(ContinualCallback):
    r"""Hold the weights that mattered for earlier tasks near the values they had.

    From the second task on, the step minimises the task's loss plus

    .. math:: \frac{\lambda}{2} \sum_i F_i (\theta_i - \theta_i^*)^2,
        \qquad F = \frac{1}{N} \sum_{n=1}^{N} \left( \nabla_\theta \log p(y_n \mid x_n) \right)^2,

    with F a mean over **samples** of squared per-sample gradients, measured in evaluation mode at a task's end. The
    penalty acts as its gradient :math:`\lambda F (\theta - \theta^*)`, added once per optimizer step after unscaling
    and before clipping, which equals the penalty in the loss. Other libraries leave out the ½ or square the gradient of
    a batch; the page of the method converts their :math:`\lambda`.

    Args:
        strength: :math:`\lambda`; above 0. At 0.5 elsewhere without the ½ it is 1 here.
        fisher: Whose labels y are: ``"empirical"`` (the data's; the module's own loss, so any loss works),
            ``"sampled"`` (one draw from the model for each sample), ``"exact"`` (the expectation over the model's
            classes, one backward pass for each class), or ``"batched"``, a cheap approximation: the squared gradient of
            a batch's summed loss, which depends on the batch size and is no Fisher information.
        mode: ``"online"``: :math:`F \leftarrow \gamma F + F_{task}`, anchored at the latest weights; ``"separate"``:
            one quadratic per task around the weights at its end, folded into one, so that a step costs the same.
        decay: :math:`\gamma` of the online form, from 0 to 1.
        n_samples: Samples to measure F on, over all ranks; the whole task if ``None``.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to protect; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave free.
        logits: Name of the submodule that returns the class scores, for ``"sampled"`` and ``"exact"``; found by itself
            in most modules.
        batch_adapter: Reads batches of an uncommon structure.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, and for an
            estimator that the module cannot serve.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="ewc",
        family="regularisation",
        paper="Kirkpatrick et al. 2017, arXiv:1612.00796",
        needs="a loss that is a mean over samples; class scores for exact and sampled",
        state="2 float32 per parameter",
    )

    def __init__(
        self,
        strength: float,
        *,
        fisher: Estimator = "empirical",
        mode: Literal["online", "separate"] = "online",
        decay: float = 1.0,
        n_samples: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        logits: str | None = None,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        check_positive("strength", strength)
        check_choice("mode", mode, ("online", "separate"))
        if not 0 <= decay <= 1:
            raise ValueError(f"`decay` must be from 0 to 1, got {decay!r}.")
        if mode == "separate" and decay != 1.0:
            raise ValueError(f"`decay={decay}` belongs to `mode='online'`; separate quadratics do not fade.")
        if n_samples is not None:
            check_positive("n_samples", n_samples)
        self.strength = strength
        self.fisher = fisher
        self.mode = mode
        self.decay = decay
        self.include = include
        self.exclude = exclude
        self.estimator = FisherEstimator(fisher, batch_adapter or BatchAdapter(), n_samples, logits)
        self._checked = False
        self._fisher = ParameterState()
        self._anchors = ParameterState()
        self._constant = 0.0
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._owned: dict[int, _Owned] = {}

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here, and not in `setup`: only now are parameters sharded, on their device, and the state restored
        check_gradients(trainer, pl_module, self)
        # a validation before training may have left whole weights in their place
        reshard(pl_module)
        self._parameters = select_parameters(pl_module, self.include, self.exclude)
        self._fisher.place(self._parameters, "The Fisher information of `EWC`")
        self._anchors.place(self._parameters, "The anchors of `EWC`")
        self._owned = {}
        self._checked = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._checked:
            # what would fail at the task's end fails before the first step
            self.estimator.check(pl_module, self._parameters, batch)
            self._checked = True

    # ------------------------------------------------------------------ the penalty

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self._fisher:
            return
        parameters, anchors, fisher = self._owned_by(optimizer)
        if not all(parameter.requires_grad for parameter in parameters):
            # the penalty does not move what was frozen since the fit began
            free = [row for row, parameter in enumerate(parameters) if parameter.requires_grad]
            parameters = [parameters[row] for row in free]
            anchors, fisher = [anchors[row] for row in free], [fisher[row] for row in free]
        for parameter in parameters:
            if parameter.grad is None:
                # the penalty reaches a weight that this step's loss does not
                parameter.grad = torch.zeros_like(parameter)
        grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        weights = [local(parameter.detach()) for parameter in parameters]
        ewc_gradient_(grads, weights, anchors, fisher, self.strength)

    def _owned_by(self, optimizer: Optimizer) -> _Owned:
        """Return the protected parameters that ``optimizer`` steps; with several optimizers each is penalised once."""
        if id(optimizer) not in self._owned:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            names = [name for name in self._fisher if id(self._parameters[name]) in stepped]
            self._owned[id(optimizer)] = (
                [self._parameters[name] for name in names],
                [self._anchors[name] for name in names],
                [self._fisher[name] for name in names],
            )
        return self._owned[id(optimizer)]

    def penalty(self) -> Tensor:
        """Return the value of the penalty at the present weights, a scalar; ranks with shards must all call it."""
        if not self._fisher:
            return torch.zeros(())
        terms = {
            name: ewc_penalty([local(self._parameters[name].detach())], [self._anchors[name]], [fisher], self.strength)
            for name, fisher in self._fisher.items()
        }
        return sum_over_shards(terms, self._parameters) + 0.5 * self.strength * self._constant

    # ------------------------------------------------------------------ consolidation

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if thawed := select_parameters(pl_module, self.include, self.exclude).keys() - self._parameters.keys():
            rank_zero_warn(
                f"`EWC` does not protect {sorted(thawed)[:3]}, which became trainable after the fit began. Make them"
                " trainable before it, or leave them out by `exclude`."
            )
        new = self.estimator.estimate(trainer, pl_module, self._parameters, derived_seed("fisher", task.index))
        self._owned = {}
        names = list(self._parameters)
        weights = {name: local(p.detach()).to(new[name].dtype, copy=True) for name, p in self._parameters.items()}
        if not self._fisher:
            self._fisher.set(new, self._parameters)
            self._anchors.set(weights, self._parameters)
            return
        fisher, added = [self._fisher[name] for name in names], [new[name] for name in names]
        latest = [weights[name] for name in names]
        if self.mode == "online":
            merge_online_(fisher, added, self.decay)
            self._anchors.set(weights, self._parameters)
        else:
            rises = {
                name: merge_separate_([total], [self._anchors[name]], [term], [weight])
                for name, total, term, weight in zip(names, fisher, added, latest, strict=True)
            }
            self._constant += float(sum_over_shards(rises, self._parameters))

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        parameters = select_parameters(pl_module, self.include, self.exclude)

        def consolidate() -> Any:
            new = self.estimator.rehearse(pl_module, parameters, batch)
            return new, {name: local(p.detach()).to(new[name].dtype, copy=True) for name, p in parameters.items()}

        kept = sum(local(p).numel() * torch.promote_types(p.dtype, torch.float32).itemsize for p in parameters.values())
        # Fisher terms and anchors
        return Footprint(device=2 * kept, task_end=consolidate)

    # ------------------------------------------------------------------ checkpoints

    @property
    @override
    def state_key(self) -> str:
        # instances for different parameters live side by side in one Trainer and one checkpoint
        if self.include is None and self.exclude is None:
            return super().state_key
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "fisher": self._fisher.state_dict(),
            "anchors": self._anchors.state_dict(),
            "constant": self._constant,
            "by_sample": self.estimator.by_sample,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._fisher.load_state_dict(state_dict["fisher"])
        self._anchors.load_state_dict(state_dict["anchors"])
        self._constant = state_dict["constant"]
        self.estimator.by_sample = state_dict["by_sample"]
