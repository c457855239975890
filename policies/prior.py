"""What is known of a session's tokens before anything is asked: how much the model needs each to repeat the text.

KVzip's scores (Kim et al. 2025, arXiv 2505.23416), kept with the session and extended after later turns. Another
policy may break ties by them, or look only at what they keep.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """Scores [L, G, N] fp16 in [0, 1] of the tokens at [0, N), for each layer and key/value head."""

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
