"""A classifier's head whose rows come into play task by task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.core.checks import check_choice, check_count, check_positive
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import full_tensor, local, reshard, shard
from lightning_cl.core.task import Task
from lightning_cl.core.task_layer import TaskLayer
from lightning_cl.functional.cosine_head import cosine_scores
from lightning_cl.functional.masked_scores import mask_scores

__all__ = ["HeadKind", "IncrementalHead", "RowStart"]

HeadKind = Literal["linear", "cosine"]
RowStart = Literal["kaiming", "zeros", "mean"]


class IncrementalHead(TaskLayer):
    r"""A linear or cosine head that answers with the classes seen so far, and takes those of a task when it starts.

    The layer replaces the last ``nn.Linear`` of any LightningModule. It hears of tasks by itself: when a task starts,
    the rows of its new classes are started and their scores come into play; rows of classes seen before go on as they
    are. The rows of classes to come are there from the beginning, because no strategy takes parameters later, and
    stand at zero: their scores are masked, so that they have no gradient, and what is zero has no decay and no
    momentum. The scores are

    .. math:: z_c = w_c^\top f + b_c \quad (\text{``linear''}) \qquad \text{or} \qquad
        z_c = \eta \, \frac{w_c^\top f}{\lVert w_c \rVert \lVert f \rVert} \quad (\text{``cosine''})

    with a learned :math:`\eta`, as in Hou et al. 2019 (LUCIR, CVPR): the weights of new classes cannot outgrow those
    of old ones. That paper takes the features without a last ReLU.

    Classes are what the stream tells; labels of replayed samples are among those seen. Until a task names its classes,
    and on data that never does, it is an ordinary head with all classes. When a task names classes to a head whose
    rows have learned in that time, or were set by hand, all its classes count as seen: none starts anew.

    A class beyond ``num_classes`` makes the head grow on a single process: parameters are replaced in the optimizers,
    whose moments go on. A checkpoint of a head that grew makes a new one grow when it is loaded.

    Args:
        in_features: Width D of the features.
        num_classes: Rows that are there from the beginning: for DDP and FSDP2, the classes of the whole stream.
        kind: ``"linear"`` or ``"cosine"``.
        start: How rows of new classes start: ``"kaiming"`` as those of ``nn.Linear``, drawn from a seed of their
            class; ``"zeros"``, for ``"linear"``; ``"mean"`` of the rows of the classes before, in the first task
            ``"kaiming"``.
        bias: Of ``"linear"``: add b.
        scale: Of ``"cosine"``: :math:`\eta` to start from; above 0. The default is that of the authors' code.
        seed: Seed of the rows.

    Attributes:
        seen: The classes so far, bool [C], a buffer; none is set until a task names its classes.

    Raises:
        ValueError: For a setting out of range; on several ranks, or sharded, for a class beyond ``num_classes``.

    Example:
        >>> head = IncrementalHead(2, 3)
        >>> _ = head.seen.copy_(torch.tensor([True, True, False]))
        >>> head(torch.zeros(1, 2)).softmax(-1)[0, 2]
        tensor(0., grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kind: HeadKind = "linear",
        start: RowStart = "kaiming",
        bias: bool = True,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_count("in_features", in_features)
        check_count("num_classes", num_classes)
        check_choice("kind", kind, get_args(HeadKind))
        check_choice("start", start, get_args(RowStart))
        check_positive("scale", scale)
        if kind == "cosine" and start == "zeros":
            raise ValueError("`start='zeros'` has no direction for `kind='cosine'`: use 'kaiming' or 'mean'.")
        super().__init__()
        self.in_features = in_features
        self.kind = kind
        self.start = start
        self.seed = seed
        self.weight = nn.Parameter(torch.zeros(num_classes, in_features))
        self.bias = nn.Parameter(torch.zeros(num_classes)) if bias and kind == "linear" else None
        # of one dimension, because FSDP2 shards no scalar
        self.scale = nn.Parameter(torch.tensor([float(scale)])) if kind == "cosine" else None
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self._set_rows(self._fresh(range(num_classes)), range(num_classes))

    @property
    def num_classes(self) -> int:
        """Rows of the head."""
        return self.seen.numel()

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Return the scores [..., C] of features [..., D], masked where a class was not seen."""
        if self.scale is None:
            scores = linear(features, self.weight, self.bias)
        else:
            scores = cosine_scores(features, self.weight, self.scale)
        return mask_scores(scores, self.seen | ~self.seen.any())

    @override
    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_classes}, kind={self.kind!r}, start={self.start!r}"

    # ------------------------------------------------------------------ tasks

    @override
    def start_task(self, trainer: Trainer, task: Task) -> None:
        seen = self.seen.tolist()
        if not task.classes and not any(seen):
            return
        reshard(trainer.lightning_module)
        if not any(seen) and self._has_learned():
            self.seen.fill_(True)
            seen = self.seen.tolist()
        # of a task that does not name its classes, every one may come
        classes = task.classes or range(self.num_classes)
        if max(classes) >= self.num_classes:
            self._grow(trainer, task)
            seen += [False] * (self.num_classes - len(seen))
        new = [label for label in sorted(classes) if not seen[label]]
        values = self._fresh(new)
        old = [label for label, known in enumerate(seen) if known]
        if not old:
            waiting = sorted(set(range(self.num_classes)) - set(new))
            self._set_rows([torch.zeros(len(waiting), *p.shape[1:]) for p in self._by_class()], waiting)
        elif self.start == "mean":
            values = [full_tensor(p)[old].float().mean(0, keepdim=True) for p in self._by_class()]
        self._set_rows(values, new)
        self.seen[new] = True

    def _by_class(self) -> list[nn.Parameter]:
        """Return the parameters with a row for each class."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def _fresh(self, classes: Sequence[int]) -> list[Tensor]:
        """Return rows to start from: the same for a class whatever the size of the head."""
        bound = 0.0 if self.start == "zeros" else 1 / math.sqrt(self.in_features)
        drawn = torch.zeros(len(classes), self.in_features + 1, dtype=torch.float32)
        for row, label in zip(drawn, classes, strict=True):
            row.uniform_(-bound, bound, generator=torch.Generator().manual_seed(derived_seed("row", self.seed, label)))
        return [drawn[:, :-1], drawn[:, -1]][: len(self._by_class())]

    def _has_learned(self) -> bool:
        """Return whether rows are no longer those that the head was made with; no buffer could say it of any fit."""
        pairs = zip(self._by_class(), self._fresh(range(self.num_classes)), strict=True)
        return not all(
            torch.equal(whole, rows.to(whole)) for whole, rows in ((full_tensor(p), rows) for p, rows in pairs)
        )

    @torch.no_grad()
    def _set_rows(self, values: Sequence[Tensor], classes: Sequence[int]) -> None:
        for parameter, rows in zip(self._by_class(), values, strict=True):
            whole = full_tensor(parameter).clone()
            whole[list(classes)] = rows.to(whole)
            local(parameter.detach()).copy_(shard(whole, parameter))

    # ------------------------------------------------------------------ growth

    def _grow(self, trainer: Trainer, task: Task) -> None:
        size = max(task.classes) + 1
        if trainer.world_size > 1 or isinstance(self.weight, DTensor):
            raise ValueError(
                f"{task} has class {size - 1}, but the head has {self.num_classes} rows, and on several ranks or in"
                f" shards it cannot grow. Give it `num_classes={size}`, or the classes of the whole stream."
            )
        for name, old in list(self._parameters.items()):
            if old is None or name == "scale":
                continue
            new = nn.Parameter(_lengthened(old.detach(), size), old.requires_grad)
            setattr(self, name, new)
            for optimizer in trainer.optimizers:
                _replace(optimizer, old, new)
        self.seen = _lengthened(self.seen, size)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        size = len(state_dict.get(f"{prefix}seen", ()))
        if size > self.num_classes and not isinstance(self.weight, DTensor):
            for parameter in self._by_class():
                # the same object, which an optimizer may know
                parameter.data = _lengthened(parameter.data, size)
            self.seen = _lengthened(self.seen, size)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _lengthened(tensor: Tensor, size: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(size - len(tensor), *tensor.shape[1:])])


def _replace(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Let an optimizer step ``new`` with what it has gathered about ``old``."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = {
            name: _lengthened(value, len(new)) if isinstance(value, Tensor) and value.shape == old.shape else value
            for name, value in optimizer.state.pop(old).items()
        }
