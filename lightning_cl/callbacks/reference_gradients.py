"""What A-GEM and GEM share: gradients of losses on memorised samples, and turning the step's gradient by them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.callbacks.gradients_aside import backward_aside, check_gradients_aside, gradients_aside
from lightning_cl.callbacks.memory import ReplayMemory
from lightning_cl.core.capture import metrics_kept
from lightning_cl.core.distributed import sum_over_ranks_, world_size
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import local, sum_over_shards
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.references import add_references_, gram_matrix, reference_products
from lightning_cl.memory import Uniform

__all__ = ["GradientTable", "ReferenceGradients"]


class ReferenceGradients(ReplayMemory):
    """Turns the gradient of a step by those of losses on samples of earlier tasks.

    Once per optimizer step, from the second task on, the module's own ``training_step`` runs on each of several draws
    from the memory: in training mode, under the precision of the run, in silence, with random numbers of its own. Its
    gradients are kept as the rows of a matrix, over this rank's shards. The loss of a draw is the mean over the samples
    that all ranks drew. A subclass says which tasks a draw is from, and by how much of each reference the step turns.

    Attributes:
        projections: Optimizer steps that were turned so far.
    """

    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "required"
    takes_own_loss: bool = True

    def __init__(self, capacity: int | str, **settings: Any) -> None:
        super().__init__(capacity, **settings)
        if not isinstance(self.buffer.recall, Uniform):
            raise ValueError(
                f"`recall={self.recall!r}` chooses between tasks, but `{type(self).__name__}` draws from given ones:"
                " leave it 'uniform'."
            )
        self.projections = 0
        self._tables: StepCache[GradientTable] = StepCache()

    @abstractmethod
    def constraints(self, task: Task) -> list[range]:
        """Return the earlier tasks that each reference is for."""

    @abstractmethod
    def coefficients(self, products: Tensor, table: GradientTable) -> Tensor:
        """Return how much of each reference to add, [K], from their products with the gradient, [K]."""

    def size_of_draw(self, incoming: Any) -> int:
        """Return how many samples a rank draws for a reference beside this batch."""
        return self.batch_size or self.adapter.size(incoming)

    @contextmanager
    def posing(self, pl_module: LightningModule, tasks: range) -> Iterator[None]:
        """Enclose the step on a draw from ``tasks``."""
        yield

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_gradients_aside(trainer, pl_module, self)
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._tables.clear()

    # ------------------------------------------------------------------ the step

    @override
    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        task = TaskEvents.attach(trainer).task
        assert task is not None
        # what all ranks hold is known on each of them, so that they agree on the passes
        past = [tasks for tasks in self.constraints(task) if self.buffer.count(tasks).any()]
        if not past:
            return
        table = self._tables.get(step)
        if table is None or table.count != len(past):
            table = self._tables[step] = GradientTable(step.parameters, len(past))
        with metrics_kept(pl_module):
            self._measure(trainer, pl_module, past, table)
        products = table.products()
        if bool((products >= 0).all()):
            return
        table.add(self.coefficients(products, table))
        self.projections += 1

    def _measure(self, trainer: Trainer, pl_module: LightningModule, past: list[range], table: GradientTable) -> None:
        """Fill the table with the gradients of the losses on a draw from each of ``past``."""
        size = self.size_of_draw(self._incoming)
        draws = [self.draw(trainer, size, stream=tasks.start, tasks=tasks) for tasks in past]
        # a rank with less to draw from, or nothing, counts for as much in the mean over all samples
        sizes = torch.tensor([float(len(drawn or ())) for drawn in draws], device=pl_module.device)
        weights = (sizes * world_size() / sum_over_ranks_(sizes.clone())).unbind()
        with gradients_aside(pl_module):
            for row, (tasks, drawn, weight) in enumerate(zip(past, draws, weights, strict=True)):
                # ranks of a sharded model must run the same passes: one without samples weighs its own batch by 0
                batch = self._incoming if drawn is None else self.as_batch(drawn, like=self._incoming)
                seed = derived_seed(self.seed, "reference", trainer.global_rank, self.number_of_draw(trainer), row)
                scale = None if world_size() == 1 else weight
                with self.posing(pl_module, tasks):
                    backward_aside(trainer, pl_module, batch, seed=seed, weight=scale)
                table.take(row)
        table.reduce()

    @override
    def forget_samples(self, trainer: Trainer, pl_module: LightningModule, sample_ids: Tensor) -> list[Influence]:
        # the gradients of the last draws
        self._tables.clear()
        return super().forget_samples(trainer, pl_module, sample_ids)

    # ------------------------------------------------------------------ what it takes

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        rows = sum(local(p).numel() * torch.promote_types(p.dtype, torch.float32).itemsize for p in trained)
        stream = trainer.datamodule  # type: ignore[attr-defined]
        tasks = (stream.task_of_epoch(0).num_tasks if hasattr(stream, "task_of_epoch") else None) or 2
        constraints = len(self.constraints(Task(index=max(tasks - 1, 1), name="")))
        size = self.adapter.size(batch)
        drawn = min(self.size_of_draw(batch), self.share(trainer, batch))

        def larger(incoming: Any) -> Any:
            # the passes come one after the other
            return incoming if drawn <= size else self.adapter.select(batch, [row % size for row in range(drawn)])

        # the step's own gradients wait beside those of a reference
        waiting = sum(local(p).nbytes for p in trained)
        return replace(super().footprint(trainer, pl_module, batch), device=constraints * rows + waiting, batch=larger)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "projections": self.projections}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.projections = state_dict["projections"]


class _Group:
    """Parameters whose shards add up in the same way: their references lie side by side in one matrix [K, N]."""

    def __init__(self, parameters: dict[str, Parameter], count: int) -> None:
        self.parameters = parameters
        self.name = next(iter(parameters))
        shards = [local(parameter.detach()) for parameter in parameters.values()]
        dtype = torch.promote_types(shards[0].dtype, torch.float32)
        self.matrix = shards[0].new_zeros((count, sum(shard.numel() for shard in shards)), dtype=dtype)
        pieces = self.matrix.split([shard.numel() for shard in shards], dim=1)
        self.pieces = dict(zip(parameters, pieces, strict=True))


class GradientTable:
    """Reference gradients of all parameters that an optimizer steps, one row for each reference."""

    def __init__(self, parameters: dict[str, Parameter], count: int) -> None:
        self.count = count
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        groups: dict[Any, dict[str, Parameter]] = {}
        for name, parameter in self.parameters.items():
            placed = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
            groups.setdefault((placed, parameter.device, parameter.dtype), {})[name] = parameter
        self.groups = [_Group(members, count) for members in groups.values()]

    def take(self, row: int) -> None:
        """Copy the gradients that a backward pass left into a row; a parameter that it did not reach has zeros."""
        for group in self.groups:
            group.matrix[row].zero_()
            found = {name: p.grad for name, p in group.parameters.items() if p.grad is not None}
            if found:
                rows = [group.pieces[name][row].view(local(grad).shape) for name, grad in found.items()]
                torch._foreach_copy_(rows, [local(grad) for grad in found.values()])

    def reduce(self) -> None:
        """Average over ranks what the strategy has not: gradients of parameters that every rank holds in full."""
        for group in self.groups:
            if not isinstance(group.parameters[group.name], DTensor):
                sum_over_ranks_(group.matrix).div_(world_size())

    def products(self) -> Tensor:
        """Return the products of the references with the present gradients, [K], the same on every rank."""
        terms = {}
        for group in self.groups:
            grads = {name: local(p.grad) for name, p in group.parameters.items() if p.grad is not None}
            if grads:
                terms[group.name] = reference_products([group.pieces[name] for name in grads], list(grads.values()))
        return sum_over_shards(terms, self.parameters) if terms else torch.zeros(self.count)

    def gram(self) -> Tensor:
        """Return the products of the references with each other, [K, K], the same on every rank."""
        return sum_over_shards({group.name: gram_matrix(group.matrix) for group in self.groups}, self.parameters)

    def add(self, coefficients: Tensor) -> None:
        """Add to the present gradients so much of each reference, [K]."""
        self._fill_missing()
        for group in self.groups:
            grads = {name: local(p.grad) for name, p in group.parameters.items() if p.grad is not None}
            add_references_(list(grads.values()), [group.pieces[name] for name in grads], coefficients)

    def _fill_missing(self) -> None:
        """Give a gradient of zeros to parameters that the step's loss does not reach, and a reference does."""
        for group in self.groups:
            for name, parameter in group.parameters.items():
                if parameter.grad is None:
                    reached = {name: group.pieces[name].any().float()}
                    # a shard may be zeros where that of another rank is not
                    if bool(sum_over_shards(reached, self.parameters)):
                        parameter.grad = torch.zeros_like(parameter)
