"""Slots on the toy module: what stays as it is, what is refused, and what PEFT is kept from doing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_cl import (
    EWC,
    AdapterSlots,
    ContinualCallback,
    FeatureDistillation,
    FreezeExcept,
    GradientProjection,
    LwF,
    MomentumInterpolation,
    OLoRA,
    Task,
)
from lightning_cl.adapters import Slot
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.optim import SPAM
from toys import LoraToy, ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, weights

FIRST = "model.base_model.model.0"


def slot_of(module: LoraToy, layer: str = FIRST) -> Slot:
    """The slots of a layer after a fit."""
    return Slot(layer, module.get_submodule(layer), "default")


def adapted(network: nn.Module, **config: Any) -> LoraToy:
    """The toy module around another network."""
    module = LoraToy()
    module.model = get_peft_model(network, LoraConfig(**{"r": 2, "target_modules": ["0", "3"], **config}))
    return module


# ---------------------------------------------------------------------- tasks


def test_parameters_keep_their_names_and_objects(tmp_path: Path) -> None:
    """From before the first task to after the last; the base does not move."""

    class Objects(ContinualCallback):
        needs_state = False

        def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
            seen.append({name: id(p) for name, p in pl_module.named_parameters()})

        on_task_end = on_task_start

    seen: list[dict[str, int]] = []
    module = LoraToy()
    base = module.model.base_model.model[0].base_layer.weight.clone()
    fit_stream(tmp_path, [AdapterSlots(8), Objects()], module=module)
    assert len(seen) == 4
    assert all(one == seen[0] for one in seen)
    assert torch.equal(module.model.base_model.model[0].base_layer.weight, base)


def test_the_sum_of_folded_adapters_is_that_of_the_list(tmp_path: Path) -> None:
    """Each task's factors stand in their rows, bit by bit as they were trained."""

    class Trained(ContinualCallback):
        needs_state = False

        def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
            found.append(slot_of(pl_module).weights("default"))  # type: ignore[arg-type]

    found: list[tuple[Tensor, Tensor]] = []
    module, slots = LoraToy(), AdapterSlots(5)
    fit_stream(tmp_path, [Trained(), slots], module=module)
    down, up = slot_of(module).weights("past")
    assert slots.segments[FIRST] == [0, 2, 4]
    for task, (own_down, own_up) in enumerate(found):
        rows = slice(*slots.segments[FIRST][task : task + 2])
        assert torch.equal(down[rows], own_down)
        assert torch.equal(up[:, rows], own_up)
        assert own_up.abs().max() > 1e-2
    assert not down[4:].any()
    assert not up[:, 4:].any()
    # what is next begins at zero
    assert not slot_of(module).weights("default")[1].any()


def test_beyond_its_capacity_it_keeps_the_best_approximation(tmp_path: Path) -> None:
    """The slot holds the dense sum cut by an SVD, and says what was lost."""
    exact, cut = LoraToy(), LoraToy()
    fit_stream(tmp_path, [AdapterSlots(4)], module=exact)
    slots = AdapterSlots(3)
    fit_stream(tmp_path, [slots], module=cut)
    down, up = slot_of(exact).factors("past")
    vectors, values, covectors = torch.linalg.svd((up @ down).double())
    best = vectors[:, :3] * values[:3] @ covectors[:3]
    down, up = slot_of(cut).factors("past")
    torch.testing.assert_close((up @ down).double(), best, rtol=0, atol=1e-5)
    assert slots.segments[FIRST] == [0, 3]
    assert slots.errors[FIRST] == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-3)


def test_the_error_is_logged(tmp_path: Path) -> None:
    """With the loggers of the Trainer, only when there is one."""
    from lightning.pytorch.loggers import CSVLogger

    for capacity in (4, 3):
        logger = CSVLogger(tmp_path, name=str(capacity))
        fit_stream(tmp_path, [AdapterSlots(capacity)], module=LoraToy(), logger=logger)
        text = (Path(logger.log_dir) / "metrics.csv").read_text()
        assert ("adapter_slots/error" in text) == (capacity == 3)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, SPAM])
def test_moments_begin_anew_for_the_slot_alone(optimizer: Any, tmp_path: Path) -> None:
    """What trains beside the slots keeps its own."""
    module = LoraToy(optimizer=optimizer)
    module.model.base_model.model[0].base_layer.bias.requires_grad_(True)
    fit = trainer(tmp_path, [AdapterSlots(8)])
    fit.fit(module, datamodule=toy_stream())
    state = fit.optimizers[0].state
    down = slot_of(module).down("default").weight
    assert not state.get(down) or state[down]["step"] == 0
    assert state[module.model.base_model.model[0].base_layer.bias]["step"] > 0
    assert all(p.grad is None for name, p in module.named_parameters() if "lora" in name)


def test_two_fits_of_one_module_share_the_slots(tmp_path: Path) -> None:
    """The second fit finds them; other settings are refused."""
    module, slots = LoraToy(), AdapterSlots(8)
    for loader in toy_loaders():
        trainer(tmp_path, [slots], max_epochs=1).fit(module, loader, loader)
    assert slots.segments[FIRST] == [0, 2, 4]
    with pytest.raises(ValueError, match=r"wants slots of rank 4 .* some of rank 8"):
        fit_stream(tmp_path, [AdapterSlots(4)], module=module)
    with pytest.raises(ValueError, match=r"`OLoRA` wants .* made by `AdapterSlots`"):
        fit_stream(tmp_path, [OLoRA(capacity=8)], module=module)


def test_a_callback_that_knows_nothing_of_finished_tasks_is_refused(tmp_path: Path) -> None:
    """A fresh one on the module of another would write over what that has kept."""
    module = LoraToy()
    fit_stream(tmp_path, [AdapterSlots(8)], module=module)
    with pytest.raises(ValueError, match="knows nothing of, and would write over"):
        fit_stream(tmp_path, [AdapterSlots(8)], module=module)


def test_a_checkpoint_is_evaluated_in_a_fresh_module(tmp_path: Path) -> None:
    """`Trainer.test` with the callback puts the slots in before it loads."""
    module, slots = LoraToy(), AdapterSlots(8)
    fit = trainer(tmp_path, [slots])
    fit.fit(module, datamodule=toy_stream())
    fit.save_checkpoint(tmp_path / "end.ckpt")
    fresh = LoraToy(seed=3)
    trainer(tmp_path, [AdapterSlots(8)]).validate(
        fresh, datamodule=toy_stream(), ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    assert torch.equal(weights(fresh), weights(module))


def test_a_head_of_peft_is_left_alone(tmp_path: Path) -> None:
    """`modules_to_save` trains on over all tasks, and the slot has none of its own."""
    module = adapted(ToyModule().model, target_modules=["0"], modules_to_save=["3"])
    head = module.model.base_model.model[3].modules_to_save["default"].weight.detach().clone()
    fit_stream(tmp_path, [AdapterSlots(8)], module=module)
    heads = module.model.base_model.model[3].modules_to_save
    assert list(heads) == ["default"]
    assert not torch.equal(heads["default"].weight, head)


# ---------------------------------------------------------------------- what PEFT does


class Teaching(LoraToy):
    """A user's step that calls PEFT in ways that change flags."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call
        self.flags: list[list[str]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        if self.call == "disable":
            with torch.no_grad(), self.model.disable_adapter():
                self(inputs)
        elif self.call == "set":
            self.model.set_adapter("default")
        elif self.call == "grad":
            self.model.base_model.set_requires_grad(["past"], True)
        self.flags.append([name for name, p in self.named_parameters() if p.requires_grad])
        return cross_entropy(self(inputs), labels)


@pytest.mark.parametrize("call", ["disable", "set", "grad"])
def test_no_call_of_peft_changes_what_trains(call: str, tmp_path: Path) -> None:
    """The step runs with both slots active and the past one frozen: the weights are those of a run without the call."""
    module, plain = Teaching(call), Teaching("nothing")
    found = fit_stream(tmp_path, [AdapterSlots(8)], module=module)
    assert torch.equal(found, fit_stream(tmp_path, [AdapterSlots(8)], module=plain))
    assert module.flags == plain.flags
    assert all(".default." in name for name in module.flags[0])
    # after the fit flags are PEFT's again, and finished tasks still act
    with_past = module(toy_data().tensors[0])
    module.model.set_adapter("default")
    assert module.get_submodule(FIRST).active_adapters == ["default", "past"]
    assert torch.equal(module(toy_data().tensors[0]), with_past)
    module.model.base_model.set_requires_grad(["past"], True)
    assert slot_of(module).down("past").weight.requires_grad


def test_another_active_adapter_is_refused_at_the_boundary(tmp_path: Path) -> None:
    """The slots would not have acted, and their fold would be of what did not train."""

    class Other(LoraToy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 5:  # the last of the task
                for layer in (0, 3):
                    self.model.base_model.model[layer]._active_adapter = ["past"]
            return loss

    with pytest.raises(ValueError, match=r"are active: \['past'\], but training needs \['default', 'past'\]"):
        fit_stream(tmp_path, [AdapterSlots(8)], module=Other())


def test_late_parameters_are_refused(tmp_path: Path) -> None:
    """An adapter that is thawed or added in the middle of a fit would train on one rank only."""

    class Thaws(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.model.base_model.model[0].base_layer.bias.requires_grad_(True)

    with pytest.raises(ValueError, match=r"base_layer.bias.*became trainable after the fit began"):
        fit_stream(tmp_path, [AdapterSlots(8), Thaws()], module=LoraToy())


def test_copies_and_pickles_during_a_fit(tmp_path: Path) -> None:
    """The guard goes with the copy of a module, and does not reach back into the original."""

    class Copies(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            for again in (copy.deepcopy(pl_module.model), pickle.loads(pickle.dumps(pl_module.model))):
                again.set_adapter("default")
                layer = again.base_model.model[0]
                assert layer.active_adapters == ["default", "past"]
                assert layer.lora_A["past"].weight is not pl_module.model.base_model.model[0].lora_A["past"].weight
                assert not layer.lora_A["past"].weight.requires_grad

    fit_stream(tmp_path, [AdapterSlots(8), Copies()], module=LoraToy())


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (ToyModule, "works on the LoRA adapters of ToyModule, which has none"),
        (lambda: adapted(ToyModule().model, use_dora=True), "a Linear with other settings"),
        (lambda: adapted(ToyModule().model, lora_bias=True), "a Linear with other settings"),
        (lambda: adapted(ToyModule().model, init_lora_weights="pissa"), "'pissa'` changes the base weight"),
        (
            lambda: adapted(nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(6, 4)), target_modules=["0"]),
            "is a Embedding with other settings",
        ),
    ],
    ids=["no adapters", "dora", "bias", "pissa", "embedding"],
)
def test_other_adapters_are_refused(module: Any, message: str, tmp_path: Path) -> None:
    """Before training, with the way out."""
    with pytest.raises(ValueError, match=message):
        fit_stream(tmp_path, [AdapterSlots(8)], module=module())


def test_merged_and_several_adapters_are_refused(tmp_path: Path) -> None:
    """One adapter trains, and it acts beside the base."""
    merged = LoraToy()
    merged.model.merge_adapter()
    with pytest.raises(ValueError, match="Unmerge them"):
        fit_stream(tmp_path, [AdapterSlots(8)], module=merged)
    several = LoraToy()
    several.model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "3"]))
    several.model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"one active LoRA adapter.*active: \['default', 'other'\]"):
        fit_stream(tmp_path, [AdapterSlots(8)], module=several)


@pytest.mark.parametrize(
    "other",
    [
        EWC(1.0),
        MomentumInterpolation(),
        LwF(1.0, teacher="pretrained"),
        FeatureDistillation(1.0, layers=["model"], teacher="ema", decay=0.9),
        GradientProjection(),
    ],
    ids=lambda other: type(other).__name__,
)
def test_callbacks_that_compare_weights_are_refused(other: ContinualCallback, tmp_path: Path) -> None:
    """They would hold a fresh adapter to what another one was."""
    with pytest.raises(ValueError, match=f"`{type(other).__name__}` compares weights with those of earlier tasks"):
        fit_stream(tmp_path, [other, AdapterSlots(8)], module=LoraToy())


@pytest.mark.parametrize("other", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(1e-2)], ids=["ema", "swa"])
def test_averages_of_weights_are_refused(other: Callback, tmp_path: Path) -> None:
    """They know nothing of the slot that a boundary fills."""
    with pytest.raises(ValueError, match=f"`{type(other).__name__}` averages weights over tasks"):
        fit_stream(tmp_path, [other, AdapterSlots(8)], module=LoraToy())


def test_an_adapter_of_the_users_named_past_is_refused(tmp_path: Path) -> None:
    """It has a scaling and a content of its own."""
    module = LoraToy()
    module.model.add_adapter("past", LoraConfig(r=8, target_modules=["0", "3"]))
    with pytest.raises(ValueError, match="an adapter of the name 'past' of its own"):
        fit_stream(tmp_path, [AdapterSlots(8)], module=module)


def test_attention_as_a_whole_is_refused(tmp_path: Path) -> None:
    """PEFT merges its adapters into weights in every forward, where no gradient passes a second one."""

    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(6, 1, batch_first=True), nn.Linear(6, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            inputs = inputs[:, None]
            return self.out(self.attention(inputs, inputs, inputs)[0][:, 0])

    with pytest.raises(ValueError, match="is a MultiheadAttention with other settings"):
        fit_stream(tmp_path, [AdapterSlots(8)], module=adapted(Attentive(), target_modules=["attention"]))


@pytest.mark.parametrize("first", [True, False], ids=["frozen before", "frozen behind"])
def test_what_is_frozen_stays_frozen(first: bool, tmp_path: Path) -> None:
    """By hand or by another callback, wherever it stands, and through PEFT's calls."""
    freeze, slots = FreezeExcept(["*model.3.lora_*default*"]), AdapterSlots(8)
    module = Teaching("set")
    fit_stream(tmp_path, [freeze, slots] if first else [slots, freeze], module=module)
    assert module.flags[-1] == [f"model.base_model.model.3.lora_{factor}.default.weight" for factor in "AB"]
    assert not slot_of(module).weights("past")[1].any()


def test_adapters_that_are_all_frozen_are_refused(tmp_path: Path) -> None:
    """As PEFT loads them without `is_trainable`."""
    module = LoraToy()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="All adapters are frozen"):
        fit_stream(tmp_path, [AdapterSlots(8)], module=module)


def test_a_diverged_task_is_not_kept(tmp_path: Path) -> None:
    """Before anything is written, with the layers' names."""

    class Diverges(ContinualCallback):
        needs_state = False

        def on_task_end(self, trainer: Trainer, pl_module: Any, task: Task) -> None:
            if task.index == 1:
                with torch.no_grad():
                    pl_module.model.base_model.model[3].lora_B["default"].weight[0, 0] = float("nan")

    module = LoraToy()
    with pytest.raises(ValueError, match=r"\['model.base_model.model.3'\] hold values that are not finite"):
        fit_stream(tmp_path, [Diverges(), AdapterSlots(8)], module=module)
    assert slot_of(module).weights("past")[1].isfinite().all()
    assert not slot_of(module).weights("past")[1][:, 2:].any()


def test_two_fillers_of_slots_are_refused(tmp_path: Path) -> None:
    """Each would fold what the other trains."""

    class Another(AdapterSlots):
        """A method on slots."""

    with pytest.raises(ValueError, match="`AdapterSlots` and `Another` both fill the slots"):
        fit_stream(tmp_path, [AdapterSlots(8), Another(8)], module=LoraToy())


def test_a_teacher_of_the_task_before_goes_with_slots(tmp_path: Path) -> None:
    """At the start of a task it says what the student says, since the fold changed no output, and then no more."""

    class Noting(FeatureDistillation):
        def distance(self, batch: Any) -> Tensor | None:
            found = super().distance(batch)
            terms.append(None if found is None else float(found.detach()))
            return found

    terms: list[float | None] = []
    fit_stream(tmp_path, [Noting(1.0, layers=["model"]), AdapterSlots(8)], module=LoraToy())
    assert terms[:6] == [None] * 6
    later = [term for term in terms[6:] if term is not None]
    assert later[0] < 1e-10
    assert min(later[1:]) > 1e-4


def test_a_base_teacher_needs_adapters(tmp_path: Path) -> None:
    """Without them it would be the student itself."""
    with pytest.raises(ValueError, match="teaches with the module without its adapters, and ToyModule has none"):
        fit_stream(tmp_path, [LwF(1.0, teacher="base")])


@pytest.mark.parametrize("capacity", [0, -1, 2.5])
def test_capacity_is_checked(capacity: Any) -> None:
    """At once."""
    with pytest.raises(ValueError, match="`capacity` must be an integer of at least 1"):
        AdapterSlots(capacity)


def test_other_layers_than_those_learned_are_refused(tmp_path: Path) -> None:
    """A callback that goes on with another module knows nothing of its layers."""
    slots = AdapterSlots(8)
    fit_stream(tmp_path, [slots], module=LoraToy())
    with pytest.raises(ValueError, match="learned with other adapted layers"):
        fit_stream(tmp_path, [slots], module=adapted(ToyModule().model, target_modules=["0"]))


def test_peft_opens_what_it_saves_itself(tmp_path: Path) -> None:
    """Both adapters are known to PEFT: its own `save_pretrained` loses nothing."""
    module = LoraToy()
    stream = toy_stream(scenario=ClassIncremental(n_tasks=2))
    fit_stream(tmp_path, [AdapterSlots(8)], module=module, stream=stream)
    module.model.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(ToyModule().model, tmp_path / "adapters")
    again.load_adapter(tmp_path / "adapters" / "past", "past")
    again.base_model.set_adapter(["default", "past"])
    inputs = toy_data().tensors[0]
    torch.testing.assert_close(again(inputs), module.model(inputs))
