"""Two forwards in place of a backward, with the memory of inference (Malladi et al. 2023, arXiv:2305.17333)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_cl.functional.mezo import direction, move_along_, projected_gradient

__all__ = ["MeZO"]

_MANUAL = (
    "Set `self.automatic_optimization = False` and write `self.optimizers().step(lambda: self.loss(batch))` in"
    " `training_step`, with a function that returns the loss and calls no backward."
)


class MeZO(Optimizer):
    r"""Zeroth-order SGD in place: no backward, no gradients, no activations kept, no state but a counter.

    A step draws a direction :math:`z \sim N(0, I)` from a seed, evaluates the loss on both sides of the weights, and
    moves them along it:

    .. math:: g = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2 \epsilon}, \qquad
        \theta \leftarrow \theta - \eta \, (g z + \lambda \theta).

    :math:`z` is drawn again for each of the three moves. It is a pure function of the seed, the parameter's number, its
    count of steps and the place in the whole parameter, and so the same on all ranks, for every sharding and after a
    resume. Both losses are averaged over ranks, and both forwards see the same draws of torch's generators, such as
    masks of dropout.

    ``step`` takes a closure that returns the loss (a number, or a tensor with one element, differentiable or not)
    without a backward. If one of the losses is not finite, the weights stay and a warning is given.

    Args:
        params: Parameters, or groups of them, with their own :math:`\eta` and :math:`\lambda`; real and dense, in
            float32 or float64. Those with ``requires_grad=False`` rest, and may be anything.
        lr: :math:`\eta`; 0 or more.
        eps: :math:`\epsilon`; above 0, the same for all groups.
        weight_decay: :math:`\lambda`; 0 or more. For steps without a preconditioner, decoupled decay and the L2 penalty
            are one.
        seed: Of the directions; the same for all groups.

    Raises:
        ValueError: For a setting out of range, for complex or sparse parameters, and for those of less than 32 bits; in
            a step without a closure, with one that builds a graph or leaves gradients, under Lightning's automatic
            optimization, and where FSDP2 would compute with weights that it gathered before they moved.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = MeZO([weight], lr=0.1)
        >>> losses = [float(optimizer.step(lambda: weight.square().sum())) for _ in range(50)]
        >>> round(losses[0], 3), losses[-1] < 0.01, weight.grad
        (5.0, True, None)
    """

    forward_only: ClassVar[bool] = True
    # there are no gradients to unscale: a gradient scaler calls `step`, which tells what it lacks
    _step_supports_amp_scaling: ClassVar[bool] = True
    # whether closures have been seen to read sharded weights; pickling leaves instance attributes out
    _checked: bool = False

    def __init__(
        self, params: Any, lr: float = 1e-6, eps: float = 1e-3, weight_decay: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in self.param_groups[-1]["params"]:
            # there from the start: what saves sharded optimizers takes a step without a closure to create it
            self.state[parameter]["step"] = torch.zeros((), dtype=torch.int64)

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            if not group[name] >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {group[name]!r}.")
        if not group["eps"] > 0:
            raise ValueError(f"`eps` must be above 0, got {group['eps']!r}.")
        for name in ("eps", "seed"):
            if group[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"`{name}` must be the same for all groups, whose weights move along one direction, got"
                    f" {self.param_groups[0][name]!r} and {group[name]!r}."
                )
        for parameter in group["params"]:
            if parameter.is_complex() or parameter.layout != torch.strided:
                raise ValueError(
                    f"`MeZO` steps real, dense parameters only, got {parameter.dtype} with {parameter.layout}."
                )
            _check_dtype(parameter)

    def reset_moments(self, parameters: Iterable[Parameter] | None = None) -> None:
        """Do nothing: there are no moments, and directions that were taken are not taken again."""

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class.

        Raises:
            ValueError: If it is of another optimizer.
        """
        if any("seed" not in group for group in state_dict["param_groups"]):
            raise ValueError(
                "The checkpoint is of another optimizer, which knows nothing of the directions that `MeZO` takes. Load"
                " the weights alone (`load_from_checkpoint`)."
            )
        super().load_state_dict(state_dict)

    # ------------------------------------------------------------------ the step

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        r"""Take one step.

        Args:
            closure: Returns the loss of the batch, without a backward; called twice.

        Returns:
            The mean of the two losses, over all ranks: :math:`L(\theta) + O(\epsilon^2)`.
        """
        if closure is None:
            raise ValueError(
                "`MeZO.step` needs a closure that returns the loss, and got none. A gradient scaler takes none either:"
                " instead of `precision='16-mixed'`, use 'bf16-mixed'. " + _MANUAL
            )
        if isinstance(closure, partial) and any(getattr(a, "automatic_optimization", False) for a in closure.args):
            raise ValueError(f"`MeZO` has no backward, which Lightning's automatic optimization runs. {_MANUAL}")
        eps: float = self.param_groups[0]["eps"]
        moving = self._moving()
        losses: list[Tensor] = []
        offset = 0.0
        generators = _generator_states(moving)
        try:
            for side in (eps, -eps):
                for parameter, key, _ in moving:
                    _move_(parameter, side - offset, key)
                offset = side
                _set_generator_states(generators)
                losses.append(self._evaluate(closure))
            device = moving[0][0].device if moving else losses[0].device
            first, second = _mean_over_ranks(losses, device)
        except BaseException:
            for parameter, key, _ in moving:
                _move_(parameter, -offset, key)
            raise
        slope = projected_gradient(first, second, eps)
        finite = math.isfinite(slope)
        for parameter, key, group in moving:
            # back, and the step, in one move
            lr = float(group["lr"]) if finite else 0.0
            keep = 1.0 - lr * group["weight_decay"]
            _move_(parameter, eps * keep - (lr * slope if finite else 0.0), key, keep=keep)
            self.state[parameter]["step"] += 1
        if not finite:
            warnings.warn(
                f"`MeZO` left the weights as they are: the losses on both sides are {first} and {second}.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._checked = True
        return torch.full_like(losses[0], (first + second) / 2.0)

    def _moving(self) -> list[tuple[Parameter, tuple[int, int, int], dict[str, Any]]]:
        """Return what a step moves: parameters, the keys of their directions, and their groups."""
        moving, number = [], 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    # it may have been frozen before
                    _check_dtype(parameter)
                    state = self.state[parameter]
                    step = state.setdefault("step", torch.zeros((), dtype=torch.int64))
                    moving.append((parameter, (group["seed"], number, int(step.item())), group))
                number += 1
        return moving

    def _evaluate(self, closure: Callable[[], Any]) -> Tensor:
        sharded = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        sharded = [p for p in sharded if isinstance(p, DTensor)]
        # it may hold copies of the weights as they were before they moved
        torch.clear_autocast_cache()
        with _no_graph():
            if sharded and not self._checked:
                with _Reads() as reads:
                    value = closure()
                reads.check(sharded)
            else:
                value = closure()
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            self.zero_grad(set_to_none=True)
            _refuse_graph()
        loss = torch.tensor(value, dtype=torch.float64) if isinstance(value, (int, float)) else value
        if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
            found = f"shape {tuple(loss.shape)} and {loss.dtype}" if isinstance(loss, Tensor) else repr(value)
            raise ValueError(f"The closure of `MeZO.step` must return the loss, one number, got {found}.")
        if isinstance(loss, DTensor):
            loss = loss.full_tensor()
        return loss.detach().reshape(()) if loss.is_floating_point() else loss.reshape(()).double()


# ---------------------------------------------------------------------- weights


def _check_dtype(parameter: Tensor) -> None:
    if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"`MeZO` needs parameters in float32, got {parameter.dtype}, where moving to both sides and back rounds"
            " more away than a step adds. Keep what trains in float32 and compute in half precision:"
            " `Trainer(precision='bf16-mixed')`."
        )


def _move_(parameter: Tensor, alpha: float, key: tuple[int, ...], *, keep: float = 1.0) -> None:
    if not isinstance(parameter, DTensor):
        if parameter.is_contiguous():
            move_along_(parameter, alpha, key, keep=keep)
        else:
            parameter.mul_(keep).add_(direction(parameter, key), alpha=alpha)
        return
    shard = parameter.to_local()
    start = _first_element(parameter)
    if start is not None and shard.is_contiguous():
        move_along_(shard, alpha, key, keep=keep, start=start, numel=parameter.numel())
        return
    whole = direction(torch.empty(parameter.shape, dtype=shard.dtype, device=shard.device), key)
    part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    shard.mul_(keep).add_(part, alpha=alpha)


def _first_element(parameter: DTensor) -> int | None:
    """Return where this rank's shard begins in the flattened parameter, ``None`` if it is not one stretch of it."""
    split = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if not split:
        return 0
    if len(split) > 1 or parameter.placements[split[0]] != Shard(0):
        return None
    rows = parameter.shape[0]
    rows_of_each = -(-rows // parameter.device_mesh.size(split[0]))
    first = min(rows_of_each * parameter.device_mesh.get_local_rank(split[0]), rows)
    return first * (parameter.numel() // max(rows, 1))


def _mean_over_ranks(losses: list[Tensor], device: torch.device) -> list[float]:
    values = [float(loss) for loss in losses]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        both = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(both)
        values = (both / dist.get_world_size()).tolist()
    return values


# ---------------------------------------------------------------------- forwards


def _generator_states(moving: list[Any]) -> dict[torch.device, Tensor]:
    devices = {parameter.device for parameter, _, _ in moving if parameter.device.type == "cuda"}
    states = {device: torch.cuda.get_rng_state(device) for device in devices}
    return states | {torch.device("cpu"): torch.get_rng_state()}


def _set_generator_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _refuse_graph() -> NoReturn:
    raise ValueError(
        f"The closure of `MeZO.step` built a graph, or left gradients: it must not run a backward. {_MANUAL}"
    )


@contextmanager
def _no_graph() -> Iterator[None]:
    """Refuse the first tensor that a forward keeps for a backward, which someone enabled again."""

    def refuse(_: Tensor) -> NoReturn:
        _refuse_graph()

    with saved_tensors_hooks(refuse, refuse):
        yield


class _Reads(TorchDispatchMode):
    """Sees which storages operations read: weights that FSDP2 has gathered before would be used as they were then."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._storages.add(leaf.untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))

    def check(self, parameters: list[Parameter]) -> None:
        for parameter in parameters:
            shard = parameter.to_local()  # type: ignore[attr-defined]
            if shard.numel() and shard.untyped_storage()._cdata not in self._storages:
                raise ValueError(
                    f"The closure of `MeZO.step` did not read a sharded parameter of shape {tuple(parameter.shape)}: it"
                    " used weights that FSDP2 had gathered before they moved, or does not need it. Call `reshard()` on"
                    " all `FSDPModule` at the start and at the end of the closure, or use `strategy='fsdp2'` of this"
                    " library, which does; leave out of the optimizer what is not needed."
                )
