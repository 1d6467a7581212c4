"""Spike-aware clipping and momentum resets around the user's optimizer (Huang et al. 2025, arXiv:2501.06842)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count, check_positive
from lightning_cl.core.requests import Influence
from lightning_cl.core.state import local, sum_rows_over_shards
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.reset_state import reset_state
from lightning_cl.functional.spam import clip_spikes_, count_spikes, warmup_scale
from lightning_cl.optim.base import MomentResetOptimizer
from lightning_cl.optim.states import (
    decays_weights_apart,
    has_second_moment,
    second_moment,
    steps_taken,
)

__all__ = ["SpikeAware"]

# weights clipped at a time: what is copied for it stays small
_CHUNK = 2**24
# what a warm-up changes in a group
_SCALED = ("params", "lr", "weight_decay")


class SpikeAware(ContinualCallback):
    r"""Clip gradient spikes, and reset the moments of the module's own optimizer at intervals and for new tasks.

    Around an optimizer with a second moment :math:`v`, such as Adam, AdamW or their forms in 8 bits, this is what
    :class:`~lightning_cl.optim.SPAM` does inside of one. In the :math:`k`-th step since its moments were last reset
    (from 0) a weight's gradient is clipped before the step,

    .. math:: g \leftarrow \operatorname{sign}(g) \sqrt{\theta v} \quad \text{where } g^2 > \theta v > 0,
        \text{ if } k \ge d,

    with :math:`v` of the steps before, without bias correction. After every :math:`\Delta T` gradients, and at the
    start of every task but the first, the optimizer begins anew: moments and bias correction. The learning rate of the
    :math:`N` steps after that is multiplied by :math:`s_k = 1 - 0.99 (1 + \cos \frac{\pi k}{N + 1}) / 2`, while the
    optimizer moves the weights: no scheduler sees it, and none of Lightning's hooks. Decoupled weight decay is not
    scaled. Over :class:`torch.optim.AdamW` every step is that of ``SPAM``, where nothing clips in between.

    :math:`k` is counted for every parameter by itself, so that one that was held for a while has resets and a warm-up
    of its own.

    Args:
        threshold: :math:`\theta`; above 0. 5000 in the paper.
        reset_interval: :math:`\Delta T`, 1 or more; 500 in the paper; ``None`` for no resets on schedule.
        warmup_steps: :math:`N`, 0 or more; 150 in the paper.
        clip_delay: :math:`d`, 1 or more: steps after a reset without clipping, until :math:`v` is an estimate; 20 in
            the authors' code.
        reset_at_task: Whether a new task resets the moments too. A stream that hides its boundaries tells of none.

    Attributes:
        count_clipped: Whether to fill ``clipped``, which takes two more passes over the gradients; a callback that
            wants to know sets it before the step and clears it in its ``teardown``.
        clipped: How many elements of each parameter the last step clipped, over all shards, by name; parameters that
            were not yet clipped at that age, or had no gradient, are left out.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for an optimizer without a second moment (after
            the first step if only its state can show that, as of one that keeps it for some parameters only), and for
            ``SPAM`` and its like, which clip by themselves.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="spike-aware",
        family="optimization",
        paper="Huang et al. 2025, arXiv:2501.06842",
        needs="an optimizer with a second moment",
        state="names of parameters",
    )
    acts_on: ClassVar[tuple[Literal["learn", "forget"], ...]] = ("learn", "forget")
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "unused"

    def __init__(
        self,
        threshold: float = 5000.0,
        *,
        reset_interval: int | None = 500,
        warmup_steps: int = 150,
        clip_delay: int = 20,
        reset_at_task: bool = True,
    ) -> None:
        check_positive("threshold", threshold)
        if reset_interval is not None:
            check_count("reset_interval", reset_interval)
        check_positive("warmup_steps", warmup_steps, zero_allowed=True)
        check_count("clip_delay", clip_delay)
        if reset_interval is not None and reset_interval <= clip_delay and threshold < math.inf:
            raise ValueError(
                f"`reset_interval={reset_interval}` leaves no step that is clipped after `clip_delay={clip_delay}`:"
                " make one longer or the other shorter, or clip nothing (`threshold=float('inf')`)."
            )
        self.threshold = threshold
        self.reset_interval = reset_interval
        self.warmup_steps = warmup_steps
        self.clip_delay = clip_delay
        self.reset_at_task = reset_at_task
        self.count_clipped = False
        self.clipped: dict[str, int] = {}
        # parameters whose moments were ever reset: the very first steps are not warmed up
        self._reset: set[str] = set()
        self._optimizers: dict[Optimizer, _Watched] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what has hooks in an optimizer."""
        return self.__dict__ | {"_optimizers": {}}

    # ---------------------------------------------------------------------- when a fit, a task or a step begins

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go()
        for optimizer in trainer.optimizers:
            name = type(optimizer).__name__
            if isinstance(optimizer, MomentResetOptimizer):
                raise ValueError(
                    f"`{name}` clips spikes and resets its moments by itself: leave `SpikeAware` out, or use"
                    " `torch.optim.AdamW` with it."
                )
            if has_second_moment(optimizer) is False:
                raise ValueError(_no_second_moment(name))

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if task.index == 0 or not self.reset_at_task:
            return
        for optimizer in trainer.optimizers:
            reset_state(optimizer)
        # also of an optimizer that was built for this fit: it is warmed up as one that goes on
        self._reset |= {name for name, _ in pl_module.named_parameters()}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # a stream may build its optimizers anew at a boundary
        for gone in self._optimizers.keys() - set(trainer.optimizers):
            self._optimizers.pop(gone).let_go()
        for optimizer in trainer.optimizers:
            self._watched(optimizer)

    @override
    def limit_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        watched = self._watched(step.optimizer)
        spiky: dict[str, Parameter] = {}
        scales: dict[Parameter, float] = {}
        for name, parameter in step.parameters.items():
            if parameter.grad is None or (age := watched.age(parameter)) is None:
                continue
            if self.reset_interval is not None and age >= self.reset_interval:
                step.optimizer.state.pop(parameter)
                self._reset.add(name)
                age = 0
            if age >= self.clip_delay:
                spiky[name] = parameter
            if name in self._reset and age < self.warmup_steps:
                scales[parameter] = warmup_scale(age, self.warmup_steps)
        self._clip(step.optimizer, spiky)
        watched.scales = scales

    @override
    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        watched = self._watched(step.optimizer)
        watched.end_step()
        stepped = {name: parameter for name, parameter in step.parameters.items() if parameter.grad is not None}
        watched.count(stepped.values())
        watched.check(stepped)

    def _watched(self, optimizer: Optimizer) -> _Watched:
        if optimizer not in self._optimizers:
            self._optimizers[optimizer] = _Watched(optimizer)
        return self._optimizers[optimizer]

    def _let_go(self) -> None:
        for watched in self._optimizers.values():
            watched.let_go()
        self._optimizers = {}

    def _clip(self, optimizer: Optimizer, parameters: dict[str, Parameter]) -> None:
        gradients: list[Tensor] = []
        moments: list[Tensor] = []
        counts: list[Tensor] = []
        counted: list[str] = []
        waiting = 0
        for name, parameter in parameters.items():
            moment = second_moment(optimizer, parameter)
            if moment is None or parameter.grad is None:
                continue
            gradients.append(local(parameter.grad))
            moments.append(moment)
            if self.count_clipped:
                counted.append(name)
                counts.append(count_spikes(gradients[-1], moment, self.threshold)[0])
            waiting += moment.numel()
            if waiting >= _CHUNK:
                clip_spikes_(gradients, moments, self.threshold)
                gradients, moments, waiting = [], [], 0
        clip_spikes_(gradients, moments, self.threshold)
        if self.count_clipped:
            self.clipped = {}
            if counts:
                totals = sum_rows_over_shards(torch.stack(counts), [parameters[name] for name in counted])
                self.clipped = {name: int(total) for name, total in zip(counted, totals.tolist(), strict=True)}

    # ---------------------------------------------------------------------- state

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go()

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        # nothing of samples is kept
        return []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"reset": sorted(self._reset)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._reset = set(state_dict["reset"])
        # ages are read anew
        self._let_go()


# -------------------------------------------------------------------------- one optimizer


@dataclass
class _Watched:
    """An optimizer: the ages of its moments, and its groups while a step is warmed up."""

    optimizer: Optimizer
    # factors of the learning rate of the step that comes, where they are not 1
    scales: dict[Parameter, float] = field(default_factory=dict)
    _checked: set[Parameter] = field(default_factory=set)
    # counters that may lie on a device, with their values: it is waited for once after a reset
    _counters: dict[Parameter, tuple[Tensor, int]] = field(default_factory=dict)
    # while a step is warmed up: the groups, and the parts that stand in for each
    _groups: list[tuple[dict[str, Any], list[dict[str, Any]]]] | None = None
    _handle: RemovableHandle = field(init=False)

    def __post_init__(self) -> None:
        """Hear of its steps."""
        self._handle = self.optimizer.register_step_pre_hook(self._enter)

    def let_go(self) -> None:
        """Leave the optimizer as it was."""
        self._handle.remove()
        self.end_step()

    def age(self, parameter: Parameter) -> int | None:
        """Return how many gradients the moments of a parameter have seen, ``None`` where that is not known."""
        count = steps_taken(self.optimizer, parameter)
        if not isinstance(count, Tensor):
            return count
        counter, value = self._counters.get(parameter, (None, 0))
        if counter is not count:
            value = int(count)
            self._counters[parameter] = count, value
        return value

    def count(self, stepped: Iterable[Parameter]) -> None:
        """Count a step that the optimizer took."""
        for parameter in stepped:
            if parameter in self._counters:
                counter, value = self._counters[parameter]
                self._counters[parameter] = counter, value + 1

    def check(self, stepped: dict[str, Parameter]) -> None:
        """Refuse an optimizer whose state shows no second moment, or not how old it is."""
        new = {name: parameter for name, parameter in stepped.items() if parameter not in self._checked}
        if not new:
            return
        name = type(self.optimizer).__name__
        missing = [known for known, parameter in new.items() if second_moment(self.optimizer, parameter) is None]
        if len(missing) == len(new) and not self._checked:
            raise ValueError(_no_second_moment(name))
        if missing:
            raise ValueError(
                f"`SpikeAware` clips gradients against the running average of their squares, which `{name}` does not"
                f" keep for {', '.join(missing)}. Use `torch.optim.AdamW`, or another optimizer that keeps it for all."
            )
        if all(steps_taken(self.optimizer, parameter) is None for parameter in new.values()):
            raise ValueError(
                f"`SpikeAware` resets moments by the age of each parameter's, but `{name}` keeps no `step` in their"
                " state. Use `torch.optim.AdamW`, or another optimizer that keeps one."
            )
        self._checked.update(new.values())

    def _enter(self, _: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Scale right before the weights move, where nobody else looks: after the closure, if there is one."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._scale()
            return None
        closed = functools.partial(self._close, closure)
        if len(args) > 1:
            return (args[0], closed, *args[2:]), kwargs
        return args, kwargs | {"closure": closed}

    def _close(self, closure: Callable[[], Any]) -> Any:
        self.end_step()
        loss = closure()
        self._scale()
        return loss

    def end_step(self) -> None:
        """Give the optimizer its own groups back."""
        if self._groups is not None:
            self.optimizer.param_groups[:] = [group for group, _ in self._groups]
            for group, parts in self._groups:
                for part in parts:
                    # what the step itself has noted in a group
                    group.update({key: value for key, value in part.items() if key not in _SCALED})
            self._groups = None

    @torch.no_grad()
    def _scale(self) -> None:
        # a step that calls that of its base class comes here twice
        if not self.scales or self._groups is not None:
            return
        # the groups themselves stay as they are
        self._groups = []
        for group in self.optimizer.param_groups:
            ages: dict[float, list[Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    ages.setdefault(self.scales.get(parameter, 1.0), []).append(parameter)
            # a group whose moments are all of one age stays whole
            whole = len(ages) <= 1
            parts = [self._part(group, s, group["params"] if whole else members) for s, members in ages.items()]
            self._groups.append((group, parts or [group]))
        self.optimizer.param_groups[:] = [part for _, parts in self._groups for part in parts]

    def _part(self, group: dict[str, Any], scale: float, parameters: list[Parameter]) -> dict[str, Any]:
        part = {**group, "params": parameters, "lr": group["lr"] * scale}
        if group.get("weight_decay") and decays_weights_apart(self.optimizer, group):
            part["weight_decay"] = group["weight_decay"] / scale
        return part


def _no_second_moment(name: str) -> str:
    return (
        f"`SpikeAware` clips gradients against the running average of their squares, which `{name}` does not keep. Use"
        " `torch.optim.AdamW` or another optimizer of Adam's family; to clip the gradients of any other, use"
        " `Trainer(gradient_clip_val=...)` or `ComponentClip`."
    )
