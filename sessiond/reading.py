"""What a turn reads, counted while it runs: a few additions a step, and a few for every layer that chooses.

    [0, turn_start)      history: takes part whole, unless a layer chose from it
    [turn_start, end)    the turn's own tokens: take part at every step

Owned by whoever owns the session's cache. It looks closer at the first generated token and at every 16th after it:
where the choice fell, and in some layers which share of full attention's probability it holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sessiond.policies.base import Scan, Taken
from sessiond.types import KVShape, Tier

if TYPE_CHECKING:
    from sessiond.cache import SessionCache

SAMPLE_EVERY = 16  # generated tokens
WEIGHED_TOKENS = 4096  # weights are computed again for so many tokens in a sample: a layer of them, or several of fewer
WEIGHED_TOGETHER = 128  # keys that one small product takes
N_RANGES = 64  # of the context, at most, for which reads are counted apart


def exact_tier(cache: SessionCache) -> Tier:
    """Where exact keys and values of the history are read from."""
    return Tier.DISK if cache.is_offloaded else Tier.DEVICE


def range_bits(n_tokens: int) -> int:
    """Ranges of two to this many tokens cut `n_tokens` into N_RANGES at most."""
    return max(0, (n_tokens - 1).bit_length() - (N_RANGES - 1).bit_length())


class Count:
    """A number for each KV head. What is equal for all is one addition."""

    __slots__ = ("even", "uneven")

    def __init__(self) -> None:
        self.even = 0
        self.uneven: Tensor | None = None

    def add(self, positions: Tensor, *, padded: bool) -> None:
        """Positions [G, K]; `padded`: there are -1 among them, which do not count."""
        if not padded:
            self.even += positions.shape[1]
            return
        more = (positions >= 0).sum(1)
        self.uneven = more if self.uneven is None else self.uneven + more

    def by_head(self, n_groups: int) -> list[int]:
        uneven = [0] * n_groups if self.uneven is None else self.uneven.tolist()
        return [self.even + n for n in uneven]


class FormReads:
    """What a layer took in one form; `stands_in` for keys, for values. `nbytes`: of what stands in, for all heads."""

    __slots__ = ("count", "exact", "form", "nbytes", "stands_in")

    def __init__(self, form: str, stands_in: tuple[bool, bool]) -> None:
        self.form = form
        self.stands_in = stands_in
        self.count = Count()
        self.exact = 0  # of each head's, in keys and values all the same
        self.nbytes = 0


class LayerReads:
    """What one layer chose from the history, and what it read of its index to choose."""

    __slots__ = ("forms", "generated", "last", "missed", "n_chosen", "n_generated", "n_weighed", "prompt", "scans")

    def __init__(self) -> None:
        self.n_chosen = 0  # steps
        self.n_generated = 0  # those of them that were no pieces of the prompt
        self.generated = Count()
        self.forms: dict[tuple[str, bool, bool], FormReads] = {}
        self.scans: dict[str, list[int]] = {}  # tokens and bytes by form
        # The last choice, for a piece and for a generated token: number of its step, and positions [G, K].
        self.prompt: tuple[int, Tensor] | None = None
        self.last: tuple[int, Tensor] | None = None
        self.n_weighed = 0
        self.missed: Tensor | None = None  # [G]: probability that was not attended, summed over samples


class Reading:
    """The record of one turn in a model of this shape.

    `attending`: layers that see all of history; others see the last `window` tokens. `tier`: where exact KV lies.
    """

    def __init__(self, shape: KVShape, attending: Sequence[int], window: int | None, tier: Tier) -> None:
        self.shape = shape
        self.attending = tuple(attending)
        self.window = window
        self.tier = tier
        self.layers = {layer: LayerReads() for layer in attending}
        self.turn_start = 0
        self.n_pieces = self.n_tokens = 0
        self.prompt_end = self.first_end = 0  # of the last piece, and of the first generated token's step
        self.own = self.earlier = self.windowed = 0  # tokens seen, summed over steps, if nothing is left out
        self.select_seconds = self.began = self.computed = 0.0
        self.samples = np.zeros(N_RANGES, np.int64)  # choices by range of the history, all layers and heads
        self._range_bits = 0
        self._sampling = False
        self._weighing: frozenset[int] = frozenset()
        self._next_layer = 0

    @property
    def n_steps(self) -> int:
        return self.n_pieces + self.n_tokens

    @property
    def end(self) -> int:
        """Tokens there were at the last step."""
        return self.first_end + self.n_tokens - 1 if self.n_tokens else self.prompt_end

    def begin(self, turn_start: int) -> None:
        """The turn's own tokens stand at `turn_start` and behind."""
        self.turn_start = turn_start
        self._range_bits = range_bits(turn_start)
        # Another layer first in every turn, so that short turns do not always weigh the same ones.
        self._next_layer = turn_start % max(1, len(self.attending))

    def piece(self, start: int, end: int) -> None:
        """Positions [start, end) of a prompt are about to be computed."""
        self.n_pieces += 1
        self.prompt_end = end
        self._step(start, end)
        self._sampling, self._weighing = False, frozenset()

    def token(self, position: int) -> None:
        """A generated token is about to be computed. They follow each other."""
        if not self.n_tokens:
            self.first_end = position + 1
        self._step(position, position + 1)
        self._sampling = self.n_tokens % SAMPLE_EVERY == 0
        self._weighing = self._layers_to_weigh(position + 1) if self._sampling else frozenset()
        self.n_tokens += 1

    def _step(self, start: int, end: int) -> None:
        if not self.began:
            self.began = time.perf_counter()
        self.own += max(0, end - self.turn_start)
        self.earlier += min(end, self.turn_start)
        if self.window is not None:
            self.windowed += min(end, end - start + self.window - 1)

    def piece_done(self) -> None:
        self.computed = time.perf_counter()

    def _layers_to_weigh(self, end: int) -> frozenset[int]:
        """The next layers in turn. A layer among them that does not choose misses nothing."""
        if not self.attending:
            return frozenset()
        n = min(len(self.attending), max(1, WEIGHED_TOKENS // end))
        chosen = [self.attending[(self._next_layer + i) % len(self.attending)] for i in range(n)]
        self._next_layer = (self._next_layer + n) % len(self.attending)
        for layer in chosen:
            self.layers[layer].n_weighed += 1
        return frozenset(chosen)

    def scanned(self, layer: int, scan: Scan) -> None:
        """To answer, a layer's selector read this of its index."""
        tally = self.layers[layer].scans.setdefault(scan.form, [0, 0])
        tally[0] += scan.n_tokens
        tally[1] += scan.nbytes

    def chose(self, layer: int, taken: Taken, *, decoding: bool, padded: bool) -> None:
        """A layer took `taken` for the step's queries. `padded`: there are -1 among its positions."""
        reads, positions = self.layers[layer], taken.positions
        reads.n_chosen += 1
        stands_in = taken.keys is not None, taken.values is not None
        form = reads.forms.get((taken.form, *stands_in))
        if form is None:
            form = reads.forms[taken.form, *stands_in] = FormReads(taken.form, stands_in)
        form.count.add(positions, padded=padded)
        form.exact += taken.exact
        form.nbytes += taken.nbytes
        if not decoding:
            reads.prompt = self.n_steps, positions
            return
        reads.last = self.n_steps, positions
        reads.n_generated += 1
        reads.generated.add(positions, padded=padded)
        if self._sampling:
            self.samples += self.by_range(positions)

    @property
    def weighed(self) -> frozenset[int]:
        """Layers whose choice `weigh` is to be shown in the step under way."""
        return self._weighing

    def weigh(self, layer: int, positions: Tensor, query: Tensor, keys: Tensor, scaling: float) -> None:
        """A layer chose positions [G, K] for a generated token's query [H, 1, D]; keys [G, N, D], its own the last."""
        reads, missed = self.layers[layer], self._missed(positions, query, keys, scaling)
        reads.missed = missed if reads.missed is None else reads.missed + missed

    def by_range(self, positions: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """How many of the positions [G, K] of the history lie in each range."""
        at = positions.numpy().ravel()
        return np.bincount(at[at >= 0] >> self._range_bits, minlength=N_RANGES)

    def _missed(self, positions: Tensor, query: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """Full attention's probability outside positions [G, K] and the turn's own, a group's heads averaged: [G]."""
        grouped = query.float().reshape(keys.shape[0], -1, keys.shape[2]) * scaling
        # A few keys at a time: what torch's threads take no part in costs other threads nothing.
        scores = torch.cat([grouped @ some.float().mT for some in torch.split(keys, WEIGHED_TOGETHER, 1)], -1)
        weights = scores.softmax(-1).mean(1)
        held = (weights.gather(1, positions.clamp(min=0).long()) * (positions >= 0)).sum(1)
        held += weights[:, self.turn_start :].sum(1)
        return (1 - held).clamp(0, 1)
