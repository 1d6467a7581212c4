"""Running a user's module beside its training: unseen by its logs, metrics, buffers and random generators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_cl.core.batches import BatchAdapter, own_mapping
from lightning_cl.core.rng import isolated_rng
from lightning_cl.core.state import reshard
from lightning_cl.core.step import loss_of, run_in_forward, user_training_step

__all__ = [
    "OutputCapture",
    "class_scores",
    "forward_loss",
    "forward_step",
    "metrics_kept",
    "move_batch",
    "run_evaluation_step",
    "run_step",
    "silenced",
    "undisturbed",
]


@contextmanager
def silenced(pl_module: LightningModule) -> Iterator[None]:
    """Let ``self.log`` and ``self.log_dict`` of the module do nothing inside the block."""
    hidden = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in hidden:
        object.__setattr__(pl_module, name, _silence)
    try:
        yield
    finally:
        for name, value in hidden.items():
            if value is None:
                object.__delattr__(pl_module, name)
            else:
                object.__setattr__(pl_module, name, value)


@contextmanager
def metrics_kept(pl_module: LightningModule) -> Iterator[None]:
    """Let the torchmetrics of the module forget what they see inside the block."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    attributes = [_attributes(metric) for metric in metrics]
    # an update may add to a tensor in place; to a list it only appends
    states = [
        (metric, name, state.detach().clone())
        for metric in metrics
        for name, state in metric.metric_state.items()
        if isinstance(state, Tensor)
    ]
    try:
        yield
    finally:
        for metric, saved in zip(metrics, attributes, strict=True):
            _restore_attributes(metric, saved)
        for metric, name, state in states:
            setattr(metric, name, state)


@contextmanager
def undisturbed(pl_module: LightningModule, seed: int | None, *, as_in_step: bool = False) -> Iterator[None]:
    """Run the module in evaluation mode and leave no trace of it.

    ``self.log`` is silent; torchmetrics, buffers, other attributes of all submodules (a list of the epoch's losses, a
    counter, training flags) and the random generators come back as they were. Autocast is off, because squared
    gradients underflow in half precision, and compiled code runs uncompiled, because it calls no hooks.

    Args:
        pl_module: The user's module.
        seed: Seeds the generators inside the block; ``None`` lets them go on from where they are.
        as_in_step: Compute without gradients and in the precision of the training step around the block, for what is
            compared with that step.
    """
    modules = list(pl_module.modules())
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    attributes = [_attributes(module) for module in modules]
    training = [module.training for module in modules]
    for module in modules:
        # not by `eval`, which takes longer, and in which some modules merge weights
        module.training = False
    device = pl_module.device.type
    # around all, because what comes back last of a metric are its states
    with metrics_kept(pl_module):
        try:
            with (
                silenced(pl_module),
                isolated_rng(seed),
                torch.set_grad_enabled(not as_in_step),
                # half-precision copies of weights that autocast keeps here would have no gradient in the step
                torch.autocast(
                    device, enabled=as_in_step and torch.is_autocast_enabled(device), cache_enabled=not as_in_step
                ),
                torch.compiler.set_stance("force_eager"),
            ):
                yield
        finally:
            reshard(pl_module)
            for module, saved, mode in zip(modules, attributes, training, strict=True):
                _restore_attributes(module, saved)
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, content in buffers:
                    module._buffers[name] = buffer.copy_(content)


def move_batch(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Bring a batch to the device the way Lightning does in training, the module's own transfer hooks included."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def forward_step(pl_module: LightningModule, batch: Any, batch_idx: int = 0) -> Any:
    """Return what the user's own ``training_step`` returns, without what callbacks add to it."""
    step, batch = user_training_step(pl_module), own_mapping(batch)
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    with _default_dtype_of_training(pl_module):
        return run_in_forward(pl_module, step, *((batch, batch_idx) if takes_index else (batch,)))


def forward_loss(pl_module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """Return the loss of the user's own ``training_step``, without what callbacks add to it.

    Raises:
        ValueError: If the module returns no loss.
    """
    loss = loss_of(forward_step(pl_module, batch, batch_idx))
    if loss is None:
        raise ValueError(
            f"`{type(pl_module).__name__}.training_step` returned no loss: there is no gradient to measure."
        )
    return loss


def class_scores(output: Any) -> Tensor | None:
    """Return the logits in what a module returned: a floating-point tensor of at least two dimensions, or ``None``."""
    value = output
    if not isinstance(output, Tensor):
        value = getattr(output, "logits", None)
        if value is None and isinstance(output, Mapping):
            value = output.get("logits")
    return value if isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point() else None


class OutputCapture:
    """Records what a submodule returns while the module's own step runs.

    Args:
        pl_module: The user's module.
        name: The submodule, such as ``"model.head"``. ``None`` takes the module itself if the step calls it, else
            the last of its direct children that returned class scores.
        read: Returns the tensor in an output, ``None`` if there is none.
        inputs: Record what the submodule gets as its first argument, in place of what it returns.

    Attributes:
        enabled: Whether outputs are recorded; one capture may be entered for a whole fit and look at parts of it.
    """

    def __init__(
        self,
        pl_module: LightningModule,
        name: str | None = None,
        read: Callable[[Any], Tensor | None] = class_scores,
        *,
        inputs: bool = False,
    ) -> None:
        self._pl_module = pl_module
        self._name = name
        self._read = read
        self._inputs = inputs
        self.enabled = True
        self._outputs: dict[str, Tensor] = {}
        self._watched: dict[str, tuple[nn.Module, Any]] = {}

    def __enter__(self) -> OutputCapture:
        self.follow()
        return self

    def __exit__(self, *_: object) -> None:
        for watched in self._watched.values():
            watched[1].remove()
        self._watched = {}

    def follow(self) -> None:
        """Watch what has the name by now: a head that grows may be another module from task to task."""
        present = self._named()
        for name, (watched, handle) in list(self._watched.items()):
            if present.get(name) is not watched:
                handle.remove()
                del self._watched[name]
        for name, module in present.items():
            if name not in self._watched:
                register: Any = module.register_forward_pre_hook if self._inputs else module.register_forward_hook
                self._watched[name] = (module, register(self._recorder(name)))

    def _named(self) -> dict[str, nn.Module]:
        if self._name is None:
            return {"": self._pl_module, **dict(self._pl_module.named_children())}
        try:
            return {self._name: self._pl_module.get_submodule(self._name)}
        except AttributeError:
            known = [name for name, _ in self._pl_module.named_children()]
            raise ValueError(
                f"{self._name!r} names no submodule of {type(self._pl_module).__name__}; its children are {known}."
            ) from None

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            keep(output)

        def record_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            keep(inputs[0] if inputs else None)

        def keep(found: Any) -> None:
            value = self._read(found) if self.enabled else None
            if value is not None:
                self._outputs.pop(name, None)
                self._outputs[name] = value

        return record_inputs if self._inputs else record

    def clear(self) -> None:
        """Forget what was recorded."""
        self._outputs = {}

    @property
    def source(self) -> str | None:
        """The name of the submodule that the recorded output is of, ``None`` if there is none."""
        return "" if "" in self._outputs else next(reversed(self._outputs), None)

    @property
    def found(self) -> Tensor | None:
        """The recorded output, ``None`` if there is none."""
        return None if self.source is None else self._outputs[self.source]

    @property
    def output(self) -> Tensor:
        """The recorded output.

        Raises:
            ValueError: If nothing that the step called returned a floating-point tensor of at least two dimensions.
        """
        if self.found is None and self._name:
            raise ValueError(
                f"The submodule {self._name!r} of {type(self._pl_module).__name__} was not called in its step, or"
                " returned no floating-point tensor of at least two dimensions."
            )
        if self.found is None:
            raise ValueError(
                f"No class scores were seen in a step of {type(self._pl_module).__name__}. Name the submodule giving"
                " them, such as `logits='model.head'`."
            )
        return self.found


def run_step(pl_module: LightningModule, batch: Any, adapter: BatchAdapter) -> Tensor | None:
    """Run the module on ``batch`` so that captures see it: its training step, or ``forward`` if it steps itself.

    Returns:
        The loss of the training step.
    """
    if pl_module.automatic_optimization:
        return forward_loss(pl_module, batch)
    inputs = adapter.inputs(batch)
    with _default_dtype_of_training(pl_module):
        if isinstance(inputs, Mapping):
            pl_module(**inputs)
        else:
            pl_module(inputs)
    return None


def run_evaluation_step(
    pl_module: LightningModule, name: str, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0
) -> Any:
    """Run the module's own ``validation_step``, ``test_step`` or ``predict_step`` so that captures see it."""
    step = getattr(pl_module, name)
    arguments = {"batch_idx": batch_idx, "dataloader_idx": dataloader_idx}
    taken = {key: value for key, value in arguments.items() if is_param_in_hook_signature(step, key, explicit=True)}
    with _default_dtype_of_training(pl_module):
        return run_in_forward(pl_module, partial(step, **taken), own_mapping(batch))


@contextmanager
def _default_dtype_of_training(pl_module: LightningModule) -> Iterator[None]:
    """Let a step make tensors in the dtype of ``precision="bf16-true"`` and its like; autocast stays as it is."""
    if pl_module._trainer is None:
        yield
        return
    device = pl_module.device.type
    autocast = torch.is_autocast_enabled(device)
    with pl_module.trainer.precision_plugin.forward_context(), torch.autocast(device, enabled=autocast):
        yield


_TORCH_NAMES = vars(nn.Module()).keys()  # hooks, parameters, buffers, submodules, the training flag


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return the attributes of a module by name: each object, and a copy of its content if it is a container."""
    return {
        name: (value, copy.copy(value) if isinstance(value, (list, dict, set)) else None)
        for name, value in vars(module).items()
        if name not in _TORCH_NAMES
    }


def _restore_attributes(module: nn.Module, saved: dict[str, tuple[Any, Any]]) -> None:
    for name in vars(module).keys() - saved.keys() - _TORCH_NAMES:
        del module.__dict__[name]
    for name, (value, content) in saved.items():
        module.__dict__[name] = value
        if content is not None:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


def _silence(*args: Any, **kwargs: Any) -> None:
    """Take the place of ``self.log`` and ``self.log_dict``."""
