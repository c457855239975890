"""Sealed KV is a pure function of identity and tokens: whatever happened on the way, the same tokens seal to the same
bytes. Compared cell by cell as XXH3-128 over every layer's K and V (`kv_digest`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_harness import CELL, Session, StepSpy, digest, drain, make_pair, random_ids, torch_threads
from kernel_marks import needs_build
from kernel_spy import KernelSpy

from sessiond.cache import SessionCache
from sessiond.model import Model
from sessiond.restoring import Restoration
from sessiond.scheduler import Scheduler
from sessiond.stepevents import CellSealed
from sessiond.storage.codec import codec_for
from sessiond.storage.kv import KVOwner, encode_kv
from sessiond.storage.prefix import prefix_hashes
from sessiond.storage.records import RevisionRecord
from sessiond.storage.store import Store
from sessiond.tiers import Tiers
from sessiond.types import Span

pytestmark = pytest.mark.usefixtures("one_thread")

TENANT, IDENTITY, PROFILE = "acme", "tiny", "here"
# Ten turns: odd sizes of new input, each answered with four tokens; 700 tokens, five whole cells and a tail of 60.
INPUTS = (1, 63, 127, 128, 129, 5, 37, 90, 64, 16)
ANSWER = 4
N_TOKENS = sum(INPUTS) + ANSWER * len(INPUTS)
N_CELLS = N_TOKENS // CELL


@pytest.fixture(
    params=[
        pytest.param(("llama", torch.bfloat16), id="bf16"),
        pytest.param(("llama", torch.float32), id="fp32"),
        pytest.param(("llama-kernels", torch.bfloat16), id="kernels", marks=needs_build),
        pytest.param(("gemma3-kernels", torch.bfloat16), id="kernels-windowed", marks=needs_build),
    ]
)
def model(request) -> Model:
    return make_pair(*request.param).ours


@pytest.fixture
def kernels(request, monkeypatch) -> Iterator[KernelSpy]:
    """The test's short inputs and decoding go through the compiled kernels, where the model's sizes allow."""
    spy = KernelSpy(monkeypatch)
    yield spy
    expected = "kernels" in request.node.callspec.id
    assert expected == (spy.take() > 50)


@pytest.fixture
def ids() -> list[int]:
    return random_ids(N_TOKENS, seed=5)


@pytest.fixture
def expected(model, ids) -> list[str]:
    """The digests of one turn over all the tokens, in a session of its own."""
    session = Session(model)
    session.run(ids, 1)
    assert session.cache.sealed == N_CELLS * CELL
    return session.cell_digests()


def turns(ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(input, answer) of each turn."""
    at = 0
    for n_input in INPUTS:
        yield ids[at : at + n_input], ids[at + n_input : at + n_input + ANSWER]
        at += n_input + ANSWER


def play(session: Session, ids: list[int], first: int = 0, last: int = len(INPUTS), **options) -> None:
    for new_ids, answer in list(turns(ids))[first:last]:
        session.force(new_ids, answer, **options)


def test_the_comparison_sees_one_bit(model, ids):
    session = Session(model)
    session.run(ids[:CELL], 1)
    before = session.cell_digests()
    session.cache.array(1, 1, Span(0, CELL))[-1, -1, -1] ^= 1
    assert session.cell_digests() != before


def test_token_by_token_differs_from_canonical(model, ids, expected):
    """The negative control: without sealing the bytes would depend on how the tokens came."""
    session = Session(model)
    session.force(ids[:1], ids[1 : 2 * CELL + 1])
    assert session.cache.sealed == 0
    assert any(digest(session.cache, i * CELL, (i + 1) * CELL) != expected[i] for i in range(2))
    session.seal()
    assert session.cell_digests() == expected[:2]


@pytest.mark.parametrize("seal_after", [(), (0, 1, 2, 3, 4, 5, 6, 7, 8), (2, 5)], ids=["at-end", "each", "twice"])
def test_ten_turns(model, ids, expected, seal_after, kernels):
    session = Session(model)
    for turn in range(len(INPUTS)):
        play(session, ids, turn, turn + 1)
        if turn in seal_after:
            session.seal()
    assert session.log == ids
    session.seal()
    assert session.cell_digests() == expected


def test_ten_turns_on_two_threads(model, ids):
    with torch_threads(2):
        whole, session = Session(model), Session(model)
        whole.run(ids, 1)
        play(session, ids)
        session.seal()
        assert session.cell_digests() == whole.cell_digests()


def test_ten_turns_that_do_not_seal(model, ids, expected):
    session = Session(model)
    play(session, ids, seal=False)
    assert session.cache.sealed == 0
    session.seal()
    assert session.cell_digests() == expected


def test_beside_other_sessions(model, ids, expected, kernels, monkeypatch):
    spy = StepSpy(model)
    monkeypatch.setattr(model, "begin", spy)
    scheduler = Scheduler(model, CELL)
    others = [Session(model, f"other{i}") for i in range(2)]
    for i, other in enumerate(others):
        scheduler.add(other.turn(random_ids(200 * i + 7, seed=i), 1000))
    session = Session(model)
    play(session, ids, scheduler=scheduler)
    assert len(scheduler.decoding) == 2, "the others were to decode all the time"
    together = sum(len(feeds) == 3 and any(feed.cache is session.cache for feed in feeds) for feeds in spy.steps)
    assert together > 30
    session.seal()
    assert session.cell_digests() == expected


def test_two_sessions_prefilling_in_turn(model, ids, expected):
    """Their canonical cells alternate in one scheduler."""
    sessions = [Session(model, "a"), Session(model, "b")]
    scheduler = Scheduler(model, CELL)
    other_ids = random_ids(N_TOKENS, seed=6)
    scheduler.add(sessions[0].turn(ids, 1))
    scheduler.add(sessions[1].turn(other_ids, 1))
    drain(scheduler)
    assert sessions[0].cell_digests() == expected
    assert sessions[1].cell_digests() != expected


def test_interrupted_sealing(model, ids, expected):
    """Sealing may stop after any cell, and turns may come in between."""
    session = Session(model)
    play(session, ids, 0, 5, seal=False)
    scheduler = Scheduler(model, CELL)
    scheduler.sealing.append(session.seal_work())
    assert scheduler.step() == [CellSealed(session.name, 0)]
    scheduler.cancel_idle(session.name)
    assert scheduler.idle
    play(session, ids, 5, 9)
    scheduler.sealing.append(session.seal_work())
    for _ in range(2):
        scheduler.step()
    scheduler.cancel_idle(session.name)
    play(session, ids, 9)
    session.seal()
    assert session.cell_digests() == expected


def test_rolled_back_and_played_again(model, ids, expected):
    """A branch that was left behind leaves nothing in the cells of the one that stays."""
    session = Session(model)
    play(session, ids, 0, 4)
    session.seal()
    n_kept = len(session.log)
    session.run(random_ids(300, seed=8), 5)
    session.seal()
    del session.log[n_kept:]
    session.cache.truncate(n_kept - 1, CELL)
    play(session, ids, 4)
    session.seal()
    assert session.cell_digests() == expected


# --- through the disk ----------------------------------------------------------------------------------------------


@contextmanager
def open_tiers(path: Path, model: Model) -> Iterator[Tiers]:
    store = Store.open(path, cell_tokens=CELL, log_map_bytes=64 << 20, block_map_bytes=64 << 20, reserve_bytes=0)
    tiers = Tiers(store, model.shape, model.max_context, IDENTITY, PROFILE)
    try:
        yield tiers
    finally:
        tiers.close()
        store.close()


def revision(n_tokens: int) -> RevisionRecord:
    return RevisionRecord(
        tenant=TENANT, revision_id="rev", session_id="ses", parent=None, kind="turn", log_start=0, log_end=n_tokens,
        position_start=0, position_end=n_tokens, n_prompt=n_tokens, n_generated=0, finish_reason="stop", aborted=False,
        created_us=0, request_id="req", usage={},
    )  # fmt: skip


def persist(path: Path, session: Session) -> None:
    cache = session.cache
    with open_tiers(path, session.model) as tiers:
        tiers.persist_cells(TENANT, np.array(session.log, np.uint32), cache, threading.Event())
        tiers.persist_tail(TENANT, "rev", cache.sealed, cache.copies(cache.sealed, cache.length), [])


def restore(path: Path, model: Model, log: list[int]) -> tuple[Session, Restoration]:
    with open_tiers(path, model) as tiers:
        cache, report = tiers.restore(TENANT, [revision(len(log))], np.array(log, np.uint32))
    return Session(model, log=list(log), cache=cache), report


def damage(path: Path, session: Session, owner: KVOwner, start: int, end: int) -> None:
    """Write a record of `owner` again with one bit flipped in its last frame."""
    arrays = session.cache.arrays(Span(start, end))
    key, value = encode_kv(owner, start, arrays, codec=codec_for(session.cache.shape.dtype)).records[-1]
    with open_tiers(path, session.model) as tiers:
        tiers.store.blocks.write([(key, value[:-1] + bytes([value[-1] ^ 1]))]).result()


@pytest.fixture
def midway(model, ids, tmp_path) -> Session:
    """A session after seven turns, sealed (four cells) and on disk with its tail."""
    session = Session(model)
    play(session, ids, 0, 7)
    session.seal()
    assert (session.cache.sealed, session.cache.length) == (4 * CELL, 517)
    persist(tmp_path, session)
    return session


def assert_equal_bytes(ours: SessionCache, theirs: SessionCache, length: int) -> None:
    for mine, other in zip(ours.arrays(Span(0, length)), theirs.arrays(Span(0, length)), strict=True):
        np.testing.assert_array_equal(mine[0], other[0])
        np.testing.assert_array_equal(mine[1], other[1])


def test_restored_kv_is_what_was_computed(model, ids, midway, tmp_path, expected, kernels):
    restored, report = restore(tmp_path, model, midway.log)
    assert report.tokens_restored == restored.cache.length == midway.cache.length
    assert restored.cache.sealed == midway.cache.sealed
    assert report.corrupt == ""
    assert_equal_bytes(restored.cache, midway.cache, midway.cache.length)
    assert restored.cell_digests() == expected[:4]
    # Going on is bit for bit what it would have been without the restart.
    for session in (midway, restored):
        play(session, ids, 7)
    assert all(map(torch.equal, restored.sampler.rows, midway.sampler.rows))
    assert_equal_bytes(restored.cache, midway.cache, midway.cache.length)
    restored.seal()
    assert restored.cell_digests() == expected


def test_a_provisional_tail_of_several_cells(model, ids, tmp_path, expected):
    """Nothing was sealed before the restart: all of it comes back provisional, and seals to the same bytes."""
    session = Session(model)
    play(session, ids, seal=False)
    persist(tmp_path, session)
    restored, _ = restore(tmp_path, model, session.log)
    assert (restored.cache.sealed, restored.cache.length) == (0, N_TOKENS - 1)
    assert_equal_bytes(restored.cache, session.cache, N_TOKENS - 1)
    restored.seal()
    assert restored.cell_digests() == expected


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_damaged_cell_ends_what_is_restored(model, ids, midway, tmp_path, expected, bad):
    hashes = prefix_hashes(TENANT, IDENTITY, np.array(midway.log, np.uint32), CELL)
    damage(tmp_path, midway, KVOwner(TENANT, "cell", hashes[bad]), bad * CELL, (bad + 1) * CELL)
    restored, report = restore(tmp_path, model, midway.log)
    assert "checksum" in report.corrupt
    assert restored.cache.sealed == restored.cache.length == bad * CELL
    assert restored.cell_digests() == expected[:bad]
    play(restored, ids, 7)
    restored.seal()
    assert restored.cell_digests() == expected


def test_a_damaged_tail_leaves_the_cells(model, ids, midway, tmp_path, expected):
    damage(tmp_path, midway, KVOwner(TENANT, "tail", b"rev", 1), midway.cache.sealed, midway.cache.length)
    restored, report = restore(tmp_path, model, midway.log)
    assert "checksum" in report.corrupt
    assert restored.cache.sealed == restored.cache.length == 4 * CELL
    play(restored, ids, 7)
    restored.seal()
    assert restored.cell_digests() == expected


def test_a_damaged_cell_over_a_long_tail_leaves_neither(model, ids, midway, tmp_path, expected):
    """The tail reaches below the cell that fails: what a failing read has half written over is computed again."""
    hashes = prefix_hashes(TENANT, IDENTITY, np.array(midway.log, np.uint32), CELL)
    with open_tiers(tmp_path, model) as tiers:
        tiers.persist_tail(TENANT, "rev", CELL, midway.cache.copies(CELL, midway.cache.length), [])
    damage(tmp_path, midway, KVOwner(TENANT, "cell", hashes[2]), 2 * CELL, 3 * CELL)
    restored, report = restore(tmp_path, model, midway.log)
    assert "checksum" in report.corrupt
    assert restored.cache.sealed == restored.cache.length == 2 * CELL
    play(restored, ids, 7)
    restored.seal()
    assert restored.cell_digests() == expected


def test_what_was_damaged_is_written_again(model, midway, tmp_path, expected):
    hashes = prefix_hashes(TENANT, IDENTITY, np.array(midway.log, np.uint32), CELL)
    damage(tmp_path, midway, KVOwner(TENANT, "cell", hashes[1]), CELL, 2 * CELL)
    restored, _ = restore(tmp_path, model, midway.log)
    assert restored.cache.sealed == CELL
    restored.run([], 1)
    restored.seal()
    persist(tmp_path, restored)
    again, report = restore(tmp_path, model, midway.log)
    assert report.corrupt == ""
    assert again.cell_digests() == expected[:4]


def test_another_identity_or_tenant_restores_nothing(model, midway, tmp_path):
    with open_tiers(tmp_path, model) as tiers:
        ids = np.array(midway.log, np.uint32)
        cache, _ = tiers.restore("other", [], ids)
        assert cache.length == 0
        tiers.restorer.identity_id = "another"
        cache, _ = tiers.restore(TENANT, [], ids)
        assert cache.length == 0
