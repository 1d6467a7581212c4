"""The optimizer's step: how callbacks act on gradients before it and on weights after it.

Lightning has no hook after a step of the optimizer; torch calls :meth:`~torch.optim.Optimizer.register_step_post_hook`
of one that was taken, and not of one that a gradient scaler skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.core.checks import check_gradients
from lightning_cl.core.hooks import overriding
from lightning_cl.core.state import local

if TYPE_CHECKING:
    from lightning_cl.core.callback import ContinualCallback

__all__ = ["OptimizerStep", "StepCache", "UpdatePipeline"]

_Value = TypeVar("_Value")

_BEFORE = ("observe_gradients", "change_gradients", "hold_gradients", "limit_gradients")
_AFTER = ("change_update", "observe_update")


class OptimizerStep:
    """One optimizer, and its step that is under way; the object stays the same while the optimizer does.

    Attributes:
        optimizer: The optimizer.
        parameters: The parameters that it steps, by name.
    """

    def __init__(self, optimizer: Optimizer, parameters: dict[str, Parameter]) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self._buffers: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def keep(self, names: Iterable[str]) -> None:
        """Copy the local shards of these weights before the step moves them, once for all callbacks that ask."""
        new = [name for name in names if name not in self._before]
        weights = [local(self.parameters[name].detach()) for name in new]
        for name, weight in zip(new, weights, strict=True):
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != weight.shape or buffer.device != weight.device:
                self._buffers[name] = torch.empty_like(weight)
            self._before[name] = self._buffers[name]
        if new:
            torch._foreach_copy_([self._before[name] for name in new], weights)

    def before(self, name: str) -> Tensor:
        """Return the local shard of a weight as it was before the step; :meth:`keep` must have copied it."""
        return self._before[name]

    def begin(self) -> None:
        """Forget the copies of the step before; their memory is used again."""
        self._before = {}

    def check_current(self, parameters: Mapping[str, Parameter], user: object) -> None:
        """Refuse a parameter in the place of one that a method keeps something for, as a head that grew has it.

        Args:
            parameters: What the method knows, by name.
            user: The callback.
        """
        for name, parameter in parameters.items():
            if self.parameters.get(name, parameter) is not parameter:
                raise ValueError(
                    f"`{type(user).__name__}` keeps state for {name!r}, but another parameter has taken its place since"
                    " the fit began: it would train unprotected. Leave it out by `exclude`, or give a head that grows"
                    " all its rows from the beginning."
                )


class StepCache(WeakKeyDictionary[OptimizerStep, Any], Generic[_Value]):
    """What a callback has found out about each optimizer, for as long as that lives; a copy of it is empty."""

    @override
    def __reduce__(self) -> tuple[type[StepCache[_Value]], tuple[()]]:
        return type(self), ()

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> StepCache[_Value]:
        return type(self)()

    @override
    def __getitem__(self, step: OptimizerStep) -> _Value:
        value: _Value = super().__getitem__(step)
        return value


class UpdatePipeline:
    """Calls the hooks of every callback around each step of each optimizer.

    Args:
        trainer: The running Trainer.
        pl_module: The user's module, its parameters sharded and on their device.
        callbacks: In the order of ``trainer.callbacks``.

    Raises:
        ValueError: If a callback acts on gradients that the run cannot show it, or on steps of ``LBFGS``.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[ContinualCallback]) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._gradient_hooks, self._weight_hooks = (
            [(callback, hook) for hook in hooks for callback in overriding(callbacks, hook)]
            for hooks in (_BEFORE, _AFTER)
        )
        self._steps: dict[Optimizer, tuple[OptimizerStep, list[int]]] = {}
        self._handles: dict[Optimizer, list[Any]] = {}
        # a step that calls that of its base class has hooks around both: how many are under way
        self._entered: Counter[Optimizer] = Counter()
        # the steps that Lightning has announced and the optimizer has not taken
        self._announced: set[Optimizer] = set()
        self._names = sorted({type(c).__name__ for hook in (*_BEFORE, *_AFTER) for c in overriding(callbacks, hook)})
        for hook in _BEFORE:
            for callback in overriding(callbacks, hook):
                check_gradients(trainer, pl_module, callback)
        if self._names:
            for optimizer in trainer.optimizers:
                if isinstance(optimizer, torch.optim.LBFGS):
                    raise ValueError(
                        f"{', '.join(self._names)} act once per optimizer step, but `LBFGS` evaluates gradients several"
                        " times in one. Use another optimizer."
                    )
                self._watch(optimizer)

    def begin_batch(self) -> None:
        """Forget steps that an error has left under way."""
        self._entered.clear()

    def before(self, optimizer: Optimizer) -> None:
        """Run what comes before a step: called where gradients are unscaled and not yet clipped."""
        if not self._names:
            return
        self._announced.add(optimizer)
        step = self._step_of(optimizer)
        step.begin()
        self._run(self._gradient_hooks, step)

    def detach(self) -> None:
        """Take the hooks off all optimizers."""
        for handle in chain.from_iterable(self._handles.values()):
            handle.remove()
        self._handles, self._steps = {}, {}

    def _step_of(self, optimizer: Optimizer) -> OptimizerStep:
        # a head that grows, or is replaced, changes them
        stepped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        if optimizer not in self._steps or self._steps[optimizer][1] != stepped:
            ids = set(stepped)
            named = self._pl_module.named_parameters()
            step = OptimizerStep(optimizer, {name: p for name, p in named if id(p) in ids})
            # a stream may build its optimizers anew at a boundary
            self._steps = {o: known for o, known in self._steps.items() if o in self._trainer.optimizers}
            self._steps[optimizer] = step, stepped
        if optimizer not in self._handles:
            # first seen inside its own step, whose hooks are read after it
            self._watch(optimizer)
        return self._steps[optimizer][0]

    def _watch(self, optimizer: Optimizer) -> None:
        before = optimizer.register_step_pre_hook(self._enter)
        self._handles[optimizer] = [before, optimizer.register_step_post_hook(self._after)]

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._entered[optimizer] += 1

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._entered[optimizer] = max(self._entered[optimizer] - 1, 0)
        if self._entered[optimizer]:
            return
        if optimizer not in self._announced:
            raise ValueError(
                f"{', '.join(self._names)} did not hear of a step of `{type(optimizer).__name__}`: it was stepped"
                " behind Lightning's back. Under manual optimization step what `self.optimizers()` returns."
            )
        self._announced.discard(optimizer)
        self._run(self._weight_hooks, self._steps[optimizer][0])

    @torch.no_grad()
    def _run(self, hooks: Sequence[tuple[ContinualCallback, str]], step: OptimizerStep) -> None:
        for callback, hook in hooks:
            if not callback.resting:
                getattr(callback, hook)(self._trainer, self._pl_module, step)
