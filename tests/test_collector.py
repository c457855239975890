"""The collector erases what nobody leads to, and nothing else, whenever it dies and whatever runs beside it."""

from __future__ import annotations

import multiprocessing
import os
import threading

import numpy as np
import pytest
from care_store import (
    CELL,
    TENANT,
    cells,
    change,
    contents,
    flip,
    open_store,
    put_cell,
    put_revision,
    put_session,
    put_tail,
    request,
    revision,
    tokens,
)

from sessiond.collector import collect, garbage
from sessiond.reachability import reachable
from sessiond.references import delete_unreferenced
from sessiond.storage import envelope, keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.blocks import BlockStore
from sessiond.storage.kv import KVOwner
from sessiond.storage.log import LogStore
from sessiond.storage.store import Store


@pytest.fixture(autouse=True)
def nothing_to_wait_for(monkeypatch):
    monkeypatch.setattr("sessiond.collector.SECOND_LOOK_SECONDS", 0.0)


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "data") as store:
        put_session(store)
        yield store


def no_pause() -> None:
    pass


def add_garbage(store: Store) -> None:
    """Something of every kind that nobody leads to."""
    batch = LogBatch()
    put_revision(batch, revision("gone", "g-root", None, 0, 10), 3)
    put_revision(batch, revision("gone", "g-turn", "g-root", 10, 5), 4)
    batch.append_tokens(TENANT, "g-ended", 0, tokens(5, 4))
    batch.put_request(request("gone", "q", "g-root", "g-ended", "failed"))
    batch.put_index(TENANT, "gone", "g-lost")
    batch.put_prior(TENANT, "g-turn", {"identity_id": "id1", "start": 0}, bytes(40))
    store.log.write(batch).result()
    prior = keys.record_key(TENANT, keys.PRIOR, "g-none")
    value = envelope.pack(prior, {"identity_id": "id1", "start": 0}, bytes(40))
    store.log.environment.submit([lambda txn: txn.put(prior, value)], len(value)).result()
    put_cell(store, b"\x01" * 16, 0)
    put_cell(store, b"\x02" * 16, 0, refer=False)
    put_tail(store, "g-turn", 0, 15)
    put_tail(store, "s1-head", 256, 64, generation=9, refer=False)


def test_garbage_of_every_kind_is_found_and_erased_and_nothing_else(store):
    before = contents(store)
    add_garbage(store)
    assert len(list(garbage(store, no_pause, erase=False))) >= 7
    assert collect(store, no_pause) >= 7
    assert contents(store) == before
    assert collect(store, no_pause) == 0


def test_what_sessions_lead_to_is_theirs(store):
    found = reachable(store, TENANT, ["s1"], no_pause)
    assert found.revisions == {"s1-root", "s1-head", "s1-unborn"}
    assert found.cells == set(cells())
    assert (found.all_revisions, found.all_cells) == (False, False)


def test_a_rolled_back_branch_and_a_fork_of_another_session_stay(store):
    """Revisions behind the head are in the session's index; a fork's history is another session's."""
    batch = LogBatch()
    put_revision(batch, revision("s1", "s1-side", "s1-root", 300, 100), 6)  # a third cell, by another way
    store.log.write(batch).result()
    side = np.concatenate([tokens(0, 300), tokens(6, 100)])
    from sessiond.storage.prefix import prefix_hashes

    put_cell(store, prefix_hashes(TENANT, "id1", side, CELL)[2], 2)
    before = contents(store)
    assert collect(store, no_pause) == 0
    assert contents(store) == before


DAMAGED = {
    "session": keys.record_key(TENANT, keys.SESSION, "s1"),
    "revision": keys.record_key(TENANT, keys.REVISION, "s1-root"),
    "request": keys.record_key(TENANT, keys.REQUEST, "s1", "turn-2"),
}


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("what", DAMAGED)
def test_beside_damage_everything_stays_that_it_may_have_led_to(store, what, gone):
    if gone:
        change(store, DAMAGED[what], None)
    else:
        flip(store, DAMAGED[what])
    before = contents(store)
    collect(store, no_pause)
    assert contents(store) == before


def test_damaged_tokens_keep_cells(store):
    flip(store, keys.tokens_key(TENANT, "s1-root", 0))
    before = contents(store)
    collect(store, no_pause)
    assert contents(store) == before


def test_kv_in_flight_is_left_alone(store):
    """A persist has written blocks, not yet the reference; without its hold the KV would be garbage."""
    cell = KVOwner(TENANT, "cell", b"\x02" * 16)
    with store.inflight.hold([cell.name]):
        put_cell(store, cell.id, 0, refer=False)
        assert collect(store, no_pause) == 0
        assert store.blocks.holds(cell)
    assert collect(store, no_pause) == 1
    assert not store.blocks.holds(cell)


def test_a_reference_written_while_it_looks_is_left_alone(store, monkeypatch):
    """A turn commits and its cell is written between the two looks of the collector."""
    prefix_hash = b"\x03" * 16

    def and_meanwhile(*args):
        found = reachable(*args)
        with store.inflight.hold([KVOwner(TENANT, "cell", prefix_hash).name]):
            pass  # a persist that found the reference, and relies on it
        return found

    put_cell(store, prefix_hash, 0)
    monkeypatch.setattr("sessiond.collector.reachable", and_meanwhile)
    assert collect(store, no_pause) == 0
    assert store.log.cell_ref(TENANT, prefix_hash) is not None


def test_kv_written_again_behind_a_queued_deletion_stays(store):
    owner = KVOwner(TENANT, "cell", b"\x02" * 16)
    put_cell(store, owner.id, 0, refer=False)
    entered, release = threading.Event(), threading.Event()

    def busy(txn):
        entered.set()
        assert release.wait(10)

    store.blocks.environment.submit([busy], 0)
    assert entered.wait(10)
    deleting = threading.Thread(target=delete_unreferenced, args=(store, [owner]))
    deleting.start()
    while store.blocks.environment._queue.empty():
        pass
    writing = threading.Thread(target=put_cell, args=(store, owner.id, 0))
    writing.start()
    release.set()
    deleting.join(10)
    writing.join(10)
    assert store.blocks.holds(owner)
    assert store.log.cell_ref(TENANT, owner.id) is not None


def die_at(path, step: int) -> None:
    """Collect, and die at the `step`-th durable write: before it for even steps, after it for odd ones."""
    left = step // 2

    def dying(original):
        def call(self, *args):
            nonlocal left
            left -= 1
            if left < 0 and step % 2 == 0:
                os._exit(9)
            done = original(self, *args)
            if left < 0:
                done.result()
                os._exit(9)
            return done

        return call

    LogStore.write = dying(LogStore.write)  # type: ignore[method-assign]
    BlockStore.delete = dying(BlockStore.delete)  # type: ignore[method-assign]
    with open_store(path) as store:
        collect(store, no_pause)
    os._exit(0)


def test_it_may_die_at_every_step(tmp_path):
    with open_store(tmp_path / "data") as store:
        put_session(store)
        before = contents(store)
        add_garbage(store)
    context = multiprocessing.get_context("spawn")
    deaths = 0
    while True:
        child = context.Process(target=die_at, args=(tmp_path / "data", deaths % 4))
        child.start()
        child.join(60)
        if child.exitcode == 0:
            break
        assert child.exitcode == 9
        deaths += 1
        with open_store(tmp_path / "data") as store:
            after = contents(store)
            assert {key: after.get(key) for key in before} == before
            from sessiond.verify import Verification

            severe = [step for step in Verification(store, no_pause).run() if getattr(step, "severity", 1) > 1]
            assert severe == []
        assert deaths < 40
    assert deaths >= 4
    with open_store(tmp_path / "data") as store:
        assert contents(store) == before
