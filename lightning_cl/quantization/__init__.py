"""Quantized base models: packed linear layers, weights streamed from a checkpoint, full checkpoints from shards."""

from lightning_cl.quantization.base import check_can_shard, quantize_base
from lightning_cl.quantization.layers import dequantize, is_quantized, quantization_bytes, quantized_layers
from lightning_cl.quantization.loading import fill_block
from lightning_cl.quantization.reader import CheckpointReader
from lightning_cl.quantization.saving import quantized_state_dict, save_quantized
from lightning_cl.quantization.skeleton import build_skeleton, load_quantized

__all__ = [
    "CheckpointReader",
    "build_skeleton",
    "check_can_shard",
    "dequantize",
    "fill_block",
    "is_quantized",
    "load_quantized",
    "quantization_bytes",
    "quantize_base",
    "quantized_layers",
    "quantized_state_dict",
    "save_quantized",
]
