"""One packed forward step over any number of sessions, computed in pieces: it can rest between two layers.

Through the compiled decoder where there is one for the model, else through the module's own forward, which does not
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sessiond.attention import PackedStep, attend
from sessiond.cache import PackedCache, PackedSpan
from sessiond.fused import Fused
from sessiond.kernels.decoder import SessionRows
from sessiond.kernels.sieved import Sieved


class ForwardStep:
    """A forward step under way. Until it is over, KV is written in some layers and not in others.

    What it needs of memory is its own: other steps may run while it rests, over other sessions.
    """

    def advance(self, enough: Callable[[], bool] | None = None) -> Tensor | None:
        """Compute layers, at least one, until `enough` says so between two of them; None: all that are left.

        Returns the logits [R, V] in fp32 of the wanted rows once all layers are computed, None before.
        """
        raise NotImplementedError


class FusedStep(ForwardStep):
    """Layers by the compiled decoder; where all sessions attend to everything or to what sieve chooses they are one
    call."""

    def __init__(self, fused: Fused, packed: PackedStep, ids: Sequence[int], logit_rows: Sequence[int]) -> None:
        self._fused, self._packed, self._logit_rows = fused, packed, logit_rows
        self._n_layers = len(fused.decoder.layers)
        self._layer = 0
        self._sieves = [_sieve_of(span, fused) for span in packed.spans]
        # Whether the decoder computes all attention itself, but in layers that are looked at.
        self._plain = all(
            span.capture is None and (span.selection is None or sieve is not None)
            for span, sieve in zip(packed.spans, self._sieves, strict=True)
        )
        looked_at = (span.selection.looked_at for span in packed.spans if span.selection is not None)
        self._by_hand = frozenset[int]().union(*looked_at) if self._plain else frozenset(range(self._n_layers))
        sessions, n_positions = [], 0
        for span, sieve in zip(packed.spans, self._sieves, strict=True):
            n_new, cache = span.end - span.start, span.cache
            cache.wrote(span.position + n_new)
            n_positions = max(n_positions, span.position + n_new)
            address = cache.keys[0].data_ptr()
            sessions.append(
                SessionRows(address, cache.capacity, span.position, span.start, n_new, cache.is_offloaded, sieve)
            )
        self._step = fused.decoder.step(fused.hidden(ids), fused.angles(n_positions), sessions)

    @torch.inference_mode()
    def advance(self, enough: Callable[[], bool] | None = None) -> Tensor | None:
        while self._layer < self._n_layers:
            if self._layer in self._by_hand:
                self._compute(self._layer)
                self._layer += 1
            else:
                by_hand = (layer for layer in self._by_hand if layer > self._layer)
                end = self._layer + 1 if enough is not None else min(by_hand, default=self._n_layers)
                self._step.run(self._layer, end)
                self._layer = end
            if enough is not None and self._layer < self._n_layers and enough():
                return None
        if self._plain:
            for span, sieve in zip(self._packed.spans, self._sieves, strict=True):
                if span.selection is not None and sieve is not None:
                    span.selection.compiled_done(sieve, span.position + 1)
        return self._fused.logits(self._step, self._logit_rows)

    def _compute(self, index: int) -> None:
        """A layer whose attention the decoder does not compute."""
        layer, step = self._fused.decoder.layers[index], self._step
        step.before(index)
        attend(step.query.transpose(0, 1), self._packed, index, layer.scaling, layer.window or None, out=step.attended)
        for span in self._packed.spans:
            span.cache.release(index)
        step.after(index)


def _sieve_of(span: PackedSpan, fused: Fused) -> Sieved | None:
    """What chooses for a span's one decoded token inside of the compiled layers, if its policy can."""
    if span.selection is None or not span.decoding or span.end - span.start != 1:
        return None
    n_groups, _, head_dim = span.cache.keys[0].shape
    return span.selection.compiled(fused.seeing_all, span.position, n_groups, head_dim)


class ModuleStep(ForwardStep):
    """The module's own forward, all at once."""

    def __init__(
        self, module: Any, n_layers: int, packed: PackedStep, ids: Sequence[int], logit_rows: Sequence[int]
    ) -> None:
        self._module, self._packed, self._ids, self._logit_rows = module, packed, ids, logit_rows
        self._n_layers = n_layers

    @torch.inference_mode()
    def advance(self, enough: Callable[[], bool] | None = None) -> Tensor | None:
        spans = self._packed.spans
        positions = [at for span in spans for at in range(span.position, span.position + span.end - span.start)]
        output = self._module(
            input_ids=torch.tensor([self._ids]),
            position_ids=torch.tensor([positions]),
            past_key_values=PackedCache(self._n_layers, spans),
            use_cache=True,
            logits_to_keep=torch.tensor(self._logit_rows, dtype=torch.long),
            packed=self._packed,
        )
        logits: Tensor = output.logits[0]
        return logits.float()
