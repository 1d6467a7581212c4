"""The one door out of a model with adapters: for PEFT, or merged for ``transformers``; also from shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lightning_cl.adapters.build import peft_models
from lightning_cl.adapters.flat import write_adapters
from lightning_cl.adapters.merging import write_merged
from lightning_cl.core.checks import check_choice
from lightning_cl.core.state import reshard
from lightning_cl.quantization.reader import CheckpointReader
from lightning_cl.quantization.saving import SHARD_BYTES

__all__ = ["export"]


def export(
    module: nn.Module,
    folder: str | Path,
    into: Literal["factors", "dequantized", "original16"] = "factors",
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    slots: Any = None,
) -> None:
    r"""Write a model with adapters so that plain PEFT or ``transformers`` opens it. Nothing is merged into 4 bits.

    * ``"factors"``: the adapters alone, for ``PeftModel.from_pretrained(base, folder)``. Of a model with slots
      (:class:`AdapterSlots`) one LoRA adapter, :math:`A = [A_1; \dots; A_n]`, :math:`B = [s_1 B_1, \dots, s_n B_n]`
      over all that is active: what stands between the factors is multiplied into A, ranks whose column of B is zero
      are left out, the scaling is 1. On the base that was trained on outputs are the same to a relative 1e-6 (float32),
      without slots bit by bit. What trains beside the adapters, as the head of a classifier, goes along as
      ``modules_to_save``.
    * ``"dequantized"``: each weight as :math:`\mathrm{dequant}(W_4) + s B A`, summed in float32: what the adapters saw
      in training. Relative error of the outputs 1e-6 in float32. In bfloat16 a weight is rounded by up to 0.4 percent
      of itself (0.2 on average): outputs move by up to about a percent, and a delta below that is lost.
    * ``"original16"``: each weight as :math:`W + s B A` with the weight that ``base`` has, before it was quantized. The
      base is better than the one that was trained on, and the adapters did not see it: outputs differ from those in
      training by about what quantization does to the outputs of the base (NF4: 7 to 10 percent of each weight).

    Weights are gathered, merged and written one after the other; rank 0 writes.

    Args:
        module: A ``PeftModel``, or a module that holds one, sharded or not; all ranks must call this. For merged
            formats LoRA around a Hugging Face model, or a quantized model without adapters.
        folder: Gets ``adapter_config.json`` and ``adapter_model.safetensors``, of adapters of other names than
            ``"default"`` in subfolders; or ``config.json`` and the safetensors files of the whole model.
        into: The format.
        base: Folder or hub name of the checkpoint with the original weights, for ``"original16"``.
        dtype: Of merged weights; float32 unless given, and that of ``base`` for ``"original16"``.
        shard_bytes: Size beyond which a file of merged weights is split.
        slots: The callback of the slots, whose state goes into ``slots.json`` and ``slots.safetensors`` beside the
            adapter: which ranks are of which task, which parameters trained, and what the method keeps. It is a record
            for other tools; to go on with training, resume from a checkpoint of the Trainer.

    Raises:
        ValueError: If ``module`` holds no adapters, or several PEFT models; for slots whose ranks are routed by the
            sample; for merged formats, if there are other adapters than LoRA on linear (also ``Conv1D``) and embedding
            layers, a merged weight is shared, or ``base`` lacks one; if a setting does not belong to the format.
    """
    check_choice("into", into, ("factors", "dequantized", "original16"))
    if (base is None) == (into == "original16"):
        raise ValueError(
            "`base` names the checkpoint that `into='original16'` merges into, and belongs to it alone; got"
            f" {base!r} with {into!r}."
        )
    if into != "factors" and slots is not None:
        raise ValueError(f"`slots` are written beside factors; {into!r} has none.")
    if into == "factors" and dtype is not None:
        raise ValueError("`dtype` is that of merged weights; factors are written as they are.")
    if any(getattr(layer, "routed", False) for layer in module.modules()):
        raise ValueError(
            "`export` writes one model for all samples, and these slots give each sample the adapter of a task. Keep a"
            " checkpoint of the Trainer, and evaluate with the callback."
        )
    if len(models := peft_models(module)) > 1:
        names = [name for name, part in module.named_modules() if any(part is model for model in models)]
        raise ValueError(
            f"{type(module).__name__} holds several PEFT models, {names}, and a folder holds one: call `export` for"
            " each of them, with the PeftModel itself and a folder of its own."
        )
    reshard(module)
    if into == "factors":
        write_adapters(module, Path(folder), slots)
    else:
        write_merged(module, Path(folder), None if base is None else CheckpointReader(base), dtype, shard_bytes)
