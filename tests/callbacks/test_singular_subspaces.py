"""Updates stay out of where leading singular directions meet, whatever the optimizer, the precision and the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.optim import SGD, AdamW

from lightning_cl import ContinualCallback, FSDP2Strategy, SingularSubspaceProjection
from lightning_cl.core.update import OptimizerStep
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer
from users import Manual, Texts, loader

OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.02, weight_decay=0.5),
    "fused adamw": lambda p: AdamW(p, lr=0.02, weight_decay=0.5, fused=True),
}
RUNS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


class Deep(ToyModule):
    """Two square layers between others, and any optimizer."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        self.optimizer = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(3)
            layers = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
            self.model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        return found


def whole(parameter: Tensor) -> Tensor:
    """A parameter, gathered if it is sharded, in float64."""
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().double().clone()


def matrices(module: LightningModule) -> dict[str, Tensor]:
    """All matrices of a module, gathered."""
    return {name: whole(p) for name, p in module.named_parameters() if p.ndim == 2}


def shares(old: Tensor, new: Tensor, rank: int) -> tuple[float, float]:
    """The norm of a change where the leading directions of the old weight meet, and in all."""
    u, _, v = torch.linalg.svd(old)
    change = new - old
    return float((u[:, :rank].T @ change @ v[:rank].T).norm()), float(change.norm())


@pytest.mark.parametrize(
    ("optimizer", "run"), [*((name, "plain") for name in OPTIMIZERS), *(("adamw", run) for run in RUNS)]
)
def test_updates_are_orthogonal(optimizer: str, run: str, tmp_path: Path) -> None:
    """What a task did to each weight is orthogonal to 1e-6 of it; the first task is free."""
    module, method = Deep(optimizer), SingularSubspaceProjection(target_ratio=0.5, min_ratio=0.5)
    first, second = toy_loaders()
    start = matrices(module)
    trainer(tmp_path, [method], max_epochs=3, **RUNS.get(run, {})).fit(module, first, first)
    old = matrices(module)
    assert all(shares(start[name], old[name], 3)[0] > 1e-2 for name in old)
    trainer(tmp_path, [method], max_epochs=3, **RUNS.get(run, {})).fit(module, second, second)
    assert method.ranks() == {"model.0.weight": 3, "model.2.weight": 3, "model.4.weight": 2}
    for name, new in matrices(module).items():
        inside, moved = shares(old[name], new, method.ranks()[name])
        assert inside < 1e-6 * moved
        assert moved > 0.05


def test_protect_pretrained(tmp_path: Path) -> None:
    """The first task is held to the weights that it found, with the target ratio in all layers."""
    module, method = Deep(), SingularSubspaceProjection(target_ratio=0.5, protect_pretrained=True)
    old, (data, _) = matrices(module), toy_loaders()
    trainer(tmp_path, [method], max_epochs=3).fit(module, data, data)
    for name, new in matrices(module).items():
        inside, moved = shares(old[name], new, 2 if name == "model.4.weight" else 3)
        assert inside < 1e-6 * moved
        assert moved > 0.05


class Interrupting(ContinualCallback):
    """Ends a fit in the middle of its task."""

    needs_state = False

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        raise RuntimeError("interrupted")


def test_an_interrupted_task_begins_anew(tmp_path: Path) -> None:
    """The next fit decomposes the weights that it finds."""
    module, method = Deep(), SingularSubspaceProjection(target_ratio=0.5, protect_pretrained=True)
    data, _ = toy_loaders()
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(tmp_path, [method, Interrupting()], max_epochs=1).fit(module, data, data)
    with torch.no_grad():
        module.model[0].weight.copy_(torch.randn(6, 6))
    old = matrices(module)["model.0.weight"]
    trainer(tmp_path, [method], max_epochs=1).fit(module, data, data)
    inside, moved = shares(old, matrices(module)["model.0.weight"], 3)
    assert inside < 1e-6 * old.norm()
    assert moved > 0.05


def test_bf16_weights_stay_within_a_rounding(tmp_path: Path) -> None:
    """Rounding does not add up over 120 steps."""
    module, (data, _) = Deep(), toy_loaders()
    method = SingularSubspaceProjection(target_ratio=0.5, protect_pretrained=True)
    module.to(torch.bfloat16)
    old = matrices(module)
    trainer(tmp_path, [method], max_epochs=40, precision="bf16-true").fit(module, data, data)
    for name, new in matrices(module).items():
        inside, moved = shares(old[name], new, 2 if name == "model.4.weight" else 3)
        assert inside < 2**-8 * new.norm()
        assert moved > 0.5


# ---------------------------------------------------------------------- ranks by importance


def similarities(module: Deep) -> dict[str, float]:
    """The mean cosine similarity of inputs and outputs, without the bias, of the square layers on the first task."""
    inputs, labels = toy_data().tensors
    x = inputs[labels < 2]
    with torch.no_grad():
        hidden = torch.tanh(module.model[0](x))
        first = cosine_similarity(x, x @ module.model[0].weight.T).mean()
        second = cosine_similarity(hidden, module.model[2](hidden)).mean()
    return {"model.0.weight": float(first), "model.2.weight": float(second)}


def test_importance_is_measured_on_square_layers(tmp_path: Path) -> None:
    """It decides how many directions a layer keeps; the others keep the target."""
    module, (data, _) = Deep(), toy_loaders()
    method = SingularSubspaceProjection(min_ratio=0.2, target_ratio=0.6, n_samples=None)
    trainer(tmp_path, [method], max_epochs=1).fit(module, data, data)
    assert method.similarity == pytest.approx(similarities(module), abs=1e-6)
    method.similarity = {"model.0.weight": 0.1, "model.2.weight": 0.3}
    # 0.2 + 0.5 * 0.4 and 0.2 + 1.5 * 0.4 of six, 0.6 of four
    assert method.ranks() == {"model.0.weight": 2, "model.2.weight": 5, "model.4.weight": 2}


def test_no_measuring_where_it_decides_nothing(tmp_path: Path) -> None:
    """With one ratio for all layers there is no pass over the task."""
    method = SingularSubspaceProjection(min_ratio=0.5, target_ratio=0.5)
    fit_stream(tmp_path, [method], module=Deep())
    assert method.similarity == {}


# ---------------------------------------------------------------------- parameters


@pytest.mark.parametrize("others", ["free", "hold"])
def test_other_parameters(others: Any, tmp_path: Path) -> None:
    """Embeddings, norms and biases train as in the paper, or stay to the bit; excluded ones train."""
    module = Texts()
    method = SingularSubspaceProjection(others=others, exclude=["norm.bias"], protect_pretrained=True)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    data = loader(Texts)
    trainer(tmp_path, [method], max_epochs=1).fit(module, data, data)
    assert method.units == {"head.weight": ["head.weight"]}
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, start[name])}
    free = {"embedding.weight", "norm.weight", "head.bias"} if others == "free" else set()
    assert moved == {"head.weight", "norm.bias"} | free


def test_frozen_and_excluded_weights(tmp_path: Path) -> None:
    """They have no subspace."""
    module = Deep()
    module.model[0].weight.requires_grad_(False)
    method = SingularSubspaceProjection(exclude=["model.4.*"])
    method.select(module)
    assert method.units == {"model.2.weight": ["model.2.weight"]}
    with pytest.raises(ValueError, match="finds no weight to project among the trainable parameters of Deep"):
        fit_stream(tmp_path, [SingularSubspaceProjection(exclude=["*.weight"])], module=module)


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    """Each weight is projected after the step of its own optimizer."""
    module, data = Manual(), loader(Manual)
    old = matrices(module)
    method = SingularSubspaceProjection(target_ratio=0.5, protect_pretrained=True)
    trainer(tmp_path, [method], max_epochs=4).fit(module, data, data)
    for name, new in matrices(module).items():
        inside, moved = shares(old[name], new, 2)
        assert inside < 1e-6 * moved
        assert moved > 0.05


# ---------------------------------------------------------------------- ranks and checkpoints


def fit_on_ranks(root: Path, strategy: str) -> dict[str, Any]:
    """Two tasks on this rank's half of each batch; return weights after each, and what decided."""
    module, method = Deep(), SingularSubspaceProjection(min_ratio=0.2, target_ratio=0.5)
    ends, ranks = [], []
    for data in toy_loaders(batch_size=4):
        sharding: Any = FSDP2Strategy(wrap=["Linear"]) if strategy == "fsdp2" else strategy
        trainer(root, [method], max_epochs=2, strategy=sharding, devices=2).fit(module, data, data)
        ends.append(matrices(module))
        ranks.append(method.ranks())
    return {"ends": ends, "ranks": ranks[0], "similarity": method.similarity}


@pytest.mark.distributed
def test_shards(tmp_path: Path) -> None:
    """Sharded weights end orthogonal and equal on both ranks, as replicas do."""
    ranks = Ranks(2)
    try:
        for strategy in ("ddp", "fsdp2"):
            first, second = ranks.run(fit_on_ranks, tmp_path, strategy)
            assert first["similarity"] == second["similarity"]
            old, new = first["ends"]
            for name, weight in new.items():
                assert torch.equal(weight, second["ends"][1][name])
                inside, moved = shares(old[name], weight, first["ranks"][name])
                assert inside < 1e-6 * moved
                assert moved > 0.01
    finally:
        ranks.close()


def test_another_model_is_refused(tmp_path: Path) -> None:
    """On resume, a weight without its directions would train unprotected."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit_stream(tmp_path, [SingularSubspaceProjection(), saver])
    module = ToyModule()
    module.model[0].weight.requires_grad_(False)
    module.configure_optimizers = ToyModule().configure_optimizers  # type: ignore[method-assign]
    again = [SingularSubspaceProjection(), saver]
    with pytest.raises(ValueError, match=r"anchors of `SingularSubspaceProjection` has 'model.0.weight' of shape"):
        fit_stream(tmp_path, again, module=module, ckpt_path=tmp_path / "step=8.ckpt")


def test_state_before_it_is_placed() -> None:
    """A state that was loaded is given back as it was."""
    state = {"subspaces": {"w": {"left": torch.ones(2, 1)}}, "similarity": {"w": 0.5}, "anchors": {"w": torch.ones(2)}}
    method = SingularSubspaceProjection()
    method.load_state_dict(state)
    assert method.state_dict() == state


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    """With the name of the setting and what was given."""
    for settings, message in (
        ({"min_ratio": -0.1}, "`min_ratio` must be from 0 to 1, got -0.1"),
        ({"target_ratio": 0.05}, "`target_ratio` must be from `min_ratio=0.1` to 1, got 0.05"),
        ({"target_ratio": 1.5}, "`target_ratio` must be from `min_ratio=0.1` to 1, got 1.5"),
        ({"n_samples": 0}, "`n_samples` must be above 0, got 0"),
        ({"others": "stop"}, "`others` must be one of 'hold', 'free', got 'stop'"),
    ):
        with pytest.raises(ValueError, match=message):
            SingularSubspaceProjection(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`exclude` pattern 'heads' matches no parameter of ToyModule"):
        fit_stream(tmp_path, [SingularSubspaceProjection(exclude=["heads"])], stream=toy_stream())


def test_footprint() -> None:
    """A copy of the weights, and half of a square of each side."""
    footprint = SingularSubspaceProjection().footprint(None, ToyModule(), None)  # type: ignore[arg-type]
    assert footprint.device == 4 * (6 * 8 + 8 * 4) + 4 * (8 * 4 + 6 * 3 + 4 * 2 + 8 * 4)
