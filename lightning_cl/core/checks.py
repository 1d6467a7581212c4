"""Checks at the start of a fit: what cannot be served is refused with the way out."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from torch.nn import Parameter

__all__ = [
    "check_automatic_optimization",
    "check_choice",
    "check_count",
    "check_gradients",
    "check_launcher",
    "check_patterns",
    "check_positive",
    "check_replicas",
    "check_version",
    "match_parameters",
    "refuse_checkpoint",
    "select_parameters",
]


def check_launcher(trainer: Trainer) -> None:
    """Refuse launchers that run the fit in child processes and lose what callbacks learned there."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "`strategy='ddp_spawn'` and `'ddp_fork'` lose the state of callbacks between fits: task 2 would train"
            " unprotected. Use `strategy='ddp'` in a script, or launch with torchrun."
        )


def check_replicas(trainer: Trainer) -> None:
    """Refuse tensor parallelism, where several ranks read the same samples and a memory would count them twice."""
    readers = (getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}).get("num_replicas", 1)
    if readers != trainer.world_size:
        raise ValueError(
            f"Task streams and continual callbacks need every rank to read samples of its own, but with tensor"
            f" parallelism {trainer.world_size} ranks read {readers} shares. Use `tensor_parallel_size=1`."
        )


def check_automatic_optimization(pl_module: LightningModule, user: object, setting: str, way_out: str) -> None:
    """Refuse a ``setting`` that adds to the loss in a module that steps its optimizers itself."""
    if not pl_module.automatic_optimization:
        raise ValueError(
            f"`{type(user).__name__}({setting})` needs automatic optimization, but"
            f" `{type(pl_module).__name__}.automatic_optimization` is False. {way_out}"
        )


def check_positive(name: str, value: Any, *, zero_allowed: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is a number above 0 (or at least 0)."""
    if not isinstance(value, (int, float)) or not (value > 0 or (zero_allowed and value == 0)):
        raise ValueError(f"`{name}` must be {'at least' if zero_allowed else 'above'} 0, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_gradients(trainer: Trainer, pl_module: LightningModule, user: object) -> None:
    """Refuse gradients that a term in ``on_before_optimizer_step`` cannot be added to."""
    name = type(user).__name__
    for optimizer in trainer.optimizers:
        if getattr(optimizer, "forward_only", False):
            raise ValueError(
                f"`{name}` acts on gradients, and `{type(optimizer).__name__}` computes none: it would do nothing. Put"
                " what it adds to the loss into the closure, or use an optimizer with a backward."
            )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and any(getattr(o, "_step_supports_amp_scaling", False) for o in trainer.optimizers):
        raise ValueError(
            f"`{name}` adds to gradients before the optimizer's step, but a fused optimizer under fp16 unscales them"
            " within it. Use `fused=False`, or `precision='bf16-mixed'`."
        )
    for path, module in pl_module.named_modules():
        if getattr(module, "sparse", False) and hasattr(module, "num_embeddings"):
            raise ValueError(f"`{name}` needs dense gradients: build the embedding {path!r} with `sparse=False`.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_patterns(setting: str, patterns: Sequence[str] | None) -> None:
    """Raise ``ValueError`` if one pattern was given for a list of them."""
    if isinstance(patterns, str):
        raise ValueError(f"`{setting}` must be a list of patterns, such as {[patterns]}, got {patterns!r}.")


def match_parameters(pl_module: nn.Module, setting: str, patterns: Sequence[str] | None) -> set[str]:
    """Return the names of the parameters that match a pattern (as in :mod:`fnmatch`); none if there are no patterns.

    Raises:
        ValueError: If a pattern matches no parameter.
    """
    names = [name for name, _ in pl_module.named_parameters()]
    found: set[str] = set()
    for pattern in patterns or ():
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(
                f"`{setting}` pattern {pattern!r} matches no parameter of {type(pl_module).__name__}. Its names"
                f" look like {names[:3]}."
            )
        found |= matched
    return found


def select_parameters(
    pl_module: nn.Module, include: list[str] | None, exclude: list[str] | None
) -> dict[str, Parameter]:
    """Return the trainable parameters whose names match ``include`` (all if ``None``) and none of ``exclude``.

    Patterns are those of :mod:`fnmatch`: ``"encoder.*"``, ``"*.bias"``.

    Raises:
        ValueError: If a pattern matches no parameter, nothing trainable is left, or a setting is no list.
    """
    for setting, patterns in (("include", include), ("exclude", exclude)):
        check_patterns(setting, patterns)
    included = match_parameters(pl_module, "include", include)
    excluded = match_parameters(pl_module, "exclude", exclude)
    selected = {
        name: parameter
        for name, parameter in pl_module.named_parameters()
        if parameter.requires_grad and (include is None or name in included) and name not in excluded
    }
    if not selected:
        raise ValueError(
            f"No trainable parameter of {type(pl_module).__name__} is left by `include={include}`, `exclude={exclude}`."
        )
    return selected


def check_version(trainer: Trainer, version: int, wanted: int) -> None:
    """Refuse a checkpoint whose task events another version of the library wrote.

    Raises:
        ValueError: If it is not the wanted version.
    """
    if version != wanted:
        raise ValueError(
            f"`ckpt_path={str(trainer.ckpt_path)!r}` was written by another version of lightning_cl: its task events"
            f" are of version {version}, not {wanted}. End the run with the version that began it, or load its weights"
            " with `load_from_checkpoint` and fit without `ckpt_path`."
        )


def refuse_checkpoint(trainer: Trainer, callbacks: Sequence[object]) -> NoReturn:
    """Refuse a checkpoint that lacks the state of callbacks, or of the task events if there are none.

    Raises:
        ValueError: Always.
    """
    names = ", ".join(type(c).__name__ for c in callbacks) or "the task events"
    raise ValueError(
        f"`ckpt_path={str(trainer.ckpt_path)!r}` holds no state for {names}: the run would go on unprotected."
        " Resume from a full checkpoint (not `save_weights_only`) of a run with the same callbacks; to start"
        " continual learning from these weights, load them with `load_from_checkpoint` and fit without `ckpt_path`."
    )
