"""One chunk of trials in a process of its own: `python trials.py KIND COUNT SEED SCRATCH` prints an Outcome."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import faultinject
from kinds import BY_NAME
from outcome import Outcome, Unavailable

HERE = Path(__file__).parent


def run_chunk(name: str, count: int, seed: int, scratch: Path | None = None, variant: str = "") -> Outcome:
    """Run `count` trials of a kind from `seed`, in a fresh folder below `scratch`.

    `variant` names a negative control: the module's `run` then has that defence switched off. A chunk that dies or
    hangs is a failure, not an exception.
    """
    if BY_NAME[name].in_memory and os.access("/dev/shm", os.W_OK):
        scratch = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{name}-") as folder:
        command = [sys.executable, "-P", str(HERE / "trials.py"), name, str(count), str(seed), folder, variant]
        try:
            environment = _environment()
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=BY_NAME[name].timeout_s
            )
        except Unavailable as exc:
            return Outcome(name, skipped=str(exc))
        except subprocess.TimeoutExpired:
            return Outcome(
                name, run=count, failed=1, details=[f"seed {seed}: no end after {BY_NAME[name].timeout_s} s"]
            )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        report = (done.stderr.strip() or done.stdout.strip())[-2000:]
        return Outcome(name, run=count, failed=1, details=[f"seed {seed}: ended with {done.returncode}: {report}"])
    return Outcome.from_json(lines[-1])


def _environment() -> dict[str, str]:
    # One thread a library: a process that forks must have no others. The trials stay out of PATHs of the user.
    quiet = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    helpers = (HERE, HERE.parent / "storage", HERE.parent / "e2e", HERE.parent)
    paths = [*map(str, helpers), *filter(None, sys.path)]
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths), **faultinject.preload()}


def main(name: str, count: str, seed: str, folder: str, variant: str = "") -> None:
    module = importlib.import_module(BY_NAME[name].module)
    options = {"variant": variant} if variant else {}
    try:
        outcome = module.run(int(count), int(seed), Path(folder), **options)
    except Unavailable as exc:
        outcome = Outcome(name, skipped=str(exc))
    sys.stdout.write(outcome.to_json() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
