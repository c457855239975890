"""The slice that runs with the other tests; SESSIOND_SEED repeats one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from kinds import BY_NAME, chunks
from outcome import Outcome, total
from trials import run_chunk

MOST_CHUNKS = 4  # of a control
SEED = int(os.environ.get("SESSIOND_SEED", str(time.time_ns() % 2**31)))


@pytest.fixture
def run_slice(tmp_path: Path) -> Callable[[str], Outcome]:
    """Runs a kind's slice, which must not fail; skips where the machine lacks what the kind needs."""

    def run(name: str) -> Outcome:
        kind = BY_NAME[name]
        outcome = total(name, [run_chunk(name, n, seed, tmp_path) for n, seed in chunks(kind, "slice", SEED)])
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        assert outcome.failed == 0, (f"SESSIOND_SEED={SEED}", outcome)
        assert outcome.run == kind.slice
        assert (outcome.lost_tokens, outcome.turns_twice, outcome.silent_corruptions) == (0, 0, 0)
        return outcome

    return run


def _has_failed(outcome: Outcome) -> bool:
    return outcome.failed > 0


@pytest.fixture
def run_control(tmp_path: Path) -> Callable[..., Outcome]:
    """Runs trials with a defence switched off; they must fail, or the trials prove nothing.

    Each trial meets the missing defence by chance: so a chunk more is run, a few times, until one shows it.
    """

    def run(
        name: str, variant: str, count: int, seed: int = SEED, shows: Callable[[Outcome], bool] = _has_failed
    ) -> Outcome:
        for more in range(MOST_CHUNKS):
            outcome = run_chunk(name, count, seed + more, tmp_path, variant)
            if outcome.skipped:
                pytest.skip(outcome.skipped)
            if shows(outcome):
                return outcome
        pytest.fail(f"seeds {seed} to {seed + MOST_CHUNKS - 1}: nothing fails with {variant}: {outcome}")

    return run
