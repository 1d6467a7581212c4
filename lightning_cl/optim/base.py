"""What the spike-aware optimizers share: their settings, their clock, their state and how it is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.optim.loading import adopted_groups, check_moments
from lightning_cl.optim.moments import MOMENTS, StateDtype, Storage, local

__all__ = ["Bucket", "MomentResetOptimizer", "moves_together"]

Group = dict[str, Any]


@dataclass
class Bucket:
    """Parameters of one group that are stepped alike: on one device, of one dtype, at one point of their clock.

    Attributes:
        group: Their settings.
        step: Gradients that the moments hold, this one not included.
        resets: How often the moments were reset.
        parameters: The parameters, sharded or not.
        weights: Local shards of the parameters.
        gradients: Local shards of the gradients, in the dtype of the moments.
        firsts: Local first moments.
        seconds: Local second moments.
    """

    group: Group
    step: int
    resets: int
    parameters: list[Parameter]
    weights: list[Tensor]
    gradients: list[Tensor]
    firsts: list[Tensor]
    seconds: list[Tensor]

    @property
    def foreach(self) -> bool:
        """Whether to move all tensors together."""
        return moves_together(self.group, self.weights)


def moves_together(group: Group, tensors: Sequence[Tensor]) -> bool:
    """Return whether a group's tensors are moved in a few kernels: as it says, or where they are not on the CPU."""
    wanted: bool | None = group["foreach"]
    return tensors[0].device.type != "cpu" if wanted is None else wanted


class MomentResetOptimizer(Optimizer, ABC):
    """An optimizer with Adam's state, whose moments are reset at intervals.

    The state of a parameter is that of :class:`torch.optim.AdamW` (``step`` counts from the last reset) and ``resets``:
    a checkpoint of AdamW can be gone on with, and no counter lies outside of what a checkpoint holds. Moments that hold
    as many gradients as ``reset_interval`` by then are reset by the next step.
    """

    @override
    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            for parameter in group["params"]:
                if parameter.is_complex():
                    raise ValueError(f"`{type(self).__name__}` steps real parameters only, got {parameter.dtype}.")
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: Group) -> None:
        """Refuse settings that make no sense."""
        beta1, beta2 = group["betas"]
        if not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
            raise ValueError(f"`betas` must be from 0 to below 1, got {group['betas']}.")
        for name in ("lr", "weight_decay", "warmup_steps"):
            if not group[name] >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {group[name]!r}.")
        if not group["eps"] > 0:
            raise ValueError(f"`eps` must be above 0, got {group['eps']!r}.")
        interval = group["reset_interval"]
        if interval is not None and not interval >= 1:
            raise ValueError(f"`reset_interval` must be 1 or more, or None for no resets, got {interval!r}.")
        if group["state_dtype"] not in (None, *get_args(StateDtype)):
            raise ValueError(
                f"`state_dtype` must be None or one of {get_args(StateDtype)}, got {group['state_dtype']!r}."
            )

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, parameter, _ in self._numbered():
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ValueError(
                    f"`{type(self).__name__}` needs dense gradients, but that of parameter {number} of shape"
                    f" {tuple(parameter.shape)} is sparse. Build its embedding with `sparse=False`."
                )
        members: list[list[tuple[int, Parameter]]] = [[] for _ in self.param_groups]
        for number, parameter, row in self._numbered():
            gradient = parameter.grad
            if gradient is not None:
                if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
                    _reduce(gradient, parameter)
                if not self.state[parameter]:
                    self.state[parameter].update(self._new_state(parameter, self.param_groups[row], number))
                members[row].append((number, parameter))
        self._prepare_gradients(members)
        for group, own in zip(self.param_groups, members, strict=True):
            self._step_group(group, own)
        return loss

    def _prepare_gradients(self, members: list[list[tuple[int, Parameter]]]) -> None:
        """Change the gradients of the numbered parameters of every group in place, before the first one moves."""

    def _step_group(self, group: Group, members: list[tuple[int, Parameter]]) -> None:
        buckets: dict[tuple[Any, ...], list[tuple[int, Parameter]]] = {}
        for number, parameter in members:
            state = self.state[parameter]
            if state["resets"].device != state["step"].device:
                # Lightning moves what it does not know by name, and a GPU would be waited for
                state["resets"] = state["resets"].to(state["step"].device)
            step, resets = int(state["step"].item()), int(state["resets"].item())
            if group["reset_interval"] is not None and step >= group["reset_interval"]:
                self._reset(parameter, group, number)
                step, resets = 0, resets + 1
            direct = self._storage(parameter, group).direct
            # what is kept in another form is worked on one after the other, to hold one copy at a time
            key = (parameter.device, parameter.dtype, step, resets, None if direct else number)
            buckets.setdefault(key, []).append((number, parameter))
        for (_, _, step, resets, _), alike in buckets.items():
            self._step_bucket(group, step, resets, alike)

    def _step_bucket(self, group: Group, step: int, resets: int, members: list[tuple[int, Parameter]]) -> None:
        parameters = [parameter for _, parameter in members]
        states = [self.state[parameter] for parameter in parameters]
        storages = [self._storage(parameter, group) for parameter in parameters]
        firsts, seconds = (
            [storage.read(state, key) for storage, state in zip(storages, states, strict=True)] for key in MOMENTS
        )
        gradients = [local(p.grad).to(m.dtype) for p, m in zip(parameters, firsts, strict=True) if p.grad is not None]
        weights = [local(parameter) for parameter in parameters]
        self._update(Bucket(group, step, resets, parameters, weights, gradients, firsts, seconds))
        for (number, _), storage, state, m, v in zip(members, storages, states, firsts, seconds, strict=True):
            for key, values in zip(MOMENTS, (m, v), strict=True):
                storage.write(state, key, values, (group.get("seed", 0), number, resets, step))
            state["step"] += 1

    @abstractmethod
    def _update(self, bucket: Bucket) -> None:
        """Move weights and moments in place."""

    # ------------------------------------------------------------------ state

    def _numbered(self) -> Iterator[tuple[int, Parameter, int]]:
        """Yield every parameter with its number among all, and that of its group."""
        rows = ((p, row) for row, group in enumerate(self.param_groups) for p in group["params"])
        for number, (parameter, row) in enumerate(rows):
            yield number, parameter, row

    def _storage(self, parameter: Parameter, group: Group) -> Storage:
        return Storage(parameter, group["state_dtype"])

    def _new_state(self, parameter: Parameter, group: Group, number: int) -> dict[str, Any]:
        return {**self._clock(parameter, group), **self._storage(parameter, group).create()}

    def _clock(self, parameter: Parameter, group: Group) -> dict[str, Any]:
        device = parameter.device if group.get("capturable") else "cpu"
        # not `torch.zeros`, whose value a plan that runs without values would not know
        return {key: torch.tensor(0.0, device=device) for key in ("step", "resets")}

    def _reset(self, parameter: Parameter, group: Group, number: int, *, anew: bool = False) -> None:
        """Set the moments of one parameter to zero, and start its bias correction anew.

        With ``anew`` nothing may be kept, as at the start of a task.
        """
        state = self.state[parameter]
        state |= self._storage(parameter, group).create()
        state["step"].zero_()
        state["resets"] += 1

    @torch.no_grad()
    def reset_moments(self, parameters: Iterable[Parameter] | None = None) -> None:
        """Reset the moments that hold gradients, as at the start of a new task; the steps after it are warmed up.

        Args:
            parameters: Those whose moments are reset; all if ``None``.
        """
        chosen = None if parameters is None else {id(parameter) for parameter in parameters}
        for number, parameter, row in self._numbered():
            state = self.state.get(parameter)
            if state and state["step"] > 0 and (chosen is None or id(parameter) in chosen):
                self._reset(parameter, self.param_groups[row], number, anew=True)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or go on from one of torch's Adam or AdamW.

        Args:
            state_dict: What ``state_dict`` of either returned.

        Raises:
            ValueError: If it is of an optimizer without Adam's moments, or one that steps otherwise; for moments of
                other shapes, or in other bits.
        """
        name, saved = type(self).__name__, state_dict["param_groups"]
        if [len(group["params"]) for group in saved] == [len(group["params"]) for group in self.param_groups]:
            ours = all(group.keys() >= self.defaults.keys() for group in saved)
            state_dict = {**state_dict, "param_groups": adopted_groups(saved, self.param_groups, name)}
            for _, parameter, row, values in self._saved(state_dict):
                storage = self._storage(parameter, state_dict["param_groups"][row])
                self._check_state(values)
                check_moments(parameter, storage, values, name=name, ours=ours)
        # refuses other groups by itself
        super().load_state_dict(state_dict)
        for number, parameter, row, values in self._saved(state_dict):
            # torch has cast the state to the dtype of the parameter
            self.state[parameter] = self._restored(parameter, self.param_groups[row], number, values)

    def _saved(self, state_dict: dict[str, Any]) -> Iterator[tuple[int, Parameter, int, dict[str, Any]]]:
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for (number, parameter, row), key in zip(self._numbered(), keys, strict=True):
            if values := state_dict["state"].get(key):
                yield number, parameter, row, values

    def _check_state(self, values: dict[str, Any]) -> None:
        """Refuse the state of a parameter that this optimizer cannot go on from."""

    def _restored(self, parameter: Parameter, group: Group, number: int, values: dict[str, Any]) -> dict[str, Any]:
        state, storage = self._new_state(parameter, group, number), self._storage(parameter, group)
        for key in state.keys() & values.keys():
            value = local(torch.as_tensor(values[key]))
            if key in MOMENTS and storage.block and value.is_floating_point():
                # AdamW's, to be kept in 8 bits from now on
                storage.write(state, key, value.to(parameter.device, torch.float32), ())
            else:
                local(state[key]).copy_(value)
        return state


def _reduce(gradient: DTensor, parameter: DTensor) -> None:
    # tensor parallelism leaves sums to whoever reads them
    if gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)
