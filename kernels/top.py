"""The best k positions of rows of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.kernels.native_library import BUILT, lib
from sessiond.kernels.scratch import scratch


def top_reference(scores: Tensor, k: int) -> Tensor:
    """Positions of the `k` highest scores [G, T] of each row, ascending; all, if there are no more. Ties: the earlier.

    The same scores give the same choice on every run. NaN comes last.
    """
    n_groups, n = scores.shape
    if k >= n:
        return torch.arange(n).expand(n_groups, -1)
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # A stable sort says the same in several times the time. Of topk only the values are sure, not its order of ties.
    least = scores.topk(max(k, 1), -1).values.amin(-1, keepdim=True)
    above, tied = scores > least, scores == least
    room = k - above.sum(-1, keepdim=True)
    return (above | tied & (tied.cumsum(-1) <= room)).nonzero()[:, 1].view(n_groups, k)


def top(scores: Tensor, k: int) -> Tensor:
    """`top_reference`, compiled for fp32: the same positions."""
    n_groups, n = scores.shape
    if k >= n or k <= 0 or not BUILT or scores.dtype is not torch.float32 or scores.device.type != "cpu":
        return top_reference(scores, k)
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    out = torch.empty(n_groups, k, dtype=torch.int64)
    room = scratch(n_groups * 3 * (n + 16))
    lib.select_top(scores.data_ptr(), scores.stride(0), n_groups, n, k, out.data_ptr(), room, torch.get_num_threads())
    return out
