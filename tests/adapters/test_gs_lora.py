"""GS-LoRA: learn, learn, forget, learn, against a plain loop; what is pruned adds nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader

from lightning_cl import ContinualCallback, FSDP2Strategy, Task
from lightning_cl.adapters import AdapterSlots, GSLoRA
from lightning_cl.adapters.lora_blocks import lora_blocks
from lightning_cl.cli.main import main
from lightning_cl.core.rng import derived_seed
from ranks import Ranks
from toys import LoraToy, ToyModule, toy_data, trainer, trainer_yaml, weights
from unlearning_contract import EPOCHS, EPOCHS_OF_REQUEST, FORGOTTEN, LAST, RETAINED, TASKS, _batches, request_stream

LAYERS = ("model.base_model.model.0", "model.base_model.model.3")
FEATURES = "model.base_model.model.1"
SETTINGS: dict[str, Any] = {"group_lasso": 0.02, "warmup_steps": 2, "forget_weight": 0.7, "prune_below": 0.0}
PLUS = SETTINGS | {
    "features": FEATURES,
    "prototype_forget_weight": 0.4,
    "prototype_retain_weight": 0.6,
    "prototype_bound": 0.1,
}
CASES = {"gs-lora": SETTINGS, "bounded": SETTINGS | {"bound": 1.4}, "gs-lora++": PLUS}
every_case = pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
# steps: 4 of each learning task, 6 of the request, 4
INSIDE = 11
SLOW = partial(LoraToy, learning_rate=0.05)


def fit(
    root: Path,
    settings: dict[str, Any],
    *others: Any,
    module: LightningModule | None = None,
    name: str = "fit",
    ckpt_path: Path | None = None,
    stream: Any = None,
    batch_size: int = 8,
    **more: Any,
) -> tuple[Tensor, GSLoRA]:
    """Learn, learn, forget, learn; return the final weights and the callback."""
    method = GSLoRA(**settings, ledger_file=str(root / f"{name}.jsonl"))
    module = module or SLOW()
    callbacks = [other(method) if isinstance(other, type) else other for other in others]
    data = stream or request_stream(batch_size=batch_size)
    trainer(root, [*callbacks, method], **more).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return weights(module), method


def lasso(model: nn.Module) -> Tensor:
    """The sum of the norms of the two blocks."""
    norms = []
    for number in ("0", "3"):
        layer = model.base_model.model[int(number)]
        factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        norms.append(torch.cat([factor.flatten() for factor in factors]).norm())
    return torch.stack(norms).sum()


def features_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the layer before the last one returns."""
    return model.base_model.model[:2](inputs)


def plain_loop(
    settings: dict[str, Any] | None, *, batch_size: int = 8, world_size: int = 1, accumulate: int = 1
) -> Tensor:
    """The same in torch, every term in the loss; without settings the request changes nothing."""
    module = SLOW()
    model, (inputs, labels) = module.model, toy_data().tensors
    optimizer = module.configure_optimizers()
    for task, rows in enumerate([TASKS[0], TASKS[1], FORGOTTEN, LAST]):
        requested = task == 2
        if requested and settings is None:
            continue
        if task >= 2 and settings is not None:
            optimizer = module.configure_optimizers()
        prototypes = {}
        if requested:
            for kind, ids in (("forget", FORGOTTEN), ("retain", RETAINED)):
                for label in labels[ids].unique().tolist():
                    chosen = inputs[ids][labels[ids] == label]
                    prototypes[kind, label] = features_of(model, chosen).detach().mean(0)
        epochs = EPOCHS_OF_REQUEST if requested else EPOCHS
        batches = list(_batches(rows, task, epochs, batch_size, world_size))
        per_epoch, steps = len(batches) // epochs, 0
        for number, parts in enumerate(batches):
            total = torch.zeros(())
            for first, second in parts:
                if not requested:
                    total = total + cross_entropy(model(inputs[first]), labels[first])
                    continue
                bound = settings.get("bound") or 2 * torch.tensor(4.0).log().item()
                term = (bound - cross_entropy(model(inputs[first]), labels[first])).clamp(min=0)
                total = total + settings["forget_weight"] * term
                total = total + cross_entropy(model(inputs[second]), labels[second])
                if "features" in settings:
                    apart = {}
                    for kind, ids in (("forget", first), ("retain", second)):
                        targets = torch.stack([prototypes[kind, label] for label in labels[ids].tolist()])
                        found = features_of(model, inputs[ids]).log_softmax(-1)
                        apart[kind] = kl_div(found, targets.softmax(-1), reduction="batchmean")
                    hinge = (settings["prototype_bound"] - apart["forget"]).clamp(min=0)
                    total = total + settings["prototype_forget_weight"] * hinge
                    total = total + settings["prototype_retain_weight"] * apart["retain"]
            (total / len(parts) / accumulate).backward()
            if (number % per_epoch + 1) % accumulate and (number + 1) % per_epoch:
                continue
            if requested and steps >= settings["warmup_steps"]:
                (settings["group_lasso"] * lasso(model)).backward()
            steps += 1
            optimizer.step()
            optimizer.zero_grad()
    return weights(module)


@every_case
def test_ends_where_a_plain_loop_ends(settings, tmp_path):
    """With the lasso as a gradient, and prototypes read before the first step."""
    found, _ = fit(tmp_path, settings)
    torch.testing.assert_close(found, plain_loop(settings), rtol=0, atol=2e-6)


def test_every_term_matters():
    """The plain loops that it ends with are far from each other."""
    ends = [plain_loop(None), *(plain_loop(settings) for settings in CASES.values())]
    ends += [plain_loop(SETTINGS | {"group_lasso": 0.0}), plain_loop(SETTINGS | {"warmup_steps": 0})]
    ends += [plain_loop(PLUS | {"prototype_forget_weight": 0.0}), plain_loop(PLUS | {"prototype_retain_weight": 0.0})]
    for i, first in enumerate(ends):
        for second in ends[:i]:
            assert (first - second).abs().max() > 1e-3


@every_case
def test_accumulates(settings, tmp_path):
    """The lasso acts once per optimizer step, and counts them; hinges are on micro-batches."""
    found, _ = fit(tmp_path, settings, batch_size=4, accumulate_grad_batches=2)
    torch.testing.assert_close(found, plain_loop(settings, batch_size=4, accumulate=2), rtol=0, atol=2e-6)


RUNS: dict[str, tuple[Callable[[], LoraToy], dict[str, Any]]] = {
    "bf16-mixed": (SLOW, {"precision": "bf16-mixed"}),
    "clipped": (SLOW, {"gradient_clip_val": 0.5}),
    "fused": (partial(LoraToy, learning_rate=0.02, optimizer=partial(torch.optim.AdamW, fused=True)), {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_other_runs(name, tmp_path):
    """The lasso makes blocks smaller whatever moves them."""
    make, more = RUNS[name]
    norms = []
    for strength in (0.0, 0.3):
        settings = SETTINGS | {"group_lasso": strength, "warmup_steps": 0}
        norms.append(sum(fit(tmp_path / str(strength), settings, module=make(), **more)[1].norms.values()))
    assert norms[1] < 0.95 * norms[0]


# ---------------------------------------------------------------------- pruning


class Looks(ContinualCallback):
    """Notes outputs and factors at a request's end; its place in the list says before or after pruning."""

    acts_on: ClassVar[tuple[Literal["learn", "forget"], ...]] = ("forget",)
    needs_state = False

    def __init__(self) -> None:
        self.outputs: Tensor | None = None
        self.factors: dict[str, Tensor] = {}

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        with torch.no_grad():
            self.outputs = pl_module(toy_data().tensors[0]).clone()
        named = pl_module.named_parameters()
        self.factors = {name: p.detach().clone() for name, p in named if "lora_" in name}


def test_pruned_blocks_add_nothing_and_learn_again(tmp_path):
    """One block is under the threshold: its B is zero to the bit, its A is new, and the outputs hardly move."""
    before, after = Looks(), Looks()
    module = SLOW()
    # small adapters, as a strong lasso leaves them
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "0.lora_" in name:
                parameter.mul_(1e-2)
    requests = request_stream()
    requests.epochs_per_task = 1
    method = GSLoRA(**(SETTINGS | {"group_lasso": 1.0, "warmup_steps": 0, "prune_below": 0.4}))
    trainer(tmp_path, [before, method, after]).fit(module, datamodule=requests)
    assert 0 < len(method.pruned) < 2, method.norms
    pruned = method.pruned[0]
    assert method.norms[pruned] < 0.4
    for name, value in after.factors.items():
        if not name.startswith(pruned):
            assert torch.equal(value, before.factors[name])
        elif "lora_B" in name:
            assert not value.any()
            assert before.factors[name].any()
        else:
            reach = value.shape[1] ** -0.5
            generator = torch.Generator().manual_seed(derived_seed("gs-lora", derived_seed(0, "request", "some"), name))
            assert torch.equal(value, torch.empty(value.shape).uniform_(-reach, reach, generator=generator))
    norm = torch.linalg.matrix_norm
    delta = 2 * before.factors[f"{pruned}.lora_B.default.weight"] @ before.factors[f"{pruned}.lora_A.default.weight"]
    assert norm(delta) <= 2 * method.norms[pruned] ** 2 / 2
    # the task after the request uses the block again
    assert dict(module.named_parameters())[f"{pruned}.lora_B.default.weight"].any()
    record = method.ledger.records[-1]
    assert record.method == "gs-lora"
    assert record.settings["pruned"] == [pruned]
    assert record.settings["blocks"] == 2


def test_outputs_of_a_pruned_model_are_near(tmp_path):
    """All blocks are small, all go, and the model says what it said to a tolerance."""
    before, after = Looks(), Looks()
    module = SLOW()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.mul_(1e-2)
    stream = request_stream()
    stream.epochs_per_task, stream.epochs_per_request = 1, 1
    module.learning_rate = 1e-4
    method = GSLoRA(**SETTINGS | {"prune_below": 0.1})
    trainer(tmp_path, [before, method, after]).fit(module, datamodule=stream)
    assert method.pruned == list(LAYERS)
    assert not torch.equal(after.outputs, before.outputs)
    torch.testing.assert_close(after.outputs, before.outputs, rtol=0, atol=0.01)
    # and that is what the base says
    base = SLOW()
    torch.testing.assert_close(after.outputs, base(toy_data().tensors[0]).detach())


def test_a_zero_block_stays_and_nothing_is_nan(tmp_path):
    """A and B of a block are zero: its norm has no gradient, and the lasso adds none."""
    module = SLOW()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "3.lora_" in name:
                parameter.zero_()
    after, method = fit(tmp_path, SETTINGS | {"warmup_steps": 0}, module=module)
    assert torch.isfinite(after).all()
    assert method.norms[LAYERS[1]] == 0
    assert method.norms[LAYERS[0]] > 0


def test_finished_tasks_in_slots_are_left_alone(tmp_path):
    """Beside adapter slots, the request moves and prunes the present slot only."""
    before, after = Looks(), Looks()

    class Starts(Looks):
        def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
            self.on_task_end(trainer, pl_module, task)

        def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
            if not self.factors:
                super().on_task_end(trainer, pl_module, task)

    before = Starts()
    fit(tmp_path, SETTINGS | {"prune_below": 100.0}, AdapterSlots(8), before, after, module=SLOW())
    for name, value in after.factors.items():
        assert torch.equal(value, before.factors[name]) == (".past." in name)
    assert any(value.any() for name, value in after.factors.items() if ".past." in name)


# ---------------------------------------------------------------------- resume, ranks, the command line


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@every_case
def test_resumes_inside_the_request_to_the_same_bits(settings, tmp_path):
    """With dropout, from a checkpoint read with fresh objects; prototypes come from it, the blocks that go too."""
    settings = settings | {"prune_below": 0.9}
    make = partial(SLOW, dropout=0.3)
    straight, method = fit(tmp_path, settings, saver(tmp_path / "saved"), module=make(), name="straight")
    torch.manual_seed(999)
    for step in (INSIDE, 15):
        path = tmp_path / "saved" / f"step={step}.ckpt"
        again = saver(tmp_path / f"again {step}")
        resumed, other = fit(tmp_path, settings, again, module=make(), name=f"resumed {step}", ckpt_path=path)
        assert torch.equal(resumed, straight)
        assert (other.norms, other.pruned) == (method.norms, method.pruned)
    state = torch.load(path, weights_only=False)["callbacks"]
    held = next(value for key, value in state.items() if "GSLoRA" in key)
    # what is forgotten leaves no mean behind
    assert held["method"] == {"prototypes": {}}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def _fit_on_this_rank(root: Path, name: str, strategy: str) -> tuple[Tensor, dict[str, float], list[str]]:
    chosen: Any = FSDP2Strategy(wrap=["Linear"]) if strategy == "fsdp2" else strategy
    settings = CASES[name]
    found, method = fit(root, settings, batch_size=4, strategy=chosen, devices=2)
    return found, method.norms, method.pruned


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["gs-lora", "gs-lora++"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_end_where_one_process_ends(name, strategy, two_ranks, tmp_path):
    """Each with its half of what is forgotten; norms are those of whole blocks, prototypes those of all samples."""
    expected = plain_loop(CASES[name], batch_size=4, world_size=2)
    first, second = two_ranks.run(_fit_on_this_rank, tmp_path, name, strategy)
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]
    torch.testing.assert_close(first[0], expected, rtol=0, atol=2e-6)


def _prune_on_this_rank(root: Path, strategy: str) -> tuple[Tensor, list[str]]:
    chosen: Any = FSDP2Strategy(wrap=["Linear"]) if strategy == "fsdp2" else strategy
    found, method = fit(root, SETTINGS | {"prune_below": 100.0}, batch_size=4, strategy=chosen, devices=2)
    return found, method.pruned


@pytest.mark.distributed
def test_shards_are_pruned_as_whole_blocks_are(two_ranks, tmp_path):
    """The new A is one tensor, of which each rank takes its part."""
    ends = {name: two_ranks.run(_prune_on_this_rank, tmp_path / name, name) for name in ("ddp", "fsdp2")}
    assert all(pruned == list(LAYERS) for pairs in ends.values() for _, pruned in pairs)
    torch.testing.assert_close(ends["ddp"][0][0], ends["fsdp2"][0][0], rtol=0, atol=2e-6)


def test_built_by_the_command_line(tmp_path):
    """The class's signature is its YAML."""
    (tmp_path / "run.yaml").write_text(
        f"""
{trainer_yaml(tmp_path)}
  callbacks:
    - class_path: lightning_cl.adapters.GSLoRA
      init_args:
        group_lasso: 0.001
        features: {FEATURES}
        ledger_file: {tmp_path / "requests.jsonl"}
model:
  class_path: toys.LoraToy
data:
  class_path: UnlearningDataModule
  init_args:
    train: {{class_path: unlearning_contract.LabelledRows}}
    requests: [{{name: some, rows: [1, 2, 5, 6]}}]
    batch_size: 4
"""
    )
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert '"group_lasso": 0.001' in (tmp_path / "requests.jsonl").read_text()


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "setting",
    [
        {"bound": 0.0},
        {"group_lasso": -1.0},
        {"warmup_steps": -1},
        {"prune_below": -0.1},
        {"prototype_forget_weight": -1.0},
        {"prototype_retain_weight": -1.0},
        {"prototype_bound": 0.0},
        {"forget_weight": 0.0},
        {"retain_weight": 0.0},
        {"utility_floor": 2.0},
    ],
)
def test_settings_are_checked(setting):
    """Each message names the setting."""
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}`"):
        GSLoRA(**setting)


class Variant(ToyModule):
    """Adapters with a magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.model = get_peft_model(self.model, LoraConfig(r=2, use_dora=True, target_modules=["0"]))


class Frozen(LoraToy):
    """Adapters that do not train."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.model.base_model.model[3].base_layer.bias.requires_grad_(True)


@pytest.mark.parametrize(
    ("module", "message"), [(ToyModule, "no adapters"), (Variant, "plain LoRA"), (Frozen, "none that do")]
)
def test_other_modules_are_refused(module, message, tmp_path):
    """Without plain LoRA that trains there is nothing to shrink."""
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, SETTINGS, module=module())


def test_features_are_vectors_with_labels_of_a_stream(tmp_path):
    """The message says what to name."""
    batches = [{"forget": toy_data().tensors, "retain": toy_data().tensors}]
    plain = trainer(tmp_path, [GSLoRA(features=FEATURES)], max_epochs=1)
    with pytest.raises(ValueError, match="a stream with `requests`"):
        plain.fit(SLOW(), DataLoader(batches, batch_size=None), DataLoader(toy_data(), batch_size=8))
    module = SLOW()
    module.model.base_model.model[1] = nn.Sequential(nn.ReLU(), nn.Unflatten(1, (1, 8)), nn.Flatten())
    module.model.base_model.model[1].add_module("3", nn.Identity())
    method = GSLoRA(features=f"{FEATURES}.1", ledger_file=str(tmp_path / "other.jsonl"))
    with pytest.raises(ValueError, match=r"the shape \[8, 1, 8\]"):
        trainer(tmp_path, [method]).fit(module, datamodule=request_stream())


def test_blocks_are_named_by_the_first_number():
    """Layers of one block form one group; a layer without a number is a group of its own."""
    network = nn.ModuleDict(
        {
            "layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)}) for _ in range(2)]),
            "embedding": nn.Embedding(3, 2),
        }
    )
    config = LoraConfig(r=1, target_modules=["q", "v", "embedding"])
    model = get_peft_model(nn.Sequential(network), config, adapter_name="a-name")
    model.base_model.model = network
    blocks = lora_blocks(model, "Test")
    assert [name.removeprefix("base_model.model.") for name in blocks] == ["layers.0", "layers.1", "embedding"]
    assert [len(factors) for factors in blocks.values()] == [4, 4, 2]
