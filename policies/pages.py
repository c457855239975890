"""Summaries of pages of keys: each channel's smallest and largest value. A page's score comes without its keys."""

from __future__ import annotations

from torch import Tensor

from sessiond.kernels import page_bounds
from sessiond.kernels.rocket import PagedSet


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
        if self._bounds is None:
            return 0
        _, n_groups, _, head_dim = self._bounds.shape
        return 2 * n_groups * self.n_pages * head_dim * self._bounds.element_size()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest values, each [G, P, D]. There must be a page."""
        assert self._bounds is not None
        return self._bounds[0, :, : self.n_pages], self._bounds[1, :, : self.n_pages]

    def extend(self, keys: Tensor) -> None:
        """Append keys [G, N, D], which stand at [length, length + N); only they are read."""
        end = self.length + keys.shape[1]
        if keys.shape[1]:
            page_bounds.extend(keys, self._room(keys, -(-end // self.size)), self.length, self.size)
        self.length = end

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
        return page_bounds.scores(query, self._kept(), self.n_pages, rising)

    def best(self, query: Tensor) -> Tensor:
        """The bound [G, P] of a page's products with the queries [G, R, D] of a group, the best of them."""
        return page_bounds.best_scores(query, self._kept(), self.n_pages)

    def first(self, n: int) -> PagedSet:
        """All tokens, of which the first `n` may be chosen."""
        return PagedSet(self._kept(), self.size, self.length, n)

    def _kept(self) -> Tensor:
        assert self._bounds is not None
        return self._bounds

    def _room(self, like: Tensor, needed: int) -> Tensor:
        """A store with room for `needed` pages, what there is kept. It grows by a quarter, so copies are few."""
        if self._bounds is None or self._bounds.shape[2] < needed:
            grown = like.new_empty(2, like.shape[0], needed + needed // 4, like.shape[-1])
            if self._bounds is not None:
                grown[:, :, : self.n_pages] = self._bounds[:, :, : self.n_pages]
            self._bounds = grown
        return self._bounds
