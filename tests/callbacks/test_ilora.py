"""I-LoRA beyond the contract: what the slow weights are, where they compute, and on which positions."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from language import LORA, llama, token_stream
from lightning_cl import AdapterSlots, ExperienceReplay, ILoRA
from lightning_cl.core.footprint import Footprint
from toys import LoraToy, ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, weights


def test_a_vanishing_term_is_replay(tmp_path: Path) -> None:
    """With dropout: the slow forward draws no random number of the fast one's."""
    settings: dict[str, Any] = {"weight": 0.5, "batch_size": 4}
    torch.manual_seed(0)
    found = fit_stream(tmp_path, [ILoRA(12, strength=1e-30, **settings)], module=ToyModule(dropout=0.3))
    torch.manual_seed(0)
    replay = ExperienceReplay(12, mode="separate", **settings)
    assert torch.equal(found, fit_stream(tmp_path, [replay], module=ToyModule(dropout=0.3)))


def test_the_term_holds_features_near_the_slow_ones(tmp_path: Path) -> None:
    """The stronger, the nearer fast and slow weights end."""
    distances = []
    for strength in (0.01, 0.3, 3.0):
        fast = fit_stream(tmp_path, [ILoRA(12, decay=0.95, strength=strength, at_end="fast")])
        slow = fit_stream(tmp_path, [ILoRA(12, decay=0.95, strength=strength, at_end="slow")])
        distances.append((fast - slow).norm())
    assert distances[0] > distances[1] > distances[2] > 0


def test_evaluates_with_the_slow_weights(tmp_path: Path) -> None:
    """In every validation after the first step the weights are others than those that train."""
    seen: list[bool] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.fast = weights(pl_module)

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step:
                seen.append(torch.equal(weights(pl_module), self.before))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.before = weights(pl_module)

    method = ILoRA(12, decay=0.9)
    end = fit_stream(tmp_path, [method, Look()])
    assert seen
    assert not any(seen)
    module = ToyModule()
    method.load_slow_weights(module)
    assert not torch.equal(weights(module), end)


def test_slow_weights_of_adapters_only(tmp_path: Path) -> None:
    """What is frozen is shared: the slow copy holds the factors of LoRA."""
    method, module = ILoRA(12), LoraToy()
    fit_stream(tmp_path, [method], module=module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(method.state_dict()["slow"]["weights"]) == trained
    assert all("lora_" in name for name in trained)


class Look(Callback):
    """Keeps the features of both kinds, and which positions counted, of the first draw of unlike lengths."""

    def __init__(self, method: ILoRA) -> None:
        self.method = method
        self.found: list[tuple[Tensor, float]] = []
        own = method._distance

        def distance(fast: Tensor, slow: Tensor) -> Tensor:
            value = own(fast, slow)
            assert method._positions is not None
            self.found.append((method._positions, float(value.detach())))
            where = method._positions.bool()
            torch.testing.assert_close(value, (fast - slow)[where].square().mean())
            assert not slow.requires_grad
            assert fast.requires_grad
            return value

        method._distance = distance  # type: ignore[method-assign]


def test_a_language_model_with_lora(tmp_path: Path) -> None:
    """Two blocks for each draw; positions of the padding count in neither the term nor the loss."""
    method, module = ILoRA(8, decay=0.9), llama(adapter=LORA)
    look = Look(method)
    trainer(tmp_path, [method]).fit(module, datamodule=token_stream(padded=True))
    assert len(look.found) % 2 == 0
    assert any(not positions.all() for positions, _ in look.found)
    # LoRA starts from zero, and slow weights from those of the fast
    assert max(value for _, value in look.found[2:]) > 0
    assert set(method.state_dict()["slow"]["weights"]) == {n for n, p in module.named_parameters() if p.requires_grad}


class Padded(ToyModule):
    """Labels for each position, of unlike numbers of positions in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[Tensor] = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing is measured."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.labels.append(batch["labels"])
        return cross_entropy(self(batch["inputs"]).flatten(0, 1), batch["labels"].flatten())


def test_labels_of_rehearsed_padding_do_not_count(tmp_path: Path) -> None:
    """Short sequences that are drawn beside longer ones get labels of -100, which no loss counts."""
    inputs, labels = toy_data().tensors
    lengths = [2, 4, 3, 1]
    data = [
        {"inputs": inputs[i : i + n], "labels": labels[i : i + n], "attention_mask": torch.ones(n, dtype=torch.long)}
        for i, n in enumerate(lengths)
    ]
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    module = Padded()
    trainer(tmp_path, [ILoRA(8, batch_size=4)], max_epochs=2).fit(module, loader, loader)
    whole = [batch for batch in module.labels if len(batch) == 4]
    assert whole
    for batch in whole:
        assert sorted((batch != -100).sum(1).tolist()) == sorted(lengths)


def test_survives_pickling_after_a_fit(tmp_path: Path) -> None:
    """Hooks and graphs are gone, and a second fit begins as the first."""
    method, module = ILoRA(12), ToyModule()
    for loader in toy_loaders():
        trainer(tmp_path, [method], max_epochs=1).fit(module, loader, loader)
        assert not any(part._forward_hooks for part in module.modules())
        method = pickle.loads(pickle.dumps(method))


def test_counts_what_it_keeps(tmp_path: Path) -> None:
    """A float32 for each weight beside the memory."""
    method, plain, job = ILoRA(12), ExperienceReplay(12, mode="separate"), trainer(tmp_path)
    module, batch = ToyModule(), (torch.zeros(8, 6), torch.zeros(8, dtype=torch.int64))
    found: list[Footprint] = [each.footprint(job, module, batch) for each in (method, plain)]
    assert found[0].device - found[1].device == 4 * sum(p.numel() for p in module.parameters())
    assert found[0].host == found[1].host > 0


class Twice(ToyModule):
    """Its step calls the network on two views of the samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]) + self(2 * batch[0]), batch[1])


def test_every_call_of_a_block_is_compared(tmp_path: Path) -> None:
    """The mean over the calls, and not the last one alone."""
    method = ILoRA(12, decay=0.9, blocks=["model.0"])
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            own = method._of_block

            def of_block(fast: list[Tensor], slow: list[Tensor]) -> Tensor:
                value = own(fast, slow)
                assert len(fast) == len(slow) == 2
                parts = [(a - b).square().mean().detach() for a, b in zip(fast, slow, strict=True)]
                found.append((value.detach(), *parts))
                return value

            method._of_block = of_block  # type: ignore[method-assign]

    fit_stream(tmp_path, [method, Look()], module=Twice())
    for value, first, second in found:
        torch.testing.assert_close(value, (first + second) / 2)
    assert any(second > 1.5 * first > 0 for _, first, second in found)


class Bare(ToyModule):
    """A layer that no step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_what_it_cannot_serve_is_refused(tmp_path: Path) -> None:
    """With the way out."""
    for settings, message in (
        ({"decay": 1.0}, "`decay` must be above 0 and below 1, got 1.0"),
        ({"strength": 0.0}, "`strength` must be above 0, got 0.0"),
        ({"weight": -1.0}, "`weight` must be above 0, got -1.0"),
        ({"at_end": "both"}, "`at_end` must be one of 'fast', 'slow', got 'both'"),
    ):
        with pytest.raises(ValueError, match=message):
            ILoRA(12, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`blocks` pattern 'encoder' matches no module"):
        fit_stream(tmp_path, [ILoRA(12, blocks=["encoder"])])
    with pytest.raises(ValueError, match="The submodule 'unused' of Bare was not called in its step"):
        fit_stream(tmp_path, [ILoRA(12)], module=Bare())
    fit_stream(tmp_path, [ILoRA(12, blocks=["model.*"])], module=Bare())
    with pytest.raises(ValueError, match=r"ILoRA.*AdapterSlots|AdapterSlots.*ILoRA"):
        fit_stream(tmp_path, [AdapterSlots(8), ILoRA(12)], module=LoraToy(), stream=toy_stream())
