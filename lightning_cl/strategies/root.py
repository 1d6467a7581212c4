"""Running a step inside the forward of the root unit, which gathers what no block holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_cl.core.state import reshard

__all__ = ["RootForward"]


class RootForward:
    """Calls functions in the place of a root's forward; one that is called inside another is called as it is."""

    def __init__(self) -> None:
        self._inside = False

    def run(self, root: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any, *, once: bool) -> Any:
        """Return what ``function`` returns.

        Args:
            root: The sharded module; ``function`` may call it, or use its weights.
            function: The step.
            args: Its positional arguments.
            kwargs: Its other arguments.
            once: One backward pass follows, from what ``function`` returns: what the root holds is gathered once for
                both. Otherwise backward passes may start at any output of the module, also several of them.
        """
        if not isinstance(root, FSDPModule) or self._inside:
            return function(*args, **kwargs)
        module = cast(nn.Module, root)
        own = module.__dict__.get("forward")

        def forward(*given: Any, **named: Any) -> Any:
            # the function may call the real forward
            _set_forward(module, own)
            with _without_own_hooks(module) if once else nullcontext():
                return function(*given, **named)

        _set_forward(module, forward)
        self._inside = True
        try:
            return module(*args, **kwargs)
        finally:
            self._inside = False
            _set_forward(module, own)
            if not torch.is_grad_enabled():
                # no backward follows, after which units are freed and show their shards again
                reshard(module)

    def check_reduced(self, root: nn.Module) -> None:
        """Refuse gradients that a backward inside the root's forward has left where no reduction looks for them.

        Raises:
            ValueError: If a step under manual optimization used what the root holds without calling the module.
        """
        if not (self._inside and isinstance(root, FSDPModule)):
            return
        group = root._get_fsdp_state()._fsdp_param_group
        gathered = (getattr(held, "_unsharded_param", None) for held in (group.fsdp_params if group else ()))
        if any(parameter is not None and parameter.grad is not None for parameter in gathered):
            raise ValueError(
                f"Under manual optimization `training_step` of {type(root).__name__.removeprefix('FSDP')} must call the"
                " module (`self(batch)`), whose forward gathers weights and reduces gradients: parts of it were called"
                " by themselves, and their gradients are lost."
            )

    def gather_again(self, root: nn.Module) -> None:
        """Let what follows in a step compute with the shards as they are now, not as they were when it began."""
        reshard(root)
        if self._inside:
            cast(FSDPModule, root).unshard()


@contextmanager
def _without_own_hooks(root: nn.Module) -> Iterator[None]:
    """Let a step call the root again, inside its forward, without a second gathering and freeing of what it holds."""
    state = cast(FSDPModule, root)._get_fsdp_state()
    kept = [
        (hooks, number, hook)
        for hooks in (root._forward_pre_hooks, root._forward_hooks)
        for number, hook in hooks.items()
        if getattr(hook, "__self__", None) is state
    ]
    for hooks, number, _ in kept:
        hooks[number] = _idle
    try:
        yield
    finally:
        for hooks, number, hook in kept:
            hooks[number] = hook


def _idle(*_: Any) -> None:
    """Take the place of a hook."""


def _set_forward(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
