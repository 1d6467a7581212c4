"""What callbacks keep after a request: nothing of its samples in memories, and what is measured without them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting import (
    FORGOTTEN,
    INPUTS,
    LABELS,
    RETAINED,
    AfterRequest,
    Serves,
    after_request,
    as_dict,
    assert_near,
    content,
    forgetting_stream,
    learned_and_forgotten,
    outcomes,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from contract import Row, all_rows
from lightning_cl import (
    AGEM,
    DER,
    EWC,
    MAS,
    SI,
    ContinualCallback,
    ExperienceReplay,
    FSDP2Strategy,
    GradientProjection,
    L2Anchor,
    SoftMask,
    TaskStreamDataModule,
)
from lightning_cl.core.requests import ForgetRequest, Influence
from lightning_cl.core.shards import of_all_ranks
from lightning_cl.datamodules import ClassIncremental, Online, Predefined, Recurring
from ranks import Ranks
from reference import per_sample_fisher
from toys import ToyModule, fit_stream, toy_stream, trainer, weights

# one row for each kind of memory of samples
MEMORIES = {
    name: row
    for name, row in all_rows().items()
    if row.method.card.stores_inputs and name not in ("hpcr", "er-separate")
}


# ---------------------------------------------------------------------- memories


@pytest.mark.parametrize("row", MEMORIES.values(), ids=MEMORIES.keys())
def test_no_byte_of_a_sample_is_left(row: Row, tmp_path: Path) -> None:
    """Not in the callback nor in a checkpoint from the request's first step on; before, there were some of all."""
    method = row.method(**{**row.settings, "capacity": 48})
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    first = 8
    serves = learned_and_forgotten(tmp_path, method, saver, module=row.module())
    secrets = [INPUTS[row].numpy().tobytes() for row in FORGOTTEN]
    stay = [INPUTS[row].numpy().tobytes() for row in RETAINED.tolist()]
    before = (tmp_path / f"step={first}.ckpt").read_bytes()
    held = sum(secret in before for secret in secrets)
    assert held >= 4
    assert outcomes(serves, method)[0] == ("removed", held)
    for step in range(first + 1, serves.ledger.records[0].steps + first + 9):
        after = (tmp_path / f"step={step}.ckpt").read_bytes()
        assert not any(secret in after for secret in secrets)
        assert sum(sample in after for sample in stay) > 5
    assert not any(secret in content(method.__dict__["buffer"].state_dict()) for secret in secrets)
    assert not any(secret in pickle.dumps(method) for secret in secrets)
    assert not set(method.buffer.sample_ids.tolist()) & set(FORGOTTEN)


def test_stored_logits_go_with_their_samples(tmp_path: Path) -> None:
    """A row of the scores that DER keeps for each sample left, and the bits of those of others."""
    method = DER(48, alpha=0.5)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    learned_and_forgotten(tmp_path, method, saver, module=ToyModule())
    before, after = (
        of_all_ranks(torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"]["DER"]["buffer"])[0]
        for step in (8, 9)
    )

    def scores(state: Any) -> dict[int, Tensor]:
        rows = torch.cat(state["columns"]["@logits"])
        return dict(zip(state["sample_ids"].tolist(), rows, strict=True))

    old, new = scores(before), scores(after)
    assert old.keys() - new.keys() == set(FORGOTTEN)
    assert all(torch.equal(old[sample], row) for sample, row in new.items())


def test_reference_gradients_go_with_their_samples(tmp_path: Path) -> None:
    """Those of the last draws, which may hold the samples, are there until then."""
    method = AGEM(48)
    tables: list[int] = []

    class Looks(AfterRequest):
        @property
        def state_key(self) -> str:
            return str(id(self))

        def forget_samples(self, trainer: Any, pl_module: Any, sample_ids: Tensor) -> list[Influence]:
            tables.append(len(method._tables))
            return []

    # asked in the order of the list
    fit_stream(tmp_path, [Looks(weights), method, Looks(weights), Serves()], stream=forgetting_stream())
    assert tables == [1, 0]


def test_a_sample_that_comes_again_is_not_kept(tmp_path: Path) -> None:
    """Also where the data shows it again: another stream over the same rows without the request."""
    method = ExperienceReplay(48)
    module = ToyModule()
    learned_and_forgotten(tmp_path, method, module=module)
    fit_stream(tmp_path, [method], module=module, stream=toy_stream())
    assert len(method.buffer) == 48 - len(FORGOTTEN)
    assert not set(method.buffer.sample_ids.tolist()) & set(FORGOTTEN)


@pytest.mark.parametrize("online", [False, True])
def test_a_stream_that_comes_back_brings_none(online: bool, tmp_path: Path) -> None:
    """Tasks recur after the request without its samples, also where boundaries are hidden."""
    recurring = Recurring(ClassIncremental(n_tasks=2), n_visits=4)
    scenario = Online(recurring) if online else recurring
    method = ExperienceReplay(48)
    stream = forgetting_stream(scenario=scenario, epochs_per_task=1)
    serves = learned_and_forgotten(tmp_path, method, module=ToyModule(learning_rate=0.05), stream=stream)
    assert outcomes(serves, method) == [("removed", len(FORGOTTEN))]
    assert len(method.buffer) == 48 - len(FORGOTTEN)
    assert not set(method.buffer.sample_ids.tolist()) & set(FORGOTTEN)


def test_without_a_stream_samples_cannot_be_told(tmp_path: Path) -> None:
    """A fit that is a request: what memories and measurements hold stays, and they say so."""
    memory, ewc = ExperienceReplay(12), EWC(1.0)
    module, loader = ToyModule(), DataLoader(TensorDataset(INPUTS[:16], LABELS[:16]), batch_size=8)
    trainer(tmp_path, [memory, ewc], max_epochs=1).fit(module, loader, loader)
    importance = {name: value.clone() for name, value in ewc.importance.items()}
    serves = Serves(ascends=True)
    pairs = [{"forget": batch} for batch in loader]
    trainer(tmp_path, [memory, ewc, serves], max_epochs=1).fit(module, DataLoader(pairs, batch_size=None), loader)
    assert outcomes(serves, memory) == [("remains", 12)]
    assert outcomes(serves, ewc) == [("recomputed", None), ("remains", None)]
    assert len(memory.buffer) == 12
    assert_near(dict(ewc.importance), importance)
    assert_near(dict(ewc.anchors), dict(module.named_parameters()))


# ---------------------------------------------------------------------- penalties


@pytest.mark.parametrize(("settings", "tasks"), [({}, 2.0), ({"decay": 0.5}, 1.5), ({"mode": "separate"}, 2.0)])
def test_ewc_is_measured_on_what_is_retained(settings: dict[str, Any], tasks: float, tmp_path: Path) -> None:
    """Around the present weights, as strong as the tasks were together; the next step is pulled there."""
    method = EWC(20.0, **settings)
    module, state, serves = after_request(tmp_path, method)
    assert outcomes(serves, method) == [("recomputed", None)] * 2
    assert_near(state["anchors"], dict(module.named_parameters()))
    fisher = per_sample_fisher(module, INPUTS[RETAINED], LABELS[RETAINED])
    assert_near(state["importance"], as_dict(module, [tasks * value for value in fisher]))
    assert state["constant"] == 0.0


def test_mas_is_measured_on_what_is_retained(tmp_path: Path) -> None:
    """Means of absolute gradients of the squared output, for two tasks."""
    module, state, _ = after_request(tmp_path, MAS(1.0))
    sums = [torch.zeros_like(p) for p in module.parameters()]
    for sample in INPUTS[RETAINED]:
        gradients = torch.autograd.grad(module.model(sample[None]).square().sum(), list(module.parameters()))
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.abs()
    assert_near(state["importance"], as_dict(module, [2 * total / len(RETAINED) for total in sums]))
    assert_near(state["anchors"], dict(module.named_parameters()))


def test_the_next_step_is_pulled_to_the_new_anchors(tmp_path: Path) -> None:
    """The penalty's gradient is lambda F (theta - theta*) of the new F and theta*."""
    method = EWC(20.0)
    module, state, _ = after_request(tmp_path, method)
    fisher = per_sample_fisher(module, INPUTS[RETAINED], LABELS[RETAINED])
    with torch.no_grad():
        moved = [p + 0.1 for p in module.parameters()]
    again = EWC(20.0)
    again.load_state_dict(state)
    again.parameters = dict(module.named_parameters())
    again.importance.place(again.parameters, "F")
    again.anchors.place(again.parameters, "anchors")
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), moved, strict=True):
            parameter.copy_(value)
    expected = sum(float((20.0 / 2 * 2 * value * 0.1**2).sum()) for value in fisher)
    torch.testing.assert_close(float(again.penalty()), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("anchor", ["previous", "pretrained"])
def test_distances_are_from_the_weights_that_have_forgotten(anchor: Any, tmp_path: Path) -> None:
    """L2 takes its anchors anew, also those of the beginning."""
    module, state, serves = after_request(tmp_path, L2Anchor(0.5, anchor=anchor))
    assert_near(state["anchors"], dict(module.named_parameters()))
    assert [i.outcome for i in serves.influences if i.owner == "L2Anchor"] == ["recomputed"]


def test_importances_of_a_way_remain(tmp_path: Path) -> None:
    """SI keeps them to the bit and anchors anew: the way cannot be walked again."""
    method = SI(1.0)
    module, state, serves = after_request(tmp_path, method)
    old = serves.before["callbacks"][0]["importance"]
    assert all(torch.equal(old[name], value) for name, value in state["importance"].items())
    assert_near(state["anchors"], dict(module.named_parameters()))
    assert outcomes(serves, method) == [("recomputed", None), ("remains", None)]


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_resumes_inside_the_request_to_the_same_bits(fisher: Any, tmp_path: Path) -> None:
    """With an estimator that has seen no batch of a task to learn."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    stream = {"epochs_per_request": 2}
    straight, module = EWC(20.0, fisher=fisher), ToyModule(learning_rate=0.02)
    learned_and_forgotten(tmp_path, straight, saver, ascends=True, module=module, stream=forgetting_stream(**stream))
    resumed, again = EWC(20.0, fisher=fisher), ToyModule(learning_rate=0.02)
    learned_and_forgotten(
        tmp_path / "again",
        resumed,
        ModelCheckpoint(tmp_path / "again", filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ascends=True,
        module=again,
        stream=forgetting_stream(**stream),
        ckpt_path=tmp_path / "step=9.ckpt",
    )
    assert torch.equal(weights(module), weights(again))


class NextToken(ToyModule):
    """A language model as users write them: scores of a position are for the token of the next."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.05)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self.model(batch["input_ids"])[:, :-1]
        return cross_entropy(scores.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens."""

    def __init__(self, seed: int) -> None:
        self.tokens = torch.randint(0, 11, (12, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def test_a_language_model_resumes_inside_the_request(tmp_path: Path) -> None:
    """Whose loss predicts the next token, which is found out on a batch and not kept in a checkpoint."""
    found = []
    for name, path in (("straight", None), ("resumed", tmp_path / "straight" / "step=4.ckpt")):
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        stream = TaskStreamDataModule(
            [Texts(0), Texts(1)],
            [Texts(2), Texts(3)],
            scenario=Predefined(),
            batch_size=4,
            requests=[ForgetRequest("rows", rows=list(range(6)), after=1)],
        )
        module, method = NextToken(), EWC(20.0, fisher="sampled")
        learned_and_forgotten(
            tmp_path / name, method, saver, ascends=True, module=module, stream=stream, ckpt_path=path
        )
        found.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*found)


def test_nothing_retained_leaves_nothing_to_hold(tmp_path: Path) -> None:
    """All that was learned is forgotten: importances, subspaces and masks go."""
    everything = [row for row in range(48) if row % 4 < 2]
    for method in (EWC(20.0), GradientProjection(threshold=0.5), SoftMask()):
        root = tmp_path / type(method).__name__
        _, state, serves = after_request(root, method, stream=forgetting_stream(everything))
        assert outcomes(serves, method)[-1] == ("removed", None)
        assert not any(state[key] for key in ("importance", "subspaces") if key in state)
        assert state.get("tasks", 0.0) == 0.0


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class Held(ContinualCallback):
    """Keeps which samples a memory holds on this rank when the second task has ended."""

    needs_state = False

    def __init__(self, memory: DER) -> None:
        self.memory = memory
        self.found: list[int] = []

    def on_task_end(self, trainer: Any, pl_module: Any, task: Any) -> None:
        if task.index == 1:
            self.found = self.memory.buffer.sample_ids.tolist()


def forget_on_this_rank(root: Path, strategy: str) -> dict[str, Any]:
    """Fit with a memory and a penalty; return what this rank keeps, and what was said."""
    memory, ewc = DER(24, alpha=0.5), EWC(20.0)
    held, serves = Held(memory), Serves(ascends=True)
    probe = AfterRequest(
        lambda module: (weights(module), {name: ewc.importance.full(name).clone() for name in ewc.importance})
    )
    chosen: Any = FSDP2Strategy(wrap=["Linear"]) if strategy == "fsdp2" else strategy
    fit = trainer(root, [memory, ewc, serves, held, probe], strategy=chosen, devices=2)
    fit.fit(ToyModule(learning_rate=0.05), datamodule=forgetting_stream(batch_size=4))
    return {
        "before": held.found,
        "held": memory.buffer.sample_ids.tolist(),
        "bytes": pickle.dumps(memory.buffer.state_dict()),
        "said": [(i.owner, i.outcome, i.count) for i in serves.influences if i.owner != "Serves"],
        "weights": probe.found[0],
        "importance": probe.found[1],
    }


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_no_rank_keeps_a_sample(strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks, each with half of the memory: the count is over both, and importances are by hand."""
    first, second = two_ranks.run(forget_on_this_rank, tmp_path, strategy)
    count = len((set(first["before"]) | set(second["before"])) & set(FORGOTTEN))
    assert count > 0
    assert first["said"] == second["said"]
    assert first["said"][0] == ("DER", "removed", count)
    for found in (first, second):
        assert not set(found["held"]) & set(FORGOTTEN)
        assert not any(INPUTS[row].numpy().tobytes() in found["bytes"] for row in FORGOTTEN)
    module = ToyModule()
    nn.utils.vector_to_parameters(first["weights"], module.parameters())
    fisher = per_sample_fisher(module, INPUTS[RETAINED], LABELS[RETAINED])
    assert_near(first["importance"], as_dict(module, [2 * value for value in fisher]))
