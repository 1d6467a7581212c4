"""Forgetting by training: a forget loss and a retain term in the place of the module's own loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from lightning_cl.core.capture import forward_step, metrics_kept, silenced
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_automatic_optimization, check_choice, check_positive
from lightning_cl.core.distributed import sum_over_ranks_, world_size
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence, RequestStream
from lightning_cl.core.state import local, zero_of_parameters
from lightning_cl.core.step import loss_of
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.unlearning import RetainPositions, kl_retain
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs
from lightning_cl.unlearning.frozen_statistics import FrozenStatistics
from lightning_cl.unlearning.reading import ids_of_step, split_alternate
from lightning_cl.unlearning.reference import Anchor, Reference, ReferencePolicy, choose_policy, sequence_sums
from lightning_cl.unlearning.request_callback import RequestCallback, RequestSettings
from lightning_cl.unlearning.utility import UtilityFloor

__all__ = ["RetainTerm", "Unlearn"]

RetainTerm = Literal["nll", "kl", "own"]


class Unlearn(RequestCallback):
    r"""Serve requests to forget by training with a forget loss and a retain term.

    In a request's steps the module's own loss gives way to

    .. math:: L = \gamma \, L_\text{forget} + \alpha \, L_\text{retain},

    each a mean over its own batch of this rank. The module's ``training_step`` runs unchanged on the batch to forget,
    where its class scores are read, and a second time on the retained batch, without its logs. The statistics of batch
    normalisation stand still: a batch of what is to be forgotten says nothing of the data that remain.

    Args:
        method: The forget loss, or its name: ``"npo"``, ``"simnpo"``, ``"gradient-ascent"``, ...
        retain: The retain term: ``"nll"``, the module's own loss on the retained batch; ``"kl"``, the divergence of its
            scores there from those of the reference; ``"own"``, a term of the method's own (of RMU a
            distance of activations); ``None`` for none.
        forget_weight: :math:`\gamma`, above 0.
        retain_weight: :math:`\alpha`, above 0.
        kl_positions: For ``retain="kl"``, the positions that count: ``"attended"`` by the attention mask,
            ``"supervised"`` or ``"all"``. Of a classifier's scores, [B, C], every row counts.
        utility_floor: End the request as soon as the mean probability of retained samples falls below this share of
            what it was at the start, above 0 and below 1; ``None`` never does.
        utility_every: Optimizer steps between two looks at that, each a forward over ``measure_samples`` samples; the
            last step of a request has one in any case, and a warning if it is too late.
        reference: How the reference model is kept, where one is needed: ``"copy"`` of the trainable weights;
            ``"peft_disabled"``, the module without its adapters; ``"cached_scores"``, one number for each sequence
            and for its alternate, computed once; ``"module_prefix"``, a copy run up to the layer of the method.
            ``"auto"`` takes the cheapest.
        anchor: The model that is the reference: the present request's at its start, or the ``"original"``, at the start
            of the first request. With ``"peft_disabled"`` it is ``"original"``.
        settings: Those of :class:`RequestSettings`.

    Raises:
        ValueError: For a setting out of range, or settings at odds; at the start of a fit under manual optimization or
            with several optimizers; at a request's start if nothing is retained that ``retain`` needs.

    Example:
        >>> from lightning_cl.unlearning import NPO
        >>> Unlearn(NPO(beta=0.1), retain="kl").method.beta
        0.1
        >>> type(Unlearn("simnpo").method).__name__
        'SimNPO'
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="unlearn",
        family="unlearning",
        paper="Maini et al. 2024, arXiv:2401.06121; the method is a forget loss",
        needs="a stream with requests; class scores; automatic optimization",
        state="the ledger; at most a copy of the trainable parameters",
    )

    def __init__(
        self,
        method: ForgetLoss | str = "npo",
        *,
        retain: RetainTerm | None = "nll",
        forget_weight: float = 1.0,
        retain_weight: float = 1.0,
        kl_positions: RetainPositions = "attended",
        utility_floor: float | None = None,
        utility_every: int = 10,
        reference: ReferencePolicy = "auto",
        anchor: Anchor = "request_start",
        **settings: Unpack[RequestSettings],
    ) -> None:
        super().__init__(**settings)
        self.method = ForgetLoss.resolve(method)
        check_choice("retain", retain, (*get_args(RetainTerm), None))
        check_choice("kl_positions", kl_positions, get_args(RetainPositions))
        check_positive("forget_weight", forget_weight)
        check_positive("retain_weight", retain_weight)
        if self.method.needs_retain and retain is None:
            raise ValueError(f"`{type(self.method).__name__}` means nothing without a retain term: set `retain='nll'`.")
        if (only := self.method.only_retain) not in (None, retain):
            raise ValueError(f"`{type(self.method).__name__}` needs `retain={only!r}`, its own term, not {retain!r}.")
        if retain == "own" and type(self.method).retain_term is ForgetLoss.retain_term:
            raise ValueError(
                f"`retain='own'` is for methods with a retain term of their own, such as `RMU`, and"
                f" `{type(self.method).__name__}` has none. Use 'nll' or 'kl'."
            )
        self.retain = retain
        self.forget_weight = forget_weight
        self.retain_weight = retain_weight
        self.kl_positions = kl_positions
        self.utility_floor = utility_floor
        self.utility_every = utility_every
        self.reference = reference
        self.anchor = anchor
        # settings at odds are an error now, whatever the loader
        self._choose(has_ids=True)
        self._reference: Reference | None = None
        self._restored_reference: dict[str, Any] | None = None
        self._floor = UtilityFloor(utility_floor, utility_every)
        self._statistics = FrozenStatistics()
        self._retained: Any = None
        self._alternate: Any = None
        self._anchors: tuple[Outputs | None, Outputs | None] = (None, None)
        # of the micro-batches of the optimizer step under way
        self._terms: list[Tensor] = []

    def _choose(self, *, has_ids: bool) -> Any:
        settings = self.reference, self.anchor, self.method, self.retain
        return choose_policy(*settings, has_ids=has_ids, owner=type(self).__name__)

    @override
    def layer(self) -> str | None:
        return self.method.layer

    @override
    def method_name(self) -> str:
        card: MethodCard | None = getattr(self.method, "card", None)
        return type(self.method).__name__ if card is None else card.name

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        way_out = "Return the loss from `training_step` and let Lightning step the optimizer, or edit by `SSD`."
        check_automatic_optimization(pl_module, self, f"method={self.method_name()!r}", way_out)
        has_ids = isinstance(trainer.datamodule, RequestStream)  # type: ignore[attr-defined]
        kept = self._choose(has_ids=has_ids)
        if self._reference is None or self._reference.kept != kept:
            self._reference = Reference(kept, self.anchor, type(self).__name__)
        if self._restored_reference is not None:
            self._reference.load_state_dict(self._restored_reference)
            self._restored_reference = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"`{type(self).__name__}` puts one loss in the place of the module's, which has"
                f" {len(trainer.optimizers)} optimizers. Use one."
            )
        assert self._reference is not None
        self._reference.check(pl_module)
        if self._open is not None:
            self._statistics.freeze(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._statistics.thaw()
        self._forget_step()

    # ------------------------------------------------------------------ a request

    @override
    def serve_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if self.retain is not None and isinstance(stream, RequestStream) and not len(stream.retained_ids(task)):
            raise ValueError(
                f"`retain={self.retain!r}` needs samples to retain, but request {task.name!r} leaves none of what was"
                " learned. Set `retain=None`."
            )

        def score() -> Any:
            batches = stream.read_samples(stream.forgotten_ids(task))
            return sequence_sums(trainer, pl_module, self.reader, batches)

        assert self._reference is not None
        self._reference.start(pl_module, score)
        self.reference_hash = self._reference.digest
        self.method.start(self.request_seed)
        self._floor.start(partial(self._retained_probability, trainer, pl_module, task))
        self._statistics.freeze(pl_module)

    @override
    def serve_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._look(trainer, pl_module, task, last=True)
        self._statistics.thaw()
        self._forget_step()
        assert self._reference is not None
        self._reference.end()

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        assert self._reference is not None
        kept = Influence(type(self).__name__, "the copy of the original model", "remains")
        return [kept] if self._reference.keeps_weights else []

    # ------------------------------------------------------------------ a step

    @override
    def transform_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        forget, self._retained = batch, None
        if isinstance(batch, Mapping) and "forget" in batch:
            forget, self._retained = batch["forget"], batch.get("retain")
        if self.retain is not None and self._retained is None:
            raise ValueError(
                f"`{type(self).__name__}(retain={self.retain!r})` needs batches of the form {{'forget': batch,"
                " 'retain': batch}; give loaders of both, use `UnlearningDataModule`, or set `retain=None`."
            )
        forget, self._alternate = split_alternate(forget)
        return forget

    @contextmanager
    @override
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        assert self._reference is not None
        self._anchors = None, None
        ids = ids_of_step(trainer, batch_idx)
        if self._reference.kept == "cached_scores":
            assert ids is not None
            cached = self._reference.cached(ids, pl_module.device, alternate=self._alternate is not None)
            self._anchors = cached, None
        elif self._reference.runs:
            self._anchors = self._run_reference(pl_module, batch, batch_idx, ids)
        with self.reader:
            yield

    def _run_reference(
        self, pl_module: LightningModule, batch: Any, batch_idx: int, ids: Tensor | None
    ) -> tuple[Outputs | None, Outputs | None]:
        assert self._reference is not None
        of_forget = self.method.reference != "none"
        of_retain = self.retain == "kl" or (self.retain == "own" and self.method.retain_reference)
        batches = [batch] * of_forget + [self._alternate] * (of_forget and self._alternate is not None)
        batches += [self._retained] * of_retain
        with self.reader:
            found = self._reference.run(pl_module, batches, batch_idx, self.reader.take, self.method.layer)
        retain = found.pop() if of_retain else None
        if (forget := found[0] if of_forget else None) is not None:
            forget.ids = ids
            forget.alternate = found[1] if len(found) > 1 else None
        return forget, retain

    @override
    def replace_loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor:
        forget = self.reader.take(batch, outputs, ids_of_step(trainer, batch_idx))
        if self._alternate is not None:
            forget.alternate = self._read_again(pl_module, self._alternate, batch_idx)[0]
        of_forget, of_retain = self._anchors
        term = self.method(forget, of_forget)
        loss = self.forget_weight * term
        self._log(pl_module, "forget_loss", term)
        if self.retain is not None:
            retained, own = self._read_again(pl_module, self._retained, batch_idx)
            kept = self.retain_term(retained, own, of_retain)
            loss = loss + self.method.weigh_retain(self.retain_weight, kept)
            self._log(pl_module, "retain_loss", kept)
            self._terms.append(kept.detach())
        if self.method.layer is not None and isinstance(trainer.strategy, DDPStrategy):
            # what lies behind the layer has no part in the loss
            loss = loss + zero_of_parameters(pl_module)
        self._retained = self._alternate = None
        self._anchors = None, None
        return loss

    def retain_term(self, retained: Outputs, own: Tensor, reference: Outputs | None) -> Tensor:
        """Return the retain term of a batch, from what the module and the reference made of it and the own loss."""
        if self.retain == "nll":
            return own
        return (self._divergence if self.retain == "kl" else self.method.retain_term)(retained, reference)

    def _read_again(self, pl_module: LightningModule, batch: Any, batch_idx: int) -> tuple[Outputs, Tensor]:
        with silenced(pl_module), metrics_kept(pl_module), self.reader:
            step_output = forward_step(pl_module, batch, batch_idx)
            loss = loss_of(step_output)
            if loss is None:
                raise ValueError(
                    f"`{type(pl_module).__name__}.training_step` returned no loss for a batch that"
                    f" `{type(self).__name__}` needs one of."
                )
            return self.reader.take(batch, step_output), loss

    def _divergence(self, retained: Outputs, reference: Outputs | None) -> Tensor:
        logits, labels = retained.predictions
        assert reference is not None and reference.logits is not None
        return kl_retain(logits, reference.logits, labels=labels, mask=retained.score_mask, positions=self.kl_positions)

    def _log(self, pl_module: LightningModule, name: str, value: Tensor) -> None:
        pl_module.log(f"unlearning/{name}", value.detach(), batch_size=1)

    def _forget_step(self) -> None:
        self._terms, self._retained, self._alternate, self._anchors = [], None, None, (None, None)

    @override
    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if type(self.method).after_step is not ForgetLoss.after_step and self._terms:
            mean = torch.stack(self._terms).mean()
            self.method.after_step(float(sum_over_ranks_(mean) / world_size()))
        self._terms = []

    @override
    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # a step begins, whose first micro-batch has run; what a skipped one left behind has no part in it
        del self._terms[:-1]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        task = TaskEvents.attach(trainer).task
        assert task is not None
        self._look(trainer, pl_module, task)
        self.skips_steps = self.stopped is not None

    def _look(self, trainer: Trainer, pl_module: LightningModule, task: Task, *, last: bool = False) -> None:
        assert self._open is not None
        steps, measure = (
            trainer.global_step - self._open["step"],
            partial(self._retained_probability, trainer, pl_module),
        )
        self.stopped = self.stopped or self._floor.look(steps, partial(measure, task), last=last)

    def _retained_probability(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> float:
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(stream, RequestStream) or not len(stream.retained_ids(task)):
            raise ValueError(
                f"`utility_floor={self.utility_floor}` watches retained samples, and there are none that can be read:"
                " use `UnlearningDataModule` or a stream with `requests`."
            )
        ids = self.sample_ids(stream.retained_ids(task), "retain")
        return float(self.score(trainer, pl_module, ids).probability.mean())

    # ------------------------------------------------------------------ memory and checkpoints

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        if self._choose(has_ids=True) not in ("copy", "module_prefix"):
            return Footprint()
        return Footprint(device=sum(local(p).nbytes for p in pl_module.parameters() if p.requires_grad))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "method": self.method.state_dict(),
            "reference": None if self._reference is None else self._reference.state_dict(),
            "utility": self._floor.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.method.load_state_dict(state_dict["method"])
        self._floor.load_state_dict(state_dict["utility"])
        if self._reference is None:
            self._restored_reference = state_dict["reference"]
        elif state_dict["reference"] is not None:
            self._reference.load_state_dict(state_dict["reference"])
