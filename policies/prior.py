"""What is known of a session's tokens before anything is asked: how much the model needs each to repeat the text.

KVzip's scores (Kim et al. 2025, arXiv 2505.23416), kept with the session and extended after later turns. Another
policy may break ties by them, or look only at what they keep.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sessiond.policies.choosing import top

# In place of a score: always kept, and no part of what a budget shares out.
ALWAYS = 2.0
BUDGETS = ("pair", "pair-uniform", "head")


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """Scores [L, G, N] fp16 in [0, 1] of the tokens at [0, N), for each layer and key/value head.

    ALWAYS stands where nothing is left out: at the first tokens, and in layers with a sliding window.
    """

    scores: Tensor
    _kept: dict[object, Tensor] = field(default_factory=dict, repr=False)

    @property
    def n(self) -> int:
        return int(self.scores.shape[2])

    @property
    def nbytes(self) -> int:
        return self.scores.nbytes + sum(mask.nbytes for mask in self._kept.values())

    def before(self, n: int) -> Prior | None:
        """The scores of the tokens below `n`."""
        return self if n >= self.n else Prior(self.scores[:, :, :n].clone()) if n > 0 else None

    def followed_by(self, scores: Tensor) -> Prior:
        """With the scores [L, G, M] of the next M tokens."""
        return Prior(torch.cat([self.scores, scores.to(self.scores.dtype)], 2))

    def of(self, layer: int, n: int) -> Tensor:
        """Scores [G, n] fp32, at most 1, of the first `n` tokens in one layer; 1 for those that have none yet."""
        scores = self.scores[layer, :, :n].float().clamp(max=1.0)
        return F.pad(scores, (0, n - scores.shape[1]), value=1.0)

    def rows(self, layer: int) -> Tensor:
        """The scores [G, N] fp16 of one layer as they are kept: some above 1."""
        return self.scores[layer]

    def kept(self, share: float, budget: str) -> Tensor:
        """Which tokens `share` of all leaves, [L, G, N] bool; computed once (`kept_by`)."""
        mask = self._kept.get((share, budget))
        if mask is None:
            mask = self._kept[share, budget] = kept_by(self.scores, share, budget)
        return mask

    def to_bytes(self) -> bytes:
        """The scores as little-endian fp16, [L, G, N] in C order."""
        return self.scores.contiguous().numpy().astype("<f2").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, n_layers: int, n_groups: int) -> Prior:
        """The inverse of `to_bytes`. Raises ValueError if the bytes are not of that shape."""
        scores = np.frombuffer(data, "<f2").astype(np.float16).reshape(n_layers, n_groups, -1)
        return cls(torch.from_numpy(scores))


def all_kept(n_layers: int, n_groups: int, n: int) -> Prior:
    """A prior of `n` tokens that are always kept."""
    return Prior(torch.full((n_layers, n_groups, n), ALWAYS, dtype=torch.float16))


def kept_by(scores: Tensor, share: float, budget: str) -> Tensor:
    """What is kept of scores [L, G, N]: bool of that shape. Ties go to the earlier layer, then head, then token.

    `pair`: the best `share` of all, wherever they are. `pair-uniform`: of each head. `head`: whole heads, by their
    best token. What scores ALWAYS is kept beside them.
    """
    n_layers, n_groups, n = scores.shape
    rows = scores.float().view(-1, n)
    counted = rows <= 1
    mask = ~counted
    rows = rows.masked_fill(mask, -1.0)
    if budget == "pair":
        best = top(rows.view(1, -1), round(share * int(counted.sum())))
        mask.view(-1)[best[0]] = True
    elif budget == "pair-uniform":
        chosen = counted.any(1)
        if bool(chosen.any()):
            best = top(rows[chosen], round(share * int(counted.sum(1).max())))
            mask[chosen] = mask[chosen].scatter(1, best, True)
    else:
        heads = rows.amax(1) if n else rows.new_zeros(len(rows))
        mask[top(heads[None], round(share * int(counted.any(1).sum())))[0]] = True
    return mask.view(n_layers, n_groups, n)
