"""Matrix product of few rows with a bf16 weight: the bulk of a decode step, bound by reading the weights once.

torch's bf16 product takes two to three times as long for one row (docs/benchmarks.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sessiond.kernels.native_library import AVX512_BF16, lib

# From so many rows on torch's blocked product is faster.
MOST_ROWS = 64
STEP = 32  # inputs a step: n_in must be a multiple


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., n_in] @ weight [n_out, n_in].T + bias [n_out]."""
    return F.linear(x, weight, bias)


def invariant_rows(weight: Tensor) -> int:
    """With so many rows at most, `linear` gives each the same bits as alone."""
    return MOST_ROWS if _compiled(weight) else 1


def _compiled(weight: Tensor) -> bool:
    return (
        AVX512_BF16
        and weight.shape[1] % STEP == 0
        and weight.dtype is torch.bfloat16
        and weight.is_contiguous()
        and weight.device.type == "cpu"
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_reference`, by the compiled kernel where it is the faster one: bf16 and at most MOST_ROWS rows.

    A row's result is then the same alone and beside others. Sums in fp32, rounded once.
    """
    n_out, n_in = weight.shape
    rows = x.numel() // n_in
    if not 0 < rows <= MOST_ROWS or x.dtype is not torch.bfloat16 or not _compiled(weight):
        return linear_reference(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], n_out))
    lib.linear_bf16(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        n_in,
        n_out,
        torch.get_num_threads(),
    )
    return out
