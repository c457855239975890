"""The scrub comes round to everything, wherever it starts, mends KV, and counts a loss once."""

from __future__ import annotations

import pytest
from care_store import TENANT, cells, contents, flip, open_store, put_session

from sessiond import errors
from sessiond.scrub import Scrub, anywhere
from sessiond.storage import keys
from sessiond.storage.kv import KVOwner


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "data") as store:
        put_session(store)
        yield store


def rounds(scrub: Scrub, count: int) -> None:
    target = scrub.rounds + count
    while scrub.rounds < target:
        scrub.step()


def test_a_sound_store_stays_as_it_is(store):
    before = contents(store)
    scrub = Scrub(store)
    rounds(scrub, 2)
    assert contents(store) == before
    assert (scrub.repaired, scrub.losses) == (0, 0)
    assert scrub.n_bytes >= sum(map(len, before.values()))


@pytest.mark.parametrize("start", [b"", KVOwner(TENANT, "tail", b"s1-head").prefix, b"\xfe"])
@pytest.mark.parametrize("owner", [KVOwner(TENANT, "cell", cells()[1]), KVOwner(TENANT, "tail", b"s1-head", 1)])
def test_damaged_kv_is_dropped_wherever_it_starts(store, monkeypatch, start, owner):
    monkeypatch.setattr("sessiond.scrub.anywhere", lambda store: start)
    flip(store, next(key for key in contents(store) if key.startswith(owner.prefix)))
    scrub = Scrub(store)
    rounds(scrub, 2)
    assert scrub.repaired == 1
    assert not store.blocks.holds(owner)
    assert scrub.losses == 0


def test_a_damaged_reference_is_dropped(store):
    flip(store, keys.cell_ref_key(TENANT, cells()[0]))
    scrub = Scrub(store)
    rounds(scrub, 2)
    assert (scrub.repaired, scrub.losses) == (1, 0)
    assert store.log.cell_ref(TENANT, cells()[0]) is None


def test_a_loss_is_counted_once_and_left_alone(store):
    flip(store, keys.tokens_key(TENANT, "s1-head", 0))
    before = contents(store)
    scrub = Scrub(store)
    rounds(scrub, 3)
    assert (scrub.repaired, scrub.losses) == (0, 1)
    assert contents(store) == before


@pytest.mark.parametrize("error", [errors.StoreReadOnly("read-only"), errors.DiskFull("full")])
def test_what_comes_after_damage_that_cannot_be_mended_now_is_scrubbed_too(store, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr("sessiond.scrub.anywhere", lambda store: b"")
    flip(store, next(key for key in contents(store) if key.startswith(KVOwner(TENANT, "cell", cells()[0]).prefix)))
    flip(store, keys.tokens_key(TENANT, "s1-head", 0))
    scrub = Scrub(store)
    with monkeypatch.context() as broken:
        broken.setattr("sessiond.scrub.mend", refuse)
        rounds(scrub, 1)
    assert (scrub.repaired, scrub.losses) == (0, 1)
    rounds(scrub, 1)
    assert scrub.repaired == 1


def test_starts_differ(store):
    assert len({anywhere(store) for _ in range(8)}) > 1
