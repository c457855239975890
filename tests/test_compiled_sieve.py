"""Sieve inside of the compiled layers: the same bits, and the same record, as asked layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import CELL, Session, make_exact_pair, random_ids, step_until, torch_threads
from kernel_marks import levels, needs_build
from test_backing import mapped_bytes, offloaded

from sessiond.kernels.sieved import Sieved, SieveIndex
from sessiond.model import Model
from sessiond.policies import registry
from sessiond.policies.base import Policy
from sessiond.reading import Reading, exact_tier
from sessiond.readsummary import summarize
from sessiond.scheduler import Scheduler
from sessiond.selection import Selection
from sessiond.stepevents import Ended

pytestmark = needs_build

SIEVE = registry.parse("sieve", {"least": 4, "most": 16, "mass": 0.9})
MIXED = registry.parse(
    "layers",
    {
        "rules": [{"layers": "0", "policy": {"name": "full"}}],
        "otherwise": {"name": "sieve", "bits": 2, "least": 8, "most": 32},
    },
)
N_HISTORY, N_NEW = 300, 60  # some of the tokens are looked at closer, and once the index has to grow


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with torch_threads(2):
        yield


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> Iterator[list[bool]]:
    """Whether each decoded token was chosen for inside of the compiled layers; never, unless `compiled`."""
    asked: list[bool] = []
    original = Selection.compiled

    def spy(selection: Selection, *token: Any) -> Sieved | None:
        found = original(selection, *token) if compiled else None
        asked.append(found is not None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Selection, "compiled", spy)
        yield asked


def reading_of(session: Session) -> Reading:
    model = session.model
    return Reading(model.shape, model.facts.attending, model.sliding_window, exact_tier(session.cache))


def converse(model: Model, policy: Policy, make: Callable[[], Session]) -> tuple[list[torch.Tensor], Reading]:
    """Two turns under the policy; logits of all tokens of the second, and its record."""
    session = make()
    session.run(random_ids(N_HISTORY, 1), 4)
    reading = reading_of(session)
    session.run(random_ids(20, 2), N_NEW, policy=policy, turn_start=len(session.log), reading=reading)
    return session.sampler.rows, reading


def same_record(one: Reading, other: Reading) -> bool:
    return repr(summarize(one)) == repr(summarize(other)) and one.n_tokens == other.n_tokens


@levels
@pytest.mark.parametrize("name", ["llama-kernels", "gemma3-kernels", "qwen2-kernels"])
@pytest.mark.parametrize("policy", [SIEVE, MIXED], ids=["sieve", "mixed"])
def test_the_same_bits_and_record_as_layer_by_layer(level, monkeypatch, name: str, policy: Policy):
    model = make_exact_pair(name).ours
    with level, counted(monkeypatch, compiled=False):
        expected, told = converse(model, policy, lambda: Session(model))
    with level, counted(monkeypatch, compiled=True) as asked:
        found, reading = converse(model, policy, lambda: Session(model))
    assert sum(asked) > N_NEW * 3 // 4
    assert all(asked) == (told.select_seconds == 0)  # an index has to grow once
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert same_record(reading, told)
    assert (reading.select_seconds > 0) == (told.select_seconds > 0)


def test_kv_in_a_file_leaves_memory_after_every_layer(monkeypatch, tmp_path: Path):
    model = make_exact_pair("llama-kernels").ours
    expected, _ = converse(model, SIEVE, lambda: Session(model))
    kept: list[Session] = []

    def make() -> Session:
        kept.append(Session(model, cache=offloaded(tmp_path, model.shape, model.max_context)))
        return kept[-1]

    with counted(monkeypatch, compiled=True) as asked:
        found, _ = converse(model, SIEVE, make)
    assert any(asked)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    cache = kept[0].cache
    assert mapped_bytes(cache) < len(cache.backing.memory) // model.shape.n_layers / 2


def test_beside_sessions_that_see_everything_each_gets_its_own(monkeypatch):
    model = make_exact_pair("llama-kernels").ours
    policies = (SIEVE, None, registry.parse("sieve", {"least": 8, "most": 64, "bits": 8}))

    def turns(scheduler: Scheduler, which: list[int]) -> list[list[int]]:
        sessions = [Session(model, name=str(i)) for i in which]
        for i, session in zip(which, sessions, strict=True):
            session.run(random_ids(100 + 70 * i, i), 2)
            options = {} if policies[i] is None else {"policy": policies[i], "turn_start": len(session.log)}
            scheduler.add(session.turn(random_ids(5, 9 + i), 12, **options))
        for session in sessions:
            step_until(scheduler, lambda event, name=session.name: isinstance(event, Ended) and event.turn_id == name)
        return [session.sampler.rows for session in sessions]

    alone = [turns(Scheduler(model, CELL), [i])[0] for i in range(3)]
    with counted(monkeypatch, compiled=True) as asked:
        together = turns(Scheduler(model, CELL), [0, 1, 2])
    assert any(asked)
    for found, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_policy_that_failed_or_scores_is_asked_in_python():
    selection = Selection(SIEVE, 2)
    selection.begin_turn(0)
    assert selection.compiled([0, 1], 0, 2, 32) is None  # there is no index yet
    selection.failure = ValueError("broken")
    assert selection.compiled([0, 1], 0, 2, 32) is None


@pytest.mark.parametrize(("turn_start", "n_tiles"), [(33, 3), (-1, 3), (16, 2)])
def test_indexes_that_do_not_fit_are_refused(turn_start: int, n_tiles: int):
    tiles = torch.zeros(2, n_tiles, 32 * 16 // 2 + 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"turn|tiles"):
        Sieved([SieveIndex(tiles, 4, SIEVE.selector(0, 1)._enough)], 2, 32, turn_start, 32)
