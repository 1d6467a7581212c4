"""Exact unlearning: what survives a deletion is, to the bit, what a run that never had the row would hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from lightning_cl.adapters import SlicedAdapters
from lightning_cl.core.requests import Influence
from lightning_cl.report.requests import write_request_report
from lightning_cl.unlearning import Ledger
from lightning_cl.unlearning.digest import digest_of
from lightning_cl.unlearning.ledger import hash_of_ids
from ranks import Ranks
from toys import toy_data, trainer

SETTINGS: dict[str, Any] = {"shards": 2, "slices": 3, "permutations": 2, "epochs": 2, "batch_size": 4}


class Centre(nn.Module):
    """Subtracts a running mean, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * inputs.detach().mean(0))
        return inputs - self.mean


class Deep(LightningModule):
    """Three hidden layers with LoRA and dropout, and a head with a buffer that trains as it is."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [6, 8, 8, 8]
        layers = [nn.Linear(before, after) for before, after in pairwise(sizes)]
        config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=["0", "1", "2"])
        self.model = get_peft_model(nn.Sequential(*layers), config)
        self.head = nn.Sequential(Centre(), nn.Dropout(0.1), nn.Linear(8, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.model(inputs).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning wants one beside any stream."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class Guarded(Dataset[Any]):
    """The toy data; rows that are gone cannot be read."""

    def __init__(self, gone: tuple[int, ...] = ()) -> None:
        self.data = toy_data()
        self.gone = gone
        self.tensors = self.data.tensors

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        if row in self.gone:
            raise AssertionError(f"row {row} was read after its deletion")
        return self.data[row]


class Plain(Deep):
    """Without what depends on a rank's own share of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 4))
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def recipe(folder: Path, gone: tuple[int, ...] = (), **changes: Any) -> SlicedAdapters:
    """The recipe over the toy data."""
    return SlicedAdapters(Deep, Guarded(gone), folder, **(SETTINGS | changes))


def never_saw(folder: Path, rows: list[int]) -> SlicedAdapters:
    """A recipe trained from the beginning without some rows, which its data does not have."""
    made = recipe(folder, tuple(rows))
    made.forget(rows)
    made.fit(lambda: trainer(folder))
    return made


def states(made: SlicedAdapters) -> dict[str, dict[str, Tensor]]:
    """All checkpoints on disk, by their place."""
    files = sorted(made.folder.glob("*/*/*.pt"))
    return {str(file.relative_to(made.folder)): torch.load(file)["state"] for file in files}


def check_equal(some: dict[str, dict[str, Tensor]], others: dict[str, dict[str, Tensor]]) -> None:
    """Check that checkpoints hold the same bits."""
    for name, state in some.items():
        assert state.keys() == others[name].keys()
        for key, value in state.items():
            assert torch.equal(value, others[name][key]), (name, key)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all checkpoints of the recipe; tests copy it."""
    folder = tmp_path_factory.mktemp("trained")
    made = recipe(folder)
    assert len(made.fit(lambda: trainer(folder))) == 2 * 2 * 3
    return folder


def copied(trained: Path, folder: Path) -> Path:
    """A copy of a folder of checkpoints."""
    for file in trained.rglob("*.pt"):
        place = folder / file.relative_to(trained)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    return folder


def test_rows_fall_apart_by_themselves(tmp_path):
    """Shards and slices partition the rows, and a row's place depends on no other row."""
    made = recipe(tmp_path)
    places = {(s, p): made.rows(s, p) for s in range(2) for p in range(3)}
    assert sorted(row for rows in places.values() for row in rows) == list(range(48))
    made.forget([11])
    for place, rows in places.items():
        assert made.rows(*place) == [row for row in rows if row != 11]


def test_orders_are_rotations(tmp_path):
    """Offsets are as even as can be."""
    made = recipe(tmp_path, slices=3, permutations=3)
    assert [made.order(p) for p in range(3)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert recipe(tmp_path / "two", slices=4, permutations=2).order(1) == [2, 3, 0, 1]


def test_a_training_moves_its_blocks_alone_from_the_top(trained):
    """Between prefixes one block's adapter differs, first the last one; the head differs always."""
    found = states(recipe(trained))
    for length, block in ((1, 2), (2, 1), (3, 0)):
        after = found[f"shard-0/order-0/prefix-{length}.pt"]
        before = found.get(f"shard-0/order-0/prefix-{length - 1}.pt")
        for index in range(3):
            name = f"model.base_model.model.{index}.lora_B.default.weight"
            start = torch.zeros_like(after[name]) if before is None else before[name]
            assert torch.equal(after[name], start) == (index != block)
        if before is not None:
            assert not torch.equal(after["head.2.weight"], before["head.2.weight"])
            assert not torch.equal(after["head.0.mean"], before["head.0.mean"])


def test_deletion_drops_what_saw_the_row_and_nothing_else(trained, tmp_path):
    """Every prefix that ends before the row's slice stays, in each order; the other shard stays whole."""
    made = recipe(copied(trained, tmp_path))
    row = made.rows(0, 1)[0]
    before = states(made)
    dropped = {str(file.relative_to(tmp_path)) for file in made.forget([row])}
    # order 0 is 0, 1, 2, order 1 is 1, 2, 0: the slice 1 is the second there and the first here
    expected = {f"shard-0/order-0/prefix-{n}.pt" for n in (2, 3)} | {
        f"shard-0/order-1/prefix-{n}.pt" for n in (1, 2, 3)
    }
    assert dropped == expected
    assert states(made).keys() == before.keys() - dropped
    assert [str(file.relative_to(tmp_path)) for file in made.served().values()] == [
        "shard-0/order-0/prefix-1.pt",
        "shard-1/order-0/prefix-3.pt",
    ]
    # the same request again finds nothing to do, in another process too
    assert recipe(tmp_path).forget([row]) == []


@pytest.mark.parametrize("part", [0, 1, 2])
def test_survivors_and_what_is_trained_anew_equal_a_run_that_never_saw_it(part, trained, tmp_path):
    """Bit for bit: the checkpoints that are left, their answers, and all of them after the next `fit`."""
    made = recipe(copied(trained, tmp_path / "deleted"))
    row = made.rows(1, part)[0]
    never = never_saw(tmp_path / "never", [row])
    made.forget([row])
    left = states(made)
    check_equal(left, states(never))
    made = recipe(tmp_path / "deleted", (row,))
    new = made.fit(lambda: trainer(tmp_path))
    assert len(new) + len(left) == 12
    check_equal(states(made), states(never))
    batch = [toy_data(8, seed=3).tensors[0]]
    assert torch.equal(made.logits(batch)[0], never.logits(batch)[0])


def test_the_row_mattered(trained, tmp_path):
    """What the deletion dropped differs from the same training without the row."""
    row = recipe(trained).rows(1, 0)[0]
    saw, never = states(recipe(trained)), states(never_saw(tmp_path, [row]))
    for name in ("shard-1/order-0/prefix-1.pt", "shard-1/order-0/prefix-3.pt"):
        assert not torch.equal(saw[name]["head.2.weight"], never[name]["head.2.weight"])


def test_a_stopped_run_goes_on(trained, tmp_path):
    """`fit` trains what is missing, and ends where a straight run ends."""
    made = recipe(copied(trained, tmp_path))
    for name in ("shard-0/order-1/prefix-3.pt", "shard-1/order-0/prefix-2.pt", "shard-1/order-0/prefix-3.pt"):
        (tmp_path / name).unlink()
    # a checkpoint that a kill left half written has another name
    (tmp_path / "shard-1/order-0/.prefix-2.pt.partial").write_bytes(b"half")
    torch.randn(7)
    assert len(made.fit(lambda: trainer(tmp_path))) == 3
    check_equal(states(made), states(recipe(trained)))
    assert made.fit(lambda: trainer(tmp_path)) == []


def test_a_process_that_dies_in_a_deletion_leaves_nothing(trained, tmp_path):
    """The request is on disk before the first file goes; who opens the folder next ends it."""
    other = recipe(copied(trained, tmp_path / "other"))
    row = other.rows(0, 0)[0]
    other.forget([row])
    made = recipe(copied(trained, tmp_path / "died"))
    (tmp_path / "died" / "requests.jsonl").write_bytes((tmp_path / "other" / "requests.jsonl").read_bytes())
    assert len(states(made)) == 12
    assert not any(row in torch.load(file)["rows"] for file in recipe(tmp_path / "died").folder.glob("*/*/*.pt"))
    assert len(states(made)) == 12 - 3 - 1
    # an object that was made before the other one's request does not read the row either
    made.train = Guarded((row,))
    made.fit(lambda: trainer(tmp_path))
    assert made.forgotten == [row]


# ---------------------------------------------------------------------- the ledger


def digest(found: dict[str, dict[str, Tensor]]) -> str:
    """The digest of checkpoints."""
    return digest_of((f"{file}:{name}", value) for file, state in found.items() for name, value in state.items())


def test_a_deletion_is_a_record_of_the_ledger(trained, tmp_path):
    """Who asked for what, what went, and what is left: the digest is that of a run that never saw the row."""
    made = recipe(copied(trained, tmp_path / "deleted"))
    row = made.rows(1, 1)[0]
    dropped = [str(file.relative_to(made.folder)) for file in made.forget([row, row], name="customer 17")]
    (record,) = made.ledger.records
    assert record == Ledger.read(made.folder / "requests.jsonl").records[0]
    assert (record.name, record.method, record.asked, record.ids) == ("customer 17", "sliced-adapters", 1, [row])
    assert record.ids_hash == hash_of_ids(torch.tensor([row]))
    assert record.settings == SETTINGS | {"rows": 48, "seed": 0, "dropped": dropped}
    assert record.influences == [Influence("SlicedAdapters", "checkpoints", "removed", len(dropped))]
    assert (record.steps, record.stopped, record.reference_hash) == (0, None, None)
    assert record.started <= record.ended
    never = states(never_saw(tmp_path / "never", [row]))
    assert record.weights_hash == digest(states(made)) == digest({file: never[file] for file in states(made)})
    page = write_request_report(made.folder / "requests.jsonl", tmp_path / "report").read_text()
    assert "customer 17" in page


def test_requests_have_names_and_are_served_once(tmp_path):
    """What was forgotten before is no part of a later record; a name stands for its rows."""
    made = recipe(tmp_path)
    made.forget([5, 3])
    made.forget([3, 7], name="request 3")
    made.forget([3, 7], name="request 3")
    made.forget([5])
    made.forget([9])
    made.forget([], name="nobody")
    records = recipe(tmp_path).ledger.records
    assert [(r.name, r.asked, r.ids) for r in records] == [
        ("request 1", 2, [3, 5]),
        ("request 3", 2, [7]),
        ("request 4", 1, [9]),
        ("nobody", 0, []),
    ]
    assert recipe(tmp_path).forgotten == [3, 5, 7, 9]
    with pytest.raises(ValueError, match="Request 'request 3' was served for other rows"):
        made.forget([3, 11], name="request 3")
    assert made.forgotten == [3, 5, 7, 9]


def test_a_ledger_that_was_changed_is_refused(tmp_path):
    """A line that is taken out would bring its rows back into the next training."""
    made = recipe(tmp_path)
    made.forget([5])
    made.forget([3])
    file = tmp_path / "requests.jsonl"
    file.write_text(file.read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match="does not follow the one before it"):
        recipe(tmp_path)


def test_answers_are_the_mean_over_shards(trained, tmp_path):
    """Each shard answers with its longest checkpoint, in evaluation mode; one without any has no part."""
    made = recipe(copied(trained, tmp_path))
    inputs, labels = toy_data(8, seed=3).tensors

    def alone(file: str) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = made._module(tmp_path / file).eval()
        with torch.no_grad():
            return module(inputs)

    expected = (alone("shard-0/order-0/prefix-3.pt") + alone("shard-1/order-0/prefix-3.pt")) / 2
    torch.testing.assert_close(made.logits([(inputs, labels)])[0], expected)
    made.forget([made.rows(0, 0)[0], made.rows(0, 1)[0]])
    assert list(made.served()) == [1]
    assert torch.equal(made.logits([inputs])[0], alone("shard-1/order-0/prefix-3.pt"))
    made.forget([made.rows(1, part)[0] for part in range(3)])
    with pytest.raises(ValueError, match="call `fit`"):
        made.logits([inputs])


def test_a_slice_that_is_empty_leaves_the_start(tmp_path):
    """A shard whose first slice was forgotten whole has a first checkpoint that was not trained."""
    made = recipe(tmp_path, shards=1, slices=2, permutations=1)
    made.forget(made.rows(0, 0))
    made.fit(lambda: trainer(tmp_path))
    found = states(made)
    assert not found["shard-0/order-0/prefix-1.pt"]["model.base_model.model.2.lora_B.default.weight"].any()
    assert found["shard-0/order-0/prefix-2.pt"]["model.base_model.model.0.lora_B.default.weight"].any()


def _even(folder: Path, batch_size: int) -> SlicedAdapters:
    """A recipe whose steps are full on one rank and on two: each slice has 16 rows."""
    made = recipe(folder, shards=1, slices=2, permutations=1, batch_size=batch_size)
    made.module = Plain
    made.forget([row for part in range(2) for row in made.rows(0, part)[16:]])
    return made


def _fit_on_ranks(folder: Path, strategy: str) -> list[Tensor]:
    made = _even(folder, 4)
    made.fit(lambda: trainer(folder, devices=2, strategy=strategy, use_distributed_sampler=False))
    made.forget([made.rows(0, 1)[0]])
    return made.logits([toy_data(4).tensors[0]])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two ranks for the tests of this file."""
    group = Ranks(2)
    yield group
    group.close()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(strategy, tmp_path, ranks):
    """Two ranks with half the batch each end where one process ends, and delete and answer as one."""
    two = ranks.run(_fit_on_ranks, tmp_path / "two", strategy)
    one = _even(tmp_path / "one", 8)
    one.fit(lambda: trainer(tmp_path))
    one.forget([one.rows(0, 1)[0]])
    found, expected = states(recipe(tmp_path / "two", shards=1, slices=2, permutations=1)), states(one)
    assert list(found) == list(expected) == ["shard-0/order-0/prefix-1.pt"]
    for key, value in found["shard-0/order-0/prefix-1.pt"].items():
        torch.testing.assert_close(value, expected["shard-0/order-0/prefix-1.pt"][key], atol=1e-5, rtol=1e-5)
    # the rows that do not fill steps, and the one after training: told by both ranks, written once
    ledger = recipe(tmp_path / "two", shards=1, slices=2, permutations=1, batch_size=4).ledger
    assert [record.ids for record in ledger.records] == [record.ids for record in one.ledger.records]
    assert ledger.records[1].settings["dropped"] == one.ledger.records[1].settings["dropped"]
    for answers in two:
        torch.testing.assert_close(answers, one.logits([toy_data(4).tensors[0]]), atol=1e-5, rtol=1e-5)


def test_settings_are_checked(tmp_path):
    """Each message names the setting."""
    with pytest.raises(ValueError, match="`shards`"):
        recipe(tmp_path, shards=0)
    with pytest.raises(ValueError, match="`permutations=4`"):
        recipe(tmp_path, permutations=4)
    made = recipe(tmp_path)
    with pytest.raises(ValueError, match="the data has 48 rows"):
        made.forget([48])
    with pytest.raises(ValueError, match="another folder"):
        recipe(tmp_path, slices=2)
    with pytest.raises(ValueError, match="only 3 blocks"):
        recipe(tmp_path / "deep", slices=4).fit(lambda: trainer(tmp_path))
    made.module = _WithoutAdapters
    with pytest.raises(ValueError, match="no adapters"):
        made.fit(lambda: trainer(tmp_path))


class _WithoutAdapters(Deep):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(6, 8)


def test_checkpoints_open_in_plain_torch(trained):
    """They hold adapters, head and buffers, and none of the frozen weights."""
    state = states(recipe(trained))["shard-0/order-0/prefix-3.pt"]
    assert not any("base_layer" in name for name in state)
    assert "head.0.mean" in state
    assert sum(value.numel() for value in state.values()) < 250


def test_loaders_read_batches(trained):
    """`logits` takes what a loader gives."""
    made = recipe(trained)
    batches = made.logits(DataLoader(toy_data(10, seed=5), batch_size=4))
    assert [batch.shape for batch in batches] == [(4, 4), (4, 4), (2, 4)]
