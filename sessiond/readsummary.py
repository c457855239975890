"""From the counts of a turn that has ended to what is told of it: reads by layer and group of KV heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sessiond.explanations import LayerRead, ViewRead
from sessiond.reading import N_RANGES, LayerReads, Reading, range_bits
from sessiond.types import Tier

MOST_SPANS = 64

Spans = np.ndarray[Any, np.dtype[np.uint32]]


def summarize(reading: Reading) -> tuple[LayerRead, ...]:
    """What each layer read: one entry for neighbouring KV heads that read the same. Empty without a step."""
    if not reading.n_steps:
        return ()
    return tuple(read for layer in range(reading.shape.n_layers) for read in _layer(reading, layer))


def attention_mass(reads: tuple[LayerRead, ...]) -> float | None:
    """Mean share of full attention's probability that was attended, of the layers and heads where it was measured."""
    known = [(read.mass, read.n_heads) for read in reads if read.mass is not None]
    return sum(mass * n for mass, n in known) / sum(n for _, n in known) if known else None


def read_share(reading: Reading) -> tuple[tuple[float, ...], int]:
    """Shares of the generated tokens' reads by equal ranges of the context, and the tokens in a range.

    Over layers and KV heads. How the choices of layers spread is known from samples and from the last step.
    """
    ends = _generated_ends(reading)
    if not len(ends):
        return (), 0
    n, n_groups = int(ends[-1]), reading.shape.n_kv_heads
    n_whole = sum(len(ends) - _generated(reading, reads)[1] for reads in reading.layers.values())
    by_position = len(reading.layers) * _covering(np.full_like(ends, reading.turn_start), ends, n)
    by_position = n_groups * (by_position + n_whole * (np.arange(n) < reading.turn_start))
    if reading.window is not None:
        n_sliding = reading.shape.n_layers - len(reading.layers)
        by_position += n_groups * n_sliding * _covering(np.maximum(0, ends - reading.window), ends, n)
    bits = range_bits(n)
    found = np.add.reduceat(by_position.astype(np.float64), np.arange(0, n, 1 << bits))
    chosen = _choices(reading).reshape(-1, 1 << (bits - range_bits(reading.turn_start))).sum(1)
    found[: len(chosen)] += chosen[: len(found)]
    return tuple((found / found.sum()).tolist()), 1 << bits


def _choices(reading: Reading) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Choices from the history for generated tokens by its ranges: the prompt's as they were, others from samples."""
    sampled, prompts = reading.samples.astype(np.float64), np.zeros(N_RANGES)
    for reads in reading.layers.values():
        if reading.n_tokens and (last := _last_choice(reading, reads)) is not None:
            sampled += reading.by_range(last)
        if (prompt := _prompt_choice(reading, reads)) is not None:
            prompts += reading.by_range(prompt)
    n_chosen = sum(sum(reads.generated.by_head(reading.shape.n_kv_heads)) for reads in reading.layers.values())
    prompts += sampled * (n_chosen / max(1.0, sampled.sum()))
    return prompts


def _generated_ends(reading: Reading) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens there were when each token was generated: the prompt's last piece gave the first one."""
    ends = np.arange(reading.first_end, reading.first_end + reading.n_tokens)
    return np.concatenate([[reading.prompt_end], ends]) if reading.n_pieces else ends


def _covering(
    starts: np.ndarray[Any, np.dtype[np.int64]], ends: np.ndarray[Any, np.dtype[np.int64]], n: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each position below `n`, how many of the ranges [start, end) hold it."""
    edges = np.bincount(np.minimum(starts, ends), minlength=n + 1) - np.bincount(ends, minlength=n + 1)
    return np.cumsum(edges)[:n]


def _prompt_choice(reading: Reading, reads: LayerReads) -> Any:
    """Positions [G, K] that a layer chose for the prompt's last piece; None: all."""
    return reads.prompt[1] if reads.prompt and reads.prompt[0] == reading.n_pieces else None


def _last_choice(reading: Reading, reads: LayerReads) -> Any:
    """The same for the last step."""
    latest = reads.last if reading.n_tokens else reads.prompt
    return latest[1] if latest and latest[0] == reading.n_steps else None


def _generated(reading: Reading, reads: LayerReads) -> tuple[list[int], int]:
    """Tokens of the history that a layer chose for generated tokens, by KV head; for how many of them it chose."""
    by_head, n = reads.generated.by_head(reading.shape.n_kv_heads), reads.n_generated
    prompt = _prompt_choice(reading, reads)
    if prompt is None:
        return by_head, n
    return [a + b for a, b in zip(by_head, (prompt >= 0).sum(1).tolist(), strict=True)], n + 1


def _layer(reading: Reading, layer: int) -> list[LayerRead]:
    n_groups, reads = reading.shape.n_kv_heads, reading.layers.get(layer)
    if reads is None:
        return [_sliding(reading, layer)]
    ends = _generated_ends(reading)
    own = int(np.maximum(0, ends - reading.turn_start).sum())
    whole = int(np.minimum(ends, reading.turn_start).sum())
    chosen, n_chosen = _generated(reading, reads)
    whole -= n_chosen * reading.turn_start
    heads = []
    for head in range(n_groups):
        spans = _spans(reading, _last_choice(reading, reads), head)
        mean = (own + whole + chosen[head]) / len(ends)
        heads.append(_Head(head, mean, spans, _views(reading, reads, head), _mass(reads, head)))
    return [_told(reading, layer, group) for group in _alike(heads)]


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    head: int
    mean: float
    spans: Spans
    views: list[ViewRead]
    mass: float | None


def _alike(heads: list[_Head]) -> list[list[_Head]]:
    """Neighbours that read the same together."""
    groups: list[list[_Head]] = []
    for one in heads:
        if groups:
            first = groups[-1][0]
            if one.mean == first.mean and one.views == first.views and np.array_equal(one.spans, first.spans):
                groups[-1].append(one)
                continue
        groups.append([one])
    return groups


def _told(reading: Reading, layer: int, heads: list[_Head]) -> LayerRead:
    first, masses = heads[0], [one.mass for one in heads if one.mass is not None]
    views = tuple(ViewRead(v.view, v.tier, v.tokens, v.nbytes * len(heads)) for v in first.views)
    return LayerRead(
        layer=layer,
        head_start=first.head,
        n_heads=len(heads),
        available=reading.end,
        attended=int((first.spans[:, 1] - first.spans[:, 0]).sum()),
        mean_attended=first.mean,
        spans=first.spans[:MOST_SPANS].copy(),
        spans_cut=len(first.spans) > MOST_SPANS,
        views=views,
        mass=sum(masses) / len(masses) if masses else None,
    )


def _sliding(reading: Reading, layer: int) -> LayerRead:
    """A layer that no policy chooses in: its last tokens only. Its own attention is not measured."""
    n_groups, window, ends = reading.shape.n_kv_heads, reading.window, _generated_ends(reading)
    assert window is not None
    seen = np.minimum(ends, window)
    span = np.array([[max(0, reading.end - window), reading.end]], np.uint32)
    view = ViewRead("exact", reading.tier, reading.windowed, reading.windowed * n_groups * _token_bytes(reading))
    mean, attended = float(seen.mean()), int(seen[-1])
    return LayerRead(layer, 0, n_groups, reading.end, attended, mean, span, False, (view,), None)


def _spans(reading: Reading, chosen: Any, head: int) -> Spans:
    """The ranges that took part at the last step, [n, 2] in order."""
    if chosen is None:
        return np.array([[0, reading.end]], np.uint32)
    row = chosen[head].numpy()
    row = row[row >= 0]
    breaks = np.flatnonzero(np.diff(row) != 1)
    starts = np.concatenate([row[:1], row[breaks + 1], [reading.turn_start]])
    ends = np.concatenate([row[breaks] + 1, row[-1:] + 1, [reading.end]])
    if len(row) and ends[-2] == starts[-1]:
        starts, ends = starts[:-1], np.delete(ends, -2)
    return np.stack([starts, ends], 1).astype(np.uint32)


def _views(reading: Reading, reads: LayerReads, head: int) -> list[ViewRead]:
    """The forms that one head was read in: exact first, then a policy's own, then what it looked through to choose."""
    n_groups, half = reading.shape.n_kv_heads, _token_bytes(reading) // 2
    exact = reading.earlier - reads.n_chosen * reading.turn_start
    exact_bytes = 2 * half * exact
    forms: dict[str, tuple[int, int]] = {}
    for form in reads.forms.values():
        counts = form.count.by_head(n_groups)
        n_exact = form.stands_in.count(False)
        if n_exact:
            exact += counts[head]
            exact_bytes += n_exact * half * counts[head]
        elif form.exact:
            exact += form.exact
        exact_bytes += (2 - n_exact) * half * form.exact
        if n_exact < 2:
            tokens, nbytes = forms.get(form.form, (0, 0))
            share = counts[head] / max(1, sum(counts))
            forms[form.form] = tokens + counts[head] - form.exact, nbytes + round(form.nbytes * share)
    for name, (tokens, nbytes) in reads.scans.items():
        forms[name] = tokens + forms.get(name, (0, 0))[0], nbytes // n_groups + forms.get(name, (0, 0))[1]
    told = [ViewRead("exact", reading.tier, reading.own + exact, reading.own * 2 * half + exact_bytes)]
    told += [ViewRead(name, Tier.DEVICE, *read) for name, read in forms.items()]
    return [view for view in told if view.tokens]


def _mass(reads: LayerReads, head: int) -> float | None:
    """Share of full attention's probability that was attended, over samples; all where nothing was ever left out."""
    if not reads.n_chosen:
        return 1.0
    if not reads.n_weighed:
        return None
    return 1.0 if reads.missed is None else 1 - float(reads.missed[head]) / reads.n_weighed


def _token_bytes(reading: Reading) -> int:
    """Bytes of the keys and values of a token in one KV head of a layer."""
    return 2 * reading.shape.head_dim * reading.shape.itemsize
