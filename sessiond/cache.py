"""A session's keys and values in the memory the model computes in, and the transformers Cache that fills it.

Every session reserves address space for its model's whole context, one contiguous run of positions for each layer and
KV head: attention is then one matrix product over any length, and nothing is ever copied to grow. Only pages that were
written cost memory (docs/decisions/0002-reserved-kv.md). Under a policy that reads little of it, the exact KV lies in a
file, of which a step maps one layer at a time (docs/decisions/0012-exact-kv-one-tier-down.md).

    [0, sealed)         canonical KV, a pure function of identity and tokens
    [sealed, length)    provisional KV of this session
    [0, borrowed)       whole cells as an archive had them, or computed behind such: good to build on, not to share
    [length, capacity)  zeros, or rows of a step that was abandoned; never attended
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sessiond.backing import Backing
from sessiond.policies.base import ModelFacts, Policy
from sessiond.policies.prior import Prior
from sessiond.policies.probing import Capture
from sessiond.selection import Selection
from sessiond.types import KVShape, Span

_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_INT_DTYPES = {2: torch.uint16, 4: torch.uint32}

# Keys are attended in multiples of this, so that the shapes of a step change every 64 tokens and not every token.
KEY_GRANULE = 64


def reserved_bytes(shape: KVShape, capacity: int) -> int:
    """Bytes of address space for `capacity` positions."""
    return shape.bytes_per_token * (-(-capacity // KEY_GRANULE) * KEY_GRANULE)


def hot_bytes_per_token(shape: KVShape, policy: Policy, model: ModelFacts, *, offloaded: bool) -> int:
    """Bytes of memory that a token takes under a policy, about: its exact KV, or a layer of it, and the index."""
    exact = shape.bytes_per_token
    return (exact // shape.n_layers if offloaded else exact) + policy.index_bytes(model)


def torch_dtype(shape: KVShape) -> torch.dtype:
    return _TORCH_DTYPES[shape.dtype]


class SessionCache:
    """One session's KV: `keys[layer]` and `values[layer]` are [G, capacity, D].

    Owned by the engine thread while a turn or a sealing step runs, else by the holder of the session's lease.
    Memory that was not written is zero, never NaN: a masked key must not spoil a sum.
    """

    def __init__(self, shape: KVShape, capacity: int, backing: Backing | None = None) -> None:
        """`backing`: memory of its own for `reserved_bytes(shape, capacity)`."""
        self.shape = shape
        self.capacity = -(-capacity // KEY_GRANULE) * KEY_GRANULE
        self._lay_out(backing or Backing(reserved_bytes(shape, capacity)))
        self._written = 0  # end of the positions that a step, a restore or a copy may have written
        self.epoch = 0  # changes whenever positions that were held are given up
        self.length = 0
        self.sealed = 0
        self.borrowed = 0
        self.selection: Selection | None = None  # None: everything takes part
        self.prior: Prior | None = None  # what is known of its tokens, whatever is asked

    def _lay_out(self, backing: Backing) -> None:
        data = self._tensor(backing)
        self.backing = backing
        self.keys: Sequence[Tensor] = data[:, 0].unbind(0)
        self.values: Sequence[Tensor] = data[:, 1].unbind(0)
        self._raw: np.ndarray[Any, Any] = data.view(_INT_DTYPES[self.shape.itemsize]).numpy()

    def _tensor(self, backing: Backing) -> Tensor:
        """The backing's memory as [L, 2, G, capacity, D]."""
        shape = self.shape
        dims = (shape.n_layers, 2, shape.n_kv_heads, self.capacity, shape.head_dim)
        return torch.frombuffer(backing.memory, dtype=torch_dtype(shape)).view(dims)

    @property
    def is_offloaded(self) -> bool:
        """Whether exact KV lies one tier down, and only what is read of it is mapped."""
        return self.backing.in_file

    def move(self, backing: Backing) -> None:
        """Go on in other memory, with the same bytes. Nobody may write meanwhile; readers read the old memory."""
        target, nbytes = self._tensor(backing), len(backing.memory) // self.shape.n_layers
        for layer in range(self.shape.n_layers):
            target[layer, 0, :, : self._written] = self.keys[layer][:, : self._written]
            target[layer, 1, :, : self._written] = self.values[layer][:, : self._written]
            backing.release(layer * nbytes, (layer + 1) * nbytes)
        self._lay_out(backing)

    def release(self, layer: int) -> None:
        """Nobody needs a layer's exact KV at the moment: where it lies in a file, its pages leave memory."""
        nbytes = len(self.backing.memory) // self.shape.n_layers
        self.backing.release(layer * nbytes, (layer + 1) * nbytes)

    def release_all(self) -> None:
        self.backing.release(0, len(self.backing.memory))

    def use(self, policy: Policy, turn_start: int, *, again: bool = False) -> None:
        """Let `policy` choose for a turn whose own tokens stand at `turn_start`. What it derived before is kept.

        `again`: the turn was interrupted, and goes on.
        """
        if self.selection is None or self.selection.policy != policy:
            self.selection = None if policy.name == "full" else Selection(policy, self.shape.n_layers)
        if self.selection is not None:
            self.selection.prior = self.prior
            self.selection.begin_turn(turn_start, again=again)

    def about_to_change(self, position: int) -> None:
        """Positions from here on get KV from a step or from disk: those held get other KV, for the same tokens."""
        if self.selection is not None:
            if position < self.length:
                self.selection.renew(position)
            self.selection.keep(max(position, self.length))  # an abandoned step may have shown more

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tokens held now occupy, and what a policy derived from them.

        Of KV in a file, one layer at a time is in memory.
        """
        derived = sum(part.nbytes for part in (self.selection, self.prior) if part is not None)
        exact = (self.capacity if self.backing.is_huge else self.length) * self.shape.bytes_per_token
        return derived + (exact // self.shape.n_layers if self.is_offloaded else exact)

    def trim(self) -> None:
        """Give memory back that lies behind all that is held: it was written once, and is zero again."""
        run = self.capacity * self.shape.head_dim * self.shape.itemsize
        used = self._written * self.shape.head_dim * self.shape.itemsize
        for start in range(0, len(self.backing.memory), run):
            self.backing.discard(start + used, start + run)

    def populate(self, layers: range, length: int) -> None:
        """Map the pages of positions [0, length) of some layers in few calls instead of a fault each. A hint, too."""
        run = self.capacity * self.shape.head_dim * self.shape.itemsize
        used = length * self.shape.head_dim * self.shape.itemsize
        runs_per_layer = 2 * self.shape.n_kv_heads
        for index in range(layers.start * runs_per_layer, layers.stop * runs_per_layer):
            if not self.backing.populate(index * run, index * run + used):
                return

    def write(self, layer: int, position: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [G, n, D] at positions [position, position + n)."""
        end = position + keys.shape[1]
        self.wrote(end)
        self.keys[layer][:, position:end] = keys
        self.values[layer][:, position:end] = values

    def wrote(self, end: int) -> None:
        """Positions up to `end` get bytes by another way than `write`, or are about to."""
        self._written = max(self._written, end)

    def clear(self) -> None:
        """Zero all memory and hold nothing."""
        self.epoch += 1
        self.selection = self.prior = None
        for layer in range(self.shape.n_layers):
            self.keys[layer].zero_()
            self.values[layer].zero_()
        self._written = self.length = self.sealed = self.borrowed = 0

    def truncate(self, length: int, cell_tokens: int) -> None:
        """Forget positions from `length` on, and clear them; a sealed cell that is cut stops being sealed.

        A masked position has weight 0, and 0 times what a failed step left (NaN) is not 0.
        """
        if length < self.length:
            self.epoch += 1  # before the bytes change: who copies looks at it last
        if self.selection is not None:
            self.selection.keep(length)
        if self.prior is not None:
            self.prior = self.prior.before(length)
        if length < self._written:
            for layer in range(self.shape.n_layers):
                self.keys[layer][:, length : self._written].zero_()
                self.values[layer][:, length : self._written].zero_()
                self.release(layer)
            self._written = length
        self.length = min(self.length, length)
        whole = self.length // cell_tokens * cell_tokens
        self.sealed, self.borrowed = min(self.sealed, whole), min(self.borrowed, whole)

    def array(self, layer: int, part: int, span: Span) -> np.ndarray[Any, Any]:
        """K (part 0) or V (part 1) of `span` in `layer`: a writable view [G, n, D] of unsigned integers."""
        view: np.ndarray[Any, Any] = self._raw[layer, part, :, span.start : span.end]
        return view

    def arrays(self, span: Span) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """K and V of `span` in every layer, as views."""
        return [(self.array(layer, 0, span), self.array(layer, 1, span)) for layer in range(self.shape.n_layers)]

    def copy_from(self, other: SessionCache, layer: int, span: Span) -> None:
        """Copy K and V of `span` in one layer out of another session's memory. Lengths stay the caller's."""
        self.wrote(span.end)
        self._raw[layer, :, :, span.start : span.end] = other._raw[layer, :, :, span.start : span.end]
        for one in (self, other):
            one.release(layer)

    def copies(self, start: int, end: int) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """`arrays` of [start, end), copied: a snapshot that later steps do not change."""
        return [(keys.copy(), values.copy()) for keys, values in self.arrays(Span(start, end))]


class PackedSpan:
    """Rows [start, end) of a packed step: tokens of one session at `position` and on."""

    __slots__ = ("_masks", "cache", "capture", "decoding", "end", "position", "selection", "start")

    def __init__(
        self,
        cache: SessionCache,
        start: int,
        end: int,
        position: int,
        selection: Selection | None = None,
        *,
        decoding: bool = False,
    ) -> None:
        self.cache = cache
        self.selection = selection
        self.decoding = decoding
        self.capture: Capture | None = None  # shown what attends, if any
        self.start = start
        self.end = end
        self.position = position
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def mask(self, first: int, width: int, window: int | None) -> Tensor:
        """Keys a query must not see, [Q, width] bool, for keys at [first, first + width). One for all layers."""
        mask = self._masks.get((first, window))
        if mask is None:
            keys = torch.arange(first, first + width)
            queries = torch.arange(self.position, self.position + self.end - self.start)[:, None]
            mask = keys > queries
            if window:
                mask |= keys <= queries - window
            self._masks[first, window] = mask
        return mask


class PackedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a packed step: hands each span's new rows to its session."""

    is_sliding = False

    def __init__(self, layer: int, spans: list[PackedSpan]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        self.spans = spans
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make: the sessions own the memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values [1, G, N, D]; the attention function reads the sessions' memory itself."""
        keys, values = key_states[0], value_states[0]
        for span in self.spans:
            rows = slice(span.start, span.end)
            span.cache.write(self.layer, span.position, keys[:, rows], values[:, rows])
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class PackedCache(Cache):
    """The transformers Cache of one packed step over any number of sessions."""

    def __init__(self, n_layers: int, spans: list[PackedSpan]) -> None:
        super().__init__(layers=[PackedLayer(layer, spans) for layer in range(n_layers)])
        self.spans = spans
