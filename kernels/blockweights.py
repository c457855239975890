"""Weights of 4 or 8 bits in blocks of 32 inputs, and the product with them.

The formats are GGUF's: 4 bits with a scale and a low are Q4_1 (Q4_0 is the case low = -8 * scale), 8 bits are Q8_0.
Inputs of a product are rounded to 8 bits by block first, as llama.cpp does (Q8_1 by Q4_1, Q8_0 by Q8_0; ggml-quants.c).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # inputs that share a scale

_MIDDLE = 128  # the code of 0 at 8 bits
_ROUNDS = 2  # of least squares: they lower the squared error by 12 %, a third would by 2 % more
_PIECE = 1 << 20  # weights quantized at a time: what is computed on the way stays in the processor's caches


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """A quantized weight [n_out, n_in].

    4 bits: w = scale * code + low with codes of 0 to 15. 8 bits: w = scale * (code - 128), no lows.
    """

    bits: int
    codes: Tensor  # uint8 [n_out, n_in], a code a byte
    scales: Tensor  # float16 [n_out, n_in // 32]
    lows: Tensor | None = None  # float16, as `scales`

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or (self.lows is not None) != (self.bits == 4):
            raise ValueError(f"{self.bits} bits {'without' if self.lows is None else 'with'} lows")
        if self.codes.dim() != 2 or self.codes.shape[1] % BLOCK or self.codes.dtype is not torch.uint8:
            raise ValueError(f"codes of shape {tuple(self.codes.shape)} and type {self.codes.dtype}")
        wanted = self.codes.shape[0], self.codes.shape[1] // BLOCK
        for one in (self.scales, self.lows):
            if one is not None and (one.shape != wanted or one.dtype is not torch.float16):
                raise ValueError(f"scales or lows of shape {tuple(one.shape)} and type {one.dtype}, not {wanted}")

    @property
    def shape(self) -> tuple[int, int]:
        """(n_out, n_in)"""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Of memory as held here."""
        return sum(one.nbytes for one in (self.codes, self.scales, self.lows) if one is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The effective weights [n_out, n_in], computed in fp32."""
        codes, scales = in_blocks(self.codes), self.scales.float()[..., None]
        if self.lows is None:
            return ((codes.float() - _MIDDLE) * scales).flatten(1).to(dtype)
        return (codes.float() * scales + self.lows.float()[..., None]).flatten(1).to(dtype)


def quantize(weight: Tensor, bits: int) -> BlockWeights:
    """Round weight [n_out, n_in] of any float dtype to the nearest codes. The same on every machine: KV is bound to the
    codes by the rule that made them (sessiond/modelidentity.py).

    8 bits: scale = max|w| / 127. 4 bits: low and scale from the extremes, then by least squares over the codes they
    gave; a block keeps whichever pair has the smaller error. Raises ValueError for another number of bits, n_in that is
    no multiple of 32, or weights that are not finite or beyond fp16's range.
    """
    n_out, n_in = weight.shape
    if bits not in (4, 8) or n_in % BLOCK:
        raise ValueError(f"{n_in} inputs in blocks of {BLOCK}, at {bits} bits")
    codes = torch.empty(n_out, n_in // BLOCK, BLOCK, dtype=torch.uint8)
    scales = torch.empty(n_out, n_in // BLOCK, dtype=torch.float16)
    lows = torch.empty_like(scales) if bits == 4 else None
    n_rows = max(1, _PIECE // max(n_in, 1))
    for start in range(0, n_out, n_rows):
        rows = slice(start, start + n_rows)
        blocks = in_blocks(weight[rows].detach().float())
        if lows is None:
            codes[rows], scales[rows] = _symmetric(blocks)
        else:
            codes[rows], scales[rows], lows[rows] = _with_low(blocks)
    if not all(one.isfinite().all() for one in (scales, lows) if one is not None):
        raise ValueError("a weight is not finite, or too large for a scale in fp16")
    return BlockWeights(bits, codes.flatten(1), scales, lows)


def linear_blocks_reference(x: Tensor, weights: BlockWeights, bias: Tensor | None = None) -> Tensor:
    """x [..., n_in] by the effective weights, plus bias [n_out]; the result has x's dtype.

    Inputs are rounded by `quantize_rows`. Products of codes are summed exactly within a block, then
        8 bits   sum += (scale * x_scale) * sum(code_x * (code - 128))
        4 bits   sum += (scale * x_scale) * sum(code_x * code) + low * (x_scale * sum(code_x))
    in fp32 over ascending blocks; the bias is added in fp32, last.
    """
    n_out, n_in = weights.shape
    x_codes, x_scales = quantize_rows(x.reshape(-1, n_in))
    total = torch.zeros(len(x_codes), n_out)
    for block in range(n_in // BLOCK):
        inputs = slice(block * BLOCK, (block + 1) * BLOCK)
        few, scale = x_codes[:, inputs].float(), x_scales[:, block, None]
        codes = weights.codes[:, inputs].float() - (_MIDDLE if weights.lows is None else 0)
        # Below 2^24: fp32 holds these sums exactly.
        term = (scale * weights.scales[:, block].float()) * (few @ codes.T)
        if weights.lows is not None:
            term += weights.lows[:, block].float() * (scale * few.sum(1, keepdim=True))
        total += term
    if bias is not None:
        total += bias.float()
    return total.to(x.dtype).reshape(*x.shape[:-1], n_out)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -127..127 [rows, n_in], as fp32 whole numbers, and fp32 scales [rows, n_in // 32] of x [rows, n_in].

    scale = max|x| / 127, code = x * (1 / scale) to the nearest, even at ties; a block of zeros has scale 0. A block
    with a NaN or an infinity is NaN.
    """
    blocks = in_blocks(x.float())
    scales = blocks.abs().amax(-1) / 127
    inverse = torch.where(scales == 0, scales, 1 / scales)
    return (blocks * inverse[..., None]).round().flatten(1), scales


def in_blocks(rows: Tensor) -> Tensor:
    """[n, n_in] as [n, n_in // 32, 32]."""
    return rows.reshape(rows.shape[0], rows.shape[1] // BLOCK, BLOCK)


def _symmetric(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks [..., 32] at 8 bits."""
    scales = (blocks.abs().amax(-1) / 127).half()
    codes = _nearest(blocks, scales, None).clamp_(-127, 127) + _MIDDLE
    return codes.to(torch.uint8), scales


def _with_low(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and lows of blocks [..., 32] at 4 bits."""
    least = blocks.amin(-1)
    scales, lows = ((blocks.amax(-1) - least) / 15).half(), least.half()
    codes = _nearest(blocks, scales, lows).clamp_(0, 15)
    error = _error(blocks, codes, scales, lows)
    for _ in range(_ROUNDS):
        fitted = _fit(blocks, codes)
        tried = _nearest(blocks, *fitted).clamp_(0, 15)
        tried_error = _error(blocks, tried, *fitted)
        better = tried_error < error
        scales, lows = torch.where(better, fitted[0], scales), torch.where(better, fitted[1], lows)
        codes = torch.where(better[..., None], tried, codes)
        error = torch.where(better, tried_error, error)
    return codes.to(torch.uint8), scales, lows


def _nearest(blocks: Tensor, scales: Tensor, lows: Tensor | None) -> Tensor:
    """(w - low) / scale, rounded; 0 where the scale is 0."""
    scale = scales.float()
    inverse = torch.where(scale == 0, scale, 1 / scale)[..., None]
    return ((blocks if lows is None else blocks - lows.float()[..., None]) * inverse).round_()


def _fit(blocks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and lows with the least squared error for these codes; NaN where all codes of a block are alike."""
    n, n_codes, n_squares = float(BLOCK), _sum(codes), _sum(codes * codes)
    n_weights, n_products = _sum(blocks), _sum(blocks * codes)
    scales = ((n * n_products - n_codes * n_weights) / (n * n_squares - n_codes * n_codes)).half()
    return scales, ((n_weights - scales.float() * n_codes) / n).half()


def _error(blocks: Tensor, codes: Tensor, scales: Tensor, lows: Tensor) -> Tensor:
    wrong = codes * scales.float()[..., None] + lows.float()[..., None] - blocks
    return _sum(wrong * wrong)


def _sum(blocks: Tensor) -> Tensor:
    """Over the 32 of a block, in an order that does not depend on the processor: KV is bound to the rule alone."""
    half = BLOCK // 2
    while half:
        blocks = blocks[..., :half] + blocks[..., half:]
        half //= 2
    return blocks[..., 0]
