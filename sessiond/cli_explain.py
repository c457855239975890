"""`sessiond explain`: what turns read, as tables, as JSON or as a heat map."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sessiond.cli_output import AsJson, connected, enum_name, err, fail, out, plain, print_json, printable
from sessiond.cli_sessions import Revision, SessionId
from sessiond.clients import Client
from sessiond.v1 import sessions_pb2 as pb

PHASES = ("queue", "restore", "prefill", "decode", "select", "commit")


@connected
def explain(
    client: Client,
    session_id: SessionId,
    revision: Revision = "",
    last: Annotated[int, typer.Option(min=1, help="How many of the last turns.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Also draw where the turns read, as a PNG or SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a session's last turns read, and what had to be computed again."""
    turns = client.session(session_id).explain(revision, last_turns=last)
    if as_json:
        print_json([plain(turn) for turn in turns])
    else:
        for turn in turns:
            _print_turn(turn)
        if not turns:
            err.print("nothing is remembered of these turns: the daemon forgets them when it restarts", markup=False)
    if plot is not None:
        _draw(turns, plot)


def _draw(turns: list[pb.TurnExplanation], path: Path) -> None:
    try:
        from sessiond.cli_readmap import draw
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("matplotlib", "numpy"):
            raise
        fail(f"drawing needs {error.name.partition('.')[0]}: pip install 'sessiond[plot]'")
    if not any(turn.read_share for turn in turns):
        fail("there is nothing to draw: no turn that is remembered generated anything")
    draw(turns, path)
    err.print(f"drawn to {path}", markup=False)


def _print_turn(turn: pb.TurnExplanation) -> None:
    name = turn.revision_id or f"{turn.request_id} (no revision)"
    _say(f"{name}: {turn.context_tokens:,} tokens of context, {turn.steps:,} steps")
    knobs = ", ".join(f"{knob} {value}" for knob, value in plain(turn.policy).get("knobs", {}).items())
    _say(f"  policy {turn.policy.name}" + (f": {knobs}" if knobs else ""))
    if turn.reads:
        out.print(_layers(turn.reads))
        out.print(_views(turn.reads))
    if turn.HasField("restored"):
        done = turn.restored
        _say(
            f"  restored {done.tokens_restored:,} tokens, computed {done.tokens_recomputed:,} again, "
            f"{done.bytes_read:,} bytes in {done.milliseconds:.1f} ms"
        )
        for reason in done.reasons:
            why = enum_name(reason, "reason", "RECOMPUTE_CAUSE_").replace("_", " ")
            _say(f"  {reason.tokens:,} tokens again: {why}" + (f" ({reason.detail})" if reason.detail else ""))
    spent = [f"{phase} {turn.milliseconds_by_phase[phase]:.1f} ms" for phase in PHASES]
    _say(f"  {', '.join(spent)}")
    for note in turn.notes:
        _say(f"  {note}")


def _say(line: str) -> None:
    out.print(printable(line), markup=False)


def _table(*columns: str, left: int) -> Table:
    """The first `left` columns are words, the others numbers."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def _layers(reads: Iterable[pb.AttentionRead]) -> Table:
    """One row for layers that follow each other and attended alike."""
    table = _table("layers", "KV heads", "attended", "of", "mean", "mass", left=2)
    for first, last_layer in _alike(reads):
        layers = f"{first.layer}" if first.layer == last_layer else f"{first.layer}-{last_layer}"
        heads = f"{first.head_start}-{first.head_start + first.n_heads - 1}"
        mass = f"{first.attention_mass:.4f}" if first.HasField("attention_mass") else "-"
        counts = f"{first.tokens_attended:,}", f"{first.tokens_available:,}", f"{first.mean_tokens_attended:,.1f}"
        table.add_row(layers, heads, *counts, mass)
    return table


def _alike(reads: Iterable[pb.AttentionRead]) -> list[tuple[pb.AttentionRead, int]]:
    """Reads with the last layer up to which they are the same for the same heads, by layer and head."""
    found = []
    running: dict[tuple[int, int], tuple[pb.AttentionRead, int]] = {}
    for read in reads:
        key = read.head_start, read.n_heads
        before = running.get(key)
        if before and read.layer == before[1] + 1 and _shown(read) == _shown(before[0]):
            running[key] = before[0], read.layer
            continue
        if before:
            found.append(before)
        running[key] = read, read.layer
    return sorted([*found, *running.values()], key=lambda one: (one[0].layer, one[0].head_start))


def _shown(read: pb.AttentionRead) -> tuple[object, ...]:
    mass = round(read.attention_mass, 4) if read.HasField("attention_mass") else None
    return read.tokens_attended, read.tokens_available, round(read.mean_tokens_attended, 1), mass


def _views(reads: Iterable[pb.AttentionRead]) -> Table:
    """Tokens and bytes of each form and tier, over all layers and heads."""
    sums: dict[tuple[str, str], list[int]] = {}
    for read in reads:
        for view in read.views:
            total = sums.setdefault((view.view, enum_name(view, "tier", "TIER_")), [0, 0])
            total[0] += view.tokens * read.n_heads
            total[1] += view.bytes
    table = _table("view", "tier", "tokens read, all heads", "bytes", left=2)
    for (view_name, tier), (tokens, n_bytes) in sums.items():
        table.add_row(printable(view_name), tier, f"{tokens:,}", f"{n_bytes:,}")
    return table
