"""RocketKV's stage 2 (Behnam et al. 2025, arXiv 2502.14051): the best tokens of a turn set, by bounds of its pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sessiond.kernels import page_bounds
from sessiond.kernels.native_library import lib
from sessiond.kernels.scratch import scratch
from sessiond.kernels.top import top_reference

MOST_SHARE = 16  # query heads of a group, in the compiled kernel


@dataclass(frozen=True, slots=True)
class PagedSet:
    """`n_tokens` tokens in pages of `size`, of which the first `n_set` may be chosen; bounds [2, G, pages, D]."""

    bounds: Tensor
    size: int
    n_tokens: int
    n_set: int

    @property
    def n_pages(self) -> int:
        return -(-self.n_tokens // self.size)


def choose_reference(query: Tensor, among: PagedSet, n_channels: int, n_chosen: int, scaling: float) -> Tensor:
    """The places [G, K] in the set, ascending, of the tokens with most estimated attention, a group's heads summed.

    query [G, R, D]; the estimate uses the `n_channels` channels in which a group's queries are strongest.
    """
    query = query.float()
    strongest = top_reference(query.abs().sum(1), n_channels)
    used = torch.zeros_like(query[:, 0]).scatter_(1, strongest, 1)[:, None]
    partial = query * used
    # SparQ (arXiv 2312.04985): fewer channels give smaller products; divide by the share that is left.
    share = partial.abs().sum(-1, keepdim=True) / query.abs().sum(-1, keepdim=True).clamp_min(1e-30)
    scaling_left = scaling / share.clamp_min(1e-30).sqrt()
    rising = query.sum(1, keepdim=True) > 0
    scores = page_bounds.scores_reference(partial, among.bounds, among.n_pages, rising) * scaling_left
    scores = scores.repeat_interleave(among.size, -1)[..., : among.n_tokens]
    return top_reference(scores.softmax(-1).sum(1)[:, : among.n_set], n_chosen)


def choose(query: Tensor, among: PagedSet, n_channels: int, n_chosen: int, scaling: float) -> Tensor:
    """`choose_reference`, compiled where it can be: the same places, but where estimates tie in all but rounding."""
    n_groups, n_share, head_dim = query.shape
    page_bounds.check(query, among.bounds, among.n_pages)
    if not 0 < n_channels <= head_dim or not 0 < n_chosen <= among.n_set <= among.n_tokens:
        raise ValueError(f"{n_chosen} of {among.n_set} of {among.n_tokens} tokens, {n_channels} of {head_dim} channels")
    bounds = among.bounds
    if not page_bounds.supported(query, bounds) or n_share > MOST_SHARE:
        return choose_reference(query, among, n_channels, n_chosen, scaling)
    query = query.contiguous()
    out = torch.empty(n_groups, n_chosen, dtype=torch.int64)
    lib.rocket_choose(
        query.data_ptr(),
        query.dtype is torch.bfloat16,
        bounds.data_ptr(),
        bounds.data_ptr() + bounds.stride(0) * bounds.element_size(),
        bounds.stride(1),
        bounds.dtype is torch.bfloat16,
        n_groups,
        n_share,
        head_dim,
        among.n_tokens,
        among.size,
        among.n_set,
        n_channels,
        n_chosen,
        scaling,
        out.data_ptr(),
        scratch(lib.rocket_room(n_groups, among.n_pages, among.size)),
        torch.get_num_threads(),
    )
    return out
