"""A head of its own for each task, where one trains beside the adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from lightning_cl.adapters.slot import Slot
from lightning_cl.core.state import full_copy, reshard
from lightning_cl.functional.masked_scores import mask_scores
from lightning_cl.mixins.incremental_head import IncrementalHead

__all__ = ["TaskHeads", "incremental_head"]


class TaskHeads:
    """Keeps the weights that one linear layer had at the end of each task, and computes with them.

    Attributes:
        name: The layer, ``None`` if nothing trains beside the adapters.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._weights: list[dict[str, Tensor]] = []

    def find(self, pl_module: LightningModule, slots: Iterable[Slot], user: str) -> None:
        """Find the layer.

        Raises:
            ValueError: If other parameters train beside the slots.
        """
        ours = {id(p) for slot in slots for name in (slot.current, slot.past) for p in slot.parameters(name).values()}
        beside = [name for name, p in pl_module.named_parameters() if p.requires_grad and id(p) not in ours]
        owners = {name.rpartition(".")[0] for name in beside}
        self.name = owners.pop() if len(owners) == 1 else None
        if beside and (self.name is None or not _is_linear(pl_module.get_submodule(self.name))):
            raise ValueError(
                f"`{user}` keeps an adapter and one linear layer, such as the head, for each task, but {beside[:4]}"
                " train as well: what later tasks make of them would change the earlier ones. Freeze them, or adapt"
                " them too; of heads it keeps an `nn.Linear`, or an `IncrementalHead(kind='linear')`."
            )

    def keep(self, pl_module: LightningModule, task: int) -> None:
        """Keep the layer as it is at the end of a task; all ranks must call this."""
        if self.name is not None:
            reshard(pl_module)
            layer = pl_module.get_submodule(self.name)
            kept = {name: full_copy(parameter) for name, parameter in layer.named_parameters()}
            if isinstance(layer, IncrementalHead):
                kept["seen"] = layer.seen.clone()
            self._weights[task:] = [kept]

    def num_bytes(self, pl_module: LightningModule) -> int:
        """Return what it keeps of a task."""
        if self.name is None:
            return 0
        return sum(p.numel() * p.itemsize for p in pl_module.get_submodule(self.name).parameters())

    def put_in_place(self, pl_module: LightningModule, tasks: list[Tensor]) -> Any:
        """Let each sample have the head of its task, by the handle of a hook.

        Args:
            pl_module: The user's module.
            tasks: Holds the tasks int64 [B] of the forward that comes, and may hold others for the next. Those without
                a kept head have the present one.
        """

        def own(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            changed = output.clone()
            for task, weights in enumerate(self._weights):
                rows = tasks[0] == task
                changed[rows] = _scores(inputs[0][rows], weights, output)
            return changed

        if self.name is None:
            return None
        # in front of the hook of FSDP2, which takes the weights away
        return pl_module.get_submodule(self.name).register_forward_hook(own, prepend=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the name, and the weights of each task."""
        return {"name": self.name, "weights": [dict(weights) for weights in self._weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.name, self._weights = state["name"], list(state["weights"])


def incremental_head(pl_module: LightningModule) -> str | None:
    """Return the name of the module's head whose rows come into play task by task, if it has one."""
    return next((name for name, part in pl_module.named_modules() if isinstance(part, IncrementalHead)), None)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, IncrementalHead) and layer.kind == "linear")


def _scores(inputs: Tensor, weights: dict[str, Tensor], like: Tensor) -> Tensor:
    """Return what a kept head computes, with as many columns as the present one."""
    bias = weights["bias"].to(like) if "bias" in weights else None
    scores = linear(inputs, weights["weight"].to(like), bias)
    if "seen" not in weights:
        return scores
    # it may have grown since
    grown, seen = (0, like.shape[-1] - scores.shape[-1]), weights["seen"].to(like.device)
    return mask_scores(pad(scores, grown), pad(seen | ~seen.any(), grown))
