"""Selective synaptic dampening against a plain loop over samples, as a function and as a callback."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl import FSDP2Strategy, TaskStreamDataModule
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.datamodules.samplers import TaskSampler
from lightning_cl.unlearning import SelectiveSynapticDampening, dampen_
from ranks import Ranks
from reference import per_sample_fisher
from toys import ToyModule, fit_stream, toy_data, toy_stream, trainer, weights

FORGOTTEN = [1, 5, 9, 13, 17, 2]
ALPHA = 1.5


def batches(rows: list[int], size: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of the toy data in batches."""
    inputs, labels = toy_data().tensors
    return [(inputs[part], labels[part]) for part in torch.tensor(rows).split(size)]


def sensitivity(module: ToyModule, inputs: Tensor) -> list[Tensor]:
    """The mean over samples of the absolute gradients of the squared norm of the output."""
    sums = [torch.zeros_like(p) for p in module.parameters()]
    for x in inputs:
        grads = torch.autograd.grad(module.model(x[None]).square().sum(), list(module.parameters()))
        for total, grad in zip(sums, grads, strict=True):
            total += grad.abs()
    return [total / len(inputs) for total in sums]


def dampened_by_loop(module: ToyModule, forget: list[Tensor], full: list[Tensor], alpha: float, lambda_: float) -> int:
    """The paper's algorithm, weight by weight; returns how many were selected."""
    count = 0
    for parameter, of_forget, of_full in zip(module.parameters(), forget, full, strict=True):
        flat = parameter.detach().flatten()
        for i, (f, d) in enumerate(zip(of_forget.flatten().tolist(), of_full.flatten().tolist(), strict=True)):
            if f > alpha * d:
                flat[i] *= min(lambda_ * d / f, 1.0)
                count += 1
    return count


@pytest.fixture
def module() -> ToyModule:
    """A toy that has learned, in training mode."""
    toy = ToyModule()
    inputs, labels = toy_data().tensors
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(toy(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return toy.train()


# ---------------------------------------------------------------------- the function


@pytest.mark.parametrize("importance", ["fisher", "sensitivity"])
def test_function_is_the_algorithm_of_the_paper(module: ToyModule, importance: str) -> None:
    """Of per-sample gradients, whatever the batch size; the same weights and the same count."""
    inputs, labels = toy_data().tensors
    expected = copy.deepcopy(module)
    if importance == "fisher":
        full = per_sample_fisher(expected, inputs, labels)
        forget = per_sample_fisher(expected, inputs[FORGOTTEN], labels[FORGOTTEN])
    else:
        full, forget = (sensitivity(expected, x) for x in (inputs, inputs[FORGOTTEN]))
    count = dampened_by_loop(expected, forget, full, ALPHA, 0.8)
    assert 3 < count < 80
    for sizes in ((1, 48), (6, 7), (4, 1)):
        edited = copy.deepcopy(module)
        found = dampen_(
            edited,
            batches(FORGOTTEN, sizes[0]),
            batches(list(range(48)), sizes[1]),
            alpha=ALPHA,
            lambda_=0.8,
            importance=importance,
        )
        assert found == count
        torch.testing.assert_close(weights(edited), weights(expected), rtol=1e-5, atol=1e-6)
    assert (weights(module) - weights(expected)).abs().max() > 1e-2


def test_infinite_alpha_changes_nothing_to_the_bit(module: ToyModule) -> None:
    """And the module stays in the mode that it was in, without gradients."""
    before = weights(module)
    assert dampen_(module, batches(FORGOTTEN, 3), batches(list(range(48)), 8), alpha=float("inf")) == 0
    assert torch.equal(weights(module), before)
    assert module.training
    assert all(p.grad is None for p in module.parameters())


def test_an_alpha_that_no_weight_can_reach_is_told(module: ToyModule) -> None:
    """6 of 48 samples matter for a weight at most 8 times as much as all of them."""
    data = batches(FORGOTTEN, 3), batches(list(range(48)), 8)
    with pytest.warns(UserWarning, match=r"`alpha=8.0` selects nothing: .* are 1 in 8 of all"):
        assert dampen_(module, *data, alpha=8.0) == 0


def test_forgets_the_samples_and_keeps_the_others(module: ToyModule) -> None:
    """A class goes while the rest stays."""
    inputs, labels = toy_data().tensors
    for _ in range(3):
        dampen_(module, batches([i for i in range(48) if i % 4 == 1], 8), batches(list(range(48)), 8), alpha=1.5)
    right = module(inputs).argmax(1) == labels
    assert right[labels == 1].float().mean() < 0.3
    assert right[labels != 1].float().mean() > 0.9


class Normed(ToyModule):
    """With batch normalisation, a tied weight and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 4))
        self.model[2].weight = self.model[0].weight
        self.model[3].bias.requires_grad_(False)


def test_buffers_stay_and_tied_weights_are_dampened_once() -> None:
    """Squares of the summed gradient of both uses, in evaluation mode; what is frozen stays."""
    torch.manual_seed(0)
    module = Normed()
    with torch.no_grad():
        module(toy_data().tensors[0])  # statistics of the data
        module.model[3].bias.fill_(0.3)
    expected, buffers = copy.deepcopy(module), {n: b.clone() for n, b in module.named_buffers()}
    expected.eval()
    inputs, labels = toy_data().tensors
    trained = [p for p in expected.parameters() if p.requires_grad]

    def fisher(rows: list[int]) -> list[Tensor]:
        sums = [torch.zeros_like(p) for p in trained]
        for row in rows:
            loss = cross_entropy(expected(inputs[row : row + 1]), labels[row : row + 1])
            for total, grad in zip(sums, torch.autograd.grad(loss, trained), strict=True):
                total += grad.square()
        return [total / len(rows) for total in sums]

    only = SimpleNamespace(parameters=lambda: trained)
    count = dampened_by_loop(only, fisher(FORGOTTEN), fisher(list(range(48))), ALPHA, 1.0)
    assert dampen_(module, batches(FORGOTTEN, 3), batches(list(range(48)), 8), alpha=ALPHA) == count > 0
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    assert module.model[3].bias.tolist() == [pytest.approx(0.3)] * 4


def test_any_module_with_its_own_batches(module: ToyModule) -> None:
    """Pairs, mappings with a loss in the output, a loss of one's own: the weights of the LightningModule."""
    expected = copy.deepcopy(module)
    data = batches(FORGOTTEN, 3), batches(list(range(48)), 8)
    dampen_(expected, *data, alpha=ALPHA)

    class Wrapped(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, inputs: Tensor, labels: Tensor) -> Any:
            logits = self.network(inputs)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    plain, wrapped, own = (copy.deepcopy(module.model) for _ in range(3))
    assert dampen_(plain, *data, alpha=ALPHA) > 0
    named = ([{"inputs": x, "labels": y} for x, y in part] for part in data)
    dampen_(Wrapped(wrapped), *named, alpha=ALPHA)
    dampen_(own, *data, alpha=ALPHA, loss=lambda network, batch: cross_entropy(network(batch[0]), batch[1]))
    for edited in (plain, wrapped, own):
        torch.testing.assert_close(weights(edited), weights(expected), rtol=0, atol=1e-7)
        assert edited.training


def test_no_labels_are_needed_for_the_sensitivity(module: ToyModule) -> None:
    """Of batches that have none."""
    labelled, unlabelled = copy.deepcopy(module.model), copy.deepcopy(module.model)
    data = batches(FORGOTTEN, 3), batches(list(range(48)), 8)
    dampen_(labelled, *data, alpha=ALPHA, importance="sensitivity")
    assert dampen_(unlabelled, *([x for x, _ in part] for part in data), alpha=ALPHA, importance="sensitivity") > 0
    torch.testing.assert_close(weights(unlabelled), weights(labelled))
    assert not torch.equal(weights(unlabelled), weights(module))


def test_patterns_select_parameters(module: ToyModule) -> None:
    """Of the module's own names, also where it is no LightningModule."""
    before, after = copy.deepcopy(module.model), module.model
    data = batches(FORGOTTEN, 3), batches(list(range(48)), 8)
    assert dampen_(after, *data, alpha=ALPHA, include=["0.*"], exclude=["*.bias"]) > 0
    assert not torch.equal(after[0].weight, before[0].weight)
    assert torch.equal(after[0].bias, before[0].bias)
    assert torch.equal(after[3].weight, before[3].weight)


def test_bfloat16_weights_are_measured_in_float32(module: ToyModule) -> None:
    """Squares that half precision would lose are there."""
    half = copy.deepcopy(module.model).to(torch.bfloat16)
    data = [
        [(x.to(torch.bfloat16) * 1e-2, y) for x, y in part]
        for part in (batches(FORGOTTEN, 3), batches(list(range(48)), 8))
    ]
    assert dampen_(half, *data, alpha=ALPHA) > 0
    assert half[0].weight.dtype == torch.bfloat16
    assert weights(half).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "`alpha` must be above 0, got 0"),
        ({"lambda_": -1.0}, "`lambda_` must be above 0, got -1.0"),
        ({"importance": "hessian"}, "`importance` must be one of 'fisher', 'sensitivity', got 'hessian'"),
        ({"include": ["nothing"]}, "`include` pattern 'nothing' matches no parameter"),
        ({"forget": []}, "There is no sample to measure the Fisher information on"),
        ({"full": []}, "There is no sample to measure the Fisher information on"),
    ],
)
def test_function_refuses(module: ToyModule, settings: dict[str, Any], message: str) -> None:
    """By name, and with the weights as they were."""
    before = weights(module)
    arguments = {"forget": batches(FORGOTTEN, 3), "full": batches(list(range(48)), 8)} | settings
    with pytest.raises(ValueError, match=message):
        dampen_(module, **arguments)
    assert torch.equal(weights(module), before)


def test_batches_without_a_loss_are_refused() -> None:
    """Inputs alone have none."""
    with pytest.raises(ValueError, match=r"gives Linear no loss\. Say by `loss` what it is"):
        dampen_(nn.Linear(2, 2), [torch.ones(2, 2)], [torch.ones(2, 2)])


# ---------------------------------------------------------------------- the callback

LEARNED = [[i for i in range(48) if i % 4 in pair] for pair in ((0, 1), (2, 3))]
REQUESTED = [[0, 4, 8, 1], [5, 9, 12, 2, 6]]


def stream(batch_size: int = 8) -> TaskStreamDataModule:
    """Learn two classes, forget of them, learn two more, forget of all four."""
    requests = [ForgetRequest(f"request {i}", rows=rows, after=i + 1) for i, rows in enumerate(REQUESTED)]
    return toy_stream(batch_size=batch_size, requests=requests)


def method(root: Path, **settings: Any) -> SelectiveSynapticDampening:
    """With weights to dampen in both requests."""
    defaults = {"alpha": 1.2, "measure_samples": 4, "ledger_file": str(root / "requests.jsonl")}
    return SelectiveSynapticDampening(**(defaults | settings))


def plain_loop(
    batch_size: int = 8, world_size: int = 1, *, full: str = "recomputed", alpha: float = 1.2
) -> tuple[Tensor, list[int]]:
    """Learn, edit, learn, edit in torch; returns the weights and how many were selected."""
    inputs, labels = toy_data().tensors
    module = ToyModule()

    def fisher(rows: list[int]) -> list[Tensor]:
        return [len(rows) * mean for mean in per_sample_fisher(module, inputs[rows], labels[rows])]

    gone: list[int] = []
    kept: list[Tensor] = []
    covered: list[int] = []
    counts = []
    for task in (0, 1):
        # what the optimizer remembers of forgotten samples is dropped
        optimizer = module.configure_optimizers()
        fixed = {"task": 2 * task, "batch_size": batch_size, "seed": 0, "world_size": world_size}
        sampler = TaskSampler(np.array(LEARNED[task]), **fixed)
        for epoch in range(2):
            sampler.set_position(epoch=epoch)
            for step in range(len(sampler)):
                ranks = sampler.global_rows(step)
                loss = sum(cross_entropy(module(inputs[rows]), labels[rows]) for rows in ranks) / len(ranks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        forget = REQUESTED[task]
        gone += forget
        retained = [i for rows in LEARNED[: task + 1] for i in rows if i not in gone]
        everything = retained + forget
        of_forget = fisher(forget)
        if full == "reduced" and kept:
            of_full = [
                old + new for old, new in zip(kept, fisher([i for i in everything if i not in covered]), strict=True)
            ]
        else:
            of_full = fisher(everything)
        kept, covered = fisher(retained), retained
        count = dampened_by_loop(
            module, [f / len(forget) for f in of_forget], [f / len(everything) for f in of_full], alpha, 1.0
        )
        counts.append(count)
    return weights(module), counts


@pytest.mark.parametrize("full", ["recomputed", "reduced"])
def test_stream_ends_where_a_plain_loop_ends(full: str, tmp_path: Path) -> None:
    """No step is trained in a request; the second one sees what was learned in between."""
    callback = method(tmp_path, full=full)
    found = fit_stream(tmp_path, [callback], stream=stream())
    expected, counts = plain_loop(full=full)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert callback.num_dampened == counts[1] > 0 < counts[0]
    assert [record.steps for record in callback.ledger.records] == [0, 0]
    assert callback.ledger.records[0].settings["full"] == full
    kept = [i for record in callback.ledger.records for i in record.influences if i.outcome == "remains"]
    assert len(kept) == (2 if full == "reduced" else 0)


def test_reduced_importances_are_others_than_recomputed_ones() -> None:
    """From the second request on, because the weights moved since."""
    recomputed, reduced = plain_loop()[0], plain_loop(full="reduced")[0]
    assert (recomputed - reduced).abs().max() > 1e-3


def test_infinite_alpha_leaves_the_stream_as_it_is(tmp_path: Path) -> None:
    """Up to the optimizer's fresh start."""
    found = fit_stream(tmp_path, [method(tmp_path, alpha=float("inf"))], stream=stream())
    expected, counts = plain_loop(alpha=float("inf"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert counts == [0, 0]
    assert (found - plain_loop()[0]).abs().max() > 1e-2


@pytest.mark.parametrize("importance", ["fisher", "sensitivity"])
def test_resume_between_requests_is_exact(importance: str, tmp_path: Path) -> None:
    """With the sums of the first request, under dropout."""

    def run(name: str, ckpt_path: Path | None = None) -> Tensor:
        saver = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callback = method(tmp_path / name, full="reduced", importance=importance)
        module = ToyModule(dropout=0.3)
        return fit_stream(tmp_path, [callback, saver], module=module, stream=stream(), ckpt_path=ckpt_path)

    straight = run("straight")
    path = tmp_path / "straight" / "step=8.ckpt"
    state = torch.load(path, weights_only=False)["callbacks"]
    sums = next(value["sums"] for value in state.values() if "sums" in value)
    assert all(bool(value.any()) for value in sums.values())
    assert torch.equal(run("resumed", path), straight)


def test_sampled_retained_rows_stand_for_the_others(module: ToyModule, tmp_path: Path) -> None:
    """Of 42 equal ones any 4 say as much as all of them."""
    inputs, labels = toy_data().tensors
    rows = FORGOTTEN + [3] * 42
    found = []
    for n_samples in (None, 4):
        edited, root = copy.deepcopy(module), tmp_path / str(n_samples)
        data = UnlearningDataModule(
            (inputs[rows], labels[rows]),
            (inputs, labels),
            requests=[ForgetRequest("some", rows=list(range(len(FORGOTTEN))))],
        )
        fit_stream(root, [method(root, n_samples=n_samples)], module=edited, stream=data)
        found.append(weights(edited))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[0], weights(module))


def test_loaders_of_ones_own_are_one_request(module: ToyModule, tmp_path: Path) -> None:
    """All data are the batches of an epoch; the loader gives pairs of them."""
    expected = copy.deepcopy(module)
    retained = [i for i in range(48) if i not in FORGOTTEN][:30]
    dampen_(expected, batches(FORGOTTEN, 3), batches(FORGOTTEN + retained, 8), alpha=1.2)
    inputs, labels = toy_data().tensors
    loaders = {
        name: DataLoader(TensorDataset(inputs[rows], labels[rows]), batch_size=size)
        for name, rows, size in (("forget", FORGOTTEN, 1), ("retain", retained, 5))
    }
    callback, batch = method(tmp_path), DataLoader(TensorDataset(inputs, labels))
    trainer(tmp_path, [callback], max_epochs=2).fit(module, CombinedLoader(loaders, "min_size"), batch)
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-5, atol=1e-6)
    assert callback.num_dampened > 0


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    """Nothing retained, batches of another form, settings that need identities."""
    inputs, labels = toy_data().tensors
    everything = UnlearningDataModule((inputs, labels), requests=[ForgetRequest("all", rows=list(range(48)))])
    with pytest.raises(ValueError, match="Request 'all' leaves nothing that was learned"):
        fit_stream(tmp_path, [method(tmp_path)], stream=everything)
    plain = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    with pytest.raises(ValueError, match=r"needs batches of the form \{'forget': batch, 'retain': batch\}"):
        trainer(tmp_path, [method(tmp_path)], max_epochs=1).fit(ToyModule(), plain, plain)
    with pytest.raises(
        ValueError, match=r"`SelectiveSynapticDampening\(full='reduced', n_samples=None\)` needs samples"
    ):
        trainer(tmp_path, [method(tmp_path, full="reduced")], max_epochs=1).fit(ToyModule(), plain, plain)
    with pytest.raises(ValueError, match="`full` must be one of 'recomputed', 'reduced', got 'none'"):
        SelectiveSynapticDampening(full="none")
    with pytest.raises(ValueError, match="`n_samples` must be an integer of at least 1, got 0"):
        SelectiveSynapticDampening(n_samples=0)
    with pytest.raises(ValueError, match="`alpha` must be above 0, got -1"):
        SelectiveSynapticDampening(-1)


def test_footprint_is_that_of_the_sums(module: ToyModule, tmp_path: Path) -> None:
    """Four bytes for each parameter, only where they are kept."""
    size = 4 * sum(p.numel() for p in module.parameters())
    assert method(tmp_path).footprint(None, module, None).device == 0
    assert method(tmp_path, full="reduced").footprint(None, module, None).device == size


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def fit_on_this_rank(root: Path, strategy: str, full: str) -> tuple[Tensor, int]:
    """Fit the stream with half of each batch; return the full weights and the count."""
    chosen = "ddp" if strategy == "ddp" else FSDP2Strategy(wrap=["Linear"])
    callback = method(root, full=full)
    found = fit_stream(root, [callback], stream=stream(batch_size=4), strategy=chosen, devices=2)
    return found, callback.num_dampened


@pytest.mark.distributed
@pytest.mark.parametrize("full", ["recomputed", "reduced"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_end_where_one_process_ends(strategy: str, full: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Importances are of all ranks' samples, and a shard is dampened by its shard of them."""
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, strategy, full)
    expected, counts = plain_loop(4, 2, full=full)
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], expected, rtol=1e-5, atol=1e-6)
    assert first[1] == second[1] == counts[1]


def edit_on_this_rank(root: Path, strategy: str, devices: int, forgotten: int, retained: int) -> tuple[Any, ...]:
    """Forget the first rows of few; return the full weights, the count, and how many samples were measured."""
    chosen = FSDP2Strategy(wrap=["Linear"]) if strategy == "fsdp2" else strategy
    inputs, labels = (part[: forgotten + retained] for part in toy_data().tensors)
    requests = [ForgetRequest("few", rows=list(range(forgotten)))]
    data = UnlearningDataModule((inputs, labels), (inputs, labels), requests=requests, batch_size=2)
    callback = method(root)
    found = fit_stream(root, [callback], module=ToyModule(), stream=data, strategy=chosen, devices=devices)
    before = callback.ledger.records[0].before
    return found, callback.num_dampened, before["forget/samples"], before["retain/samples"]


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    """Three processes."""
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def check_counts_alike(ranks: Ranks, root: Path, strategy: str, forgotten: int, retained: int) -> None:
    """Check that all ranks end where the function ends on one process."""
    expected, everything = ToyModule(), list(range(forgotten + retained))
    count = dampen_(expected, batches(everything[:forgotten], 8), batches(everything, 8), alpha=1.2)
    assert count > 0
    for found, *counts in ranks.run(edit_on_this_rank, root, strategy, ranks.world_size, forgotten, retained):
        torch.testing.assert_close(found, weights(expected), rtol=1e-5, atol=1e-6)
        # `method` measures four samples of a set at most
        assert counts == [count, min(forgotten, 4), min(retained, 4)]


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "forgotten", "retained"), [("ddp", 1, 5), ("fsdp2", 5, 7)])
def test_every_sample_counts_alike_on_two_ranks(
    strategy: str, forgotten: int, retained: int, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Numbers that ranks and batches do not divide: a mean over samples, as on one process."""
    check_counts_alike(two_ranks, tmp_path, strategy, forgotten, retained)


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "forgotten", "retained"), [("fsdp2", 2, 7), ("ddp", 4, 2)])
def test_every_sample_counts_alike_on_more_ranks_than_samples(
    strategy: str, forgotten: int, retained: int, three_ranks: Ranks, tmp_path: Path
) -> None:
    """Two samples on three ranks, to forget or retained: none weighs double."""
    check_counts_alike(three_ranks, tmp_path, strategy, forgotten, retained)
