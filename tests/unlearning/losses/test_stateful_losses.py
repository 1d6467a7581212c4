"""What RMU, PDU and random labels keep between steps, and what all of these losses refuse."""

from __future__ import annotations

import pickle

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy, pad

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.functional.unlearning import control_vector, kl_retain, random_labels, rmu_loss, token_nll
from lightning_cl.unlearning import CEU, PDU, RMU, UNDIAL, MaximumEntropy, Outputs, RandomLabel
from lightning_cl.unlearning.reading import OutputReader


def _activations(width=4):
    return Outputs(activations=torch.randn(2, 3, width), mask=torch.tensor([[True, True, False], [True] * 3]))


def test_rmu_draws_a_point_for_each_request_and_keeps_it():
    """From the request's seed; a resumed loss steers to the same point, even where the seed of another one is set."""
    loss, batch = RMU("layer", coefficient=6.5), _activations()
    loss.start(11)
    first = loss(batch, None)
    torch.testing.assert_close(loss.state_dict()["control"], control_vector(4, 6.5, 11))
    resumed = RMU("layer", coefficient=6.5)
    resumed.load_state_dict(pickle.loads(pickle.dumps(loss.state_dict())))
    assert torch.equal(resumed(batch, None), first)
    loss.start(12)
    assert loss(batch, None) != first


def test_rmu_that_resumes_before_its_first_step_draws_the_same():
    """The point is drawn when the width is known; until then the seed is the state."""
    loss, batch = RMU("layer"), _activations()
    loss.start(11)
    resumed = RMU("layer")
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(batch, None), loss(batch, None))


def test_rmu_reads_positions_by_mask_or_by_labels():
    """A prompt is attended but not supervised; labels stand where their activations are."""
    batch = _activations()
    batch.labels = torch.tensor([[-100, 3, -100], [-100, 1, 2]])
    attended, supervised = RMU("layer"), RMU("layer", positions="supervised")
    for loss in (attended, supervised):
        loss.start(0)
    control = control_vector(4, 20.0, 0)
    h = batch.activations
    expected = ((h[0, :2] - control).square().mean() + (h[1] - control).square().mean()) / 2
    torch.testing.assert_close(attended(batch, None), expected)
    expected = ((h[0, 1] - control).square().mean() + (h[1, 1:] - control).square().mean()) / 2
    torch.testing.assert_close(supervised(batch, None), expected)
    reference = Outputs(activations=torch.zeros_like(h))
    expected = (h[0, :2].square().mean() + h[1].square().mean()) / 2
    torch.testing.assert_close(attended.retain_term(batch, reference), expected)


class _PositionWise(LightningModule):
    """Holds the scores of a position against the label of the same position."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def training_step(self, batch, batch_idx=0):
        self.scores = self.head(self.embedding(batch["input_ids"]))
        return cross_entropy(self.scores.flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("mask", [torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), None], ids=["masked", "whole"])
def test_rows_of_a_module_that_does_not_shift(mask):
    """The reader gives them a position more, which neither activations nor a mean over attended positions see."""
    torch.manual_seed(0)
    module, (tokens, labels) = _PositionWise(), torch.randint(7, (2, 2, 4))
    attended = torch.ones(2, 4) if mask is None else mask
    labels = labels.masked_fill(attended == 0, -100)
    batch = {"input_ids": tokens, "labels": labels} | ({} if mask is None else {"attention_mask": mask})
    with OutputReader(module, "Test", BatchAdapter(), "head", "embedding") as reader:
        found = reader.take(batch, module.training_step(batch))
    reference = torch.randn(2, 4, 7)
    kept = kl_retain(found.logits, pad(reference, (0, 0, 0, 1)), mask=found.mask)
    torch.testing.assert_close(kept, kl_retain(module.scores, reference, mask=mask))
    torch.testing.assert_close(
        token_nll(found.logits, found.labels, reduction="token_mean"),
        cross_entropy(module.scores.flatten(0, 1), labels.flatten()),
    )
    for positions in ("attended", "supervised"):
        loss = RMU("embedding", positions=positions)
        loss.start(0)
        control = control_vector(4, 20.0, 0)
        torch.testing.assert_close(loss(found, None), rmu_loss(module.embedding(tokens), control, attended > 0))


def test_pdu_moves_its_multiplier_after_the_warm_up():
    """By hand; a request starts with the first one again, and a resume goes on with the last."""
    loss = PDU(0.5, eta=2.0, mu=1.0, warmup_steps=1)
    term = torch.tensor(0.75)
    assert loss.weigh_retain(1.0, term) == 0.25
    assert loss.weigh_retain(2.0, term) == 0.5
    for retain_loss, multiplier in ((0.9, 1.0), (0.75, 1.5), (0.25, 1.0), (0.0, 0.0), (0.75, 0.5)):
        loss.after_step(retain_loss)
        assert loss.multiplier == pytest.approx(multiplier)
    assert loss.weigh_retain(1.0, term) == 0.125
    resumed = PDU(0.5, eta=2.0, mu=1.0, warmup_steps=1)
    resumed.load_state_dict(loss.state_dict())
    resumed.after_step(0.75)
    assert resumed.multiplier == 1.0
    loss.start(0)
    assert loss.multiplier == 1.0
    loss.after_step(0.9)
    assert loss.multiplier == 1.0


def test_random_label_is_the_cross_entropy_of_wrong_labels():
    """Of the request's seed, in every epoch the same, and of none of the classes that go."""
    logits, labels, ids = torch.randn(40, 5), torch.arange(40) % 2 + 3, torch.arange(100, 140)
    loss = RandomLabel(forgotten_classes=[3, 4])
    loss.start(9)
    wrong = random_labels(labels, ids, classes=torch.tensor([0, 1, 2]), seed=9)
    expected = token_nll(logits, wrong, reduction="token_mean")
    assert torch.equal(loss(Outputs(logits, labels, ids=ids), None), expected)
    resumed = RandomLabel(forgotten_classes=[3, 4])
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(Outputs(logits, labels, ids=ids), None), expected)
    # half a batch is half of the labels
    halves = [loss(Outputs(logits[part], labels[part], ids=ids[part]), None) for part in (slice(20), slice(20, 40))]
    torch.testing.assert_close(sum(halves) / 2, expected)


def test_random_label_draws_no_class_that_a_mask_has_closed():
    """One whose loss nobody could lower."""
    logits = torch.zeros(50, 4)
    logits[:, 3] = -1e9
    loss = RandomLabel()
    loss.start(0)
    found = loss(Outputs(logits, torch.zeros(50, dtype=torch.int64), ids=torch.arange(50)), None)
    torch.testing.assert_close(found, torch.tensor(3.0).log())


def test_random_label_needs_identities():
    """And says who gives them."""
    with pytest.raises(ValueError, match=r"`RandomLabel` .* no identities\. Fit with a `TaskStreamDataModule`"):
        RandomLabel()(Outputs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RMU("layer", coefficient=0.0), "`coefficient` must be above 0, got 0.0"),
        (lambda: RMU("layer", positions="all"), "`positions` must be one of 'attended', 'supervised', got 'all'"),
        (lambda: UNDIAL(0.0), "`beta` must be above 0, got 0.0"),
        (lambda: CEU(-1), "`skip` must be an integer of at least 0, got -1"),
        (lambda: CEU(1.5), "`skip` must be an integer of at least 0, got 1.5"),
        (lambda: PDU(0.3, eta=0.0), "`eta` must be above 0, got 0.0"),
        (lambda: PDU(0.3, mu=-1.0), "`mu` must be at least 0, got -1.0"),
        (lambda: PDU(0.3, warmup_steps=-1), "`warmup_steps` must be an integer of at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    """Each by its name."""
    with pytest.raises(ValueError, match=message):
        make()


def test_what_each_needs_is_declared():
    """The callback looks at it before the first step."""
    assert (UNDIAL.reference, CEU.reference, MaximumEntropy.reference) == ("scores", "none", "none")
    assert PDU.needs_retain
    assert RMU("model.3").layer == "model.3"
    with pytest.raises(ValueError, match=r"`RMU\(positions='supervised'\)` needs labels"):
        RMU("layer", positions="supervised")(Outputs(activations=torch.zeros(1, 2, 3)), None)
