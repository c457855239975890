"""One step of sieve: the fewest earlier tokens that hold a mass of estimated attention, by codes of the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sessiond.kernels.key_codes import check_tiles, scores_reference, supported
from sessiond.kernels.native_library import lib
from sessiond.kernels.scratch import scratch
from sessiond.kernels.top import top_reference

# Estimates that differ by less than this share tie: the prior, where there is one, decides. It is far below the error
# of any index. Weights below the other one are none.
TIE = 2.0**-14
NOTHING = 1e-30


@dataclass(frozen=True, slots=True)
class Enough:
    """So many tokens as hold `mass`, rounded up to 16: at least `least`, at most `most`."""

    mass: float
    least: int
    most: int


def heaviest_reference(
    query: Tensor,
    tiles: Tensor,
    n: int,
    n_earlier: int,
    bits: int,
    scaling: float,
    enough: Enough,
    prior: Tensor | None,
) -> Tensor:
    """Positions [G, K], ascending, of those among the first `n_earlier` of `n` keys that weigh most for one query.

    query [G, R, D]; a token weighs the mean of a group's heads, of softmax over all n keys. K is one for all groups.
    `prior` [G, N] fp16 in [0, 1], 1 for tokens behind N: it orders those that weigh the same.
    """
    weights = (scores_reference(query, tiles, n, bits) * scaling).softmax(-1).mean(1)
    own, earlier = weights[:, n_earlier:].sum(-1), weights[:, :n_earlier]
    if prior is not None:
        known = prior[:, :n_earlier].float().clamp(max=1.0)
        known = F.pad(known, (0, n_earlier - known.shape[1]), value=1.0)
        earlier = earlier * (1 + TIE * known) + NOTHING * known
    most = earlier.topk(min(enough.most, n_earlier), -1).values
    held = torch.cumsum(most, -1) + own[:, None]
    needed = int((held < enough.mass).sum(-1).max()) + 1
    return top_reference(earlier, max(enough.least, min(enough.most, -(-needed // 16) * 16)))


def heaviest(
    query: Tensor,
    tiles: Tensor,
    n: int,
    n_earlier: int,
    bits: int,
    scaling: float,
    enough: Enough,
    prior: Tensor | None,
) -> Tensor:
    """`heaviest_reference`, compiled where it can be: the same positions, but where estimates tie in all but rounding.

    Weights below e^-87 of a head's largest are none.
    """
    n_groups, n_share, head_dim = query.shape
    check_tiles(tiles, n_groups, n, head_dim, bits)
    if not 0 <= n_earlier <= n or not 1 <= enough.least <= enough.most:
        raise ValueError(f"{n_earlier} of {n} tokens, {enough}")
    if not supported(query) or n == 0:
        return heaviest_reference(query, tiles, n, n_earlier, bits, scaling, enough, prior)
    known, stride, n_known = 0, 0, 0
    if prior is not None:
        if prior.shape[0] != n_groups:
            raise ValueError(f"a prior of shape {tuple(prior.shape)} for {n_groups} groups")
        prior = prior.half().contiguous()
        known, stride, n_known = prior.data_ptr(), prior.stride(0), prior.shape[1]
    query = query.contiguous()
    out = torch.empty(n_groups * min(enough.most, n_earlier), dtype=torch.int64)
    count = lib.sieve_choose(
        tiles.data_ptr(),
        tiles.stride(0),
        query.data_ptr(),
        query.dtype is torch.bfloat16,
        n_groups,
        n_share,
        head_dim,
        bits,
        n,
        n_earlier,
        scaling,
        known,
        stride,
        n_known,
        TIE,
        NOTHING,
        enough.mass,
        enough.least,
        enough.most,
        out.data_ptr(),
        scratch(lib.sieve_room(n_groups, n_share, n, enough.most)),
        torch.get_num_threads(),
    )
    return out[: n_groups * count].view(n_groups, count)
