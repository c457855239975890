"""Keys in few bits as an index: they rank tokens, and nothing else is computed from them."""

from __future__ import annotations

import torch
from torch import Tensor

from sessiond.kernels import key_codes
from sessiond.kernels.heaviest import Enough, heaviest
from sessiond.kernels.key_codes import TILE, tile_bytes


class QuantizedKeys:
    """Codes of the keys at [0, n) of one layer of one session; one scale and low for each token and head.

    Grows and shrinks at its end, by tiles of 16 keys (kernels/key_codes.py).
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self.n = 0
        self._tiles = torch.empty(0, 0, 0, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, room to grow included."""
        return self._tiles.nbytes

    def used(self, n: int) -> int:
        """Bytes of the first `n` keys."""
        return self._tiles.shape[0] * self._tiles.shape[2] * n // TILE

    def keep(self, n: int) -> None:
        self.n = min(self.n, n)

    def extend(self, keys: Tensor) -> None:
        """Take what is new in keys [G, N, D]: those at [n, N)."""
        start, end = self.n, keys.shape[1]
        if end <= start:
            return
        if end > self._tiles.shape[1] * TILE:
            self._grow(keys, end)
        key_codes.pack(keys[:, start:], self._tiles, start, self._bits)
        self.n = end

    def for_next(self, end: int) -> Tensor | None:
        """The tiles, if they hold all keys before `end` but the last, and have room for that one."""
        return self._tiles if self.n == end - 1 and end <= self._tiles.shape[1] * TILE else None

    def took_next(self, end: int) -> None:
        """A kernel has put the key before `end` there."""
        self.n = end

    def scores(self, query: Tensor, n: int) -> Tensor:
        """query [G, R, D] against the first `n` keys: [G, R, n], fp32, without the softmax's scaling."""
        return key_codes.scores(query, self._tiles, n, self._bits)

    def heaviest(
        self, query: Tensor, n: int, n_earlier: int, scaling: float, enough: Enough, prior: Tensor | None
    ) -> Tensor:
        """Positions [G, K] among the first `n_earlier` of `n` keys that hold `enough` (kernels/heaviest.py)."""
        return heaviest(query, self._tiles, n, n_earlier, self._bits, scaling, enough, prior)

    def _grow(self, keys: Tensor, end: int) -> None:
        """Room for `end` keys and a quarter more, so that copies are few."""
        room = -(-max(256, end + end // 4) // TILE)
        tiles = torch.zeros(keys.shape[0], room, tile_bytes(keys.shape[2], self._bits), dtype=torch.uint8)
        if self.n:
            there = -(-self.n // TILE)
            tiles[:, :there] = self._tiles[:, :there]
        self._tiles = tiles
