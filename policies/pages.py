"""Summaries of pages of keys: each channel's smallest and largest value. A page's score comes without its keys."""

from __future__ import annotations

import torch
from torch import Tensor


class Pages:
    """The keys appended so far in pages of `size`, the last page perhaps not full.

    G key/value heads, N keys, P pages, D channels. Summaries keep the keys' dtype, so they are exact.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.length = 0
        # [2, G, room for pages, D]: smallest values, then largest; what lies from `n_pages` on is undefined.
        self._bounds: Tensor | None = None

    @property
    def n_pages(self) -> int:
        return -(-self.length // self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, room to grow included."""
        return 0 if self._bounds is None else self._bounds.nbytes

    @property
    def read_bytes(self) -> int:
        """Bytes of the bounds of all pages: what scores read."""
        return sum(bounds.nbytes for bounds in self.bounds()) if self.n_pages else 0

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest values, each [G, P, D]. There must be a page."""
        assert self._bounds is not None
        return self._bounds[0, :, : self.n_pages], self._bounds[1, :, : self.n_pages]

    def extend(self, keys: Tensor) -> None:
        """Append keys [G, N, D], which stand at [length, length + N); only they are read."""
        taken = min(-self.length % self.size, keys.shape[1])
        if taken:
            low, high = self.bounds()
            low[:, -1] = torch.minimum(low[:, -1], keys[:, :taken].amin(1))
            high[:, -1] = torch.maximum(high[:, -1], keys[:, :taken].amax(1))
            self.length += taken
        if taken < keys.shape[1]:
            self._append(keys[:, taken:])

    def keep(self, n: int) -> None:
        """Forget what depends on positions from `n` on. A page cut by `n` goes too: `length` falls to its beginning,
        and the next `extend` must start there."""
        if n < self.length:
            self.length = n // self.size * self.size

    def cover(self, keys: Tensor, n: int) -> None:
        """Summarise exactly the first `n` of keys [G, N, D]; those known already must not have changed."""
        self.keep(n)
        self.extend(keys[:, self.length : n])

    def scores(self, query: Tensor, rising: Tensor) -> Tensor:
        """Products of queries [G, R, D] with a page's largest values in `rising` channels, its smallest in the others.

        `rising` [G, R or 1, D]; the result [G, R, P], fp32. Where `rising` is the query's own sign, no key of the page
        has a larger product.
        """
        low, high = self.bounds()
        query = query.float()
        falls = query.masked_fill(rising, 0) @ low.float().mT
        return query.masked_fill(~rising, 0) @ high.float().mT + falls

    def _append(self, keys: Tensor) -> None:
        """Add pages for keys [G, N, D], N > 0, of which the first begins a page."""
        # The last key repeated changes neither bound of its page.
        filling = keys[:, -1:].expand(-1, -keys.shape[1] % self.size, -1)
        paged = torch.cat([keys, filling], 1).view(keys.shape[0], -1, self.size, keys.shape[-1])
        start, end = self.n_pages, self.n_pages + paged.shape[1]
        bounds = self._room(paged, start, end)
        bounds[0, :, start:end] = paged.amin(2)
        bounds[1, :, start:end] = paged.amax(2)
        self.length += keys.shape[1]

    def _room(self, like: Tensor, used: int, needed: int) -> Tensor:
        """A store with room for `needed` pages, the first `used` kept. It grows by a quarter, so copies are few."""
        if self._bounds is None or self._bounds.shape[2] < needed:
            grown = like.new_empty(2, like.shape[0], needed + needed // 4, like.shape[-1])
            if self._bounds is not None:
                grown[:, :, :used] = self._bounds[:, :, :used]
            self._bounds = grown
        return self._bounds
