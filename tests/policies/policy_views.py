"""Random keys, values and queries of one layer, shown to selectors as an engine would; and plain attention weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from sessiond.kernels.coded import CodedRows
from sessiond.policies.base import LayerView, Selector, Taken

# SmolLM2's: 9 query heads on 3 key/value heads.
H, G, D = 9, 3, 16
SCALING = D**-0.5


class Layer:
    """`n` tokens of one layer. The first of `start` tokens of a piece attends like any other: causally."""

    def __init__(self, n: int, seed: int = 0, spread: float = 1.5, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(heads, n, D, generator=generator) * spread for heads in (H, G, G)]
        self.query, self.keys, self.values = (part.to(dtype) for part in draw)

    def view(self, start: int, end: int, turn_start: int) -> LayerView:
        return LayerView(self.query[:, start:end], self.keys[:, :end], self.values[:, :end], start, turn_start, SCALING)

    def prompt(self, selector: Selector, pieces: list[int], turn_start: int) -> list[Tensor | None]:
        """Shows the prompt that ends at the last of `pieces`, cut at the others."""
        ends = [turn_start, *pieces]
        return [selector.prompt(self.view(a, b, turn_start)) for a, b in itertools.pairwise(ends)]

    def step(self, selector: Selector, position: int, turn_start: int) -> Tensor | None:
        return selector.step(self.view(position, position + 1, turn_start))


def weights(layer: Layer, head: int, at: int, positions: list[int]) -> list[float]:
    """Softmax weights of one query over `positions` (those after `at` excepted: 0), one multiplication at a time."""
    keys = layer.keys[head // (H // G)].tolist()
    query = layer.query[head, at].tolist()
    logits = [
        sum(a * b for a, b in zip(query, keys[p], strict=True)) * SCALING if p <= at else -math.inf for p in positions
    ]
    most = max(logits)
    exps = [math.exp(logit - most) for logit in logits]
    return [value / sum(exps) for value in exps]


def best(scores: list[float], k: int) -> list[int]:
    """The `k` best positions, ascending; of equals the earlier."""
    return sorted(sorted(range(len(scores)), key=lambda p: (-scores[p], p))[:k])


def rows(positions: Tensor | None) -> list[list[int]]:
    """Each row without its padding, which must stand at its end."""
    assert positions is not None
    assert positions.dtype == torch.int64
    found = []
    for row in positions.tolist():
        kept = [p for p in row if p >= 0]
        assert row == kept + [-1] * (len(row) - len(kept))
        assert kept == sorted(set(kept))
        found.append(kept)
    return found


def read_out(answer: Tensor | Taken | None, dtype: torch.dtype) -> Taken:
    """An answer in a form of its own, with the numbers of what is coded in it: [G, K, D]."""
    assert isinstance(answer, Taken)
    keys, values = (
        form.at(answer.positions, dtype) if isinstance(form, CodedRows) else form
        for form in (answer.keys, answer.values)
    )
    return replace(answer, keys=keys, values=values)
