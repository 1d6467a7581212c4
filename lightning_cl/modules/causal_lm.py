"""The reference causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from typing_extensions import override

from lightning_cl.core.checks import check_positive
from lightning_cl.core.step import run_in_forward
from lightning_cl.datamodules.sources.tokens import HashTokenizer, make_tokenizer
from lightning_cl.metrics.tokens import Perplexity, TokenMean
from lightning_cl.modules.language_model import LanguageModel

__all__ = ["CausalLM"]

_IGNORED = -100
_LONGEST_PROMPT = 1024


class CausalLM(LanguageModel):
    """A causal language model of Hugging Face: from a config, a folder or the hub, with adapters, in full or 4 bits.

    Batches are dicts with ``input_ids`` [B, T] and what else the network takes, such as ``attention_mask``; without
    ``labels``, the labels are the inputs, and -100 on padding. The loss is the mean cross-entropy over the tokens of
    the batch, from float32 logits.

    It logs ``train_loss``; and for each validation or test loader ``val_loss``, ``val_perplexity`` and ``val_acc`` (the
    share of tokens predicted), over all tokens of the loader and of all ranks. ``ContinualMetrics("val_perplexity",
    mode="min")`` makes the matrix of them.

    Args:
        model: Folder or hub name of a model; or a config, whose weights are random: a dict such as
            ``{"model_type": "llama", "hidden_size": 64}``, or a ``PretrainedConfig``.
        tokenizer: For ``prompts``: ``"bytes"``, or folder or hub name of a tokenizer; that of ``model`` if ``None``.
        prompts: Texts that the model continues after every task; they stand in the record and in the report.
        max_new_tokens: Tokens of each continuation, the likeliest ones; at least 1.
        settings: The further arguments of :class:`~lightning_cl.modules.LanguageModel`.

    Raises:
        ValueError: As for :class:`~lightning_cl.modules.LanguageModel`, and for prompts without a tokenizer.

    Example:
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> module = CausalLM({"model_type": "llama", "vocab_size": 259, **sizes}, learning_rate=1e-3)
        >>> module.configure_model()
        >>> module(input_ids=torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 259])
    """

    def __init__(
        self,
        model: Any,
        *,
        tokenizer: str | None = None,
        prompts: list[str] | None = None,
        max_new_tokens: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(model, kind="AutoModelForCausalLM", **settings)
        check_positive("max_new_tokens", max_new_tokens)
        if prompts and tokenizer is None and not isinstance(model, str):
            raise ValueError(
                "`prompts` needs a `tokenizer`, and a model from a config brings none: give 'bytes', or a name."
            )
        if tokenizer == "hash":
            raise ValueError("`tokenizer='hash'` cannot be read back into text: give 'bytes', or a name.")
        self.tokenizer = tokenizer if tokenizer is not None or not isinstance(model, str) else model
        self.prompts = prompts or []
        self.max_new_tokens = max_new_tokens
        self.evaluated = nn.ModuleDict({stage: _evaluated() for stage in ("val", "test")})
        self.save_hyperparameters({"tokenizer": tokenizer, "prompts": prompts, "max_new_tokens": max_new_tokens})

    @override
    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Return the logits [B, T, V] of the token after each of ``input_ids`` [B, T]."""
        logits: Tensor = self.network(input_ids=input_ids, **inputs).logits
        soft_prompts = logits.shape[1] - input_ids.shape[1]
        # FSDP2 warns of outputs that are views
        return logits[:, soft_prompts:] if soft_prompts else logits

    def _loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss over the supervised tokens of a batch, the logits [N, V] and their targets [N]."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch.get("labels")
        if labels is None:
            mask = inputs.get("attention_mask")
            labels = inputs["input_ids"] if mask is None else inputs["input_ids"].masked_fill(mask == 0, _IGNORED)
        targets = pad(labels[:, 1:], (0, 1), value=_IGNORED).flatten()
        logits = self(**inputs).flatten(0, 1)
        tokens = (targets != _IGNORED).sum()
        # a mean over no token would be NaN, and so would the weights after it
        loss = cross_entropy(logits.float(), targets, ignore_index=_IGNORED, reduction="sum") / tokens.clamp(min=1)
        return loss, logits, targets

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = self._loss(batch)[0]
        self.log("train_loss", loss)
        return loss

    @override
    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        loss, logits, targets = self._loss(batch)
        tokens, right = (targets != _IGNORED).sum(), (logits.argmax(-1) == targets).sum()
        metrics: Any = self.evaluated[stage]
        for name, value in (("loss", loss), ("perplexity", loss), ("acc", right / tokens)):
            metrics[name].update(value, tokens)
            self.log(f"{stage}_{name}", metrics[name], prog_bar=name == "perplexity")

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        return self.generate(ids, torch.ones_like(ids) if mask is None else mask, self.max_new_tokens)

    # ------------------------------------------------------------------ generation

    def generate(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int) -> Tensor:
        """Return the likeliest next tokens one after the other, int64 [B, new_tokens], of prompts padded on the right.

        Every token takes a forward over the whole text, with no cache, and their number is fixed: so it runs on sharded
        weights as a training step does, with all ranks in step.

        Args:
            input_ids: Prompts [B, T].
            attention_mask: 1 on prompts, 0 on padding [B, T].
            new_tokens: Tokens to append.
        """
        rows, lengths = torch.arange(len(input_ids), device=input_ids.device), attention_mask.sum(1)
        ids, mask = pad(input_ids, (0, new_tokens)), pad(attention_mask, (0, new_tokens))
        for _ in range(new_tokens):
            following = self(input_ids=ids, attention_mask=mask)[rows, lengths - 1].argmax(-1)
            ids[rows, lengths], mask[rows, lengths] = following, 1
            lengths = lengths + 1
        return torch.stack([ids[rows, lengths - new_tokens + i] for i in range(new_tokens)], dim=1)

    def generate_samples(self) -> dict[str, str]:
        """Return the continuation of each of ``prompts``, by prompt; with several ranks, all of them must call it."""
        if not self.prompts:
            return {}
        assert self.tokenizer is not None
        tokenizer = make_tokenizer(self.tokenizer)
        assert not isinstance(tokenizer, HashTokenizer)
        training = {module: module.training for module in self.modules()}
        self.eval()
        samples = {}
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for prompt in self.prompts:
                ids, mask = (torch.from_numpy(part) for part in tokenizer.encode([prompt], _LONGEST_PROMPT))
                # without padding, whichever side a tokenizer puts it on
                ids = ids[mask.bool()][None].to(self.device)
                new = run_in_forward(self, self.generate, ids, torch.ones_like(ids), self.max_new_tokens)[0].cpu()
                end = tokenizer.eos_id
                samples[prompt] = tokenizer.decode(new if end is None else new[: _position(new, end)])
        for module, mode in training.items():
            module.training = mode
        return samples


def _evaluated() -> nn.ModuleDict:
    return nn.ModuleDict({"loss": TokenMean(), "perplexity": Perplexity(), "acc": TokenMean()})


def _position(ids: Tensor, value: int) -> int:
    """Return the first position of ``value``, the length of ``ids`` if it is not there."""
    return int(next(iter((ids == value).nonzero().flatten()), len(ids)))
