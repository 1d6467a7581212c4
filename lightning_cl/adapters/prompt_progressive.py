"""Progressive Prompts (Razdaibiedina et al. 2023, arXiv:2301.12314)."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.adapters.prompt_backbone import Backbone
from lightning_cl.adapters.prompt_pool import Chosen, Prompts
from lightning_cl.adapters.prompted import PromptTuning, prompts_in
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import full_copy, local, reshard, shard
from lightning_cl.core.stream import TaskStream
from lightning_cl.core.task import Task

__all__ = ["ProgressivePrompts"]


class TaskPrompts(Prompts):
    """A prompt for each task, the newest in front, and a residual network that the newest one may train through."""

    by_task: ClassVar[tuple[str, ...]] = ("tokens",)

    def __init__(self, backbone: Backbone, num_tasks: int, length: int, hidden: int | None) -> None:
        super().__init__(backbone, num_tasks=num_tasks)
        self.tokens = nn.Parameter(torch.empty(num_tasks, length, backbone.width))
        self.residual: nn.Sequential | None = None
        if hidden is not None:
            self.residual = nn.Sequential(
                nn.Linear(backbone.width, hidden), nn.ReLU(), nn.Linear(hidden, backbone.width)
            )
        self.owner = Owner()

    @property
    @override
    def asks(self) -> bool:
        return False

    @override
    def starting_anew(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @override
    def choose(self, query: Tensor | None, batch_size: int) -> Chosen:
        task = newest = self.learning
        if newest is None:
            newest = int(self.learned.clamp(min=1)) - 1
            task = min(self.owner.task(newest), newest)
        last = self.tokens[task]
        if task == newest and self.residual is not None:
            last = last + self.residual(last)
        tokens = torch.cat([last[None], self.tokens[:task].detach().flip(0)]).flatten(0, 1)
        return Chosen(tokens=tokens.expand(batch_size, *tokens.shape))

    @override
    def start(self, generator: torch.Generator, backbone: Backbone) -> None:
        nn.init.uniform_(self.tokens, -backbone.token_range, backbone.token_range, generator=generator)
        for parameter, value in zip(*self.fresh_residual(generator), strict=True):
            parameter.data.copy_(value)

    def fresh_residual(self, generator: torch.Generator) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Return the parameters of the residual network, and whole values that they start from: it adds nothing."""
        if self.residual is None:
            return [], []
        parameters = list(self.residual.parameters())
        values = [torch.zeros(parameter.shape) for parameter in parameters]
        nn.init.kaiming_uniform_(values[0], a=5**0.5, generator=generator)
        return parameters, values


class Owner:
    """The LightningModule that prompts are in, whose ``current_task`` they ask for; not part of a copy of them."""

    def __init__(self, module: LightningModule | None = None) -> None:
        self._module = None if module is None else weakref.ref(module)

    def task(self, newest: int) -> int:
        """Return the index of the task that is evaluated; ``newest`` where a Trainer checks evaluation before all."""
        module = None if self._module is None else self._module()
        task: Task | None = getattr(module, "current_task", None)
        if task is None and module is not None and module._trainer is not None and module.trainer.sanity_checking:
            return newest
        if task is None:
            raise ValueError(
                "`ProgressivePrompts` needs to know the task of what it computes: evaluate on a task stream with a"
                " `TaskIncremental` scenario (`Trainer.validate` and `test` tell it, `predict` does not), or set"
                " `current_task` of the LightningModule to a `Task`."
            )
        return task.index

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        module = None if self._module is None else self._module()
        return Owner(memo.get(id(module), module))

    def __reduce__(self) -> tuple[type[Owner], tuple[()]]:
        return Owner, ()


class ProgressivePrompts(PromptTuning):
    r"""Give each task a prompt of its own, in front of the frozen prompts of all tasks before it.

    The input of task t is :math:`[P_t; P_{t-1}; \dots; P_1; x]`; only :math:`P_t` trains, and the others are held to
    the bit. With ``reparametrisation`` the prompt in training is :math:`P_t + \mathrm{MLP}(P_t)`, with one hidden layer
    that adds nothing at first; at the task's end the sum becomes the prompt and the MLP begins anew.

    Which prompts a sample gets depends on its task, so that must be known in evaluation too.

    Args:
        length: Tokens of a task's prompt.
        reparametrisation: Width of the hidden layer of the residual MLP; none if ``None``. The paper has 800.
        num_tasks: Tasks to make room for; a task stream says it itself.
        backbone: Name of the network of transformers in the module; found by itself where there is one.
        trainable: Patterns (as in :mod:`fnmatch`) of what trains beside the prompts; by default all that is outside the
            network, but for the output embeddings of a language model.
        seed: Seeds the first values.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, a module
            without such a network or with several, an unknown number of tasks, and a stream that does not tell the task
            in evaluation; in a forward for more tokens than the network has positions.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="progressive-prompts",
        family="prompts",
        paper="Razdaibiedina et al. 2023, arXiv:2301.12314",
        needs="a pre-trained network of transformers; the task in evaluation",
        state="a prompt per task",
    )

    def __init__(
        self,
        length: int = 10,
        *,
        reparametrisation: int | None = None,
        num_tasks: int | None = None,
        backbone: str | None = None,
        trainable: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_count("length", length)
        if reparametrisation is not None:
            check_count("reparametrisation", reparametrisation)
        super().__init__(num_tasks=num_tasks, backbone=backbone, trainable=trainable, seed=seed)
        self.length = length
        self.reparametrisation = reparametrisation

    @override
    def build(self, backbone: Backbone, num_tasks: int) -> Prompts:
        return TaskPrompts(backbone, num_tasks, self.length, self.reparametrisation)

    @override
    def attach(self, pl_module: LightningModule, num_tasks: int | None = None) -> Prompts:
        prompts = super().attach(pl_module, num_tasks)
        assert isinstance(prompts, TaskPrompts)
        prompts.owner = Owner(pl_module)
        return prompts

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(datamodule, TaskStream) and not datamodule.reveals_task:
            raise ValueError(
                "`ProgressivePrompts` needs the task of a sample in evaluation, and this stream's scenario does not"
                " tell it: use a `TaskIncremental` scenario, or a method that finds the task, such as `SPrompts`."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            # the task learned last is not that of what is computed from now on
            pl_module.current_task = None  # type: ignore[assignment]

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        stream = trainer.datamodule  # type: ignore[attr-defined]
        # requests to forget count among the tasks of a stream, and not among those that are evaluated
        columns = stream.trained_by(task) if isinstance(stream, TaskStream) else [task.index]
        if columns != [self._finished]:
            raise ValueError(
                f"`ProgressivePrompts` finds the prompts of a task by its index, and task {task.index + 1} here comes"
                f" after {self._finished} learned tasks. Learn all tasks in one stream, or begin with a fresh network"
                " and a fresh callback."
            )
        super().on_task_start(trainer, pl_module, task)

    @override
    @torch.no_grad()
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        prompts: TaskPrompts = prompts_in(pl_module)
        if prompts.residual is None:
            return
        reshard(pl_module)
        tokens = full_copy(prompts.tokens)
        first, bias, second, last_bias = (full_copy(parameter) for parameter in prompts.residual.parameters())
        hidden = torch.relu(nn.functional.linear(tokens[self._task], first, bias))
        tokens[self._task] += nn.functional.linear(hidden, second, last_bias)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "residual", self._task))
        parameters, values = prompts.fresh_residual(generator)
        for parameter, value in zip([prompts.tokens, *parameters], [tokens, *values], strict=True):
            local(parameter).copy_(shard(value, parameter))
