"""L2 anchors: what they hold, from when on, and that nothing but the anchors is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_cl import SI, L2Anchor, Task
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights
from users import Manual, Texts, loader

STRENGTH = 0.8


class WithPenalty(ToyModule):
    """The toy module with the penalty around its first weights in its loss; one weight takes no part in the loss."""

    in_loss: bool = False
    fused: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.first = [p.detach().clone() for p in self.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for parameter, first in zip(self.parameters(), self.first, strict=True) if self.in_loss else ():
            loss = loss + STRENGTH / 2 * (parameter - first.to(parameter)).square().sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 5e-2, fused=True) if self.fused else super().configure_optimizers()


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "fused": {},
}
TOLERANCES = {"bf16-mixed": 2e-3, "bf16-true": 2e-2}


@pytest.mark.parametrize("name", RUNS)
def test_acts_as_a_penalty_in_the_loss(name: str, tmp_path: Path) -> None:
    """From the first step of the first fit on; the same weights, and others than without it."""
    data = toy_loaders(batch_size=6)[0]

    def run(callbacks: list[Callback], in_loss: bool) -> Tensor:
        module = WithPenalty()
        module.in_loss, module.fused = in_loss, name == "fused"
        trainer(tmp_path, callbacks, max_epochs=2, **RUNS[name]).fit(module, data, data)
        return weights(module).double()

    anchored = L2Anchor(STRENGTH, anchor="pretrained")
    held, tolerance = run([anchored], False), TOLERANCES.get(name, 1e-6)
    torch.testing.assert_close(held, run([], True), rtol=0, atol=tolerance)
    assert (held - run([], False)).abs().max() > max(1e-3, 2 * tolerance)
    kept = torch.float64 if name == "64-true" else torch.float32
    assert {anchor.dtype for anchor in anchored.anchors.values()} == {kept}


def test_nothing_is_held_before_the_first_task_ends(tmp_path: Path) -> None:
    """With `previous` the first task is plain fine-tuning; then the anchors are the weights at its end."""
    data = toy_loaders()
    ends = []
    for callbacks in ([anchored := L2Anchor(STRENGTH)], []):
        module = ToyModule()
        trainer(tmp_path, callbacks, max_epochs=1).fit(module, data[0], data[0])
        ends.append(weights(module))
    assert torch.equal(*ends)
    assert torch.equal(torch.cat([anchor.flatten() for anchor in anchored.anchors.values()]), ends[0])
    trainer(tmp_path, [anchored], max_epochs=1).fit(module := ToyModule(), data[1], data[1])
    anchors = torch.cat([anchor.flatten() for anchor in anchored.anchors.values()])
    assert torch.equal(anchors, weights(module))
    assert anchored.penalty() == 0


def test_pretrained_anchors_stay_in_later_fits_and_checkpoints(tmp_path: Path) -> None:
    """They are the weights before the first step, in the object and through a file."""
    data, first = toy_loaders()[0], weights(ToyModule())
    module, anchored = ToyModule(), L2Anchor(STRENGTH, anchor="pretrained")
    for _ in range(2):
        job = trainer(tmp_path, [anchored], max_epochs=1)
        job.fit(module, data, data)
        assert torch.equal(torch.cat([anchor.flatten() for anchor in anchored.anchors.values()]), first)
    job.save_checkpoint(tmp_path / "last.ckpt")
    later, fresh = L2Anchor(STRENGTH, anchor="pretrained"), ToyModule()
    trainer(tmp_path, [later], max_epochs=2).fit(fresh, data, data, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(torch.cat([anchor.flatten() for anchor in later.anchors.values()]), first)
    distance = (weights(fresh) - first).square().sum()
    assert later.penalty() == pytest.approx(STRENGTH / 2 * float(distance))
    assert distance > 1e-3


def test_anchors_are_all_that_is_kept(tmp_path: Path) -> None:
    """One float32 for each weight, in the state and in the plan; no ones."""
    anchored, module = L2Anchor(STRENGTH), ToyModule()
    fit_stream(tmp_path, [anchored], module=module)
    state = anchored.state_dict()
    assert {name: value.shape for name, value in state["anchors"].items()} == {
        name: p.shape for name, p in module.named_parameters()
    }
    assert not state["importance"]
    footprint = anchored.footprint(module.trainer, module, None)
    assert footprint.device == 4 * sum(p.numel() for p in module.parameters())


def test_patterns_and_frozen_weights(tmp_path: Path) -> None:
    """A head may move freely, a frozen base has no anchors, and instances stand side by side."""
    free = L2Anchor(1e4, exclude=["model.3.*"], anchor="pretrained")
    module, start = ToyModule(learning_rate=1e-4), ToyModule()
    fit_stream(tmp_path, [free], module=module)
    assert free.anchors.keys() == {"model.0.weight", "model.0.bias"}
    moved = {n: (p - q).abs().max() for (n, p), q in zip(module.named_parameters(), start.parameters(), strict=True)}
    assert moved["model.3.weight"] > 20 * moved["model.0.weight"] > 0
    frozen, adapters = ToyModule(), L2Anchor(STRENGTH)
    frozen.model[0].requires_grad_(False)
    fit_stream(tmp_path, [adapters], module=frozen)
    assert adapters.anchors.keys() == {"model.3.weight", "model.3.bias"}
    pair = [L2Anchor(STRENGTH, include=[f"model.{layer}.*"]) for layer in (0, 3)]
    assert torch.equal(fit_stream(tmp_path, pair), fit_stream(tmp_path, [L2Anchor(STRENGTH)]))


def test_what_freezes_within_the_fit_is_not_moved(tmp_path: Path) -> None:
    """The penalty gives no gradient to a frozen weight, and still holds the others."""

    class Freezing(ToyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 1:
                self.model[0].requires_grad_(False)
                self.frozen_at = self.model[0].weight.detach().clone()
                self.optimizers().zero_grad()

    anchored = L2Anchor(STRENGTH, anchor="pretrained")
    module, free, data = Freezing(), Freezing(), toy_loaders()[0]
    trainer(tmp_path, [anchored], max_epochs=2).fit(module, data, data)
    trainer(tmp_path, max_epochs=2).fit(free, data, data)
    assert torch.equal(module.model[0].weight, module.frozen_at)
    assert (module.model[3].weight - free.model[3].weight).abs().max() > 1e-3


def test_what_thaws_within_the_fit_is_named(tmp_path: Path) -> None:
    """Silence would mean an unprotected model."""

    class Thawing(ToyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.model[0].requires_grad_(True)

    module, data = Thawing(), toy_loaders()[0]
    module.model[0].requires_grad_(False)
    with pytest.raises(UserWarning, match=r"`L2Anchor` does not protect \['model.0.bias', 'model.0.weight'\]"):
        trainer(tmp_path, [L2Anchor(1.0, anchor="pretrained")], max_epochs=1).fit(module, data, data)


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    """Each holds what it steps, once; a weight that none steps stays."""

    def run(callbacks: list[Callback], in_loss: bool) -> Tensor:
        module = Manual()
        first = [p.detach().clone() for p in module.parameters()]
        stepped = [number for number, (name, _) in enumerate(module.named_parameters()) if name != "scale"]

        def loss(batch: Any) -> Tensor:
            terms = [(p - a).square().sum() for p, a in zip(module.parameters(), first, strict=True)]
            penalty = STRENGTH / 2 * sum(terms[number] for number in stepped)
            return cross_entropy(module(batch[0]), batch[1]) + (penalty if in_loss else 0)

        object.__setattr__(module, "loss", loss)
        data = loader(Manual)
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, data, data)
        return weights(module)

    held = run([L2Anchor(STRENGTH, anchor="pretrained")], False)
    torch.testing.assert_close(held, run([], True), rtol=0, atol=1e-6)
    assert (held - run([], False)).abs().max() > 1e-3


def test_batches_are_not_read(tmp_path: Path) -> None:
    """Mappings that the step takes keys from are as good as any."""
    anchored, module = L2Anchor(STRENGTH, anchor="pretrained"), Texts()
    trainer(tmp_path, [anchored], max_epochs=1).fit(module, loader(Texts), loader(Texts))
    assert anchored.penalty() > 0


def test_resume_with_another_module_is_refused(tmp_path: Path) -> None:
    """A weight without an anchor would train unprotected; `exclude` leaves a new head free."""

    class Grown(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    fit_stream(tmp_path, [anchored := L2Anchor(STRENGTH, anchor="pretrained")])
    with pytest.raises(ValueError, match=r"anchors of `L2Anchor` has no entry for \['extra.bias'.*`exclude`"):
        fit_stream(tmp_path, [anchored], module=Grown())


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    """With the name of the setting and what was given."""
    with pytest.raises(ValueError, match="`strength` must be above 0, got -1"):
        L2Anchor(-1)
    with pytest.raises(ValueError, match="`anchor` must be one of 'previous', 'pretrained', got 'first'"):
        L2Anchor(1.0, anchor="first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`exclude` pattern 'head\.\*' matches no parameter of ToyModule"):
        fit_stream(tmp_path, [L2Anchor(1.0, exclude=["head.*"])])


def test_resume_inside_the_first_task_keeps_the_first_weights(tmp_path: Path) -> None:
    """The weights of the checkpoint are not taken for the pre-trained ones."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit_stream(tmp_path, [L2Anchor(STRENGTH, anchor="pretrained"), saver])
    resumed = L2Anchor(STRENGTH, anchor="pretrained")
    again = ModelCheckpoint(tmp_path / "on", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    ended = fit_stream(tmp_path, [resumed, again], stream=toy_stream(), ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(ended, straight)
    assert torch.equal(torch.cat([anchor.flatten() for anchor in resumed.anchors.values()]), weights(ToyModule()))


class Replacing(ToyModule):
    """Puts a wider head in the place of the old one, in the optimizer too."""

    def on_task_start(self, task: Task) -> None:
        if task.index == 1:
            self.model[3] = nn.Linear(8, 6)
            self.trainer.optimizers[0].param_groups[0]["params"][2:] = list(self.model[3].parameters())


def test_a_head_in_the_place_of_an_anchored_one_is_refused(tmp_path: Path) -> None:
    """It would train without an anchor; left out, all else is held."""
    for method in (L2Anchor(3.0), SI(3.0)):
        with pytest.raises(ValueError, match=r"keeps state for 'model\.3\.weight', but another.*`exclude`"):
            fit_stream(tmp_path, [method], module=Replacing())
    held = fit_stream(tmp_path, [L2Anchor(3.0, exclude=["model.3.*"])], module=Replacing())
    assert not torch.equal(held, fit_stream(tmp_path, module=Replacing()))
