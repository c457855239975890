"""Every kernel against its reference and against what memory and arithmetic allow. One JSON line last.

The cases are those of the files _kernels_*.py beside this one. Each runs alternately with its reference and with the
floor: a read of much memory by all threads, and multiply-adds in registers. A share of the floor is
max(bytes / bandwidth, multiply-adds / peak) / time, the median over rounds; 1 is as fast as can be. Before anything is
timed, kernel and reference must give the same.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import Conditions, arguments, console, median, print_json, spin_as_the_daemon, spread
from _floors import Floors
from _kernelcase import KernelCase
from rich.table import Table
from torch import Tensor

FARTHEST = 0.02  # of a result from its reference, relative: roundings to bf16, no mistakes
out = console()


def load_cases(names: Sequence[str] = ()) -> list[KernelCase]:
    """Of all files, or of those named."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("_kernels_*.py"))
    chosen = [name for name in found if not names or name.removeprefix("_kernels_") in names]
    if missing := set(names) - {name.removeprefix("_kernels_") for name in chosen}:
        raise ValueError(f"there are no cases of {', '.join(sorted(missing))}")
    return [case for name in chosen for case in importlib.import_module(name).cases()]


def check_agreement(case: KernelCase) -> None:
    """No speed without agreement. Raises RuntimeError if both give one tensor and these are far apart."""
    if case.reference is None:
        return
    if case.fresh:
        case.fresh()
    found, expected = case.run(), case.reference()
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor) and expected.is_floating_point()):
        return
    distance = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    if found.shape != expected.shape or not distance <= FARTHEST:
        raise RuntimeError(f"{case.name}: {distance:.3g} from its reference, {found.shape} against {expected.shape}")


def seconds_of(call: Callable[[], object], fresh: Callable[[], object] | None, at_least: float) -> float:
    """Median time of a call, over calls that take `at_least` seconds together; `fresh` before each, unmeasured."""
    took: list[float] = []
    while sum(took) < at_least:
        if fresh:
            fresh()
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return median(took)


def measure(case: KernelCase, floors: Floors, rounds: int, at_least: float) -> dict[str, Any]:
    """Times in microseconds, and shares of the floor, of one case."""
    times: dict[str, list[float]] = {"run": [], "reference": []}
    calls = {"run": case.run, "reference": case.reference}
    shares, ratios = [], []
    for round_ in range(-1, rounds):  # the first warms up
        floors.sample()
        order = list(calls) if round_ % 2 == 0 else list(calls)[::-1]
        took = {name: seconds_of(call, case.fresh, at_least) for name in order if (call := calls[name])}
        if round_ < 0:
            continue
        for name, seconds in took.items():
            times[name].append(seconds * 1e6)
        shares.append(floors.seconds(case.nbytes, case.multiply_adds, case.kind) / took["run"])
        if case.reference:
            ratios.append(took["reference"] / took["run"])
    told = {"us": spread(times["run"]), "floor_share": spread(shares)}
    return told | ({"reference_us": spread(times["reference"]), "speedup": spread(ratios)} if ratios else {})


def report(cases: Sequence[KernelCase], told: dict[str, dict[str, Any]], floors: Floors) -> dict[str, Any]:
    table = Table(title="Kernels: medians")
    for name in ("kernel", "us", "reference, us", "times faster", "share of the floor"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for name, found in told.items():
        cells = (found.get(key, {}).get("median", "") for key in ("us", "reference_us", "speedup", "floor_share"))
        table.add_row(name, *map(str, cells))
    out.print(table)
    figures: dict[str, float] = {}
    for case in cases:
        if case.figure:  # of several cases under one name the worst counts
            share = told[case.name]["floor_share"]["median"]
            figures[case.figure] = min(share, figures.get(case.figure, share))
    return {"benchmark": "kernels", **figures, "kernels": told, "bounds": floors.told()}


def check_names(cases: Sequence[KernelCase]) -> None:
    """Raises ValueError if two cases have one name: one would hide the other."""
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several cases are called {', '.join(twice)}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="TOPIC", help="of _kernels_TOPIC.py")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=5.0, help="each of a round measures for at least so long")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    spin_as_the_daemon()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    conditions, floors = Conditions(Path.cwd()), Floors()
    cases = load_cases(options.only)
    check_names(cases)
    with torch.inference_mode():
        for case in cases:
            check_agreement(case)
        told = {case.name: measure(case, floors, options.rounds, options.milliseconds / 1e3) for case in cases}
    facts = {"rounds": options.rounds, "threads": options.threads, "order": "alternating (ABBA)"}
    print_json({**report(cases, told, floors), **facts, **conditions.told()})


if __name__ == "__main__":
    main()
