"""The model that an unlearning step is held against, kept in the cheapest way that serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_cl.core.adapters import adapters_disabled, has_adapters, trained_beside_adapters
from lightning_cl.core.capture import forward_step, move_batch, undisturbed
from lightning_cl.core.checks import check_choice
from lightning_cl.core.copies import WeightCopy
from lightning_cl.core.distributed import gather_rows
from lightning_cl.unlearning.digest import digest_of
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs
from lightning_cl.unlearning.reading import OutputReader, split_alternate

__all__ = ["Anchor", "Reference", "ReferencePolicy", "SequenceSums", "choose_policy", "sequence_sums"]

ReferencePolicy = Literal["auto", "copy", "peft_disabled", "cached_scores", "module_prefix"]
Anchor = Literal["request_start", "original"]
_Kept = Literal["none", "copy", "peft_disabled", "cached_scores", "module_prefix"]
# of answers, and of the alternates that come with them: ascending identities and their sums, on the CPU
SequenceSums = dict[str, tuple[Tensor, Tensor]]


def choose_policy(
    policy: ReferencePolicy,
    anchor: Anchor,
    method: ForgetLoss,
    retain: str | None,
    *,
    has_ids: bool,
    owner: str,
) -> _Kept:
    """Return how the reference is kept.

    Args:
        policy: The setting.
        anchor: The setting.
        method: Says what it needs of the reference on the forget batch.
        retain: The retain term, which says what it needs of it on the retained batch.
        has_ids: Whether samples have identities.
        owner: The callback, for errors.

    Raises:
        ValueError: If the settings do not go together.
    """
    check_choice("reference", policy, get_args(ReferencePolicy))
    check_choice("anchor", anchor, get_args(Anchor))
    needs: set[str] = set() if method.reference == "none" else {method.reference}
    if retain == "kl":
        needs.add("scores")
    if retain == "own" and method.retain_reference:
        needs.add("activations")
    if not needs:
        if policy != "auto":
            raise ValueError(
                f"`{owner}(reference={policy!r})` keeps a reference model that neither `{type(method).__name__}` nor"
                " the retain term asks for. Leave `reference` at 'auto'."
            )
        return "none"
    if policy == "auto":
        if needs == {"sequences"} and has_ids and anchor == "request_start":
            return "cached_scores"
        return "module_prefix" if needs == {"activations"} else "copy"
    if policy == "cached_scores" and needs != {"sequences"}:
        raise ValueError(
            f"`{owner}(reference='cached_scores')` keeps one number for each sequence, but whole scores or activations"
            " of the reference are needed. Use 'copy', or 'peft_disabled' where the module has adapters."
        )
    if policy == "cached_scores" and not has_ids:
        raise ValueError(
            f"`{owner}(reference='cached_scores')` looks scores up by the identities of samples, which loaders of your"
            " own do not give. Use `UnlearningDataModule`, a stream with `requests`, or `reference='copy'`."
        )
    if policy == "module_prefix" and needs != {"activations"}:
        raise ValueError(
            f"`{owner}(reference='module_prefix')` runs the module up to a layer, but scores of the reference are"
            " needed. Use 'copy'."
        )
    needed: dict[str, Anchor] = {"cached_scores": "request_start", "peft_disabled": "original"}
    if needed.get(policy, anchor) != anchor:
        raise ValueError(
            f"`{owner}(reference={policy!r})` is the model at {needed[policy]!r}: set `anchor={needed[policy]!r}`, or"
            " use `reference='copy'`."
        )
    return policy


def sequence_sums(
    trainer: Trainer, pl_module: LightningModule, reader: OutputReader, batches: Iterable[tuple[Any, Tensor]]
) -> SequenceSums:
    """Run the module's own step, in evaluation mode and without a trace, and sum up every sample and its alternate.

    Args:
        trainer: The running Trainer.
        pl_module: The user's module.
        reader: Reads scores and labels.
        batches: This rank's batches, as many on all ranks, with identities.

    Returns:
        The sums of the samples of all ranks; of alternates those that there are.
    """
    ids: dict[str, list[Tensor]] = {"own": [], "alternate": []}
    sums: dict[str, list[Tensor]] = {"own": [], "alternate": []}
    for batch, of_batch in batches:
        for kind, part in zip(ids, split_alternate(move_batch(trainer, pl_module, batch)), strict=True):
            if part is not None:
                with undisturbed(pl_module, seed=0, as_in_step=True), reader:
                    outputs = reader.take(part, forward_step(pl_module, part))
                ids[kind].append(of_batch)
                sums[kind].append(outputs.nll_sum.cpu())
    found: SequenceSums = {}
    for kind in ids:
        rows = (torch.cat([torch.empty(0, dtype=torch.int64), *ids[kind]]), torch.cat([torch.empty(0), *sums[kind]]))
        of_all, values = (gather_rows(part.to(pl_module.device))[0].cpu() for part in rows)
        order = of_all.argsort()
        found[kind] = of_all[order], values[order]
    return found


class Reference:
    """Runs the user's own step with the weights of the reference: in evaluation mode, without a graph or a trace.

    It is no part of the module: neither its state dict nor its optimizers know it. Frozen parameters are shared.

    Args:
        kept: How it is kept: ``"copy"`` of the trainable weights, ``"peft_disabled"`` (no weights: the module without
            its adapters), ``"cached_scores"`` (no weights: sums of negative log-likelihoods by identity, of
            alternates too), ``"module_prefix"`` (a copy that is run up to a layer) or ``"none"``.
        anchor: Whether it is the model at every request's start, or at the first one's.
        owner: The callback, for errors.
    """

    def __init__(self, kept: _Kept, anchor: Anchor, owner: str) -> None:
        self.kept = kept
        self.anchor = anchor
        self.digest: str | None = None
        self._owner = owner
        self._copy = WeightCopy(owner)
        self._sums: SequenceSums = {}

    @property
    def runs(self) -> bool:
        """Whether it makes a forward in every step."""
        return self.kept in ("copy", "peft_disabled", "module_prefix")

    @property
    def keeps_weights(self) -> bool:
        """Whether it holds a copy of weights."""
        return bool(self._copy)

    def start(self, pl_module: LightningModule, score: Callable[[], SequenceSums]) -> None:
        """Take the model as it is at a request's start.

        Args:
            pl_module: The user's module.
            score: Returns :func:`sequence_sums` of all samples to forget.
        """
        if self.kept == "none" or (self.anchor == "original" and self.digest is not None):
            return
        if self.kept in ("copy", "module_prefix"):
            self._copy.take(pl_module)
        elif self.kept == "cached_scores":
            self._sums = score()
        self.digest = self._digest(pl_module)

    def end(self) -> None:
        """Forget the model of a request's start, which knows what was forgotten; the original one stays."""
        if self.anchor == "request_start":
            self._copy = WeightCopy(self._owner)
            self._sums, self.digest = {}, None

    def check(self, pl_module: LightningModule) -> None:
        """Bring restored weights to their place, and refuse a reference that is not what it should be.

        Raises:
            ValueError: If its digest is not the one that was saved; for ``"peft_disabled"``, if the module has no
                adapters, or more than them trains.
        """
        if self.kept == "peft_disabled":
            self._check_adapters(pl_module)
        # restored weights wait until they are placed, and make the copy look empty until then
        self._copy.place(pl_module)
        if self.digest is not None and self._digest(pl_module) != self.digest:
            raise ValueError(
                f"The reference model of `{self._owner}` is not the one that the request began with: the weights that"
                " the module shares with it have changed. Resume with the same base weights."
            )

    def _check_adapters(self, pl_module: LightningModule) -> None:
        without = f"`{self._owner}(reference='peft_disabled')` is the module without its adapters, and"
        if not has_adapters(pl_module):
            raise ValueError(f"{without} {type(pl_module).__name__} has none. Use 'auto'.")
        if beside := trained_beside_adapters(pl_module):
            raise ValueError(
                f"{without} {beside[:3]} train beside them: the reference would change with every step. Use 'auto' or"
                " 'copy', freeze them, or name their modules in `modules_to_save` of PEFT's config."
            )

    def _digest(self, pl_module: LightningModule) -> str:
        if self.kept == "cached_scores":
            pairs = self._sums.items()
            return digest_of((f"{kind}.{place}", part) for kind, pair in pairs for place, part in enumerate(pair))
        if self.kept == "peft_disabled":
            return digest_of((name, p) for name, p in pl_module.named_parameters() if not p.requires_grad)
        with self._copy.in_place(pl_module):
            return digest_of((name, p) for name, p in pl_module.named_parameters() if p.requires_grad)

    def cached(self, ids: Tensor, device: torch.device, *, alternate: bool) -> Outputs:
        """Return outputs that know their sums and nothing else.

        Args:
            ids: Identities of the samples of a batch, int64 [n].
            device: For the sums.
            alternate: Whether the batch brings alternates, so that there are outputs of them as well.

        Raises:
            ValueError: If a sample is unknown.
        """
        found = Outputs(ids=ids, stored_nll_sum=self._sums_of("own", ids).to(device))
        if alternate:
            found.alternate = Outputs(ids=ids, stored_nll_sum=self._sums_of("alternate", ids).to(device))
        return found

    def _sums_of(self, kind: str, ids: Tensor) -> Tensor:
        known, sums = self._sums[kind]
        places = torch.searchsorted(known, ids).clamp(max=max(len(known) - 1, 0))
        if not len(known) or not torch.equal(known[places], ids):
            raise ValueError(f"`{self._owner}` has no reference scores for samples of this batch: it changed since.")
        return sums[places]

    def run(
        self,
        pl_module: LightningModule,
        batches: list[Any],
        batch_idx: int,
        read: Callable[[Any, Any], Outputs],
        layer: str | None,
    ) -> list[Outputs]:
        """Return what the reference makes of batches, detached.

        Args:
            pl_module: The user's module.
            batches: Batches on the device.
            batch_idx: Index of the step.
            read: Makes outputs of a batch and of what the module's step returned; ``None`` if it was cut short.
            layer: Name of the submodule that ``"module_prefix"`` ends with.
        """
        weights = adapters_disabled(pl_module) if self.kept == "peft_disabled" else self._copy.in_place(pl_module)
        outputs = []
        with undisturbed(pl_module, None, as_in_step=True), weights:
            for batch in batches:
                with _cut_after(pl_module, layer) if self.kept == "module_prefix" else nullcontext():
                    step_output = None
                    step_output = forward_step(pl_module, batch, batch_idx)
                outputs.append(read(batch, step_output))
        return outputs

    def num_bytes(self, pl_module: LightningModule) -> int:
        """Return what it keeps on this rank."""
        if self.kept in ("copy", "module_prefix"):
            return self._copy.num_bytes(pl_module)
        return sum(value.nbytes for pair in self._sums.values() for value in pair)

    def state_dict(self) -> dict[str, Any]:
        """Return what it keeps, and its digest."""
        copy = self._copy.state_dict() if self._copy else None
        return {"kept": self.kept, "digest": self.digest, "copy": copy, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; :meth:`check` brings it to its place.

        Raises:
            ValueError: If it was kept in another way.
        """
        if state["kept"] != self.kept and state["digest"] is not None:
            raise ValueError(
                f"The checkpoint's reference model was kept as {state['kept']!r}, that of `{self._owner}` is"
                f" {self.kept!r}. Resume with the same `reference`, `method` and `retain`."
            )
        self.digest, self._sums = state["digest"], state["sums"]
        if state["copy"] is not None:
            self._copy.load_state_dict(state["copy"])


class _Reached(Exception):
    """The layer has computed."""


@contextmanager
def _cut_after(pl_module: LightningModule, layer: str | None) -> Iterator[None]:
    """End the forward inside the block as soon as a layer has computed; a sharded one runs to its end."""
    if layer is None or any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
        yield
        return

    def stop(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached

    # behind the hook that records
    handle = pl_module.get_submodule(layer).register_forward_hook(stop)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()
