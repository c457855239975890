"""A GGUF file's own quantization of a model's matrices, as it stands in the file.

What transformers converts is rounded to bf16: quantizing that again would round twice. Codes are kept only if they are
proven: their effective weights, rounded to bf16, are the converted tensor bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sessiond.blockfile import unpack
from sessiond.kernels.blockweights import BLOCK, BlockWeights

_BLOCK_BYTES = {"Q4_0": 2 + 16, "Q4_1": 2 + 2 + 16, "Q8_0": 2 + 32}


def kept_blocks(source: Path, module: Any) -> dict[str, BlockWeights]:
    """Of the GGUF file `source`, what belongs to the linear and embedding weights of `module`, which was made from it.

    By the name of the weight; of tied weights, the first. Weights of other GGUF types, and those that the module holds
    in another form, are left out.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    reader = GGUFReader(str(source))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    field = reader.fields["general.architecture"]
    architecture = next((number for number, name in MODEL_ARCH_NAMES.items() if name == field.contents()), None)
    if architecture is None:
        return {}  # gguf knows no names of its tensors
    config = module.config.get_text_config()
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    kept = {}
    for name, weight in _weights(module):
        tensor = tensors.get(f"{names.get_name(name.removesuffix('.weight'))}.weight")
        if tensor is None or tensor.tensor_type.name not in _BLOCK_BYTES:
            continue
        found = _parse(torch.from_numpy(tensor.data.copy()), tensor.tensor_type.name)
        if found.shape != weight.shape:
            continue
        for ordered in _orders(found, config):
            if torch.equal(ordered.dequantize(torch.bfloat16), weight):
                kept[name] = ordered
                break
    return kept


def _weights(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the linear and embedding layers; tied ones once."""
    matrices = {
        id(child.weight) for child in module.modules() if isinstance(child, (torch.nn.Linear, torch.nn.Embedding))
    }
    for name, parameter in module.named_parameters():
        if id(parameter) in matrices:
            yield name, parameter.data


def _parse(raw: Tensor, kind: str) -> BlockWeights:
    """Rows of GGUF blocks [n_out, bytes]: a scale, at Q4_1 a low, then codes (gguf-py, quants.py)."""
    blocks = raw.reshape(raw.shape[0], raw.shape[1] // _BLOCK_BYTES[kind], _BLOCK_BYTES[kind])
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    if kind == "Q8_0":
        codes = blocks[..., 2:].view(torch.int8).to(torch.int16) + 128
        return BlockWeights(8, codes.to(torch.uint8).flatten(1), scales)
    # Q4_0: w = scale * (code - 8); a multiple by a power of two is exact.
    lows = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0] if kind == "Q4_1" else scales * -8
    return BlockWeights(4, unpack(blocks[..., -BLOCK // 2 :].flatten(1)), scales, lows)


def _orders(weights: BlockWeights, config: Any) -> Iterator[BlockWeights]:
    """The rows in the orders that a file may have them: as transformers, or with a head's rotated pairs side by side.

    llama.cpp interleaves the halves that transformers' rotary embedding pairs, in query and key rows of Llama files.
    """
    yield weights
    n_out = weights.shape[0]
    for n_heads in (config.num_attention_heads, config.num_key_value_heads):
        if n_out % (2 * n_heads) == 0:
            pairs = torch.arange(n_out).reshape(n_heads, n_out // n_heads // 2, 2)
            yield _rows(weights, pairs.transpose(1, 2).reshape(-1))


def _rows(weights: BlockWeights, order: Tensor) -> BlockWeights:
    lows = None if weights.lows is None else weights.lows[order]
    return BlockWeights(weights.bits, weights.codes[order], weights.scales[order], lows)
