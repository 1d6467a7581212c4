"""Salient layers beyond the contract: which blocks train, and when they are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from language import llama, token_stream
from lightning_cl import ContinualCallback, SalientLayers
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer


class Record(ContinualCallback):
    """Keeps what is chosen and what moves in every step, and the task's gradients."""

    boundaries = "unused"
    needs_state = False

    def __init__(self, method: SalientLayers) -> None:
        self.method = method
        self.chosen: list[list[str]] = []
        self.moved: list[set[str]] = []
        self.norms: list[dict[str, float]] = []

    def observe_gradients(self, trainer: Any, pl_module: Any, step: Any) -> None:
        self.norms.append({name: float(p.grad.norm()) for name, p in step.parameters.items() if p.grad is not None})

    def limit_gradients(self, trainer: Any, pl_module: Any, step: Any) -> None:
        step.keep(step.parameters)

    def observe_update(self, trainer: Any, pl_module: Any, step: Any) -> None:
        self.chosen.append(list(self.method.chosen[trainer.optimizers.index(step.optimizer)]))
        self.moved.append({name for name, p in step.parameters.items() if not torch.equal(p, step.before(name))})


def run(root: Path, method: SalientLayers, module: Any = None, **settings: Any) -> Record:
    """Fit the toy stream under the method; return what was seen."""
    record = Record(method)
    fit_stream(root, [method, record], module=module, **settings)
    return record


def test_the_most_sensitive_block_trains(tmp_path: Path) -> None:
    """That of the largest gradient over all of its parameters, in every step anew; nothing else moves."""
    record = run(tmp_path, SalientLayers())
    for chosen, moved, norms in zip(record.chosen, record.moved, record.norms, strict=True):
        squares = {
            block: sum(norm**2 for name, norm in norms.items() if name.startswith(block))
            for block in ("model.0", "model.3")
        }
        assert chosen == [max(squares, key=lambda block: squares[block])]
        assert moved == {f"{chosen[0]}.weight", f"{chosen[0]}.bias"}
    assert len({tuple(chosen) for chosen in record.chosen}) == 2


def test_a_choice_lasts_and_exceptions_train(tmp_path: Path) -> None:
    """For so many steps; what `exclude` names is neither chosen nor held."""
    record = run(tmp_path, SalientLayers(every_n_steps=5))
    assert record.chosen[:5] == [record.chosen[0]] * 5
    assert record.chosen[5:10] == [record.chosen[5]] * 5
    record = run(tmp_path, SalientLayers(exclude=["model.3.*"]))
    assert record.chosen == [["model.0"]] * 12
    assert all({"model.3.weight", "model.3.bias"} <= moved for moved in record.moved)


def test_from_a_task_on(tmp_path: Path) -> None:
    """Before, everything trains; the first choice is that task's."""
    method = SalientLayers(from_task=1)
    fit_stream(tmp_path, [method])
    assert method._taken == {0: 6}


def test_blocks_of_a_language_model(tmp_path: Path) -> None:
    """Embeddings, the last normalisation and the head are held too."""
    method = SalientLayers()
    record, module = Record(method), llama(learning_rate=0.01)
    trainer(tmp_path, [method, record]).fit(module, datamodule=token_stream())
    for chosen, moved in zip(record.chosen, record.moved, strict=True):
        assert chosen[0].startswith("network.model.layers.")
        assert moved == {name for name, _ in module.named_parameters() if name.startswith(f"{chosen[0]}.")}


class Manual(ToyModule):
    """Two optimizers, one for each layer, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.model[layer].parameters(), lr=0.05) for layer in (0, 3)]


def test_several_optimizers_choose_among_their_own(tmp_path: Path) -> None:
    """Under manual optimization, too."""
    method = SalientLayers()
    loader = toy_loaders()[0]
    trainer(tmp_path, [method], max_epochs=1).fit(Manual(), loader, loader)
    assert method.chosen == {0: ["model.0"], 1: ["model.3"]}


def test_accumulated_batches_are_one_choice(tmp_path: Path) -> None:
    """Of the gradient of the step: as with batches of their joined size."""
    whole = fit_stream(tmp_path, [SalientLayers()], stream=toy_stream(batch_size=8))
    parts = fit_stream(tmp_path, [SalientLayers()], stream=toy_stream(batch_size=4), accumulate_grad_batches=2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    """With the way out."""
    for settings, message in (
        ({"num_blocks": 0}, "`num_blocks` must be a number above 0, got 0"),
        ({"every_n_steps": 0.5}, "`every_n_steps` must be a number above 0, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            SalientLayers(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`num_blocks=3`, but ToyModule has 2 blocks to choose from by `blocks=None`"):
        fit_stream(tmp_path, [SalientLayers(3)])
