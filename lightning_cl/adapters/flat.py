"""Adapters in the files of PEFT; those of slots as one."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.adapters.build import peft_models
from lightning_cl.adapters.slot import PAST, Slot
from lightning_cl.core.distributed import gather_on_rank_zero, rank
from lightning_cl.core.imports import require
from lightning_cl.core.state import full_tensor
from lightning_cl.quantization.names import places

__all__ = ["write_adapters"]

_VERSION = 1


def write_adapters(module: nn.Module, folder: Path, slots: Any = None) -> None:
    """Write the adapters in ``module``, see :func:`~lightning_cl.adapters.export`.

    Args:
        module: Holds a ``PeftModel``.
        folder: Where the files go.
        slots: The callback that filled the slots.
    """
    models = peft_models(module)
    if not models:
        raise ValueError(f"{type(module).__name__} holds no `peft.PeftModel`: there are no adapters to export.")
    adapted = models[0]
    where = next(name for name, part in module.named_modules() if part is adapted)
    layers = _layers_with_slots(adapted)
    if slots is not None and not layers:
        raise ValueError(f"`slots` is a {type(slots).__name__}, and the adapters of {type(module).__name__} have none.")
    beside = _trained_beside(adapted)
    tensors = _adapter_tensors(adapted, layers)
    offsets: dict[str, list[int]] = {}
    ranks: dict[str, int] = {}
    current = ""
    for name, slot in layers.items():
        down, up, kept = _joined(slot)
        current, ranks[name] = slot.current, len(down)
        if rank() == 0:
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.{current}.weight"] = down.cpu()
            tensors[f"{prefix}.lora_B.{current}.weight"] = up.cpu()
        if slots is not None:
            offsets[name] = [int(kept[:end].sum()) for end in _segments(slots, _clean(f"{where}.{slot.name}"))]
    if rank() == 0 and layers:
        _write(adapted, current, _flat_config(adapted.peft_config[current], ranks), tensors, beside, folder)
        if slots is not None:
            _write_state(slots, layers, offsets, folder)
    elif rank() == 0:
        for name, config in adapted.peft_config.items():
            to = folder if name == "default" else folder / name
            _write(adapted, name, copy.copy(config), tensors, beside, to)
    gather_on_rank_zero(None)  # nobody reads before all is written


# ---------------------------------------------------------------------- what is written


def _clean(name: str) -> str:
    # activation checkpointing and torch.compile put themselves into names
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _layers_with_slots(adapted: Any) -> dict[str, Slot]:
    """Return the slots by their layers' names in the base model; those of ``Slot`` are names in the PeftModel."""
    found = {}
    for name, layer in adapted.named_modules():
        if hasattr(layer, "lora_A") and PAST in layer.lora_A:
            name = _clean(name)
            current = next(adapter for adapter in layer.active_adapters if adapter != PAST)
            found[name.removeprefix("base_model.model.")] = Slot(name, layer, current)
    return found


def _joined(slot: Slot) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of all that acts in a layer as two, and which of its ranks these have."""
    names = sorted(slot.layer.active_adapters, key=lambda adapter: adapter != PAST)
    parts = [(*slot.factors(name), slot.layer.scaling[name]) for name in names]
    down = torch.cat([part for part, _, _ in parts])
    up = torch.cat([scaling * part for _, part, scaling in parts], 1)
    kept = up.ne(0).any(0)
    kept[0] |= not kept.any()  # PEFT knows no adapter without a rank
    return down[kept], up[:, kept], kept


def _adapter_tensors(adapted: Any, layers: Mapping[str, Slot]) -> dict[str, Tensor]:
    """Return the parameters of adapters by their names in PEFT, whole, on rank 0; all but those of slots."""
    ours = {id(place.tensor) for place in places(adapted) if place.adapter}
    ours -= {id(parameter) for slot in layers.values() for parameter in slot.layer.parameters()}
    biases = any(getattr(config, "bias", "none") != "none" for config in adapted.peft_config.values())
    found = {}
    for name, parameter in adapted.named_parameters():
        if id(parameter) in ours or (biases and parameter.requires_grad and name.endswith("bias")):
            value = full_tensor(parameter)
            if rank() == 0:
                found[_clean(name)] = value.cpu()
    return found


def _trained_beside(adapted: Any) -> dict[str, dict[str, Tensor]]:
    """Return what trains beside the adapters: by module its tensors with their names, whole, on rank 0."""
    biases = any(getattr(config, "bias", "none") != "none" for config in adapted.peft_config.values())
    own = [place for place in places(adapted) if place.name is not None and not place.adapter and place.persistent]
    trained = {
        str(place.name).rpartition(".")[0]
        for place in own
        if place.tensor.requires_grad and not (biases and place.attribute == "bias")
    }
    modules: dict[str, dict[str, Tensor]] = {
        name: {} for name in sorted(trained) if not any(name.startswith(f"{other}.") for other in trained)
    }
    for place in own:
        for name, tensors in modules.items():
            if str(place.name).startswith(f"{name}."):
                value = full_tensor(place.tensor)
                if rank() == 0:
                    tensors[str(place.name)] = value.cpu()
    return modules


def _flat_config(config: Any, ranks: Mapping[str, int]) -> Any:
    """Return the config of one adapter with these ranks, and a scaling of 1."""
    config = copy.copy(config)
    common = Counter(ranks.values()).most_common(1)[0][0]
    # anchored, as PEFT takes a name for the end of others
    others = {f"^{name}": r for name, r in ranks.items() if r != common}
    config.r = config.lora_alpha = common
    config.rank_pattern, config.alpha_pattern = others, dict(others)
    config.use_rslora, config.init_lora_weights = False, True
    return config


# ---------------------------------------------------------------------- files


def _write(
    adapted: Any,
    name: str,
    config: Any,
    tensors: dict[str, Tensor],
    beside: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
) -> None:
    """Write one adapter as PEFT does, with modules that were trained beside it."""
    peft = require("peft", extra="llm")
    base = adapted.get_base_model()
    # what PEFT would do by itself, "auto", asks the hub for the size of the vocabulary
    found = peft.get_peft_model_state_dict(
        adapted, state_dict=dict(tensors), adapter_name=name, save_embedding_layers=False
    )
    for values in beside.values():
        found |= {f"base_model.model.{key}": value for key, value in values.items()}
    if beside:
        config.modules_to_save = [*(config.modules_to_save or ()), *beside]
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    folder.mkdir(parents=True, exist_ok=True)
    # copies: parameters may be shared
    found = {key: value.detach().clone().contiguous() for key, value in found.items()}
    save = require("safetensors.torch", extra="llm").save_file
    save(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # for `AutoPeftModel`; FSDP2 gives a sharded model a class of its own
    kind = next(cls for cls in type(base).__mro__ if not cls.__module__.startswith("torch.distributed"))
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(folder, auto_mapping_dict=mapping if config.task_type is None else None)


def _segments(slots: Any, layer: str) -> list[int]:
    """Return the offsets of the finished tasks in a layer, whose name for the callback may begin with more."""
    names = {f".{_clean(name)}": offsets for name, offsets in slots.segments.items()}
    layer = f".{layer.lstrip('.')}"
    found = [layer] if layer in names else [name for name in names if name.endswith(layer)]
    if len(found) > 1:
        raise ValueError(
            f"`slots` has learned with {[name[1:] for name in found]}, and the given module does not say which is"
            f" {layer[1:]!r}. Give it the name that it has in the LightningModule: `nn.ModuleDict({{name: model}})`."
        )
    if not found:
        raise ValueError(f"`slots` is a {type(slots).__name__} that has not learned with the layer {layer[1:]!r}.")
    return list(names[found[0]])


def _trained(slot: Slot, adapter: str) -> list[str]:
    return [name for name, parameter in slot.parameters(adapter).items() if parameter.requires_grad]


def _write_state(slots: Any, layers: Mapping[str, Slot], offsets: Mapping[str, list[int]], folder: Path) -> None:
    """Write what a callback keeps: plain values as JSON, tensors under their paths in it."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = full_tensor(value).cpu().clone().contiguous()
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {str(key): plain(each, f"{path}.{key}".lstrip(".")) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each, f"{path}.{index}".lstrip(".")) for index, each in enumerate(value)]
        return value if isinstance(value, str | int | float | None) else repr(value)

    record = {
        "version": _VERSION,
        "method": type(slots).__name__,
        # what trained, while it was exported, of the slot of each layer that trains and of the one for finished tasks
        "trained": {name: {a: _trained(slot, a) for a in (slot.current, slot.past)} for name, slot in layers.items()},
        # task i of a layer has the rows from the i-th number to the next of its lora_A here; what trains has the rest
        "offsets": dict(offsets),
        "state": plain(slots.state_dict(), ""),
    }
    (folder / "slots.json").write_text(json.dumps(record, indent=1), "utf-8")
    if tensors:
        require("safetensors.torch", extra="llm").save_file(tensors, folder / "slots.safetensors")
