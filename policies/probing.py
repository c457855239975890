"""Scores by reconstruction (KVzip, arXiv 2505.23416): tokens to run behind a history, and what is read off meanwhile.

    [0, kept)        first tokens, system prompt: never scored, in every softmax
    [kept, n)        history, scored in chunks [start, end)
    [n, n + P)       one probe after the other: "repeat the part that starts with ...", then the chunk itself

A probe's own keys and values are nobody's memory, and go when it has run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sessiond.policies.choosing import AT_ONCE
from sessiond.policies.prior import ALWAYS

CHUNK = 2000
LEAST = 64  # tokens: shorter chunks are not worth a probe
QUOTED = 8  # last tokens of the chunk before, which tell where to start


@dataclass(frozen=True, slots=True)
class Instruction:
    """Token ids of the request to repeat the context: `whole` from its beginning; or, for a later chunk, `before` and
    `after` the quoted last tokens of the chunk before it."""

    whole: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]

    def ids(self, quoted: Sequence[int]) -> list[int]:
        return [*self.before, *quoted, *self.after] if quoted else list(self.whole)

    @property
    def most(self) -> int:
        """Tokens of the longer form."""
        return max(len(self.whole), len(self.before) + QUOTED + len(self.after))


@dataclass(frozen=True, slots=True)
class Probe:
    """`token_ids` to be run at `position` and on, behind the history, whose positions [start, end) they score."""

    token_ids: list[int]
    position: int
    start: int
    end: int


def plan_probes(
    ids: Sequence[int], first: int, kept: int, room: int, instruction: Instruction, chunk: int = CHUNK
) -> list[Probe]:
    """Probes that score [first, len(ids)) of a history `ids`, of which [0, kept) is never scored.

    `room`: positions behind the history. With little of it chunks are shorter; with too little, or with fewer than
    LEAST tokens to score, there are none.
    """
    n = len(ids)
    size = min(chunk, room - instruction.most)
    if size < LEAST or n - first < LEAST:
        return []
    n_chunks = -(-(n - first) // size)
    # Of equal length: a last one of a few tokens would be scored by a few queries.
    bounds = [first + (n - first) * i // n_chunks for i in range(n_chunks + 1)]
    probes = []
    for start, end in itertools.pairwise(bounds):
        quoted = [] if start <= kept else list(ids[max(kept, start - QUOTED) : start])
        probes.append(Probe([*instruction.ids(quoted), *ids[start:end]], n, start, end))
    return probes


class Capture:
    """Reads a probe's scores off the layers that attend to all of history, piece by piece. fp32, a few queries at a
    time."""

    def __init__(self, probe: Probe, kept: int, n_layers: int, n_groups: int) -> None:
        self._probe = probe
        self._kept = kept
        self._scores: list[Tensor | None] = [None] * n_layers
        self._n_groups = n_groups

    @property
    def scores(self) -> Tensor:
        """[L, G, end - start]; ALWAYS in layers that were not seen."""
        unseen = torch.full((self._n_groups, self._probe.end - self._probe.start), ALWAYS)
        return torch.stack([unseen if one is None else one for one in self._scores])

    def __call__(self, layer: int, query: Tensor, keys: Tensor, scaling: float) -> None:
        """query [H, Q, D] are the newest of keys [G, T, D].

        A token's score is its highest weight, over a group's heads and the queries, in a softmax over the first
        tokens, the chunk and the probe so far.
        """
        probe, kept, n_new = self._probe, self._kept, query.shape[1]
        n_groups, n, head_dim = keys.shape
        columns = torch.cat([keys[:, :kept], keys[:, probe.start : probe.end], keys[:, probe.position : n]], 1)
        columns = columns.float()
        n_before = kept + probe.end - probe.start  # columns that every query sees
        own = torch.arange(probe.position, n)
        best = torch.zeros(n_groups, probe.end - probe.start)
        for some, at in zip(
            torch.split(query, AT_ONCE, 1), torch.split(torch.arange(n - n_new, n), AT_ONCE), strict=True
        ):
            grouped = some.float().reshape(n_groups, -1, head_dim) * scaling
            logits = (grouped @ columns.mT).view(n_groups, -1, some.shape[1], columns.shape[1])
            logits[..., n_before:].masked_fill_(own > at[:, None], float("-inf"))
            weights = logits.softmax(-1)[..., kept:n_before]
            best = torch.maximum(best, weights.amax((1, 2)))
        before = self._scores[layer]
        self._scores[layer] = best if before is None else torch.maximum(before, best)
