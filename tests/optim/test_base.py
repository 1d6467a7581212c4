"""What the spike-aware optimizers share: whose state they go on from, and what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_cl.optim import SPAM, StableSPAM, reset_state
from toys import ToyModule, toy_data, trainer, weights

EVERY = pytest.mark.parametrize("kind", [SPAM, StableSPAM])


def run(optimizer: Optimizer, parameter: Parameter, steps: range) -> Tensor:
    """Step with gradients that are a function of the step; return the weights."""
    for step in steps:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return parameter.detach().clone()


def no_spikes(parameter: Parameter, **settings: Any) -> SPAM:
    """SPAM where it is AdamW."""
    return SPAM([parameter], threshold=float("inf"), reset_interval=None, **settings)


@pytest.mark.parametrize("fused", [False, True])
def test_goes_on_from_adamw(fused: bool) -> None:
    """Moments, bias correction and learning rate, but not the implementation."""
    straight, resumed = Parameter(torch.ones(5)), Parameter(torch.ones(5))
    settings = {"lr": 0.1, "betas": (0.8, 0.99), "weight_decay": 0.1}
    expected = run(AdamW([straight], **settings), straight, range(12))
    first = AdamW([resumed], fused=fused, **settings)
    run(first, resumed, range(5))
    second = no_spikes(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert not second.param_groups[0]["fused"]
    assert second.param_groups[0]["reset_interval"] is None
    torch.testing.assert_close(run(second, resumed, range(5, 12)), expected, rtol=1e-6, atol=1e-7)
    assert second.state[resumed]["step"] == 12


def test_adam_of_other_groups_is_refused() -> None:
    """By torch's own message."""
    parameters = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="parameter group"):
        SPAM(parameters).load_state_dict(Adam([{"params": p} for p in parameters]).state_dict())


@EVERY
def test_state_without_moments_is_refused(kind: type[Optimizer]) -> None:
    """Silence would train on with moments of zero."""
    parameter = Parameter(torch.ones(2))
    other = SGD([parameter], lr=0.1, momentum=0.9)
    run(other, parameter, range(1))
    with pytest.raises(ValueError, match=r"no \['exp_avg', 'exp_avg_sq', 'step'\].*load_from_checkpoint"):
        kind([parameter]).load_state_dict(other.state_dict())


@EVERY
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "`lr` must be 0 or more, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"`betas` must be from 0 to below 1, got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, "`betas`"),
        ({"eps": 0.0}, "`eps` must be above 0, got 0.0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be 0 or more"),
        ({"reset_interval": 0}, "`reset_interval` must be 1 or more, or None"),
        ({"warmup_steps": -1}, "`warmup_steps` must be 0 or more"),
        ({"state_dtype": "float8"}, "`state_dtype` must be None or one of"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type[Optimizer], settings: dict[str, Any], message: str) -> None:
    """For all parameters, and for a group that is added later, which leaves the others as they were."""
    parameter, more = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        kind([parameter], **settings)
    optimizer = kind([parameter])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [more], **settings})
    assert len(optimizer.param_groups) == 1


@EVERY
def test_sparse_gradients_are_refused_before_anything_moves(kind: type[Optimizer]) -> None:
    """And the message says which setting of the embedding makes them."""
    dense, table = Parameter(torch.ones(3)), Parameter(torch.ones(4, 2))
    optimizer = kind([dense, table])
    dense.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (4, 2), check_invariants=False)
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(4, 2\) is sparse.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))


@EVERY
def test_complex_parameters_are_refused(kind: type[Optimizer]) -> None:
    """A spike of a complex number is not defined."""
    with pytest.raises(ValueError, match="real parameters only"):
        kind([Parameter(torch.ones(2, dtype=torch.complex64))])


@EVERY
def test_a_reset_counts_only_where_there_is_something_to_reset(kind: type[Optimizer]) -> None:
    """Before the first gradient, and right after another reset, nothing changes and no warm-up begins."""
    stepped, idle = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = kind([stepped, idle])
    optimizer.reset_moments()
    assert not optimizer.state
    run(optimizer, stepped, range(3))
    reset_state(optimizer)
    reset_state(optimizer)
    state = optimizer.state[stepped]
    assert (state["step"], state["resets"]) == (0, 1)
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()
    assert not optimizer.state.get(idle)


@EVERY
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch"])
def test_some_parameters_begin_anew(kind: type[Optimizer], ours: bool) -> None:
    """Those that are named, of which some may be another optimizer's; the others keep their moments."""
    first, second = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = (kind if ours else torch.optim.AdamW)([first, second])
    for parameter in (first, second):
        run(optimizer, parameter, range(3))
    kept = optimizer.state[second]["exp_avg"].clone()
    reset_state(optimizer, iter([first, Parameter(torch.ones(3))]))
    assert not optimizer.state.get(first) or optimizer.state[first]["step"] == 0
    assert torch.equal(optimizer.state[second]["exp_avg"], kept)
    assert kept.any()


def test_layout_of_the_weights_does_not_matter() -> None:
    """Channels-last weights with gradients in the usual order, in every storage."""
    start = torch.randn(32, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    for settings in ({}, {"foreach": True}, {"capturable": True}, {"density": 0.5}, {"state_dtype": "bfloat16"}):
        ends = []
        for layout in (torch.contiguous_format, torch.channels_last):
            weight = Parameter(start.clone().to(memory_format=layout))
            optimizer = SPAM([weight], reset_interval=4, warmup_steps=2, clip_delay=1, threshold=10.0, **settings)
            ends.append(run(optimizer, weight, range(10)))
        assert torch.equal(*ends), settings
        assert not torch.equal(ends[0], start)


def test_a_reset_for_a_task_keeps_nothing_of_a_part_either() -> None:
    """The next mask shares most of its weights with the one before; resumed right after it, the same bits follow."""
    straight, resumed = Parameter(torch.ones(500)), Parameter(torch.ones(500))
    optimizers = [SPAM([weight], density=0.9, lr=0.1, warmup_steps=2) for weight in (straight, resumed)]
    for optimizer, weight in zip(optimizers, (straight, resumed), strict=True):
        run(optimizer, weight, range(5))
        reset_state(optimizer)
    assert not optimizers[0].state_dict()["state"][0]["exp_avg_sq"].any()
    fresh = SPAM([resumed])
    fresh.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert torch.equal(run(optimizers[0], straight, range(5, 9)), run(fresh, resumed, range(5, 9)))


@pytest.mark.parametrize("foreach", [False, True])
def test_an_infinite_threshold_clips_nothing(foreach: bool) -> None:
    """Also where the second moment is zero."""
    weight = Parameter(torch.ones(3))
    optimizer = SPAM([weight], threshold=float("inf"), clip_delay=1, foreach=foreach)
    for size in (1.0, 1e6):
        weight.grad = torch.tensor([size, 0.0, -size])
        optimizer.step()
        assert torch.equal(weight.grad, torch.tensor([size, 0.0, -size]))
    assert weight[1] == 1


def test_an_interval_within_the_delay_is_refused() -> None:
    """Nothing would ever be clipped."""
    with pytest.raises(ValueError, match=r"`reset_interval=20` leaves no step.*`clip_delay=20`"):
        SPAM([Parameter(torch.ones(2))], reset_interval=20)
    SPAM([Parameter(torch.ones(2))], reset_interval=20, threshold=float("inf"))


@EVERY
@pytest.mark.parametrize(
    ("other", "settings", "message"),
    [
        (AdamW, {"maximize": True}, "`maximize=True`"),
        (Adam, {"weight_decay": 0.1}, "adds its weight decay of 0.1 to the gradient"),
    ],
)
def test_adam_that_steps_otherwise_is_refused(
    kind: type[Optimizer], other: type[Optimizer], settings: dict[str, Any], message: str
) -> None:
    """Its settings would mean something else; what was there stays."""
    parameter, mine = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    saved = other([parameter], **settings)
    run(saved, parameter, range(1))
    optimizer = kind([mine])
    run(optimizer, mine, range(3))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state[mine]["step"] == 3


@EVERY
def test_state_of_another_shape_is_refused(kind: type[Optimizer]) -> None:
    """Which a copy would broadcast."""
    row, table = Parameter(torch.ones(8)), Parameter(torch.ones(4, 8))
    saved = AdamW([row])
    run(saved, row, range(1))
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(8,\) for a parameter of shape \(4, 8\)"):
        kind([table]).load_state_dict(saved.state_dict())


def test_moments_in_other_bits_are_refused() -> None:
    """The codes of 8 bits are no numbers; what a reader has made floats of them neither."""
    pytest.importorskip("bitsandbytes")
    weight = Parameter(torch.ones(64, 64))
    small = SPAM([weight], state_dtype="8bit")
    run(small, weight, range(1))
    with pytest.raises(ValueError, match=r"in 8 bits, and this run reads it in full.*`state_dtype`"):
        StableSPAM([weight]).load_state_dict(small.state_dict())
    read = copy.deepcopy(small.state_dict())
    read["state"][0] |= {key: read["state"][0][key].float() for key in ("exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match="in full precision, and this run reads it in 8 bits"):
        small.load_state_dict(read)


def test_sums_that_are_not_reduced_are(tmp_path: Path) -> None:
    """Tensor parallelism leaves partial gradients of what is replicated; here one process has all of them."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        weight = Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
        weight.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        SPAM([weight]).step()
        assert weight.grad.placements == (Replicate(),)
    finally:
        torch.distributed.destroy_process_group()


class WithoutOptimizer(LightningModule):
    """The toy module as users of a command line write it: the config names the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ToyModule().model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.model(inputs), labels)


COMMON = {"lr": 0.02, "betas": [0.8, 0.99], "reset_interval": 5, "warmup_steps": 3, "state_dtype": "float32"}


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SPAM, {"threshold": 3.0, "density": 0.5, "clip_delay": 2}),
        (StableSPAM, {"gamma1": 0.85, "gamma2": 0.99, "gamma3": 0.9, "annealing_steps": 10}),
    ],
)
def test_from_yaml(
    kind: type[Optimizer], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`optimizer: class_path` in a config of LightningCLI: the same weights as the same settings in Python."""
    config = tmp_path / "config.yaml"
    named = {"class_path": f"lightning_cl.optim.{kind.__name__}", "init_args": COMMON | settings}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run_of_two_epochs = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, **quiet}
    config.write_text(yaml.safe_dump({"optimizer": named, "trainer": run_of_two_epochs}))
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config)])
    cli = LightningCLI(WithoutOptimizer, run=False, save_config_callback=None, seed_everything_default=0)
    loader = DataLoader(toy_data(), batch_size=8)
    cli.trainer.fit(cli.model, loader)
    assert isinstance(cli.trainer.optimizers[0], kind)
    expected = WithoutOptimizer()
    expected.configure_optimizers = lambda: kind(expected.parameters(), **COMMON, **settings)  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=2).fit(expected, loader)
    assert torch.equal(weights(cli.model), weights(expected))
