"""Training of prompts on a frozen network, task after task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.adapters.joint_replay import refuse_joint_replay
from lightning_cl.adapters.prompt_backbone import Backbone, find_backbone
from lightning_cl.adapters.prompt_pool import Prompts, Query
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.checks import (
    check_automatic_optimization,
    check_choice,
    check_count,
    check_patterns,
    check_positive,
    match_parameters,
)
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.freezing import FrozenForFit
from lightning_cl.core.reduction import check_trainable
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import local, reshard, shard
from lightning_cl.core.stream import TaskStream
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.masks import hold_gradient_, scale_update_
from lightning_cl.functional.reset_state import reset_state

__all__ = ["KeyedPromptTuning", "PromptTuning", "prompts_in"]


class PromptTuning(ContinualCallback):
    """Puts prompts into a frozen network of transformers and trains them; the base of all prompt methods.

    The prompts become the submodule ``prompts`` of the network before the strategy wraps the module, all of them at
    once, so that no parameter comes or goes in a fit. The network itself is frozen for the fit. Where each task has
    rows of its own, those of all other tasks are held: they have no gradient, and after each step they are put back to
    what they were, so that neither momentum nor weight decay moves them; the optimizer's state for them begins anew
    with each task.

    Args:
        num_tasks: Tasks to make room for; a task stream says it itself.
        query: What a sample is recognised by, see :class:`Prompts`.
        backbone: Name of the network of transformers in the module; found by itself where there is one.
        trainable: Patterns (as in :mod:`fnmatch`) of what trains beside the prompts; by default all that is outside the
            network, but for the output embeddings of a language model.
        seed: Seeds the first values.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, a module
            without such a network or with several, and an unknown number of tasks.
    """

    def __init__(
        self,
        *,
        num_tasks: int | None = None,
        query: Query = "cls",
        backbone: str | None = None,
        trainable: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        if num_tasks is not None:
            check_count("num_tasks", num_tasks)
        check_choice("query", query, ("cls", "mean"))
        check_patterns("trainable", trainable)
        self.num_tasks = num_tasks
        self.query = query
        self.backbone = backbone
        self.trainable = trainable
        self.seed = seed
        # rows of the present task, tasks that ended, and tasks that began, over all fits of this callback
        self._task = self._finished = self._begun = 0
        self._frozen = FrozenForFit()
        self._rows: dict[str, Tensor] | None = None

    @abstractmethod
    def build(self, backbone: Backbone, num_tasks: int) -> Prompts:
        """Return the prompts of all tasks, with any values."""

    # ------------------------------------------------------------------ set-up

    def attach(self, pl_module: LightningModule, num_tasks: int | None = None) -> Prompts:
        """Put prompts into the network of a module, or return those that are there.

        A fit does so by itself; a module that is to load trained prompts outside of a Trainer, or that shards itself in
        ``configure_model``, calls it.

        Args:
            pl_module: The user's module, its network built and not yet sharded.
            num_tasks: Tasks to make room for, if the setting does not say.

        Raises:
            ValueError: If the network has prompts of another method or another size.
        """
        backbone = find_backbone(pl_module, self.backbone)
        there = getattr(backbone.module, "prompts", None)
        prompts = self.build(backbone, self.num_tasks or num_tasks or 1)
        if there is None:
            prompts.start(torch.Generator().manual_seed(derived_seed(self.seed, "prompts")), backbone)
            device = next(iter(backbone.module.parameters())).device
            prompts.to("cpu" if device.type == "meta" else device)
            prompts.attach(backbone)
            return prompts
        shapes = [{name: tuple(p.shape) for name, p in each.named_parameters()} for each in (prompts, there)]
        if type(there) is not type(prompts) or shapes[0] != shapes[1]:
            raise ValueError(
                f"`{type(self).__name__}` finds other prompts in {backbone.name!r}: {there!r}. Go on with the settings"
                " that made them, or with a fresh network."
            )
        return there

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.separate:
            refuse_joint_replay(trainer, type(self).__name__, "prompts", "L2P")
        super().setup(trainer, pl_module, stage)

    @override
    def prepare_module(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.attach(pl_module, self.num_tasks or self._tasks_of(trainer))
        if stage == "fit":
            self._freeze(pl_module)

    def _tasks_of(self, trainer: Trainer) -> int:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        found = datamodule.task_of_epoch(0).num_tasks if isinstance(datamodule, TaskStream) else None
        if found is None and self.separate:
            raise ValueError(
                f"`{type(self).__name__}` makes room for the prompts of all tasks, and the data does not say how many"
                " there are: give `num_tasks`."
            )
        return found or 1

    @property
    def separate(self) -> bool:
        """Whether tasks have prompts of their own."""
        return True

    def _freeze(self, pl_module: LightningModule) -> None:
        backbone = find_backbone(pl_module, self.backbone)
        inside = f"{backbone.name}."
        outputs = {id(p) for p in _output_embeddings(pl_module)}
        parameters = dict(pl_module.named_parameters())
        train = match_parameters(pl_module, "trainable", self.trainable)
        if self.trainable is None:
            train = {name for name, p in parameters.items() if not name.startswith(inside) and id(p) not in outputs}
        prompts = {name for name in parameters if name.startswith(f"{inside}prompts.")}
        self._frozen.freeze(pl_module, parameters.keys() - train - prompts)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._frozen.thaw(pl_module)
        self._rows = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self.teardown(trainer, pl_module, "fit")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_trainable(trainer, pl_module)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        prompts = prompts_in(pl_module)
        reshard(pl_module)
        if self.separate:
            self._check_rows(prompts)
        # an index counts the tasks of one stream only
        self._task, self._rows = self._finished, None
        self._begun = self._task + 1
        prompts.learned.fill_(self._begun)
        self.start_task(trainer, pl_module, prompts)
        for optimizer in trainer.optimizers:
            reset_state(optimizer, prompts.starting_anew())

    def _check_rows(self, prompts: Prompts) -> None:
        learned = int(prompts.learned)
        if learned != self._begun:
            raise ValueError(
                f"The network has prompts of {learned} tasks, and this `{type(self).__name__}` knows of {self._begun},"
                " so it would write over some. Go on with the callback of the fit before, or with its checkpoint"
                " (`ckpt_path`), or begin with a fresh network and a fresh callback."
            )
        if self._finished >= prompts.num_tasks:
            raise ValueError(
                f"Task {self._finished + 1} has no prompts: there is room for {prompts.num_tasks}. Give `num_tasks`."
            )

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._finished = self._begun

    def start_task(self, trainer: Trainer, pl_module: LightningModule, prompts: Prompts) -> None:
        """Prepare the prompts of the present task; all ranks call it."""

    # ------------------------------------------------------------------ the step

    @contextmanager
    @override
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        prompts = prompts_in(pl_module)
        prompts.task = self._task
        prompts.terms, prompts.modes = [], set()
        # a network that was loaded is in evaluation mode in a user's fit too
        prompts.training = True
        try:
            yield
        finally:
            prompts.task = None
        if prompts.modes == {False}:
            raise ValueError(
                f"`{type(pl_module).__name__}.training_step` puts the network in evaluation mode, in which no prompts"
                " train: do so before the step, such as in `on_train_start`."
            )

    @override
    def hold_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        held = self._held(pl_module, step)
        for name, mask in held.items():
            if (gradient := step.parameters[name].grad) is not None:
                hold_gradient_(local(gradient), mask)
        step.keep(held)

    @override
    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for name, mask in self._held(pl_module, step).items():
            scale_update_(local(step.parameters[name].detach()), step.before(name), mask)

    def _held(self, pl_module: LightningModule, step: OptimizerStep) -> dict[str, Tensor]:
        """Return 1 for the rows of the present task and 0 for the others, of this rank's shards, by names."""
        if self._rows is None:
            prompts = prompts_in(pl_module)
            path = next(name for name, part in pl_module.named_modules() if part is prompts)
            self._rows = {
                f"{path}.{name}": _rows_mask(getattr(prompts, name), self._task, prompts.num_tasks)
                for name in prompts.by_task
            }
        return {name: mask for name, mask in self._rows.items() if name in step.parameters}

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        prompts = prompts_in(pl_module)
        return Footprint(device=sum(local(getattr(prompts, name)).nbytes for name in prompts.by_task))

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": 1, "task": self._task, "finished": self._finished, "begun": self._begun}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._task, self._finished, self._begun = (state_dict[name] for name in ("task", "finished", "begun"))


class KeyedPromptTuning(PromptTuning):
    """Prompt methods whose prompts add a term to the loss of a training step.

    Args:
        strength: The factor of the term, its mean over the samples of all forwards in a step; above 0.
        settings: As for :class:`PromptTuning`.
    """

    def __init__(self, strength: float, **settings: Any) -> None:
        check_positive("strength", strength)
        super().__init__(**settings)
        self.strength = strength

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_automatic_optimization(
            pl_module, self, f"strength={self.strength}", "Its keys learn by a term in the loss that you return."
        )
        super().setup(trainer, pl_module, stage)

    @override
    def loss_term(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        terms: list[Tensor] = prompts_in(pl_module).terms
        if outputs is None:
            return None
        if not terms:
            raise ValueError(
                f"`{type(pl_module).__name__}.training_step` made no forward of the network with the prompts of"
                f" `{type(self).__name__}`."
            )
        return self.strength * torch.cat(terms).mean()


def prompts_in(pl_module: LightningModule) -> Any:
    """Return the prompts of a module."""
    return next(part for part in pl_module.modules() if isinstance(part, Prompts))


def _output_embeddings(pl_module: LightningModule) -> Sequence[Parameter]:
    """Return the parameters of language models that turn hidden states into scores of tokens."""
    found = []
    part: Any
    for part in pl_module.modules():
        outputs = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
        found += [] if outputs is None else list(outputs.parameters())
    return found


def _rows_mask(parameter: Tensor, task: int, num_tasks: int) -> Tensor:
    rows = len(parameter) // num_tasks
    mask = torch.zeros(len(parameter), *[1] * (parameter.ndim - 1), device=parameter.device)
    mask[task * rows : (task + 1) * rows] = 1
    return shard(mask, parameter) if isinstance(parameter, DTensor) else mask
