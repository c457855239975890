"""Rows of numbers in 2, 4 or 8 bits: asymmetric, a scale and a low for each group of a row (METHODS.md, first table).

A row of D numbers in P groups: D codes, [D * bits / 8 rounded up] bytes, and 2P bf16 numbers, scales before lows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sessiond.kernels.native_library import BUILT, lib

KINDS = (torch.bfloat16, torch.float32)
MOST_WIDTH = 1024  # of the compiled kernel


def quantize_reference(rows: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int) -> None:
    """Fill codes [G, n, B] uint8 and scales [G, n, 2P] bf16 for rows [G, n, D]; `group` numbers share one scale."""
    width = rows.shape[-1]
    # The last number fills a short group up, which changes no bound.
    filling = rows[..., -1:].expand(*rows.shape[:-1], -width % group)
    new = torch.cat([rows, filling], -1).float().view(*rows.shape[:-1], -1, group)
    low, high = new.amin(-1), new.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8).to(torch.bfloat16)
    low = low.to(torch.bfloat16)
    wide = ((new - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
    codes.copy_(_packed(wide.nan_to_num().to(torch.uint8).flatten(-2)[..., :width], bits))
    scales.copy_(torch.cat([scale, low], -1))


def quantize(rows: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int) -> None:
    """`quantize_reference`, compiled where it can be: the same bytes."""
    n_groups, n, width = rows.shape
    n_shares = -(-width // group)
    if codes.shape != (n_groups, n, -(-width * bits // 8)) or scales.shape != (n_groups, n, 2 * n_shares):
        raise ValueError(f"codes of shape {tuple(codes.shape)} for rows {tuple(rows.shape)} in {bits} bits")
    if (
        not BUILT
        or width > MOST_WIDTH
        or rows.dtype not in KINDS
        or rows.device.type != "cpu"
        or codes.dtype is not torch.uint8
        or scales.dtype is not torch.bfloat16
        or codes.stride(2) != 1
        or scales.stride(2) != 1
    ):
        quantize_reference(rows, codes, scales, bits, group)
        return
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    lib.quantize_rows(
        rows.data_ptr(),
        rows.dtype is torch.bfloat16,
        rows.stride(0),
        rows.stride(1),
        codes.data_ptr(),
        codes.stride(0),
        codes.stride(1),
        scales.data_ptr(),
        scales.stride(0),
        scales.stride(1),
        n_groups,
        n,
        width,
        bits,
        group,
        1 if n < 16 else torch.get_num_threads(),
    )


def _packed(codes: Tensor, bits: int) -> Tensor:
    """[..., D] codes below 2^bits to [..., B] bytes, B = D * bits / 8 rounded up; the first in the lowest bits."""
    parts = F.pad(codes, (0, -codes.shape[-1] % (8 // bits))).chunk(8 // bits, -1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << (i * bits)
    return packed
