"""Quantized weights on disk: blocks.safetensors beside a converted model's bf16 weights.

    <name>.codes     U8   [n_out, n_in] at 8 bits; [n_out, n_in / 2] at 4, two codes a byte: of each block of 32, byte i
                          has code i below and code i + 16 above, as in GGUF
    <name>.scales    F16  [n_out, n_in / 32]
    <name>.lows      F16  [n_out, n_in / 32], at 4 bits only

`name` is that of the bf16 tensor in model.safetensors. transformers does not know the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sessiond.errors import ModelCorrupt
from sessiond.kernels.blockweights import BLOCK, BlockWeights

HALF = BLOCK // 2


def write_blocks(path: Path, kept: Mapping[str, BlockWeights]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, weights in kept.items():
        tensors[f"{name}.codes"] = _pack(weights.codes) if weights.bits == 4 else weights.codes
        tensors[f"{name}.scales"] = weights.scales
        if weights.lows is not None:
            tensors[f"{name}.lows"] = weights.lows
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_blocks(path: Path) -> dict[str, BlockWeights]:
    """Name of the bf16 tensor -> its quantized form. Raises ModelCorrupt."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            return {
                name: _weights(
                    file.get_tensor(f"{name}.codes"),
                    file.get_tensor(f"{name}.scales"),
                    file.get_tensor(f"{name}.lows") if f"{name}.lows" in names else None,
                )
                for name in sorted(one.removesuffix(".codes") for one in names if one.endswith(".codes"))
            }
    except (OSError, ValueError, IndexError, RuntimeError, SafetensorError) as error:
        raise ModelCorrupt(f"{path} cannot be read: {error}", path=path) from error


def _weights(codes: Tensor, scales: Tensor, lows: Tensor | None) -> BlockWeights:
    return BlockWeights(8, codes, scales) if lows is None else BlockWeights(4, unpack(codes), scales, lows)


def _pack(codes: Tensor) -> Tensor:
    """Codes [n_out, n_in] of 4 bits, two a byte."""
    blocks = codes.reshape(codes.shape[0], codes.shape[1] // BLOCK, BLOCK)
    return (blocks[..., :HALF] | blocks[..., HALF:] << 4).flatten(1)


def unpack(packed: Tensor) -> Tensor:
    """Codes [n_out, n_in] of bytes [n_out, n_in / 2] with two 4-bit codes each."""
    blocks = packed.reshape(packed.shape[0], packed.shape[1] // HALF, HALF)
    return torch.cat((blocks & 15, blocks >> 4), -1).flatten(1)
