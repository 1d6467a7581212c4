"""Unlearning by an assistant at the side of a model that stays as it is: Ji et al. 2024 (ULD), arXiv:2406.08607."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_cl.adapters.attach import add_adapters
from lightning_cl.adapters.blocks import keep_blocks
from lightning_cl.core.adapters import has_adapters
from lightning_cl.core.checks import check_count
from lightning_cl.functional.unlearning import logit_difference
from lightning_cl.quantization.layers import is_int8, quantized_layers, share_packed_4bit

__all__ = ["LogitDifference", "build_assistant"]


def build_assistant(
    model: nn.Module,
    num_layers: int,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    target_modules: str | list[str] = "all-linear",
) -> Any:
    """Return the first layers of a causal language model with LoRA adapters, as a model of its own.

    Embeddings, layers, last norm and head are those of ``model``, in the same memory; only the adapters are new, and
    only they train. Build the assistant when the model is on its device and quantized, and before it is sharded; after
    a later move each of the two has weights of its own.

    Args:
        model: A causal language model of transformers. Nothing of it changes, flags neither.
        num_layers: Layers of the assistant, from 1 to those of the model; the paper takes 8 of 32.
        rank: Rank of the adapters.
        alpha: Scales what they add, by ``alpha / rank``.
        dropout: Share of their inputs that is left out in training.
        target_modules: The layers with adapters, as in PEFT.

    Returns:
        A ``peft.PeftModel`` in training mode that computes as a causal language model, starting as the model cut off
        after ``num_layers`` layers.

    Raises:
        ValueError: For a number of layers out of range; for a model with adapters, which would not go along, or a
            sharded one, or one on the meta device; if its list of layers cannot be found.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> assistant = build_assistant(model, num_layers=1, rank=2)
        >>> assistant.get_base_model().config.num_hidden_layers, model.config.num_hidden_layers
        (1, 4)
        >>> embeddings = [each.get_input_embeddings().weight for each in (assistant, model)]
        >>> embeddings[0].data_ptr() == embeddings[1].data_ptr()
        True
    """
    check_count("num_layers", num_layers)
    check_count("rank", rank)
    if has_adapters(model):
        raise ValueError(
            f"{type(model).__name__} has adapters, and an assistant has its own: what they know would be missing in it."
            " Merge them (`merge_and_unload`) first."
        )
    if any(isinstance(parameter, DTensor) or parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"The weights of {type(model).__name__} are sharded or on the meta device: build the assistant from the"
            " loaded model, before a strategy shards it."
        )
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        # a flag of its own, in the same memory; a quantized weight is frozen anyway, and knows more than its values
        plain = type(parameter) is nn.Parameter
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if plain else parameter
    assistant = copy.deepcopy(model, shared)
    for name, layer in quantized_layers(assistant):
        if not is_int8(layer):
            if layer.quant_state is None:
                raise ValueError(
                    f"`model` has 4-bit layers that are not packed yet, such as {name!r}: move it to its device first."
                )
            share_packed_4bit(layer, model.get_submodule(name))
    keep_blocks(assistant, num_layers)
    settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": target_modules}
    # GPT-2 and its like keep their weights transposed
    transposed = any(type(layer).__name__ == "Conv1D" for layer in assistant.modules())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": transposed, **settings}
    return add_adapters(assistant, config).train()


class LogitDifference:
    r"""Takes what an assistant knows from the scores of a model, in ``generate`` of transformers.

    Give it as ``model.generate(..., logits_processor=[LogitDifference(assistant)])``, a new one for each call. It
    returns the log-probabilities of :math:`z + w a` over the tokens that the model itself finds possible, see
    :func:`~lightning_cl.functional.unlearning.logit_difference`: for greedy search, sampling and beams; temperature,
    top-k and the like come after it. The assistant reads each token once, with keys and values of its own, which follow
    when beams change places.

    **The weights of the model keep the knowledge**: whoever has them, or leaves the processor out, has all of it.

    Args:
        assistant: What :func:`build_assistant` returned, trained; on the device of the prompts, not sharded. It is put
            into evaluation mode.
        weight: w, below 0; the paper's are -0.8 and -0.5.
        threshold: Which tokens the assistant may change, and which are left at all: those of at least this share of
            the likeliest one's probability, and this share of the vocabulary in any case.
        attention_mask: That of the prompts, [B, T], as ``generate`` gets it; all ones if ``None``. Prompts of different
            lengths are padded on the left.

    Raises:
        ValueError: For a weight not below 0, a threshold out of range, a sharded assistant, or a mask that does not fit
            the prompts.
    """

    def __init__(
        self, assistant: Any, *, weight: float = -0.8, threshold: float = 0.01, attention_mask: Tensor | None = None
    ) -> None:
        if not weight < 0:
            raise ValueError(f"`weight` must be below 0, got {weight!r}: above, the assistant's knowledge is added.")
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must be above 0 and at most 1, got {threshold!r}.")
        if any(isinstance(parameter, DTensor) for parameter in assistant.parameters()):
            raise ValueError(
                "The assistant is sharded, and is called token by token beside a model: build one anew beside it by"
                " `build_assistant`, and load into it what the checkpoint of the fit holds."
            )
        self.assistant = assistant.eval()
        self.weight = weight
        self.threshold = threshold
        self.attention_mask = attention_mask
        network = assistant.get_base_model() if hasattr(assistant, "get_base_model") else assistant
        self._takes = inspect.signature(network.forward).parameters.keys()
        self._read: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log-probabilities [B, V] for the next token of texts [B, T] from the scores of the model."""
        assistant = self._scores(input_ids).to(scores.device)
        return logit_difference(scores, assistant, weight=self.weight, threshold=self.threshold)

    def _scores(self, input_ids: Tensor) -> Tensor:
        mask = self._mask(input_ids)
        order = self._rows_before(input_ids, mask)
        known = 0
        if order is None:
            self._cache = None
        else:
            known = input_ids.shape[1] - 1
            if not torch.equal(order, torch.arange(len(order), device=order.device)):
                self._cache.reorder_cache(order)
        settings: dict[str, Any] = {}
        if "position_ids" in self._takes:
            settings["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, known:]
        if "logits_to_keep" in self._takes:
            settings["logits_to_keep"] = 1
        output = self.assistant(
            input_ids=input_ids[:, known:],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            **settings,
        )
        self._cache, self._read = output.past_key_values, input_ids
        scores: Tensor = output.logits[:, -1]
        return scores

    def _mask(self, input_ids: Tensor) -> Tensor:
        """Return the attention mask of texts: that of their prompts, and ones behind it."""
        mask = torch.ones_like(input_ids)
        if (given := self.attention_mask) is not None:
            rows, length = given.shape
            if len(input_ids) % rows or length > input_ids.shape[1]:
                raise ValueError(
                    f"`attention_mask` is of prompts of shape {list(given.shape)}, and texts of shape"
                    f" {list(input_ids.shape)} do not begin with them. Make a `LogitDifference` for every `generate`."
                )
            # each prompt's beams, or answers, stand one behind the other
            mask[:, :length] = given.repeat_interleave(len(input_ids) // rows, dim=0).to(mask)
        return mask

    def _rows_before(self, input_ids: Tensor, mask: Tensor) -> Tensor | None:
        """Return which text of the call before each text goes on with by a token, int64 [B]; ``None`` if one does not.

        Beams change places between calls, and the processor is told nothing but the texts.
        """
        before, length = self._read, input_ids.shape[1] - 1
        if before is None or before.shape[1] != length:
            return None
        if torch.equal(before, input_ids[:, :-1]):
            return torch.arange(len(before), device=before.device)
        if len(before) != len(input_ids):
            return None
        # equal texts behind different padding are not the same
        both = torch.cat([torch.cat([before, input_ids[:, :-1]]), mask[:, :-1].repeat(2, 1)], dim=1)
        _, kinds = both.unique(dim=0, return_inverse=True)
        same = kinds[len(before) :, None] == kinds[None, : len(before)]
        return same.int().argmax(1) if bool(same.any(1).all()) else None
