"""Training of new blocks only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from language import LLAMA, TokenRows, llama, token_stream
from lightning_cl import EWC, BlockExpansion, FreezeExcept, FSDP2Strategy
from lightning_cl.adapters import insert_blocks, inserted_blocks
from lightning_cl.modules import CausalLM
from ranks import Ranks
from toys import ToyModule, trainer


class Words(LightningModule):
    """A language model as users write it: built at once, trained by plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.network(**batch, labels=batch["input_ids"]).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss, batch_size=len(batch["input_ids"]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5, weight_decay=0.01)


def loader() -> DataLoader[Any]:
    """Three steps an epoch."""
    return DataLoader(TokenRows(1), batch_size=4)


def whole(module: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered."""
    named = ((name, p.detach()) for name, p in module.named_parameters())
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in named}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """By name, within a tolerance of each weight."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def plain_loop(count: int, epochs: int = 2) -> dict[str, Tensor]:
    """Torch over a network that was grown by hand."""
    module = Words()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    insert_blocks(module.network, count)
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for batch in loader():
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
    return whole(module)


def test_ends_where_a_plain_loop_ends(tmp_path: Path) -> None:
    """New blocks and what is named train; all else stays, against weight decay too."""
    module, start = Words(), whole(Words())
    method = BlockExpansion(1, trainable=["*lm_head*"])
    trainer(tmp_path, [method], max_epochs=2).fit(module, loader(), loader())
    assert_close(whole(module), plain_loop(1), 0.0)
    assert inserted_blocks(module) == ["network.model.layers.2"]
    for name, before in start.items():
        # the first two blocks are where they were
        assert torch.equal(whole(module)[name], before) == ("lm_head" not in name)
    assert all(p.requires_grad for p in module.parameters())


def test_a_second_fit_goes_on_with_the_blocks(tmp_path: Path) -> None:
    """They are inserted once, and everything else is frozen again."""
    module = Words()
    for _ in range(2):
        trainer(tmp_path, [BlockExpansion(1, trainable=["*lm_head*"])], max_epochs=1).fit(module, loader(), loader())
    assert_close(whole(module), plain_loop(1), 0.0)


def test_blocks_of_the_module_itself_are_trained(tmp_path: Path) -> None:
    """Another number of them than the callback's is left as it is."""
    module = Words()
    insert_blocks(module.network, 2)
    trainer(tmp_path, [BlockExpansion(1, trainable=["*lm_head*"])], max_epochs=2).fit(module, loader(), loader())
    assert_close(whole(module), plain_loop(2), 0.0)


class Look(Callback):
    """Keeps the first loss, and what trains and has moments."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            self.loss = outputs["loss"].detach()
            self.trains = {name for name, p in pl_module.named_parameters() if p.requires_grad}
            self.moments = len(trainer.optimizers[0].state)


def test_a_network_built_in_configure_model(tmp_path: Path) -> None:
    """The first loss is that of the network without blocks, to the bit; only new weights have moments."""
    looks = []
    for methods in ([], [BlockExpansion(2), EWC(1.0)]):
        look, module = Look(), llama()
        trainer(tmp_path, [*methods, look]).fit(module, datamodule=token_stream())
        looks.append(look)
    assert torch.equal(looks[0].loss, looks[1].loss)
    assert inserted_blocks(module) == ["network.model.layers.1", "network.model.layers.3"]
    assert looks[1].trains == {n for n, _ in module.named_parameters() if ".layers.1." in n or ".layers.3." in n}
    assert looks[1].moments == len(looks[1].trains)
    assert "configure_model" not in vars(module)


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("step", [2, 6, 8], ids=["first task", "boundary", "second task"])
def test_resumes_to_the_same_bits(step: int, tmp_path: Path) -> None:
    """A fresh module is grown before the checkpoint is loaded, for a fit and for a validation."""
    straight = llama()
    trainer(tmp_path, [BlockExpansion(1), saver(tmp_path)]).fit(straight, datamodule=token_stream())
    resumed, path = llama(), tmp_path / f"step={step}.ckpt"
    job = trainer(tmp_path, [BlockExpansion(1), saver(tmp_path / "resumed")])
    job.fit(resumed, datamodule=token_stream(), ckpt_path=path)
    assert_close(whole(resumed), whole(straight), 0.0)
    fresh = llama()
    job = trainer(tmp_path, [BlockExpansion(1), saver(tmp_path / "other")])
    job.validate(fresh, datamodule=token_stream(), ckpt_path=path, verbose=False)
    assert whole(fresh).keys() == whole(straight).keys()
    assert all(p.requires_grad for p in fresh.parameters())


class Fails(Words):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise RuntimeError("out of memory")


class Forgets(Words):
    """Its optimizer knows the parameters that were there first."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def test_an_exception_thaws_the_module(tmp_path: Path) -> None:
    """Lightning calls no teardown then."""
    module = Fails()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(tmp_path, [BlockExpansion(1)], max_epochs=1).fit(module, loader(), loader())
    assert all(p.requires_grad for p in module.parameters())


def test_what_it_cannot_serve_is_refused(tmp_path: Path) -> None:
    """With the way out."""
    for settings, message in (
        ({"count": 0}, "`count` must be an integer of at least 1, got 0"),
        ({"count": 1, "trainable": "*head"}, r"`trainable` must be a list of patterns, such as \['\*head'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            BlockExpansion(**settings)  # type: ignore[arg-type]
    for method, module, message in (
        (BlockExpansion(1), ToyModule(), r"ToyModule has no model of transformers. Call `insert_blocks\(network, 1"),
        (BlockExpansion(1, network="body"), Words(), r"`network='body'` names no submodule of Words; .*'network'"),
        (BlockExpansion(1, trainable=["head"]), Words(), "`trainable` pattern 'head' matches no parameter of Words"),
        (BlockExpansion(3), Words(), "`count=3` inserts more blocks than the 2"),
        (BlockExpansion(1), Forgets(), "are trainable, but no optimizer steps them"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, [method], max_epochs=1).fit(module, loader(), loader())
        assert all(p.requires_grad for p in module.parameters())


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


STRATEGIES: dict[str, Callable[[], Any]] = {"ddp": lambda: "ddp", "fsdp2": FSDP2Strategy}


def words_on_this_rank(root: Path, strategy: str) -> dict[str, Tensor]:
    """Train a network that was built at once with half of each batch; return all weights."""
    module, method = Words(), BlockExpansion(1, trainable=["*lm_head*"])
    fit = trainer(root, [method], strategy=STRATEGIES[strategy](), devices=2)
    fit.fit(module, datamodule=token_stream(batch_size=2))
    return whole(module)


def language_model_on_this_rank(root: Path, folder: str) -> Any:
    """Train a lazily built language model under `fsdp2`; return all weights, or the error."""
    method: Any = BlockExpansion(1) if folder == "" else FreezeExcept(["*.layers.2.*"])
    module = llama() if folder == "" else CausalLM(folder)
    try:
        trainer(root, [method], strategy=FSDP2Strategy(), devices=2).fit(module, datamodule=token_stream(batch_size=2))
    except ValueError as error:
        return str(error)
    return whole(module)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_end_where_one_process_ends(strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """The new block is a unit like the others, reduced like the others."""
    module = Words()
    trainer(tmp_path, [BlockExpansion(1, trainable=["*lm_head*"])]).fit(module, datamodule=token_stream())
    first, second = two_ranks.run(words_on_this_rank, tmp_path, strategy)
    assert_close(first, second, 0.0)
    assert_close(first, whole(module))


@pytest.mark.distributed
def test_a_language_model_under_fsdp2_wants_a_grown_checkpoint(two_ranks: Ranks, tmp_path: Path) -> None:
    """Its weights come block by block from a folder: the refusal names the way, and the way works."""
    for error in two_ranks.run(language_model_on_this_rank, tmp_path, ""):
        assert "stand on the meta device" in error
        assert "`save_pretrained`" in error
    grown = Words().network
    insert_blocks(grown, 1)
    grown.save_pretrained(tmp_path / "grown")
    module = CausalLM(str(tmp_path / "grown"))
    trainer(tmp_path, [FreezeExcept(["*.layers.2.*"])]).fit(module, datamodule=token_stream())
    first, _ = two_ranks.run(language_model_on_this_rank, tmp_path, str(tmp_path / "grown"))
    assert_close(first, whole(module), 1e-5)
    assert (whole(module)["network.model.layers.2.mlp.down_proj.weight"] != 0).any()
