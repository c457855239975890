"""Where in a conversation its turns read, as a heat map. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from sessiond.v1.sessions_pb2 import TurnExplanation


def draw(turns: Sequence[TurnExplanation], path: Path) -> None:
    """Turns newest first, as the service tells them; the image's kind is that of the file's name. Raises ValueError.

    x: tokens of the log; y: turns, the oldest above; colour: share of the turn's reads that fell on the range.
    """
    shown = [turn for turn in reversed(turns) if turn.read_share]
    width = max(turn.read_range_tokens for turn in shown)
    rows = [_wider(turn, width) for turn in shown]
    n_ranges = max(len(row) for row in rows)
    shares = np.full((len(rows), n_ranges), np.nan)  # not drawn
    for i, row in enumerate(rows):
        shares[i, : len(row)] = row
    figure = Figure(figsize=(10, 1.6 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = np.arange(n_ranges + 1) * width
    # Few ranges get much and most get little: the root keeps those apart.
    mesh = axes.pcolormesh(edges, np.arange(len(rows) + 1), shares, cmap="magma", norm=PowerNorm(0.5, vmin=0))
    axes.set_yticks(np.arange(len(rows)) + 0.5, [f"{turn.policy.name}  {turn.revision_id[:8]}" for turn in shown])
    axes.invert_yaxis()
    axes.set_xlabel(f"position in the conversation, tokens (ranges of {width})")
    figure.colorbar(mesh, ax=axes, label="share of the turn's reads")
    figure.savefig(path, dpi=120)


def _wider(turn: TurnExplanation, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The shares by ranges of `width` tokens, a multiple of the turn's own."""
    n = width // turn.read_range_tokens
    share = np.array(turn.read_share)
    wide: np.ndarray[Any, np.dtype[np.float64]] = np.add.reduceat(share, np.arange(0, len(share), n))
    return wide
