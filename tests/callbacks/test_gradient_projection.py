"""GPM in runs of every kind: what old inputs give does not move, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting import Serves, forgetting_stream
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl import ContinualCallback, FSDP2Strategy, GradientProjection
from lightning_cl.core.update import OptimizerStep
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer
from users import Attention, Images, Manual, Texts, Tied, UserModule, loader

ALL = {"threshold": 1.0, "n_samples": None}


def perceptron() -> nn.Module:
    """Two layers with dropout."""
    return nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Dropout(0.2), nn.Linear(40, 3))


class Regressor(LightningModule):
    """Two linear layers, or other ones, fitted to random targets by any optimizer."""

    def __init__(self, optimizer: Callable[..., Any], build: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.optimizer = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.network = (build or perceptron)()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return mse_loss(self(inputs.to(self.dtype)).flatten(1), targets.to(self.dtype))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def task(number: int, samples: int = 12, outputs: int = 3) -> TensorDataset:
    """Inputs [n, 10] in a space of their own of three dimensions, random targets."""
    generator = torch.Generator().manual_seed(number)
    space = torch.randn(3, 10, generator=generator)
    inputs = torch.randn(samples, 3, generator=generator) @ space
    return TensorDataset(inputs, torch.randn(samples, outputs, generator=generator))


def fit_tasks(root: Path, module: LightningModule, methods: list[Any], tasks: list[Any], **settings: Any) -> None:
    """One fit for each task."""
    for data in tasks:
        batches = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=4)
        trainer(root, methods, **({"max_epochs": 3} | settings)).fit(module, batches, batches)


@torch.no_grad()
def outputs(module: nn.Module, inputs: Tensor) -> Tensor:
    """What it gives in evaluation mode."""
    module.eval()
    found: Tensor = module(inputs)
    module.train()
    return found


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.5),
    "fused adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
}
RUNS: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize(
    ("optimizer", "run"), [*((name, "plain") for name in OPTIMIZERS), *(("adamw", run) for run in RUNS)]
)
def test_old_outputs_do_not_move(optimizer: str, run: str, tmp_path: Path) -> None:
    """With threshold 1, two nonlinear layers give what they gave on the inputs of both tasks before; new ones learn."""
    module, method = Regressor(OPTIMIZERS[optimizer]), GradientProjection(**ALL)
    first, second, third = (task(number) for number in range(3))
    fit_tasks(tmp_path, module, [method], [first, second], **RUNS.get(run, {}))
    old = torch.cat([first.tensors[0], second.tensors[0]])
    before, before_third = outputs(module, old), outputs(module, third.tensors[0])
    fit_tasks(tmp_path, module, [method], [third], **RUNS.get(run, {}))
    torch.testing.assert_close(outputs(module, old), before, rtol=0, atol=1e-5)
    assert (outputs(module, third.tensors[0]) - before_third).abs().max() > 0.02


class Updates(ContinualCallback):
    """Notes what each step did to a weight and its bias, after all corrections."""

    needs_state = False

    def __init__(self) -> None:
        self.noted: list[Tensor] = []

    def limit_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        step.keep(list(step.parameters))

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        moved = [p.detach() - step.before(name) for name, p in step.parameters.items()]
        self.noted.append(torch.cat([moved[0], moved[1][:, None]], 1).double())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_applied_updates_are_orthogonal(optimizer: str, tmp_path: Path) -> None:
    """Every single update, after momentum, preconditioning and weight decay, to 1e-6; and not because it is none."""
    module, method, updates = Regressor(OPTIMIZERS[optimizer]), GradientProjection(), Updates()
    fit_tasks(tmp_path, module, [method], [task(0)])
    (basis,) = method.subspaces["network.0.weight"].bases()
    assert 0 < basis.shape[1] < 11
    fit_tasks(tmp_path, module, [updates, method], [task(1)])
    assert len(updates.noted) == 9
    for update in updates.noted:
        assert (update @ basis).abs().max() < 1e-6
        assert update.norm() > 1e-3


def test_bf16_weights_stay_within_a_rounding(tmp_path: Path) -> None:
    """Rounding does not add up: after 120 steps the protected part is as near as after 4."""
    drifts = []
    for epochs in (1, 40):
        module, method = Regressor(OPTIMIZERS["adamw"]), GradientProjection()
        fit_tasks(tmp_path, module, [method], [task(0)], precision="bf16-true")
        layer = module.network[0]
        before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double()
        (basis,) = method.subspaces["network.0.weight"].bases()
        fit_tasks(tmp_path, module, [method], [task(1)], precision="bf16-true", max_epochs=epochs)
        moved = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double() - before
        drifts.append(((moved @ basis).norm() / before.norm(), moved.norm() / before.norm()))
    (_, short), (drift, moved) = drifts
    assert drift < 2**-8
    assert moved > 10 * drift
    assert moved > 2 * short


# ---------------------------------------------------------------------- layers


def convolutions() -> nn.Module:
    """Of every kind; the patches of eight positions span less than the 19 and 10 dimensions."""
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
    )


def images(number: int) -> TensorDataset:
    """Two of four channels, with random targets."""
    generator = torch.Generator().manual_seed(number)
    return TensorDataset(torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 24, generator=generator))


def test_convolutions(tmp_path: Path) -> None:
    """Their outputs on old images stay; every group has a space of its own."""
    module, method = Regressor(OPTIMIZERS["adamw"], convolutions), GradientProjection(**ALL)
    fit_tasks(tmp_path, module, [method], [images(0)])
    before = module(images(0).tensors[0]).detach()
    assert method.subspaces["network.0.weight"].ranks() == [8, 8]
    assert len(method.subspaces["network.2.weight"].ranks()) == 6
    fit_tasks(tmp_path, module, [method], [images(1)], max_epochs=20)
    torch.testing.assert_close(module(images(0).tensors[0]).detach(), before, rtol=0, atol=1e-5)
    assert not torch.allclose(module(images(1).tensors[0]), module(images(1).tensors[0] * 0), atol=1e-2)


class Repeated(Regressor):
    """Calls a layer twice."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network[1](self.network[0](self.network[0](inputs)))


def test_a_layer_called_twice_keeps_both_of_its_inputs(tmp_path: Path) -> None:
    """Both of its inputs are in the space."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 3, bias=False))

    module, method = Repeated(OPTIMIZERS["momentum"], build), GradientProjection(**ALL)
    inputs, targets = task(0).tensors
    fit_tasks(tmp_path, module, [method], [TensorDataset(inputs[:2], targets[:2])])
    assert method.used() == {"network.0.weight": 0.4, "network.1.weight": 0.2}


def choice(module: LightningModule, **settings: Any) -> dict[str, list[str]]:
    """What is projected together."""
    method = GradientProjection(**settings)
    method.select(module)
    return method.units


def test_what_is_projected() -> None:
    """Weights of layers that are called, with their biases; not what is tied, used by functions, frozen or excluded."""
    module = ToyModule()
    first, second = ["model.0.weight", "model.0.bias"], ["model.3.weight", "model.3.bias"]
    assert choice(module) == {first[0]: first, second[0]: second}
    assert choice(module, exclude=["model.3.*", "model.0.bias"]) == {first[0]: first[:1]}
    module.model[0].weight.requires_grad_(False)
    module.model[3].bias.requires_grad_(False)
    assert choice(module) == {second[0]: second[:1]}
    assert choice(Attention()) == {"head.weight": ["head.weight", "head.bias"]}
    assert choice(Images()).keys() == {"body.0.weight", "head.weight"}
    with pytest.raises(ValueError, match="finds no weight to project among the trainable parameters of Tied"):
        choice(Tied())


@pytest.mark.parametrize("others", ["hold", "free"])
def test_other_parameters(others: Any, tmp_path: Path) -> None:
    """From the second task on, embeddings and norms do not move by a bit, unless they are free; excluded ones train."""
    module = Texts()
    module.configure_optimizers = lambda: AdamW(module.parameters(), lr=0.01)  # type: ignore[method-assign]
    method = GradientProjection(others=others, exclude=["norm.bias"])
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit_tasks(tmp_path, module, [method], [loader(Texts)])
    ends = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert all(not torch.equal(start[name], end) for name, end in ends.items())
    fit_tasks(tmp_path, module, [method], [loader(Texts, 7)])
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, ends[name])}
    assert moved == {"norm.bias", "head.weight", "head.bias"} | (
        {"norm.weight", "embedding.weight"} if others == "free" else set()
    )


class Masked(UserModule):
    """A linear layer at every position of padded texts."""

    def build(self) -> None:
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = self.embedding(batch["input_ids"]).detach()[batch["attention_mask"].bool()]
        return cross_entropy(self.layer(self.embedding(batch["input_ids"])).mean(1), batch["labels"])


def test_padding_does_not_count(tmp_path: Path) -> None:
    """Positions that the attention mask of the batch leaves out are not in the space."""
    ids, mask = torch.tensor([[3, 0, 0], [4, 5, 0]]), torch.tensor([[1, 0, 0], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    module, method = Masked(), GradientProjection(**ALL)
    module.seen = torch.zeros(1)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(2)]
    fit_tasks(tmp_path, module, [method], [DataLoader(rows, batch_size=2)], max_epochs=1)
    (basis,) = method.subspaces["layer.weight"].bases()
    assert basis.shape == (7, 3)
    seen = torch.cat([module.embedding.weight[[3, 4, 5]], torch.ones(3, 1)], 1).detach().double()
    torch.testing.assert_close(seen @ basis @ basis.T, seen, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- tasks


def test_threshold_rises_with_every_task(tmp_path: Path) -> None:
    """By its step, to at most 1: the third task is measured with 0.5 + 2 * 0.25."""
    method = GradientProjection(threshold=0.5, threshold_step=0.25, n_samples=None)
    same = task(0)
    ranks = []
    for _ in range(4):
        fit_tasks(tmp_path, Regressor(lambda p: SGD(p, lr=1e-9)), [method], [same])
        (basis,) = method.subspaces["network.0.weight"].bases()
        ranks.append(basis.shape[1])
    x = torch.cat([same.tensors[0], torch.ones(12, 1)], 1).double()
    energy = torch.linalg.svdvals(x).square()
    share = energy.cumsum(0) / energy.sum()
    assert ranks == [int((share < 0.5).sum()) + 1, int((share < 0.75).sum()) + 1, 4, 4]


def test_a_request_does_not_raise_the_threshold(tmp_path: Path) -> None:
    """Three tasks are measured one step apart with a request between them, after which the second is measured again."""
    seen = []

    class Notes(GradientProjection):
        def _extend(self, trainer: Any, pl_module: Any, number: int, sample_ids: Tensor | None = None) -> None:
            seen.append((number, sample_ids is not None))
            super()._extend(trainer, pl_module, number, sample_ids)

    fit_stream(tmp_path, [Notes(threshold=0.5), Serves()], stream=forgetting_stream())
    assert seen == [(0, False), (1, False), (1, True), (2, False), (3, False)]


class Interrupting(ContinualCallback):
    """Ends a fit in the middle of its task."""

    needs_state = False

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        raise RuntimeError("interrupted")


def test_a_task_is_held_to_the_weights_that_it_started_from(tmp_path: Path) -> None:
    """Not to those of a task before, nor of a fit that was interrupted; between tasks there are none."""
    module, method = Regressor(OPTIMIZERS["adamw"]), GradientProjection()
    fit_tasks(tmp_path, module, [method], [task(0)])
    assert method.state_dict()["anchors"] == {}
    with pytest.raises(RuntimeError, match="interrupted"):
        fit_tasks(tmp_path, module, [method, Interrupting()], [task(1)])
    assert method.state_dict()["anchors"].keys() == dict(module.named_parameters()).keys()
    layer, (basis,) = module.network[0], method.subspaces["network.0.weight"].bases()
    with torch.no_grad():
        layer.weight.add_(0.1)
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double()
    fit_tasks(tmp_path, module, [method], [task(1)])
    moved = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().double() - before
    assert (moved @ basis).abs().max() < 1e-6
    assert moved.norm() > 0.1
    assert method.state_dict()["anchors"] == {}


def test_a_limited_number_of_samples(tmp_path: Path) -> None:
    """Three samples span three directions."""
    method = GradientProjection(threshold=1.0, n_samples=3)
    fit_tasks(tmp_path, Regressor(OPTIMIZERS["momentum"]), [method], [task(0)])
    assert method.used()["network.0.weight"] == pytest.approx(3 / 11)


def test_full_layers_stay_and_are_told(tmp_path: Path) -> None:
    """Once inputs span all dimensions there is a warning, once, and the layer does not move."""
    data = TensorDataset(torch.randn(30, 10), torch.randn(30, 3))
    module, method = Regressor(OPTIMIZERS["adamw"]), GradientProjection(**ALL)
    with pytest.raises(UserWarning, match=r"span all dimensions of \['network.0.weight'\]"):
        fit_tasks(tmp_path, module, [method], [data])
    before = module.network[0].weight.detach().clone()
    fit_tasks(tmp_path, module, [method], [data])
    torch.testing.assert_close(module.network[0].weight.detach(), before, rtol=0, atol=1e-6)


class Unseen(ToyModule):
    """Takes the weight of a layer without calling it."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(nn.functional.linear(inputs, self.model[0].weight, self.model[0].bias))
        return self.model[3](hidden)


def test_layers_that_are_not_called(tmp_path: Path) -> None:
    """Their inputs are not known: one that trains is told, a module with no other is refused before the first step."""
    with pytest.raises(UserWarning, match=r"does not protect \['model.0.weight'\]: they train, but"):
        fit_tasks(tmp_path, Unseen(), [GradientProjection(threshold=0.5)], toy_loaders()[:1])
    with pytest.raises(ValueError, match=r"step of Unseen calls none of the layers.*'model.0.weight'"):
        fit_tasks(tmp_path, Unseen(), [GradientProjection(exclude=["model.3.*"])], toy_loaders()[:1])


class Wide(nn.Linear):
    """Reads the first of its inputs, and is called with more than its weight is multiplied by."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs[:, : self.in_features])


def test_inputs_that_cannot_be_measured_fail_before_the_first_step(tmp_path: Path) -> None:
    """And not at the task's end."""
    module, updates = Regressor(OPTIMIZERS["momentum"], lambda: Wide(4, 3)), Updates()
    with pytest.raises(RuntimeError, match="size"):
        fit_tasks(tmp_path, module, [GradientProjection(), updates], [task(0)])
    assert updates.noted == []


# ---------------------------------------------------------------------- optimizers


@pytest.mark.filterwarnings("ignore:Old inputs span all dimensions")
def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    """Each layer is projected after the step of its own optimizer; the parameter of none stays."""
    module, method = Manual(), GradientProjection(**ALL)
    few = [(x, y) for x, y in Manual.samples(3)]
    fit_tasks(tmp_path, module, [method], [DataLoader(few, batch_size=3)])
    old = torch.stack([x for x, _ in few])
    before = module(old).detach()
    fit_tasks(tmp_path, module, [method], [loader(Manual)])
    torch.testing.assert_close(module(old).detach(), before, rtol=0, atol=1e-5)
    assert module.scale == 1


@pytest.mark.filterwarnings("ignore:Old inputs span all dimensions")
def test_weight_and_bias_in_different_optimizers_are_refused(tmp_path: Path) -> None:
    """They are projected together."""

    def split(parameters: Iterator[nn.Parameter]) -> list[SGD]:
        every = list(parameters)
        return [SGD([p for p in every if p.ndim == n], lr=0.1) for n in (1, 2)]

    class Split(Manual):
        def configure_optimizers(self) -> Any:
            return split(self.parameters())

    with pytest.raises(ValueError, match=r"projects \['body.weight', 'body.bias'\] together, so one optimizer"):
        fit_tasks(tmp_path, Split(), [GradientProjection()], [loader(Manual)])
    fit_tasks(tmp_path, Split(), [GradientProjection(exclude=["*.bias"])], [loader(Manual)])


# ---------------------------------------------------------------------- ranks and checkpoints


def fit_convolutions(root: Path, strategy: str) -> Tensor:
    """Two tasks, the two images of each on one rank or on two; return the full weights."""
    module = Regressor(OPTIMIZERS["adamw"], convolutions)
    method = GradientProjection(threshold=0.9)
    for number in range(2):
        sharding: Any = FSDP2Strategy(wrap=["Conv2d"]) if strategy == "fsdp2" else strategy
        settings = {"strategy": sharding, "devices": 2} if strategy != "auto" else {}
        data = DataLoader(images(number), batch_size=2 if strategy == "auto" else 1)
        trainer(root, [method], max_epochs=4, **settings).fit(module, data, data)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in full])


@pytest.mark.distributed
def test_shards_that_cut_groups(tmp_path: Path) -> None:
    """Six outputs in two groups and in six, on two ranks, end where one process ends."""
    expected = fit_convolutions(tmp_path, "auto")
    ranks = Ranks(2)
    try:
        for strategy in ("ddp", "fsdp2"):
            for found in ranks.run(fit_convolutions, tmp_path, strategy):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    finally:
        ranks.close()


def test_another_model_is_refused(tmp_path: Path) -> None:
    """A layer without a space would train unprotected, one of another size cannot be projected."""
    method = GradientProjection(threshold=0.5)
    fit_stream(tmp_path, [method])

    class Grown(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"no subspace for \['extra.weight'\].*unprotected"):
        fit_stream(tmp_path, [method], module=Grown())
    module = ToyModule()
    module.model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"inputs of shape \(1, 7\) for 'model.0.weight', the module has.*\(1, 6\)"):
        fit_stream(tmp_path, [method], module=module)
    module.model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'model.0.weight', the module has no such layer"):
        fit_stream(tmp_path, [method], module=module)


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    """With the name of the setting and what was given."""
    for settings, message in (
        ({"threshold": 0.0}, "`threshold` must be above 0 and at most 1, got 0.0"),
        ({"threshold": 1.1}, "`threshold` must be above 0 and at most 1, got 1.1"),
        ({"threshold_step": -0.1}, "`threshold_step` must be at least 0, got -0.1"),
        ({"n_samples": 0}, "`n_samples` must be above 0, got 0"),
        ({"others": "stop"}, "`others` must be one of 'hold', 'free', got 'stop'"),
    ):
        with pytest.raises(ValueError, match=message):
            GradientProjection(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`exclude` pattern 'heads' matches no parameter of ToyModule"):
        fit_stream(tmp_path, [GradientProjection(exclude=["heads"])], stream=toy_stream())


def test_footprint() -> None:
    """A copy of the weights, and half of a square of 7 and of 9 inputs; the Gram matrices at a task's end."""
    footprint = GradientProjection().footprint(None, ToyModule(), None)  # type: ignore[arg-type]
    assert footprint.device == 4 * (6 * 8 + 8 + 8 * 4 + 4) + 4 * (7 * 3 + 9 * 4)
    assert footprint.task_end is not None
