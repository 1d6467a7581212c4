"""Starts of adapters beside slots, against plain loops that take them from stored inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_cl import FSDP2Strategy
from lightning_cl.adapters import AdapterSlots, AdapterStart, InfLoRA, LoRAFA, OLoRA, add_adapters
from lightning_cl.functional.adapter_starts import least_context_rows
from lightning_cl.quantization import quantize_base
from lightning_cl.quantization.layers import dequantize
from lora_loops import slots_loop
from ranks import Ranks
from reference import TASKS
from toys import LoraToy, ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, weights

FIRST = "model.base_model.model.0"


def callbacks(kind, **settings):
    """Slots, and the start beside them."""
    return [AdapterSlots(capacity=8), AdapterStart(kind, **settings)]


def stored(layers, task):
    """The inputs of both layers in a task, as rows."""
    x = toy_data().tensors[0][TASKS[task]]
    return [x.double(), layers[0].forward(x).relu().detach().double()]


def eva(layers, task):
    """The right singular vectors of the activations."""
    for layer, seen in zip(layers, stored(layers, task), strict=True):
        layer.down = torch.linalg.svd(seen).Vh[:2].float()


def corda():
    """Directions that the base makes least of in the earlier tasks; the first task starts as it is."""
    context = [torch.zeros(6, 6).double(), torch.zeros(8, 8).double()]

    def begin(layers, task):
        if task == 0:
            return
        # with the weights that the task before left
        for layer, total, seen in zip(layers, context, stored(layers, task - 1), strict=True):
            total += seen.T @ seen / len(seen)
            damped = total + 0.01 * total.diagonal().mean() * torch.eye(len(total))
            right = torch.linalg.svd(layer.weight.double() @ damped, full_matrices=False).Vh[-2:]
            layer.down = torch.linalg.qr((right @ torch.linalg.inv(damped)).T).Q.T.float().contiguous()

    return begin


BEGIN = {"eva": lambda: eva, "corda": corda}
every_kind = pytest.mark.parametrize("kind", BEGIN)


@every_kind
def test_fits_end_where_plain_loops_end(kind, tmp_path):
    """Over two tasks; and elsewhere than without the start."""
    found = fit_stream(tmp_path, callbacks(kind), module=LoraToy())
    torch.testing.assert_close(found, slots_loop(begin=BEGIN[kind]()), rtol=0, atol=2e-6)
    assert (found - fit_stream(tmp_path, [AdapterSlots(capacity=8)], module=LoraToy())).abs().max() > 1e-2


class Watching(LoraToy):
    """Keeps what each step finds in the first layer."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.training:
            layer = self.model.base_model.model[0]
            self.seen.append([layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.any()])
        return super().training_step(batch, batch_idx)


def test_orthogonal_rows_follow_seed_layer_and_task(tmp_path):
    """B is zero, so that no output changes."""
    starts = []
    for seed in (0, 0, 1):
        module = Watching()
        fit_stream(tmp_path, callbacks("orthogonal", seed=seed), module=module)
        assert not module.seen[0][1]
        assert not module.seen[6][1]
        starts.append([module.seen[step][0] for step in (0, 6)])
    for down in starts[0] + starts[2]:
        torch.testing.assert_close(down @ down.T, torch.eye(2))
    assert torch.equal(starts[0][0], starts[1][0])
    assert (starts[0][0] - starts[0][1]).abs().max() > 0.1
    assert (starts[0][0] - starts[2][0]).abs().max() > 0.1


def test_an_adapter_of_more_ranks_than_inputs_starts(tmp_path):
    """Its last rows are zero; B of the others trains them."""
    module = LoraToy()
    module.model = get_peft_model(ToyModule().model, LoraConfig(r=7, target_modules=["0"]))
    fit_stream(tmp_path, [AdapterSlots(capacity=14), AdapterStart("orthogonal")], module=module, max_steps=1)
    down = module.model.base_model.model[0].lora_A["default"].weight
    torch.testing.assert_close(down @ down.T, torch.diag(torch.tensor([1.0] * 6 + [0.0])))


def test_starts_go_with_methods_on_slots(tmp_path):
    """Wherever they stand in the list."""
    results = [
        fit_stream(tmp_path, order, module=LoraToy())
        for order in (
            [OLoRA(capacity=8), AdapterStart("eva")],
            [AdapterStart("eva"), OLoRA(capacity=8)],
            [OLoRA(capacity=8)],
        )
    ]
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 1e-3


@pytest.mark.parametrize("step", [2, 6, 8], ids=["first task", "boundary", "second task"])
def test_corda_resumes_to_the_same_bits(step, tmp_path):
    """The context is in the checkpoint."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    through, again = callbacks("corda"), callbacks("corda")
    straight = fit_stream(tmp_path, [*through, saver], module=LoraToy(dropout=0.3))
    module = LoraToy(dropout=0.3)
    other = ModelCheckpoint(tmp_path / "resumed", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(tmp_path, [*again, other])
    fit.fit(module, datamodule=toy_stream(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
    assert torch.equal(weights(module), straight)
    for name, total in through[1].context.items():
        assert torch.equal(again[1].context[name], total)
        assert total.any()


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def fit_on_this_rank(root, kind, strategy):
    """Fit the toy stream with half of each batch; return the full weights."""
    module, sharded = LoraToy(), strategy == "fsdp2"
    fit = trainer(root, callbacks(kind), strategy=FSDP2Strategy(wrap=["Linear"]) if sharded else strategy, devices=2)
    fit.fit(module, datamodule=toy_stream(batch_size=4))
    return weights(module)


@pytest.mark.distributed
@every_kind
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_end_where_one_process_ends(kind, strategy, two_ranks, tmp_path):
    """Each reads its half of the task, and one decomposes for both."""
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, kind, strategy)
    assert torch.equal(first, second)
    expected = slots_loop(batch_size=4, world_size=2, begin=BEGIN[kind]())
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-6)


class Packed(ToyModule):
    """One layer in 4 bits under an adapter."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 4))
            packed = quantize_base(network, compute_dtype=torch.float32, skip=["0", "2"])
            self.model = add_adapters(packed, {"peft_type": "LORA", "r": 2, "target_modules": ["1"]})

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_corda_reads_packed_weights(tmp_path):
    """Unpacked, in the context of the first task."""
    started = {}

    class Keep(AdapterStart):
        def on_task_start(self, trainer, pl_module, task):
            super().on_task_start(trainer, pl_module, task)
            layer = pl_module.model.base_model.model[1]
            started[task.index] = layer.lora_A["default"].weight.detach().clone()

    method = Keep("corda")
    module = Packed()
    loaders = toy_loaders()
    slots = AdapterSlots(capacity=4)
    for loader in loaders:
        context = dict(method.context)
        trainer(tmp_path, [slots, method], max_epochs=1).fit(module, loader, loader)
    weight = dequantize(module.model.base_model.model[1].base_layer)
    rows = least_context_rows(weight, context["model.base_model.model.1"], rank=2).float()
    torch.testing.assert_close(started[1].T @ started[1], rows.T @ rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kaiming"}, "`kind` must be one of 'orthogonal', 'eva', 'corda', got 'kaiming'"),
        ({"kind": "eva", "n_samples": 0}, "`n_samples` must be"),
        ({"kind": "orthogonal", "n_samples": 8}, r"`n_samples=8` does not belong to `kind='orthogonal'`"),
        ({"kind": "eva", "seed": 1}, r"`seed=1` does not belong to `kind='eva'`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    """When the callback is made."""
    with pytest.raises(ValueError, match=message):
        AdapterStart(**settings)


def test_a_start_needs_adapters_that_leave_it_to_choose(tmp_path):
    """Slots, of a method without a start of its own."""
    with pytest.raises(ValueError, match=r"`AdapterStart\('eva'\)` starts the adapters of `AdapterSlots`"):
        fit_stream(tmp_path, [AdapterStart("eva")], module=LoraToy())
    for method in (InfLoRA(), LoRAFA()):
        with pytest.raises(ValueError, match=f"`{type(method).__name__}` chooses itself where its adapters start"):
            fit_stream(tmp_path, [method, AdapterStart("eva")], module=LoraToy())


def test_an_adapter_that_was_trained_is_refused(tmp_path):
    """What it learned would be lost."""
    module = LoraToy()
    nn.init.ones_(module.model.base_model.model[0].lora_B["default"].weight)
    with pytest.raises(ValueError, match=r"`AdapterStart` chooses.*'default' of 'model.base_model.model.0'"):
        fit_stream(tmp_path, callbacks("eva"), module=module)


def test_a_context_of_another_model_is_refused(tmp_path):
    """It says nothing about this one's inputs."""
    both, loaders = callbacks("corda"), toy_loaders()
    trainer(tmp_path, both, max_epochs=1).fit(LoraToy(), loaders[0], loaders[0])
    del both[1].context[FIRST]
    with pytest.raises(ValueError, match=rf"no context for '{FIRST}', which has 6"):
        trainer(tmp_path, both, max_epochs=1).fit(LoraToy(), loaders[1], loaders[1])
