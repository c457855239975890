"""What the attention twins share: softmax block by block, and the joining of parts of one row's keys.

Online softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867). Parts as in flash-decoding (Dao et al. 2023): each
leaves its own weighted mean of values and the logarithm of its weights' sum. Logarithms are to base 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
# Keys of one part. Fixed, so that the order of a row's sums depends on its own length and not on the batch.
SPLIT = 256
BLOCK_KEYS = 64
BLOCK_ROWS = 64


def padded(n: int) -> int:
    """The power of two that holds `n`; matrix products of tiles want at least 16."""
    return 1 << max(4, (n - 1).bit_length())


@triton.jit
def weigh(scores: tl.tensor, largest: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Weights of scores [M, N], what sums so far [M] are worth now, and the largest score [M]. -inf: not seen."""
    now = tl.maximum(largest, tl.max(scores, 1))
    floor = tl.where(now == float("-inf"), 0.0, now)
    return tl.exp2(scores - floor[:, None]), tl.exp2(largest - floor), now


@triton.jit
def absorb(
    scores: tl.tensor, values: tl.tensor, mean: tl.tensor, total: tl.tensor, largest: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take a block of scores [M, N] with its values [N, D] into `mean` [M, D] (not yet divided by `total` [M])."""
    weights, shrink, largest = weigh(scores, largest)
    total = total * shrink + tl.sum(weights, 1)
    mean = mean * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return mean, total, largest


@triton.jit
def leave(
    means: tl.tensor,
    logs: tl.tensor,
    at: tl.tensor,
    there: tl.tensor,
    mean: tl.tensor,
    total: tl.tensor,
    largest: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Store the parts of M rows at `at` [M] of means [*, D] and logs [*], where `there` [M].

    A row that saw nothing leaves the logarithm -inf and no mean.
    """
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    tl.store(logs + at, tl.where(some, largest + tl.log2(divisor), float("-inf")), mask=there)
    channels = tl.arange(0, BLOCK_D)
    inside = (there & some)[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(means + at[:, None] * HEAD_DIM + channels[None, :], mean / divisor[:, None], mask=inside)


@triton.jit
def _join(
    means: tl.tensor,
    logs: tl.tensor,
    out: tl.tensor,
    n_parts: int,
    n_heads: int,
    n_new: int,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One row [D] of all its parts; rows come as [B, H, Q] and go as [B, Q, H].

    One part after another: those that saw nothing change no bit, so it does not matter how many others the batch needs.
    """
    row = tl.program_id(0).to(tl.int64)
    session, head, new = row // (n_heads * n_new), row // n_new % n_heads, row % n_new
    channels = tl.arange(0, BLOCK_D)
    inside = channels < HEAD_DIM
    mean = tl.zeros([BLOCK_D], tl.float32)
    one = tl.arange(0, 1)
    total = tl.zeros([1], tl.float32)
    largest = tl.full([1], float("-inf"), tl.float32)
    for part in range(n_parts):
        at = row * n_parts + part
        log = tl.load(logs + at + one)
        now = tl.maximum(largest, log)
        floor = tl.where(now == float("-inf"), 0.0, now)
        weight, shrink = tl.exp2(log - floor), tl.exp2(largest - floor)
        # What saw nothing left no mean.
        of_part = tl.load(means + at * HEAD_DIM + channels, inside & (log > float("-inf")), other=0.0)
        mean = mean * shrink + weight * of_part
        total = total * shrink + weight
        largest = now
    mean = mean / tl.where(total > 0, total, 1.0)
    to = out + ((session * n_new + new) * n_heads + head) * HEAD_DIM
    tl.store(to + channels, mean.to(out.dtype.element_ty), mask=inside)


class Parts:
    """Room for `n` parts of each row of queries [B, H, Q, D]."""

    def __init__(self, query: Tensor, n: int) -> None:
        self.n = n
        rows = query.shape[:-1].numel()
        self.means = query.new_empty(rows, n, query.shape[-1], dtype=torch.float32)
        self.logs = query.new_empty(rows, n, dtype=torch.float32)

    def join(self, query: Tensor) -> Tensor:
        """The attention of queries [B, H, Q, D] over all parts: [B, Q, H, D]. A row that saw no key is 0."""
        n_sessions, n_heads, n_new, head_dim = query.shape
        out = query.new_empty(n_sessions, n_new, n_heads, head_dim)
        _join[(n_sessions * n_heads * n_new,)](
            self.means,
            self.logs,
            out,
            self.n,
            n_heads,
            n_new,
            HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim),
        )
        return out
