"""SPAM (Huang et al. 2025, arXiv:2501.06842)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_cl.functional.adam import adam_update_
from lightning_cl.functional.spam import Schedule, clip_spikes_, schedule_, spam_update_, warmup_scale
from lightning_cl.optim.base import Bucket, Group, MomentResetOptimizer
from lightning_cl.optim.moments import MOMENTS, StateDtype, local
from lightning_cl.optim.sparse import SparseMoments

__all__ = ["SPAM"]

_SCHEDULED = ("lr", "betas", "eps", "threshold", "reset_interval", "warmup_steps", "clip_delay")


class SPAM(MomentResetOptimizer):
    r"""Adam that clips gradient spikes, and resets its moments at intervals.

    In the :math:`k`-th step since the last reset (from 0), with moments :math:`m, v` of the steps before it:

    .. math::
        g &\leftarrow \operatorname{sign}(g) \sqrt{\theta v}
        \quad \text{where } g^2 > \theta v > 0, \text{ if } k \ge d \\
        w &\leftarrow (1 - \eta \lambda) w \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        w &\leftarrow w - \eta s_k \frac{m / (1 - \beta_1^{k + 1})}{\sqrt{v / (1 - \beta_2^{k + 1})} + \epsilon}

    After every :math:`\Delta T` gradients :math:`m = v = 0`, and :math:`s_k = 1 - 0.99 (1 + \cos \frac{\pi k}{N + 1})
    / 2` warms the :math:`N` steps after it up (:func:`~lightning_cl.functional.warmup_scale`); before the first reset
    :math:`s_k = 1`. Every setting may differ by parameter group.

    With a ``density`` below 1 only a random part of the weights has moments and is stepped or decayed, the others rest.
    A reset draws that part anew: weights that stay in it keep their moments, bias-corrected; others begin at zero.

    Gradients may be clipped in place. Weights that :func:`~torch.distributed.fsdp.fully_shard` has sharded are stepped
    in their shards, with the same mask as without sharding.

    Args:
        params: Parameters, or groups of them.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`; the paper's are the default.
        eps: :math:`\epsilon`; 1e-6 in the paper.
        weight_decay: :math:`\lambda`, decoupled, and not scaled by the warm-up; 0 in the paper.
        threshold: :math:`\theta`; 5000 in the paper; infinity clips nothing.
        reset_interval: :math:`\Delta T`; 500 in the paper; ``None`` for no resets.
        warmup_steps: :math:`N`; 150 in the paper.
        density: Fraction of the weights that have moments, above 0 to 1; 1 in the paper but for its experiments with
            little memory.
        clip_delay: :math:`d`, steps after a reset without clipping, until :math:`v` is an estimate; 20 in the authors'
            code.
        seed: Of the mask and of random rounding.
        foreach: Whether to step all tensors in a few kernels, equal to the bit; ``None``: on GPUs.
        capturable: Whether a step may be captured as a CUDA graph: its counters lie on the device.
        fused: Whether to compile the step with :func:`torch.compile`, into one kernel for each tensor.
        state_dtype: What the moments are kept in: ``None`` (the dtype of the parameter, as torch's Adam does, but
            float32 for float16), ``"float32"``, ``"bfloat16"`` (rounded stochastically) or ``"8bit"`` (blockwise, by
            bitsandbytes).

    Raises:
        ValueError: For a setting out of its range, settings that exclude each other, complex parameters, and sparse
            gradients.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = SPAM([weight], lr=0.1)
        >>> for scale in [1.0] * 25 + [1000.0]:
        ...     weight.grad = torch.full_like(weight, scale)
        ...     optimizer.step()
        >>> round(weight.grad.item(), 2)
        11.11
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        threshold: float = 5000.0,
        reset_interval: int | None = 500,
        warmup_steps: int = 150,
        density: float = 1.0,
        *,
        clip_delay: int = 20,
        seed: int = 0,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool = False,
        state_dtype: StateDtype | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "threshold": threshold,
                "reset_interval": reset_interval,
                "warmup_steps": warmup_steps,
                "density": density,
                "clip_delay": clip_delay,
                "seed": seed,
                "foreach": foreach,
                "capturable": capturable,
                "fused": fused,
                "state_dtype": state_dtype,
            },
        )

    @override
    def _check(self, group: Group) -> None:
        super()._check(group)
        if not group["threshold"] > 0:
            raise ValueError(f"`threshold` must be above 0, got {group['threshold']!r}.")
        if not 0 < group["density"] <= 1:
            raise ValueError(f"`density` must be above 0 and at most 1, got {group['density']!r}.")
        delay, interval = group["clip_delay"], group["reset_interval"]
        if not delay >= 1:
            raise ValueError(f"`clip_delay` must be 1 or more, got {delay!r}.")
        if interval is not None and interval <= delay and group["threshold"] < inf:
            raise ValueError(
                f"`reset_interval={interval}` leaves no step that is clipped after `clip_delay={delay}`: make one"
                " longer or the other shorter, or clip nothing (`threshold=float('inf')`)."
            )
        on_device = [name for name in ("capturable", "fused") if group[name]]
        if on_device and (group["density"] < 1 or group["foreach"] or group["state_dtype"] not in (None, "float32")):
            raise ValueError(
                f"`{on_device[0]}=True` steps dense moments in full precision, one tensor after the other: it goes with"
                " neither `density` below 1 nor `foreach=True` nor a `state_dtype` of fewer bits."
            )
        if group["density"] < 1 and (group["foreach"] or group["state_dtype"] not in (None, "float32")):
            raise ValueError(
                "`density` below 1 keeps its moments in full precision and steps one tensor after the other: it goes"
                " with neither `foreach=True` nor a `state_dtype` of fewer bits."
            )

    @override
    def _step_group(self, group: Group, members: list[tuple[int, Parameter]]) -> None:
        if group["capturable"] or group["fused"]:
            self._step_on_device(group, [parameter for _, parameter in members])
        else:
            super()._step_group(group, members)

    @override
    def _update(self, bucket: Bucket) -> None:
        group, step = bucket.group, bucket.step
        scale = warmup_scale(step, group["warmup_steps"]) if bucket.resets else 1.0
        clips = step >= group["clip_delay"]
        common: dict[str, Any] = {
            "step": step + 1,
            "lr": float(group["lr"]),
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "scale": scale,
        }
        if group["density"] < 1:
            self._update_sparse(bucket, clips, common)
            return
        tensors = (bucket.weights, bucket.gradients, bucket.firsts, bucket.seconds)
        # each tensor to its end, as long as it is in the cache
        parts = [tensors] if bucket.foreach else [tuple([t] for t in row) for row in zip(*tensors, strict=True)]
        for weights, gradients, firsts, seconds in parts:
            if clips:
                clip_spikes_(gradients, seconds, group["threshold"], foreach=bucket.foreach)
            adam_update_(weights, gradients, firsts, seconds, **common, foreach=bucket.foreach)

    def _update_sparse(self, bucket: Bucket, clips: bool, common: dict[str, Any]) -> None:
        for parameter, weight, gradient, m, v in zip(
            bucket.parameters, bucket.weights, bucket.gradients, bucket.firsts, bucket.seconds, strict=True
        ):
            state = self.state[parameter]
            indices, carried = state["indices"], state["carried"]
            flat = weight.reshape(-1)
            w, g = flat.index_select(0, indices), gradient.reshape(-1).index_select(0, indices)
            if clips:
                clip_spikes_([g], [v], bucket.group["threshold"], foreach=bucket.foreach)
            for part, corrected in ((slice(carried), True), (slice(carried, None), False)):
                adam_update_([w[part]], [g[part]], [m[part]], [v[part]], **common, corrected=corrected)
            flat.index_copy_(0, indices.long(), w)
            if not weight.is_contiguous():  # `flat` is a copy then
                weight.copy_(flat.view_as(weight))

    def _step_on_device(self, group: Group, members: list[Parameter]) -> None:
        update = _compiled() if group["fused"] else spam_update_
        by_device: dict[torch.device, list[Parameter]] = {}
        for parameter in members:
            by_device.setdefault(parameter.device, []).append(parameter)
        for parameters in by_device.values():
            states = [self.state[parameter] for parameter in parameters]
            clock = {key: [state[key] for state in states] for key in ("step", "resets")}
            schedule = schedule_(clock["step"], clock["resets"], **{name: group[name] for name in _SCHEDULED})
            rows = zip(*(part.unbind() for part in schedule), strict=True)
            for parameter, state, row in zip(parameters, states, rows, strict=True):
                m, v = (local(state[key]) for key in MOMENTS)
                assert parameter.grad is not None
                tensors = (local(parameter), local(parameter.grad).to(m.dtype), m, v)
                # one shape for all, so that it is compiled once
                same_order = all(t.is_contiguous() for t in tensors)
                weight, gradient, m, v = (t.view(-1) if same_order else t for t in tensors)
                decay = group["lr"] * group["weight_decay"]
                update(weight, gradient, m, v, Schedule(*row), decay, group["betas"])

    # ------------------------------------------------------------------ moments of a part of the weights

    def _sparse(self, parameter: Parameter, group: Group, number: int) -> SparseMoments:
        dtype = self._storage(parameter, group).dtype
        return SparseMoments(parameter, dtype, group["density"], (group["seed"], number))

    @override
    def _clock(self, parameter: Parameter, group: Group) -> dict[str, Any]:
        return super()._clock(parameter, {**group, "capturable": group["capturable"] or group["fused"]})

    @override
    def _new_state(self, parameter: Parameter, group: Group, number: int) -> dict[str, Any]:
        if group["density"] == 1:
            return super()._new_state(parameter, group, number)
        return {**self._clock(parameter, group), **self._sparse(parameter, group, number).create()}

    @override
    def _reset(self, parameter: Parameter, group: Group, number: int, *, anew: bool = False) -> None:
        if group["density"] == 1:
            super()._reset(parameter, group, number)
            return
        state = self.state[parameter]
        state |= self._sparse(parameter, group, number).redraw(state, group["betas"], anew=anew)
        state["step"].zero_()
        state["resets"] += 1

    @override
    def _restored(self, parameter: Parameter, group: Group, number: int, values: dict[str, Any]) -> dict[str, Any]:
        if group["density"] == 1:
            return super()._restored(parameter, group, number, values)
        state = self._clock(parameter, group)
        for key in state.keys() & values.keys():
            state[key].copy_(torch.as_tensor(values[key]))
        dense = {key: local(values[key]).to(parameter.device) for key in MOMENTS}
        anew = bool(values.get("anew", False))
        return state | self._sparse(parameter, group, number).compress(dense, int(state["resets"]), anew=anew)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state, moments in the shapes of the parameters, zero where there are none."""
        result = super().state_dict()
        for number, parameter, row in self._numbered():
            state = self.state.get(parameter)
            if state and "indices" in state:
                sparse = self._sparse(parameter, self.param_groups[row], number)
                dense = {key: sparse.expand(state, key) for key in MOMENTS}
                result["state"][number] = {key: state[key] for key in ("step", "resets", "anew")} | dense
        return result


@lru_cache
def _compiled() -> Callable[..., None]:
    return torch.compile(spam_update_, dynamic=True)
