"""A policy at work in one session: asks its selectors, layer by layer, which tokens take part.

What selectors derive from KV must not outlive it: `keep` is called whenever positions are given up, `renew` whenever
they are computed again.
A selector that raises is not asked again in that turn: attention is then full, which is always right.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog
import torch
from torch import Tensor

from sessiond.kernels.chosen import positions_told
from sessiond.kernels.coded import CodedRows
from sessiond.kernels.rope import Rope
from sessiond.kernels.sieved import Sieved, SieveIndex
from sessiond.policies.base import LayerView, Policy, Selector, Taken
from sessiond.policies.prior import Prior

if TYPE_CHECKING:
    from sessiond.reading import Reading

log = structlog.get_logger()


class Selection:
    """Owned by whoever owns the session's cache, whose KV it speaks of."""

    def __init__(self, policy: Policy, n_layers: int) -> None:
        self.policy = policy
        self.turn_start = 0
        self.failure: Exception | None = None
        self.prior: Prior | None = None
        self.reading: Reading | None = None  # is told what is chosen
        self._selectors: list[Selector | None] = [policy.selector(layer, n_layers) for layer in range(n_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that what the selectors derived occupies."""
        return sum(selector.nbytes for selector in self._selectors if selector is not None)

    def begin_turn(self, turn_start: int, *, again: bool = False) -> None:
        """A turn's own tokens stand at `turn_start` and behind. `again`: it had begun before."""
        self.turn_start = turn_start
        self.failure = self.failure if again else None

    def keep(self, n: int) -> None:
        """Positions from `n` on hold nothing."""
        for selector in self._selectors:
            if selector is not None:
                selector.keep(n)

    def renew(self, n: int) -> None:
        """Positions from `n` on are computed again."""
        for selector in self._selectors:
            if selector is not None:
                selector.renew(n)

    def branch(self, n: int) -> Selection:
        """What is known of the first `n` positions, for another session that shares them."""
        other = Selection(self.policy, len(self._selectors))
        other._selectors = copy.deepcopy(self._selectors)
        other.turn_start = self.turn_start
        other.keep(n)
        return other

    def choose(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        position: int,
        scaling: float,
        rope: Rope | None = None,
        *,
        decoding: bool,
    ) -> Taken | None:
        """Earlier positions that take part for queries [H, Q, D] at `position` and on; None: all (LayerView, Selector).

        keys and values [G, capacity, D] hold the queries' own already. History that is computed again attends to all,
        also where a piece of a prompt begins in it.
        """
        selector, end = self._selectors[layer], position + query.shape[1]
        if selector is None or self.failure is not None or end <= self.turn_start:
            return None
        if position < self.turn_start and not self.policy.dense_prompt:
            return None
        view = LayerView(query, keys[:, :end], values[:, :end], position, self.turn_start, scaling, rope, self.prior)
        began = time.perf_counter()
        try:
            answer = selector.step(view) if decoding else selector.prompt(view)
            chosen = Taken(answer, None, None, "exact", 0) if isinstance(answer, Tensor) else answer
            padded = chosen is not None and self._check(chosen, keys)
        except Exception as error:
            log.exception("policy failed; this turn attends to everything", policy=self.policy.name)
            self.failure = error
            return None
        self._tell_time(began)
        if chosen is None:
            return None
        if self.policy.dense_prompt and not decoding:
            return None  # all of them; prompts under such a policy may be canonical
        whole = chosen.positions.shape[1] >= self.turn_start and not padded  # padded: of some heads only
        taken = None if whole and chosen.keys is None and chosen.values is None else chosen
        self._tell(layer, selector, taken, view, decoding=decoding, padded=padded)
        return taken

    def compiled(self, layers: Sequence[int], position: int, n_groups: int, head_dim: int) -> Sieved | None:
        """What chooses for one decoded token at `position` inside of the compiled layers; None: `choose` does.

        `layers`: those that see all of history; no other is asked.
        """
        if self.failure is not None or self.prior is not None or position < self.turn_start:
            return None
        indexes: list[SieveIndex | None] = [None] * len(self._selectors)
        for layer in layers:
            selector = self._selectors[layer]
            if selector is not None:
                indexes[layer] = selector.compiled(position + 1)
                if indexes[layer] is None:
                    return None
        return Sieved(indexes, n_groups, head_dim, self.turn_start, position)

    @property
    def looked_at(self) -> frozenset[int]:
        """Layers in which `choose` is to be asked in the step under way, whatever is compiled."""
        return frozenset() if self.reading is None else self.reading.weighed

    def compiled_done(self, sieved: Sieved, end: int) -> None:
        """The layers are computed: take note of what was chosen in them for the token before `end`."""
        if self.reading is not None:
            self.reading.select_seconds += sieved.seconds
        for layer, selector in enumerate(self._selectors):
            positions = sieved.chosen(layer)
            if selector is None or positions is None:
                continue
            selector.compiled_done(end)
            everything = positions.shape[1] >= self.turn_start
            taken = None if everything else Taken(positions, None, None, "exact", 0)
            self._tell(layer, selector, taken, None, decoding=True, padded=False)

    def _tell_time(self, began: float) -> None:
        if self.reading is not None:
            self.reading.select_seconds += time.perf_counter() - began

    def _tell(
        self,
        layer: int,
        selector: Selector,
        taken: Taken | None,
        view: LayerView | None,
        *,
        decoding: bool,
        padded: bool,
    ) -> None:
        """Have an answer counted, and weighed if it is to be and `view` shows what it was chosen from.

        A statistic must not end the step, and with it other sessions' turns.
        """
        if self.reading is None:
            return
        try:
            if (scan := selector.scan) is not None:
                self.reading.scanned(layer, scan)
            if taken is not None:
                self.reading.chose(layer, taken, decoding=decoding, padded=padded)
                if view is not None and layer in self.reading.weighed:
                    self.reading.weigh(layer, taken.positions, view.query, view.keys, view.scaling)
        except Exception:
            log.exception("what a turn reads is not counted any further", policy=self.policy.name)
            self.reading = None

    def rest(self, layer: int, keys: Tensor, values: Tensor, length: int, rope: Rope | None) -> None:
        """The turn is over: let the selector of a layer catch up with `length` tokens. Nobody waits for it."""
        selector = self._selectors[layer]
        if selector is None or self.failure is not None:
            return
        nothing = keys.new_empty(keys.shape[0], 0, keys.shape[2])
        view = LayerView(nothing, keys[:, :length], values[:, :length], length, length, 1.0, rope, self.prior)
        try:
            with torch.inference_mode():  # as in a step: what one made, the other extends
                selector.rest(view)
        except Exception as error:
            log.exception("policy failed after a turn; it is not asked again before the next", policy=self.policy.name)
            self.failure = error

    def _check(self, chosen: Taken, keys: Tensor) -> bool:
        """An answer outside what was asked for would read other memory, or end the step of other sessions too.

        Returns whether there are -1 in it.
        """
        at, n_groups = chosen.positions, keys.shape[0]
        if at.ndim != 2 or at.shape[0] != n_groups or at.is_floating_point():
            raise ValueError(f"positions of shape {tuple(at.shape)} and type {at.dtype}")
        if chosen.whole and at.shape[1] > self.turn_start:
            raise ValueError(f"{at.shape[1]} positions before {self.turn_start}")
        padded = not chosen.whole and positions_told(at, self.turn_start)
        for form in (chosen.keys, chosen.values):
            if isinstance(form, CodedRows):
                form.check(n_groups, at.shape[1] if chosen.whole else self.turn_start, keys.shape[2])
            elif form is not None and (form.shape != (*at.shape, keys.shape[2]) or form.dtype != keys.dtype):
                raise ValueError(f"{chosen.form} of shape {tuple(form.shape)} and type {form.dtype}")
        return padded
