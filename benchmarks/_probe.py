"""What attention does under a policy: how much true weight took part, how far its output is off, how much it read.

Noted in decoded steps, at layers that see all of history. Weights and outputs are computed again from the exact KV, so
only every few steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sessiond import attention, forward
from sessiond.attention import PackedStep
from sessiond.cache import PackedSpan
from sessiond.policies.base import Selector, Taken
from sessiond.selection import Selection

EVERY = 8  # decoded steps, of which one is looked at closely


@dataclass
class Probe:
    """Of one policy, over all its turns."""

    every: int = EVERY
    shares: list[float] = field(default_factory=list)  # of history that took part, by step and layer
    mass: list[Tensor] = field(default_factory=list)  # [H] each: true softmax weight of what took part
    errors: dict[int, list[Tensor]] = field(default_factory=dict)  # layer: [H] each, |o - o'| / |o|
    n_steps: int = 0
    kv_bytes: int = 0  # read of exact keys and values
    form_bytes: int = 0  # kept of what stood in for them, read at most
    scan_bytes: int = 0  # read of indexes
    _position: int = -1

    def begin(self) -> None:
        """Another turn: its first step may stand where the last one ended."""
        self._position = -1

    def note(
        self, query: Tensor, span: PackedSpan, layer: int, scaling: float, chosen: Taken | None, out: Tensor
    ) -> None:
        """query [H, 1, D] over its session's KV gave `out` [1, H, D]."""
        if span.position != self._position:
            self._position, self.n_steps = span.position, self.n_steps + 1
        keys = span.cache.keys[layer][:, : span.position + 1]
        history = span.selection.turn_start if span.selection is not None else keys.shape[1]
        kept = history if chosen is None else float((chosen.positions >= 0).sum(-1).float().mean())
        self.shares.append(kept / history)
        self._count_bytes(keys, history, chosen, span.selection, layer)
        if self.n_steps % self.every == 1 % self.every:
            self._look(
                query, keys, span.cache.values[layer][:, : span.position + 1], history, layer, scaling, chosen, out
            )

    def _count_bytes(
        self, keys: Tensor, history: int, chosen: Taken | None, selection: Selection | None, layer: int
    ) -> None:
        n_groups, n_tokens, head_dim = keys.shape
        own = n_groups * (n_tokens - history)
        picked = n_groups * history if chosen is None else int((chosen.positions >= 0).sum())
        forms = (None, None) if chosen is None else (chosen.keys, chosen.values)
        beside = 0 if chosen is None else n_groups * chosen.exact  # of those that a form stands in for
        exact = sum(own + (picked if form is None else beside) for form in forms)
        self.kv_bytes += exact * head_dim * keys.element_size()
        self.form_bytes += 0 if chosen is None else chosen.nbytes
        selector = selection._selectors[layer] if selection is not None else None
        if selector is None:
            return
        if type(selector).scan is Selector.scan:  # it does not tell: all of its index, but for forms, counted above
            self.scan_bytes += 0 if any(form is not None for form in forms) else selector.nbytes
        elif (scan := selector.scan) is not None:
            self.scan_bytes += scan.nbytes

    def _look(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        history: int,
        layer: int,
        scaling: float,
        chosen: Taken | None,
        out: Tensor,
    ) -> None:
        n_groups, _, head_dim = keys.shape
        grouped = query.float().view(n_groups, -1, head_dim)
        weights = (grouped @ keys.float().mT * scaling).softmax(-1)
        true = (weights @ values.float()).view(-1, head_dim)
        self.mass.append(mass_kept(weights, history, chosen).flatten())
        error = (out[0].float() - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=1e-9)
        self.errors.setdefault(layer, []).append(error)

    def told(self) -> dict[str, Any]:
        """Shares are of 1; bytes are per decoded step, over all layers."""
        if not self.shares:
            return {"attended": 1.0}
        found: dict[str, Any] = {"attended": sum(self.shares) / len(self.shares)}
        for name, total in (("kv", self.kv_bytes), ("form", self.form_bytes), ("scan", self.scan_bytes)):
            found[f"{name}_bytes_per_step"] = round(total / self.n_steps)
        if self.mass:
            mass, errors = torch.cat(self.mass), torch.cat([e for some in self.errors.values() for e in some])
            found["mass_mean"], found["mass_worst"] = float(mass.mean()), worst_hundredth(mass)
            found["error_mean"], found["error_p99"] = float(errors.mean()), float(errors.quantile(0.99))
            by_layer = sorted(self.errors.items())
            found["error_by_layer"] = [round(float(torch.cat(some).mean()), 5) for _, some in by_layer]
        return found


def mass_kept(weights: Tensor, history: int, chosen: Taken | None) -> Tensor:
    """What of softmax weights [G, S, T] lies on the chosen positions and on those from `history` on: [G, S]."""
    own = weights[..., history:].sum(-1)
    if chosen is None:
        return own + weights[..., :history].sum(-1)
    at = chosen.positions[:, None].expand(-1, weights.shape[1], -1)
    return own + weights.gather(-1, at.clamp(min=0)).masked_fill(at < 0, 0.0).sum(-1)


def worst_hundredth(values: Tensor) -> float:
    """Mean of the lowest 1% of `values` [N], of one at least."""
    return float(values.topk(max(1, values.numel() // 100), largest=False).values.mean())


@contextlib.contextmanager
def probing(probe: Probe) -> Iterator[None]:
    """Show `probe` what every decoded step attends to under a policy."""
    choose, attend = Selection.choose, attention.attend
    answers: dict[Selection, Taken | None] = {}

    def chosen(self: Selection, *args: Any, **kwargs: Any) -> Taken | None:
        answers[self] = choose(self, *args, **kwargs)
        return answers[self]

    def attended(
        heads: Tensor, packed: PackedStep, layer: int, scaling: float, window: int | None, out: Tensor | None = None
    ) -> Tensor:
        answers.clear()
        out = attend(heads, packed, layer, scaling, window, out)
        for span in packed.spans:
            if span.decoding and span.selection is not None and window is None:
                rows = slice(span.start, span.end)
                probe.note(heads[:, rows], span, layer, scaling, answers.get(span.selection), out[rows])
        return out

    probe.begin()
    with (
        mock.patch.object(Selection, "choose", chosen),
        mock.patch.object(attention, "attend", attended),
        mock.patch.object(forward, "attend", attended),
    ):
        yield
