"""CURLoRA: a small matrix trains between rows and columns of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl import ContinualCallback, CURLoRA, Task
from lora_runs import LAYERS, RUNS, SLOW, Watch, slot_of
from toys import LoraToy, fit_stream


class Starts(ContinualCallback):
    """Notes factors and mixing of a layer where a task starts, and what trains."""

    needs_state = False

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []
        self.trained: set[str] = set()

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        slot = slot_of(pl_module)
        self.found.append((*slot.weights("default"), slot.mixing("default")))
        self.trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}


def places(parts: Tensor, weight: Tensor) -> list[int]:
    """The rows of a weight that parts are."""
    return [int((weight == part).all(1).nonzero()) for part in parts]


@pytest.mark.parametrize("run", RUNS)
def test_rows_and_columns_stay_while_the_matrix_trains(run: str, tmp_path: Path) -> None:
    """They are the base's, to the bit, at the start of each task and at its end."""
    kind, settings = RUNS[run]
    starts, watch, after, module = Starts(), Watch(), Watch(), kind()
    weight = module.get_submodule(LAYERS[0]).base_layer.weight.detach().clone()
    fit_stream(tmp_path, [watch, CURLoRA(capacity=8), starts, after], module=module, **settings)
    drawn = []
    for (down, up, first), trained, last in zip(starts.found, watch.factors, watch.mixings, strict=True):
        assert torch.equal(down, trained[0])
        assert torch.equal(up, trained[1])
        drawn.append((places(down, weight), places(up.T, weight.T)))
        assert not first.any()
        assert last.abs().max() > 1e-3
    assert drawn[0] != drawn[1]
    assert starts.trained == {f"{name}.lora_A.default.mixing" for name in LAYERS}
    for old, new in zip(watch.outputs, after.outputs, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)


def test_draws_follow_the_seed(tmp_path: Path) -> None:
    """The same seed draws the same."""
    found = []
    for seed in (3, 3, 4):
        starts = Starts()
        fit_stream(tmp_path, [CURLoRA(capacity=8, seed=seed), starts], module=SLOW())
        found.append(torch.cat([down for down, _, _ in starts.found]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_base_weight_of_zeros_is_refused(tmp_path: Path) -> None:
    """As a head that starts at zero has it; the layer is named."""
    module = LoraToy()
    with torch.no_grad():
        module.get_submodule(LAYERS[1]).base_layer.weight.zero_()
    watch = Watch()
    with pytest.raises(ValueError, match=r"cannot start in 'model\.base_model\.model\.3': 2 columns .* of 0 columns"):
        fit_stream(tmp_path, [CURLoRA(), watch], module=module)
    assert watch.steps == []
