"""Serving requests by training: what runs, on what, and what is left behind."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_cl import EWC
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.core.task import Task
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.unlearning import NPO, PDU, RMU, GradientAscent, Ledger, SelectiveSynapticDampening, Unlearn
from toys import LoraToy, ToyModule, toy_data, toy_stream, trainer, weights

CLASS_0 = ForgetRequest("class 0", classes=[0], after=1)
TWO_ROWS = ForgetRequest("two rows", rows=[1, 3])


def serve(
    root: Path, unlearn: Unlearn, module: Any = None, requests: list[ForgetRequest] | None = None, **settings: Any
) -> Tensor:
    """Learn two tasks and serve requests between and behind them; return the final weights."""
    stream = toy_stream(requests=requests or [CLASS_0, TWO_ROWS], epochs_per_request=3)
    callbacks = [unlearn, *settings.pop("callbacks", [])]
    ckpt_path = settings.pop("ckpt_path", None)
    module = module or ToyModule()
    trainer(root, callbacks, **settings).fit(module, datamodule=stream, ckpt_path=ckpt_path)
    return weights(module)


def test_a_step_that_a_scaler_skips_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    """The multiplier of PDU moves by the retain loss of the step that was taken, alone."""
    terms: list[Tensor] = []

    class Weighs(PDU):
        seen: ClassVar[list[tuple[int, float]]] = []

        def weigh_retain(self, weight: float, term: Tensor) -> Tensor:
            terms.append(term.detach())
            return super().weigh_retain(weight, term)

        def after_step(self, retain_loss: float) -> None:
            self.seen.append((len(terms), retain_loss))

    # a scale near the limit of float16, which grows after every step until one is skipped
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1))
    loss = Weighs(0.5)
    serve(tmp_path, Unlearn(loss), requests=[CLASS_0], plugins=[plugin])
    assert 0 < len(loss.seen) < len(terms)
    for steps, retain_loss in loss.seen:
        assert retain_loss == pytest.approx(float(terms[steps - 1]))


def test_the_ledger_says_what_was_done(tmp_path: Path) -> None:
    """Two requests, two records in a file, with what was measured before and after and of whom."""
    unlearn = Unlearn(NPO(beta=0.5), retain="kl", seed=4)
    serve(tmp_path, unlearn)
    first, second = Ledger.read(tmp_path / "requests.jsonl").records
    assert (first.name, second.name) == ("class 0", "two rows")
    assert (first.ids, first.num_ids) == ((toy_data().tensors[1] == 0).nonzero().flatten().tolist(), 12)
    assert (first.method, first.settings["method"], first.settings["retain"]) == (
        "npo",
        {"class": "NPO", "beta": 0.5},
        "kl",
    )
    assert (first.steps, second.steps, first.stopped) == (6, 3, None)
    assert first.seed != second.seed
    assert first.reference_hash != second.reference_hash
    assert len(first.weights_hash) == 64
    assert first.after["forget/probability"] < first.before["forget/probability"] - 0.02
    assert {"retain/accuracy", "holdout/probability", "forget/membership_auc"} <= first.after.keys()
    assert "request:class 0/probability" in second.after
    assert "request:class 0/probability" not in first.after
    assert first.started <= first.ended <= second.started


def test_measured_as_computed_by_hand(tmp_path: Path) -> None:
    """Probability and accuracy of the forgotten and of the held out, by the module's own scores."""

    class Probe(Unlearn):
        def serve_start(self, trainer: Any, pl_module: Any, task: Task) -> None:
            super().serve_start(trainer, pl_module, task)
            with torch.no_grad():
                scores = pl_module(toy_data().tensors[0][[1, 3]])
            self.by_hand = scores.softmax(-1)[range(2), toy_data().tensors[1][[1, 3]]].mean()

    unlearn = Probe("npo")
    serve(tmp_path, unlearn, requests=[TWO_ROWS])
    record = unlearn.ledger.records[0]
    assert record.before["forget/probability"] == pytest.approx(float(unlearn.by_hand), rel=1e-5)


@pytest.mark.parametrize("policy", ["copy", "cached_scores"])
def test_reference_policies_agree(policy: Any, tmp_path: Path) -> None:
    """A copy of the weights and one number for each sequence are the same reference."""
    automatic = Unlearn("npo")
    expected = serve(tmp_path / "auto", automatic)
    found = serve(tmp_path / policy, Unlearn("npo", reference=policy))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert automatic._choose(has_ids=True) == "cached_scores"


def test_adapters_off_are_the_original_model(tmp_path: Path) -> None:
    """Where nothing was learned by the adapters yet, the module without them is the one at the request's start."""

    def run(name: str, **settings: Any) -> Tensor:
        data = UnlearningDataModule(toy_data(), batch_size=8, epochs_per_request=3, requests=[CLASS_0])
        module = LoraToy()
        trainer(tmp_path / name, [Unlearn("npo", **settings)]).fit(module, datamodule=data)
        return weights(module)

    without_copy = run("off", reference="peft_disabled", anchor="original")
    torch.testing.assert_close(without_copy, run("copy", reference="copy"), rtol=0, atol=1e-6)


class Headed(LoraToy):
    """Adapters in the first layer, and a head that is trained whole, as PEFT keeps it or by itself."""

    def __init__(self, *, by_peft: bool) -> None:
        super().__init__(learning_rate=0.02)
        network = ToyModule().model
        saved = ["3"] if by_peft else None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = get_peft_model(network, LoraConfig(r=2, target_modules=["0"], modules_to_save=saved))
        if not by_peft:
            self.model.base_model.model[3].requires_grad_(True)


def test_a_head_that_trains_beside_the_adapters_is_no_original(tmp_path: Path) -> None:
    """It is refused before a step, for it would move the reference; one that PEFT keeps is switched off with them."""

    def run(name: str, module: Any, **settings: Any) -> Tensor:
        data = UnlearningDataModule(toy_data(), batch_size=8, epochs_per_request=3, requests=[CLASS_0])
        trainer(tmp_path / name, [Unlearn("npo", **settings)]).fit(module, datamodule=data)
        return weights(module)

    off: dict[str, Any] = {"reference": "peft_disabled", "anchor": "original"}
    found = run("off", Headed(by_peft=True), **off)
    torch.testing.assert_close(found, run("copy", Headed(by_peft=True), reference="copy"), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"'model.base_model.model.3.bias'\] train beside them: the reference would"):
        run("beside", Headed(by_peft=False), **off)
    biased = LoraToy()
    biased.model.base_model.model[0].base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model.0.base_layer.bias'\] train beside them"):
        run("bias", biased, **off)


def test_the_original_model_stays_the_reference(tmp_path: Path) -> None:
    """By default the second request is held against what the first one left; `original` keeps the first one's."""
    kept, renewed = (Unlearn("undial", reference="copy", anchor=anchor) for anchor in ("original", "request_start"))
    serve(tmp_path / "kept", kept)
    serve(tmp_path / "renewed", renewed)
    first, second = (record.reference_hash for record in kept.ledger.records)
    assert first == second
    first, second = (record.reference_hash for record in renewed.ledger.records)
    assert first != second
    assert [i.state for i in kept.ledger.records[0].influences if i.owner == "Unlearn"] == [
        "the copy of the original model"
    ]
    assert not renewed._reference.keeps_weights


def test_optimizers_begin_anew_at_both_ends(tmp_path: Path) -> None:
    """Momentum of learning does not move a request, nor the momentum of an ascent what is learned next."""

    class Moments(Unlearn):
        seen: list[float]

        def look(self, trainer: Any) -> None:
            state = trainer.optimizers[0].state
            self.seen.append(max((float(s["momentum_buffer"].abs().max()) for s in state.values()), default=0.0))

        def serve_start(self, trainer: Any, pl_module: Any, task: Task) -> None:
            super().serve_start(trainer, pl_module, task)
            self.look(trainer)

        def on_task_end(self, trainer: Any, pl_module: Any, task: Task) -> None:
            self.look(trainer)
            super().on_task_end(trainer, pl_module, task)
            self.look(trainer)

    unlearn = Moments("npo")
    unlearn.seen = []
    serve(tmp_path, unlearn, requests=[CLASS_0])
    start, before_end, end = unlearn.seen
    assert (start, end) == (0.0, 0.0)
    assert before_end > 0


class Normalised(ToyModule):
    """The toy module with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.model.insert(1, nn.BatchNorm1d(8))


def test_batch_statistics_stand_still(tmp_path: Path) -> None:
    """Within a request; before and after it they move."""
    module = Normalised()
    seen: list[Tensor] = []

    class Watch(Unlearn):
        def on_task_start(self, trainer: Any, pl_module: Any, task: Task) -> None:
            seen.append(module.model[1].running_mean.clone())
            super().on_task_start(trainer, pl_module, task)

        def on_task_end(self, trainer: Any, pl_module: Any, task: Task) -> None:
            super().on_task_end(trainer, pl_module, task)
            seen.append(module.model[1].running_mean.clone())
            assert module.model[1].training

    serve(tmp_path, Watch("npo"), module, requests=[CLASS_0])
    assert torch.equal(*seen)
    assert not torch.equal(module.model[1].running_mean, seen[1])


def test_the_floor_ends_a_request(tmp_path: Path) -> None:
    """An ascent without a bound would destroy the model; it ends early, says why, and the stream goes on."""
    settings: dict[str, Any] = {"retain": None, "utility_every": 1, "forget_weight": 20.0}
    free = Unlearn(GradientAscent(bound=None), **settings)
    serve(tmp_path / "free", free, requests=[TWO_ROWS])
    floored = Unlearn(GradientAscent(bound=None), utility_floor=0.9, **settings)
    serve(tmp_path / "floored", floored, requests=[TWO_ROWS])
    record = floored.ledger.records[0]
    assert record.stopped is not None
    assert record.stopped.endswith(f"below 0.9 of {record.before['retain/probability']:.3g}")
    assert 0 < record.steps < free.ledger.records[0].steps
    assert floored.ended_tasks == {"learn": 2, "forget": 1}


@pytest.mark.filterwarnings("default:A request ended, and the utility had fallen")
def test_a_short_request_that_ends_below_the_floor_says_so(tmp_path: Path) -> None:
    """Its last step has a look in any case; one above the floor has nothing to say."""
    settings: dict[str, Any] = {"retain": None, "utility_floor": 0.9, "utility_every": 1000}
    late = Unlearn(GradientAscent(bound=None), forget_weight=20.0, **settings)
    with warnings.catch_warnings(record=True) as told:
        serve(tmp_path / "late", late, requests=[TWO_ROWS])
    assert any("lower `utility_every`" in str(warning.message) for warning in told)
    record = late.ledger.records[0]
    assert record.stopped is not None
    assert record.stopped.startswith(f"after {record.steps} steps")
    gentle = Unlearn(GradientAscent(bound=None), forget_weight=1e-6, **settings)
    serve(tmp_path / "gentle", gentle, requests=[TWO_ROWS])
    assert gentle.ledger.records[0].stopped is None


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize(("step", "served"), [(3, 0), (6, 0), (8, 0), (11, 0), (12, 1), (15, 1), (18, 1), (20, 1)])
@pytest.mark.parametrize("method", ["undial", "npo"])
def test_resumes_to_the_same_bits(method: str, step: int, served: int, tmp_path: Path) -> None:
    """Before a request, at its boundaries, inside it, behind it; and nothing is served twice."""
    settings: dict[str, Any] = {"utility_floor": 0.01, "utility_every": 2}
    straight = Unlearn(method, **settings)
    expected = serve(tmp_path / "a", straight, ToyModule(dropout=0.3), callbacks=[saver(tmp_path / "saved")])
    resumed = Unlearn(method, **settings)
    path = tmp_path / "saved" / f"step={step}.ckpt"
    saved = torch.load(path, weights_only=False)["callbacks"][resumed.state_key]
    assert len(saved["ledger"]) == served
    callbacks = [saver(tmp_path / "saved")]
    found = serve(tmp_path / "b", resumed, ToyModule(dropout=0.3), callbacks=callbacks, ckpt_path=path)
    assert torch.equal(found, expected)
    hashes = [[record.weights_hash for record in run.ledger.records] for run in (straight, resumed)]
    assert hashes[0] == hashes[1]


@pytest.mark.filterwarnings("ignore:Request 'two rows' was served on")
def test_a_served_request_is_left_out(tmp_path: Path) -> None:
    """By the ledger of an earlier run; one of that name for other samples is an error."""
    ledger = tmp_path / "model.jsonl"
    serve(tmp_path / "a", Unlearn("npo", ledger_file=str(ledger)), requests=[TWO_ROWS])
    again = Unlearn("npo", ledger_file=str(ledger))
    without = serve(tmp_path / "b", again, requests=[TWO_ROWS])
    assert len(Ledger.read(ledger)) == 1
    torch.testing.assert_close(without, _learned(tmp_path / "c"), rtol=0, atol=0)
    other = ForgetRequest("two rows", rows=[1, 2])
    with pytest.raises(ValueError, match="was served for other samples"):
        serve(tmp_path / "d", Unlearn("npo", ledger_file=str(ledger)), requests=[other])


def _learned(root: Path) -> Tensor:
    module = ToyModule()
    trainer(root).fit(module, datamodule=toy_stream())
    return weights(module)


def test_a_ledger_in_the_way(tmp_path: Path) -> None:
    """The default file of an earlier run in the same folder is no licence to leave requests out."""
    serve(tmp_path, Unlearn("npo"))
    with pytest.raises(ValueError, match="holds the ledger of an earlier run"):
        serve(tmp_path, Unlearn("npo"))


class Unevaluated(ToyModule):
    """The toy module without a validation step, which Lightning would miss the data of."""

    validation_step = LightningModule.validation_step


def test_loaders_of_ones_own(tmp_path: Path) -> None:
    """A fit on a dict of loaders is one request; the loss is that of the two batches."""
    inputs, labels = toy_data().tensors
    loaders = {
        "forget": DataLoader([(inputs[i], labels[i]) for i in range(4)], batch_size=4),
        "retain": DataLoader([(inputs[i], labels[i]) for i in range(8, 12)], batch_size=4),
    }
    module, plain = Unevaluated(), ToyModule()
    unlearn = Unlearn(GradientAscent(bound=None), retain_weight=0.5)
    trainer(tmp_path, [unlearn], max_epochs=1).fit(module, loaders)
    optimizer = plain.configure_optimizers()
    loss = 0.5 * cross_entropy(plain(inputs[8:12]), labels[8:12]) - cross_entropy(plain(inputs[:4]), labels[:4])
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)
    assert [record.name for record in unlearn.ledger.records] == ["fit 1"]
    alone = Unlearn(GradientAscent(bound=None), retain=None)
    trainer(tmp_path / "alone", [alone], max_epochs=1).fit(Unevaluated(), loaders["forget"])
    with pytest.raises(ValueError, match="'retain': batch"):
        trainer(tmp_path / "no", [Unlearn("simnpo")], max_epochs=1).fit(Unevaluated(), loaders["forget"])


def test_learning_methods_rest(tmp_path: Path) -> None:
    """EWC's penalty would pull what is forgotten back: until the request ends, weights are those without it."""

    class Watch(Unlearn):
        def serve_end(self, trainer: Any, pl_module: Any, task: Task) -> None:
            self.forgotten = weights(pl_module)
            super().serve_end(trainer, pl_module, task)

    request = ForgetRequest("two rows", rows=[1, 3], after=1)
    alone, beside = Watch("npo"), Watch("npo")
    expected = serve(tmp_path / "a", alone, requests=[request])
    found = serve(tmp_path / "b", beside, requests=[request], callbacks=[EWC(1000.0)])
    assert torch.equal(alone.forgotten, beside.forgotten)
    assert (found - expected).abs().max() > 1e-3


def test_picklable(tmp_path: Path) -> None:
    """After a fit, as callbacks are."""
    unlearn = Unlearn("npo")
    serve(tmp_path, unlearn)
    assert len(pickle.loads(pickle.dumps(unlearn)).ledger) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "nothing"}, "`method` must be a `ForgetLoss` or one of"),
        ({"method": "rmu"}, "has settings without defaults"),
        ({"retain": "all"}, "`retain` must be one of"),
        ({"retain": "own"}, "is for methods with a retain term of their own"),
        ({"forget_weight": 0.0}, "`forget_weight`"),
        ({"retain_weight": -1.0}, "`retain_weight`"),
        ({"utility_floor": 1.5}, "`utility_floor` must be above 0 and below 1"),
        ({"utility_every": 0}, "`utility_every`"),
        ({"method": "simnpo", "reference": "copy"}, "keeps a reference model that neither"),
        ({"method": "undial", "reference": "cached_scores"}, "keeps one number for each sequence"),
        ({"reference": "module_prefix"}, "runs the module up to a layer"),
        ({"reference": "peft_disabled"}, "set `anchor='original'`"),
        ({"reference": "cached_scores", "anchor": "original"}, "set `anchor='request_start'`"),
        ({"measure_samples": 0}, "`measure_samples`"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_settings_at_odds(settings: dict[str, Any], message: str) -> None:
    """Each is refused when the callback is made, with the way out."""
    with pytest.raises(ValueError, match=message):
        Unlearn(**settings)


def test_refused_before_the_first_step(tmp_path: Path) -> None:
    """Two that serve, nothing retained, no adapters to leave out, scores that are not found by identity."""
    with pytest.raises(ValueError, match="would each serve the requests"):
        serve(tmp_path / "a", Unlearn("npo"), callbacks=[SelectiveSynapticDampening()])
    everything = ForgetRequest("all", rows=list(range(48)))
    with pytest.raises(ValueError, match="leaves none of what was learned"):
        serve(tmp_path / "b", Unlearn("npo"), requests=[everything])
    with pytest.raises(ValueError, match="Use 'auto'"):
        serve(tmp_path / "c", Unlearn("npo", reference="peft_disabled", anchor="original"))
    loaders = {"forget": DataLoader(toy_data(), batch_size=8), "retain": DataLoader(toy_data(), batch_size=8)}
    cached = Unlearn("npo", reference="cached_scores")
    with pytest.raises(ValueError, match="looks scores up by the identities"):
        trainer(tmp_path / "d", [cached], max_epochs=1).fit(Unevaluated(), loaders)
    watched = Unlearn("simnpo", utility_floor=0.5)
    with pytest.raises(ValueError, match="there are none that can be read"):
        trainer(tmp_path / "e", [watched], max_epochs=1).fit(Unevaluated(), loaders)


def test_a_prefix_of_the_module_is_a_whole_reference(tmp_path: Path) -> None:
    """RMU needs the reference's activations of one layer: run up to it, the result is that of a whole copy."""

    def run(policy: Any) -> Tensor:
        method = RMU(layer="model.0", coefficient=2.0)
        unlearn = Unlearn(method, retain="own", reference=policy)
        return serve(tmp_path / policy, unlearn, requests=[CLASS_0])

    torch.testing.assert_close(run("module_prefix"), run("copy"), rtol=0, atol=0)
