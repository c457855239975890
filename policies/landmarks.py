"""Means of chunks of keys, and how well each mean stands for its keys (ShadowKV, arXiv 2410.21465)."""

from __future__ import annotations

import torch
from torch import Tensor


class Landmarks:
    """The whole chunks of `chunk` keys each at [0, n_chunks * chunk).

    `means` [G, P, D], in the keys' dtype. `coherence` [G, P], fp32: the smallest cosine between a mean and its keys.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self.n_chunks = 0
        self.means = self.coherence = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.means.nbytes + self.coherence.nbytes

    def keep(self, n: int) -> None:
        """Forget what depends on positions from `n` on: a chunk that is cut goes."""
        if n // self._chunk < self.n_chunks:
            self.n_chunks = n // self._chunk
            self.means = self.means[:, : self.n_chunks].clone()
            self.coherence = self.coherence[:, : self.n_chunks].clone()

    def cover(self, keys: Tensor, n: int) -> None:
        """Take the whole chunks among the first `n` of keys [G, T, D]; those known already must not have changed."""
        end = n // self._chunk
        if end <= self.n_chunks:
            return
        new = keys[:, self.n_chunks * self._chunk : end * self._chunk].float()
        new = new.view(keys.shape[0], -1, self._chunk, keys.shape[2])
        means = new.mean(2)
        coherence = torch.cosine_similarity(new, means[:, :, None], -1).amin(-1)
        means = means.to(keys.dtype)
        if self.n_chunks:
            means, coherence = torch.cat([self.means, means], 1), torch.cat([self.coherence, coherence], 1)
        self.means, self.coherence, self.n_chunks = means, coherence, end
