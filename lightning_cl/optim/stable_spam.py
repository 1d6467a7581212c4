"""Stable-SPAM (Huang et al. 2025, arXiv:2502.17055)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_cl.functional.adam import adam_update_
from lightning_cl.functional.spam import warmup_scale
from lightning_cl.functional.stable_spam import (
    absolute_maxima,
    annealing_scale,
    clip_to_thresholds_,
    euclidean_norms,
    norm_factors_,
    spike_thresholds_,
)
from lightning_cl.optim.base import Bucket, Group, MomentResetOptimizer, moves_together
from lightning_cl.optim.moments import StateDtype, local

__all__ = ["StableSPAM"]

_AVERAGES = ("max_avg", "norm_avg", "norm_avg_sq")


@dataclass
class _Alike:
    """Parameters of one group whose averages hold as many gradients, on one device and mesh, and their averages [n]."""

    group: Group
    step: int
    sharding: Hashable
    parameters: list[Parameter]
    gradients: list[Tensor]
    averages: dict[str, Tensor]

    @property
    def foreach(self) -> bool:
        return moves_together(self.group, self.gradients)


class StableSPAM(MomentResetOptimizer):
    r"""Adam whose gradients are clipped and scaled by what each tensor is used to, with momentum reset.

    For the gradient g of each tensor, the t-th that it gets,

    .. math::
        T &\leftarrow \gamma_3 T + (1 - \gamma_3) \max_i |g_i|, \quad \hat{T} = T / (1 - \gamma_3^t), \quad
        g_i \leftarrow g_i \, \hat{T} / \max_j |g_j| \; \text{ where } |g_i| > \hat{T} \quad \text{(AdaClip)} \\
        \mu &\leftarrow \gamma_1 \mu + (1 - \gamma_1) \lVert g \rVert_2, \quad
        \nu \leftarrow \gamma_2 \nu + (1 - \gamma_2) \lVert g \rVert_2^2, \quad
        g \leftarrow \frac{g}{\lVert g \rVert_2} \cdot
        \frac{\mu / (1 - \gamma_1^t)}{\sqrt{\nu / (1 - \gamma_2^t)} + \epsilon} \quad \text{(AdaGN)}

    in place in ``.grad``, and then a step of :class:`torch.optim.AdamW`, whose moments and their bias correction begin
    anew before every ``reset_interval``-th step (MoRet). :math:`T, \mu, \nu` and t go on over resets. Maximum and norm
    are those of the whole tensor, over all shards.

    Paper: Huang et al. 2025, arXiv:2502.17055. Its authors' code counts t from the last reset, though the averages go
    on: so the threshold is some hundred times too high after each. It also updates the old moments once more in the
    step of a reset, and counts that step among the new. Ours does neither.

    Args:
        params: Parameters, named or not, or groups of them, in which every setting may differ.
        lr: Learning rate; 0 or more.
        betas: Decay of the first and second moments; from 0 to below 1.
        eps: Added to roots, for numerical stability; above 0.
        weight_decay: Decoupled weight decay; 0 or more.
        gamma1: :math:`\gamma_1`, decay of the average of norms; from 0 to below 1.
        gamma2: :math:`\gamma_2`, decay of the average of squared norms; from 0 to below 1.
        gamma3: :math:`\gamma_3`, decay of the average of maxima; from 0 to below 1.
        reset_interval: Steps between momentum resets; ``None`` for no resets.
        warmup_steps: Steps over which the learning rate is warmed up after a reset, as SPAM does; the paper has none.
        annealing_steps: Steps over which :math:`\gamma_1` and :math:`\beta_1` fall to half of themselves along a
            cosine, then stay there. The authors' scripts give the length of the whole run; the paper's algorithm has
            no such fall, nor has ``None``.
        state_dtype: ``"float32"``, ``"bfloat16"`` or ``"8bit"`` moments; ``None`` for the parameter's own dtype.
        foreach: Whether to move all tensors in a few kernels, equal to the bit; ``None`` to do so but on the CPU.

    Raises:
        ValueError: If a setting is out of its range, or a parameter complex; at a step if a gradient is sparse.

    Example:
        After a gradient a thousand times the usual one Adam stands still for as long as it remembers.

        >>> for optimizer in (torch.optim.AdamW, StableSPAM):
        ...     weight = torch.nn.Parameter(torch.zeros(1))
        ...     steps = optimizer([weight], lr=0.01, weight_decay=0.0)
        ...     for gradient in [1.0] * 20 + [1000.0] + [-1.0] * 200:
        ...         weight.grad = torch.tensor([gradient])
        ...         steps.step()
        ...     print(round(weight.item(), 2))
        -0.24
        1.66
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        gamma3: float = 0.999,
        reset_interval: int | None = 1000,
        *,
        warmup_steps: int = 0,
        annealing_steps: int | None = None,
        state_dtype: StateDtype | None = None,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "gamma1": gamma1,
                "gamma2": gamma2,
                "gamma3": gamma3,
                "reset_interval": reset_interval,
                "warmup_steps": warmup_steps,
                "annealing_steps": annealing_steps,
                "state_dtype": state_dtype,
                "foreach": foreach,
            },
        )

    @override
    def _check(self, group: Group) -> None:
        super()._check(group)
        for name in ("gamma1", "gamma2", "gamma3"):
            if not 0 <= group[name] < 1:
                raise ValueError(f"`{name}` must be from 0 to below 1, got {group[name]!r}.")
        steps = group["annealing_steps"]
        if steps is not None and not steps >= 1:
            raise ValueError(f"`annealing_steps` must be 1 or more, or None for no annealing, got {steps!r}.")

    # ------------------------------------------------------------------ gradients

    @override
    def _prepare_gradients(self, members: list[list[tuple[int, Parameter]]]) -> None:
        alike = self._alike(members)
        maxima = [absolute_maxima(one.gradients, _dtype(one.parameters[0]), foreach=one.foreach) for one in alike]
        for one, largest in zip(alike, _over_shards(maxima, alike, "max"), strict=True):
            bounds = spike_thresholds_(one.averages["max_avg"], largest, step=one.step, gamma3=one.group["gamma3"])
            clip_to_thresholds_(one.gradients, largest, bounds)
        squares = [
            euclidean_norms(one.gradients, _dtype(one.parameters[0]), foreach=one.foreach).square() for one in alike
        ]
        for one, square in zip(alike, _over_shards(squares, alike, "sum"), strict=True):
            factors = norm_factors_(
                one.averages["norm_avg"],
                one.averages["norm_avg_sq"],
                square.sqrt(),
                step=one.step,
                gammas=(one.group["gamma1"] * _annealing(one.group, one.step), one.group["gamma2"]),
                eps=one.group["eps"],
            )
            for gradient, factor in zip(one.gradients, factors.unbind(), strict=True):
                gradient.mul_(factor)
            self._keep(one)

    def _alike(self, members: list[list[tuple[int, Parameter]]]) -> list[_Alike]:
        found: dict[Any, list[Parameter]] = {}
        groups: dict[Any, Group] = {}
        for row, (group, own) in enumerate(zip(self.param_groups, members, strict=True)):
            for _, parameter in own:
                state = self.state[parameter]
                # Lightning moves what it does not know by name, and a GPU would be waited for
                state["norm_step"] = state["norm_step"].to(state["step"].device)
                state["norm_step"] += 1
                step = int(state["norm_step"].item())
                key = (row, step, parameter.device, _dtype(parameter), _sharding(parameter))
                found.setdefault(key, []).append(parameter)
                groups[key] = group
        return [
            _Alike(
                group=groups[key],
                step=key[1],
                sharding=key[2:],
                parameters=parameters,
                gradients=[local(parameter.grad) for parameter in parameters if parameter.grad is not None],
                averages={name: torch.stack([self.state[p][name] for p in parameters]) for name in _AVERAGES},
            )
            for key, parameters in found.items()
        ]

    def _keep(self, one: _Alike) -> None:
        for name, values in one.averages.items():
            torch._foreach_copy_([self.state[p][name] for p in one.parameters], list(values.unbind()))

    # ------------------------------------------------------------------ step

    @override
    def _update(self, bucket: Bucket) -> None:
        group = bucket.group
        beta1, beta2 = group["betas"]
        scale = warmup_scale(bucket.step, group["warmup_steps"]) if bucket.resets else 1.0
        for decay, rows in self._by_decay(bucket, beta1).items():
            lists = (bucket.weights, bucket.gradients, bucket.firsts, bucket.seconds)
            adam_update_(
                *([values[row] for row in rows] for values in lists),
                step=bucket.step + 1,
                lr=float(group["lr"]),
                betas=(decay, beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                scale=scale,
                foreach=bucket.foreach,
            )

    def _by_decay(self, bucket: Bucket, beta1: float) -> dict[float, list[int]]:
        # parameters that rested for a while are annealed less
        found: dict[float, list[int]] = {}
        for row, parameter in enumerate(bucket.parameters):
            decay = beta1 * _annealing(bucket.group, self.state[parameter]["norm_step"].item())
            found.setdefault(decay, []).append(row)
        return found

    # ------------------------------------------------------------------ state

    @override
    def _new_state(self, parameter: Parameter, group: Group, number: int) -> dict[str, Any]:
        zero = torch.zeros((), dtype=_dtype(parameter), device=parameter.device)
        own = {"norm_step": torch.tensor(0.0), **{name: zero.clone() for name in _AVERAGES}}
        return super()._new_state(parameter, group, number) | own

    @override
    def _check_state(self, values: dict[str, Any]) -> None:
        # AdamW and SPAM have none of them: they begin with the next gradient
        missing = {"norm_step", *_AVERAGES} - values.keys()
        if 0 < len(missing) <= len(_AVERAGES):
            raise ValueError(
                f"The checkpoint's optimizer lacks {sorted(missing)} of `StableSPAM`. Load the weights alone"
                " (`load_from_checkpoint`) to begin with new moments."
            )


def _annealing(group: Group, step: float) -> float:
    steps = group["annealing_steps"]
    return 1.0 if steps is None else annealing_scale(step, steps)


def _dtype(parameter: Tensor) -> torch.dtype:
    """Return that of a parameter's averages: half precision would forget small changes."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _sharding(parameter: Tensor) -> Hashable:
    return (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None


def _over_shards(values: list[Tensor], members: list[_Alike], operation: Literal["sum", "max"]) -> list[Tensor]:
    """Return numbers of whole tensors from those of shards, by one reduction for all that are sharded alike."""
    whole = list(values)
    shared: dict[Hashable, list[int]] = {}
    for row, one in enumerate(members):
        if isinstance(one.parameters[0], DTensor):
            shared.setdefault(one.sharding, []).append(row)
    for rows in shared.values():
        like = members[rows[0]].parameters[0]
        assert isinstance(like, DTensor)
        kinds = [Partial(operation) if placement.is_shard() else Replicate() for placement in like.placements]
        reduced = DTensor.from_local(torch.cat([values[row] for row in rows]), like.device_mesh, kinds).full_tensor()
        for row, part in zip(rows, reduced.split([len(values[row]) for row in rows]), strict=True):
            whole[row] = part
    return whole
