"""Pictures of what benchmarks measured: PNGs in a folder. Needs the extra "plot", but no screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Told = Mapping[str, Mapping[str, Any]]


def quality_against_bytes(told: Told, full_bytes: int, folder: Path) -> Path:
    """Mean KL against the bytes that a decoded step reads, as a share of what full attention reads, `full_bytes`."""
    points = {
        name: (read_bytes(found) / full_bytes, found["kl_mean"]) for name, found in told.items() if "mass_mean" in found
    }
    figure, axes = _axes("bytes read per token, share of full KV", "mean KL from full attention, nats")
    for name, (x, y) in points.items():
        axes.scatter(x, y, s=24)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 3), fontsize=8)
    if "chunking" in told:
        axes.axhline(told["chunking"]["kl_mean"], linestyle=":", color="grey", label="floor: other chunking")
        axes.legend()
    axes.set_xscale("log")
    axes.set_yscale("log")
    return _save(figure, folder / "quality_bytes.png")


def quality_against_depth(told: Told, folder: Path) -> Path:
    """Mean KL against the tokens before the turn."""
    lines = {
        name: [(one["depth"], one["kl_mean"]) for one in found["by_depth"]]
        for name, found in told.items()
        if found.get("by_depth")
    }
    return _lines(lines, "tokens before the turn", folder / "quality_depth.png")


def quality_against_turn(told: Told, folder: Path) -> Path:
    """Mean KL against the turn's number, of one task."""
    lines = {name: list(enumerate(found["kl_by_turn"], 1)) for name, found in told.items() if name != "full"}
    return _lines(lines, "turn", folder / "quality_turn.png")


def read_bytes(found: Mapping[str, Any]) -> int:
    """What a decoded step read, of exact KV, of forms of it and of indexes."""
    return sum(int(found.get(f"{part}_bytes_per_step", 0)) for part in ("kv", "form", "scan"))


def speed(lines: Mapping[str, Sequence[tuple[int, float]]], x: str, y: str, file: Path) -> Path:
    """Tokens a second, by contender, against what doubles from point to point."""
    figure, axes = _axes(x, y)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({at for points in lines.values() for at, _ in points}), [f"{at:,}" for at in ticks])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return _save(figure, file)


def _lines(lines: Mapping[str, Sequence[tuple[int, float]]], x: str, file: Path) -> Path:
    figure, axes = _axes(x, "mean KL from full attention, nats")
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set_yscale("log")
    axes.legend(fontsize=8, ncols=2)
    return _save(figure, file)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return file
