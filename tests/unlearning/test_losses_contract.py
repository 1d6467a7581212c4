"""What every forget loss owes, one row for each in `support/unlearning_rows`: a loss without a row fails here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_cl import FSDP2Strategy
from lightning_cl.cli.main import main
from lightning_cl.core.card import methods_below
from lightning_cl.unlearning import ForgetLoss, Unlearn
from ranks import Ranks
from toys import ToyModule, trainer, trainer_yaml, weights
from unlearning_contract import LossRow, TokenToy, all_rows, plain_loop, request_stream

ROWS = all_rows()
every_loss = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
# each on tokens, and on classes unless it cannot
CASES = {f"{name}-{kind}": (row, kind == "tokens") for name, row in ROWS.items() for kind in ("tokens", "classes")}
CASES = {name: (row, tokens) for name, (row, tokens) in CASES.items() if tokens or not row.tokens}
every_case = pytest.mark.parametrize(("row", "tokens"), CASES.values(), ids=CASES.keys())
# steps: 4 of each learning task, then 6 of the request, 2 for each pass, and 4
INSIDE = 11


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def fit(
    root: Path,
    row: LossRow,
    *,
    tokens: bool,
    saved: str | None = None,
    ckpt_path: Path | None = None,
    batch_size: int = 8,
    method: Any = None,
    **settings: Any,
) -> Tensor:
    """Learn, learn, forget, learn; return the final weights. With ``saved``, under dropout."""
    module = (TokenToy if tokens else ToyModule)(dropout=0.3 if saved else 0.0)
    unlearn = Unlearn(method or row.make(), retain=row.retain, ledger_file=str(root / f"{saved}.jsonl"))
    callbacks = [unlearn, *([saver(root / saved)] if saved else ())]
    stream = request_stream(tokens=tokens, batch_size=batch_size)
    trainer(root, callbacks, **settings).fit(module, datamodule=stream, ckpt_path=ckpt_path)
    return weights(module)


def test_every_loss_has_a_row() -> None:
    """A loss is what has a card."""
    assert set(methods_below(ForgetLoss).values()) == {row.method for row in ROWS.values()}


@every_case
def test_ends_where_a_plain_loop_ends(row: LossRow, tokens: bool, tmp_path: Path) -> None:
    """Learn, learn, forget, learn, with the loss written into a torch loop."""
    expected = plain_loop(row, tokens=tokens)
    torch.testing.assert_close(fit(tmp_path, row, tokens=tokens), expected, rtol=0, atol=row.tolerance)


@every_case
def test_is_not_a_no_op(row: LossRow, tokens: bool) -> None:
    """The plain loop that it ends with is far from the one without the request."""
    assert (plain_loop(row, tokens=tokens) - plain_loop(None, tokens=tokens)).abs().max() > 1e-2


@every_loss
def test_accumulates(row: LossRow, tmp_path: Path) -> None:
    """Over micro-batches of half the size, a mean of their losses."""
    expected = plain_loop(row, tokens=row.tokens, batch_size=4, accumulate=2)
    found = fit(tmp_path, row, tokens=row.tokens, batch_size=4, accumulate_grad_batches=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=row.tolerance)


@every_loss
def test_resumes_inside_the_request_to_the_same_bits(row: LossRow, tmp_path: Path) -> None:
    """With dropout, from a checkpoint read with fresh objects."""
    straight = fit(tmp_path, row, tokens=row.tokens, saved="straight")
    torch.manual_seed(999)
    path = tmp_path / "straight" / f"step={INSIDE}.ckpt"
    assert torch.equal(fit(tmp_path, row, tokens=row.tokens, saved="resumed", ckpt_path=path), straight)


@every_loss
def test_is_found_by_its_name(row: LossRow, tmp_path: Path) -> None:
    """With the settings that it has by default; one that must be given some says so."""
    name = row.method.card.name
    if any(setting.default is setting.empty for setting in inspect.signature(row.method).parameters.values()):
        with pytest.raises(ValueError, match=f"`method='{name}'` has settings without defaults"):
            Unlearn(name)
        return
    found = fit(tmp_path / "name", row, tokens=row.tokens, method=name)
    assert torch.equal(found, fit(tmp_path / "class", row, tokens=row.tokens, method=row.method()))


@every_loss
def test_built_by_the_command_line(row: LossRow, tmp_path: Path) -> None:
    """The class's signature is its YAML."""
    settings = "".join(f"\n              {name}: {value}" for name, value in row.settings.items())
    network = "unlearning_contract.TokenToy" if row.tokens else "toys.ToyModule"
    (tmp_path / "run.yaml").write_text(
        f"""
{trainer_yaml(tmp_path)}
  callbacks:
    - class_path: Unlearn
      init_args:
        retain: {"null" if row.retain is None else row.retain}
        ledger_file: {tmp_path / "requests.jsonl"}
        method:
          class_path: lightning_cl.unlearning.{row.method.__name__}
          init_args:{settings or " {}"}
model:
  class_path: {network}
data:
  class_path: UnlearningDataModule
  init_args:
    train: {{class_path: {"unlearning_contract.TokenRows" if row.tokens else "unlearning_contract.LabelledRows"}}}
    requests: [{{name: some, rows: [1, 2, 5, 6]}}]
    batch_size: 4
"""
    )
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert row.method.__name__ in (tmp_path / "requests.jsonl").read_text()


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def fit_on_this_rank(
    root: Path, name: str, strategy: str, saved: str | None = None, ckpt_path: Path | None = None
) -> Tensor:
    """Fit with half of each batch."""
    row = ROWS[name]
    layer = "PositionWise" if row.tokens else "Linear"
    unused = "_find_unused_parameters_true" if row.unused_parameters else ""
    chosen: Any = FSDP2Strategy(wrap=[layer]) if strategy == "fsdp2" else f"ddp{unused}"
    more: dict[str, Any] = {"strategy": chosen, "devices": 2, "batch_size": 4}
    return fit(root, row, tokens=row.tokens, saved=saved, ckpt_path=ckpt_path, **more)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_end_where_one_process_ends(name: str, strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Each with its half of what is forgotten, and a draw of its own of what is retained."""
    row = ROWS[name]
    expected = plain_loop(row, tokens=row.tokens, batch_size=4, world_size=2)
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, name, strategy)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0, atol=row.tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume_to_the_same_bits(name: str, strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Inside the request, with dropout."""
    straight = two_ranks.run(fit_on_this_rank, tmp_path, name, strategy, "straight")
    path = tmp_path / "straight" / f"step={INSIDE}.ckpt"
    resumed = two_ranks.run(fit_on_this_rank, tmp_path, name, strategy, "resumed", path)
    assert torch.equal(resumed[0], straight[0])
    assert torch.equal(resumed[1], straight[1])
