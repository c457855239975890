"""Run a column of fault trials: `python tests/faults/main.py --column ci`. The last line is one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # also under `python -P`

from kinds import BY_NAME, KINDS, Kind, chunks
from outcome import Outcome, total, with_limits
from trials import run_chunk


def main() -> int:
    options = parse()
    started = time.monotonic()
    say(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="sessiond-faults-", dir=options.scratch) as folder:
        outcomes = [run_kind(kind, options, Path(folder)) for kind in options.kinds]
    minutes = (time.monotonic() - started) / 60
    sys.stdout.write(json.dumps(summary(outcomes, options.seed, minutes)) + "\n")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def run_kind(kind: Kind, options: argparse.Namespace, scratch: Path) -> Outcome:
    """All chunks of one kind, as many at once as there are cores; a line of progress for each."""
    if options.count:
        todo = [(options.count, options.seed)]
    else:
        todo = chunks(kind, options.column, options.seed, options.part)
    started, done = time.monotonic(), 0
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(1 if kind.alone else options.jobs) as pool:
        work = pool.map(lambda item: with_limits(run_chunk(kind.name, *item, scratch)), todo)
        for (_, seed), outcome in zip(todo, work, strict=True):
            done += outcome.run
            outcomes.append(outcome)
            for line in outcome.details[:20]:
                say(f"  FAILED {kind.name}: {line}")
            if outcome.failed:
                say(f"  again: python tests/faults/main.py --kind {kind.name} --seed {seed} --count {outcome.run}")
            if len(todo) > 1:
                say(f"  {kind.name} {done}/{sum(count for count, _ in todo)}")
    outcome = total(kind.name, outcomes)
    verdict = f"skipped: {outcome.skipped}" if outcome.skipped else f"{outcome.run} run, {outcome.failed} failed"
    say(f"{kind.name}: {verdict} in {time.monotonic() - started:.0f} s {outcome.counts or ''}")
    return outcome


def summary(outcomes: list[Outcome], seed: int, minutes: float) -> dict[str, object]:
    return {
        "kinds": {o.kind: {"run": o.run, "failed": o.failed, **o.counts} for o in outcomes},
        "skipped": {o.kind: o.skipped for o in outcomes if o.skipped},
        "lost_tokens": sum(o.lost_tokens for o in outcomes),
        "turns_twice": sum(o.turns_twice for o in outcomes),
        "silent_corruptions": sum(o.silent_corruptions for o in outcomes),
        "seed": seed,
        "faults_minutes": round(minutes, 1),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--column", choices=("slice", "ci", "release"), default="ci")
    parser.add_argument("--kind", action="append", choices=sorted(BY_NAME), help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n parts of the column")
    parser.add_argument("--count", type=int, help="one chunk of so many trials: repeats a failure")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", type=Path, help="folder for data directories; not on tmpfs")
    options = parser.parse_args()
    index, _, n_parts = options.part.partition("/")
    options.part = int(index), int(n_parts)
    if not 1 <= options.part[0] <= options.part[1]:
        parser.error("--part must be i/n with 1 <= i <= n")
    options.kinds = [BY_NAME[name] for name in options.kind] if options.kind else list(KINDS)
    return options


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
