"""Pages of keys by each channel's smallest and largest value (Quest, arXiv 2406.10774): made, and scored.

Bounds are [2, G, pages, D], smallest first, in the keys' dtype; queries [G, R, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.kernels.native_library import BUILT, lib

KINDS = (torch.bfloat16, torch.float32)
MOST_DIM = 256  # of the compiled kernels


def extend_reference(keys: Tensor, bounds: Tensor, first: int, size: int) -> None:
    """Take keys [G, N, D], which stand at [first, first + N), into the bounds of their pages of `size`."""
    for i in range(keys.shape[1]):
        key, (page, place) = keys[:, i], divmod(first + i, size)
        low, high = (key, key) if place == 0 else (bounds[0, :, page].clone(), bounds[1, :, page].clone())
        bounds[0, :, page], bounds[1, :, page] = torch.minimum(low, key), torch.maximum(high, key)


def extend(keys: Tensor, bounds: Tensor, first: int, size: int) -> None:
    """`extend_reference`, compiled where it can be: the same bounds."""
    n_groups, n, head_dim = keys.shape
    there = bounds.shape
    if (
        there[0] != 2
        or there[1] != n_groups
        or there[2] * size < first + n
        or there[3] != head_dim
        or bounds.dtype != keys.dtype
    ):
        raise ValueError(f"bounds of shape {tuple(there)} for {first + n} keys in pages of {size}")
    if not supported(keys, bounds) or keys.stride(2) != 1:
        extend_reference(keys, bounds, first, size)
        return
    lib.pages_extend(
        keys.data_ptr(),
        keys.stride(0),
        keys.stride(1),
        bounds.data_ptr(),
        bounds.data_ptr() + bounds.stride(0) * bounds.element_size(),
        bounds.stride(1),
        keys.dtype is torch.bfloat16,
        n_groups,
        first,
        n,
        size,
        head_dim,
    )


def scores_reference(query: Tensor, bounds: Tensor, n_pages: int, rising: Tensor | None = None) -> Tensor:
    """Products of queries with a page's largest values in `rising` channels, its smallest in others: [G, R, P] fp32.

    `rising` bool [G, R or 1, D]; None: where the query is above 0, and then no key of the page has a larger product.
    """
    low, high = bounds[0, :, :n_pages].float(), bounds[1, :, :n_pages].float()
    query = query.float()
    rising = query > 0 if rising is None else rising
    return query.masked_fill(~rising, 0) @ high.mT + query.masked_fill(rising, 0) @ low.mT


def scores(query: Tensor, bounds: Tensor, n_pages: int, rising: Tensor | None = None) -> Tensor:
    """`scores_reference`, compiled where it can be: sums in fp32."""
    if rising is not None and (rising.shape[1] not in (1, query.shape[1]) or rising.dtype is not torch.bool):
        raise ValueError(f"rising of shape {tuple(rising.shape)} and type {rising.dtype}")
    check(query, bounds, n_pages)
    if not supported(query, bounds) or n_pages == 0:
        return scores_reference(query, bounds, n_pages, rising)
    return _scored(query, bounds, n_pages, rising, best=False)


def best_scores(query: Tensor, bounds: Tensor, n_pages: int) -> Tensor:
    """A page's best score of a group's heads, each with its own sign: [G, P] fp32."""
    check(query, bounds, n_pages)
    if not supported(query, bounds) or n_pages == 0:
        return scores_reference(query, bounds, n_pages).amax(1)
    return _scored(query, bounds, n_pages, None, best=True)


def positions_of(pages: Tensor, size: int, end: int) -> Tensor:
    """The positions in pages [G, K] int64, in their order: [G, K * size]; -1 from `end` on."""
    if not BUILT:
        positions = (pages[..., None] * size + torch.arange(size)).flatten(1)
        return positions.masked_fill(positions >= end, -1)
    pages = pages.contiguous()
    out = torch.empty(pages.shape[0], pages.shape[1] * size, dtype=torch.int64)
    lib.page_positions(pages.data_ptr(), pages.numel(), size, end, out.data_ptr())
    return out


def check(query: Tensor, bounds: Tensor, n_pages: int) -> None:
    """Raises ValueError where a kernel would leave these bounds."""
    there = bounds.shape
    if (
        len(there) != 4
        or there[0] != 2
        or there[1] != query.shape[0]
        or there[2] < n_pages
        or there[3] != query.shape[2]
    ):
        raise ValueError(f"bounds of shape {tuple(there)} for {n_pages} pages, queries {tuple(query.shape)}")


def _scored(query: Tensor, bounds: Tensor, n_pages: int, rising: Tensor | None, *, best: bool) -> Tensor:
    n_groups, n_share, head_dim = query.shape
    query = query.contiguous()
    rising = None if rising is None else rising.contiguous()
    out = torch.empty((n_groups, n_pages) if best else (n_groups, n_share, n_pages), dtype=torch.float32)
    lib.page_scores(
        query.data_ptr(),
        query.dtype is torch.bfloat16,
        0 if rising is None else rising.data_ptr(),
        1 if rising is None else rising.shape[1],
        bounds.data_ptr(),
        bounds.data_ptr() + bounds.stride(0) * bounds.element_size(),
        bounds.stride(1),
        bounds.dtype is torch.bfloat16,
        n_groups,
        n_share,
        n_pages,
        head_dim,
        out.data_ptr(),
        best,
        torch.get_num_threads(),
    )
    return out


def supported(query: Tensor, bounds: Tensor) -> bool:
    """Whether the compiled kernels take these."""
    return (
        BUILT
        and query.shape[2] <= MOST_DIM
        and query.dtype in KINDS
        and bounds.dtype in KINDS
        and bounds.is_contiguous()
        and query.device.type == "cpu"
    )
