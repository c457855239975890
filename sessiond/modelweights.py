"""Quantized weights of a loaded model: which matrices get which codes, and layers that compute with them.

    kind    layers of the model                     output (lm_head)
    int4    kept codes, else 4 bits                 kept codes, else 8 bits
    int8    kept codes of 8 bits, else 8 bits       the same

Kept are the GGUF file's own codes (ggufblocks.py); what else there is is rounded from the loaded weights. The output
has 8 bits under int4 too, as llama.cpp's files do: its rounding goes straight into every logit. Layers that multiply
the same inputs have codes of one kind: beside kept ones of 8 bits, which lose least, the others are rounded to 8 bits.
A matrix whose inputs are no multiple of 32 stays as it is. The embedding stays as it is: a lookup reads one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sessiond.blockfile import read_blocks
from sessiond.errors import ModelCorrupt
from sessiond.kernels.blockweights import BLOCK, BlockWeights, linear_blocks_reference, quantize
from sessiond.modelcheck import BLOCKS
from sessiond.types import WeightsKind

_LOOKED_AT = 16  # rows of kept codes

# Layers that multiply the same inputs. The compiled decoder has them as one matrix, in one kind of codes: were they
# made alike there, the model's own forward would compute with others, and so would who measures.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def load_blocks(path: Path, module: Any, kind: WeightsKind, *, kept: bool = True) -> dict[str, BlockWeights]:
    """Name of the weight -> its codes, for every nn.Linear of `module`, which was loaded from the directory `path`.

    Depends on what identity_fields tells of `kind`, and on nothing else. `kept`: False rounds all of them, to measure
    what keeping them is worth. Raises ModelCorrupt.
    """
    assert kind != "bf16"
    own = read_blocks(path / BLOCKS) if kept and (path / BLOCKS).is_file() else {}
    tied: dict[int, BlockWeights] = {
        id(parameter): own[name] for name, parameter in module.named_parameters(remove_duplicate=False) if name in own
    }
    output = module.get_output_embeddings()
    found = {}
    for name, child in module.named_modules():
        if not isinstance(child, nn.Linear) or child.in_features % BLOCK:
            continue
        needs_8_bits = kind == "int8" or _beside_8_bits(module, name, tied)
        weights = tied.get(id(child.weight))
        if weights is None or (needs_8_bits and weights.bits != 8):
            try:
                weights = quantize(child.weight, 8 if needs_8_bits or child is output else 4)
            except ValueError as error:
                raise ModelCorrupt(f"{name} of {path} cannot be quantized: {error}", path=path) from error
        elif weights.shape != child.weight.shape:
            raise ModelCorrupt(f"{path / BLOCKS} has {name} in another shape", path=path)
        elif not _belong(weights, child.weight):
            raise ModelCorrupt(f"{path / BLOCKS} has codes of other weights than those of {name}", path=path)
        found[f"{name}.weight"] = weights
    return found


def _beside_8_bits(module: Any, name: str, kept: Mapping[int, BlockWeights]) -> bool:
    """Whether a layer is one of those of which one has kept codes of 8 bits. `kept`: by the id of the parameter."""
    above, _, last = name.rpartition(".")
    parent = module.get_submodule(above)
    beside = [kept.get(id(getattr(parent, other).weight)) for names in _JOINED if last in names for other in names]
    return any(weights is not None and weights.bits == 8 for weights in beside)


def _belong(kept: BlockWeights, weight: Tensor) -> bool:
    """Whether kept codes are those of a weight, by its first rows: to look at all would take as long as loading.

    A weight loaded as fp16 is no longer what the codes were proven against, and passes.
    """
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return True
    lows = None if kept.lows is None else kept.lows[:_LOOKED_AT]
    first = BlockWeights(kept.bits, kept.codes[:_LOOKED_AT], kept.scales[:_LOOKED_AT], lows)
    return torch.equal(first.dequantize(torch.bfloat16), weight[:_LOOKED_AT].to(torch.bfloat16))


class BlockLinear(nn.Module):
    """nn.Linear on quantized weights."""

    def __init__(self, weights: BlockWeights, bias: Tensor | None) -> None:
        super().__init__()
        self.weights: BlockWeights | None = weights  # None: handed over to the compiled decoder
        self.bias = bias
        self.out_features, self.in_features = weights.shape

    def forward(self, x: Tensor) -> Tensor:
        assert self.weights is not None
        return linear_blocks_reference(x, self.weights, self.bias)


def with_blocks(module: Any, blocks: Mapping[str, BlockWeights]) -> Any:
    """The model with the linear layers of `blocks` replaced; weights that nothing else holds are let go."""
    for name, weights in blocks.items():
        layer = name.removesuffix(".weight")
        module.set_submodule(layer, BlockLinear(weights, module.get_submodule(layer).bias))
    return module
