"""Damage of every kind of record is found, and named; what can be mended is, and is then found no more."""

from __future__ import annotations

import pytest
from care_store import TENANT, cells, change, contents, flip, open_store, put_cell, put_session, put_tail

from sessiond.errors import SessionNotFound
from sessiond.storage import keys
from sessiond.storage.findings import Finding, Severity
from sessiond.storage.kv import KVOwner
from sessiond.storage.store import Store
from sessiond.types import Span
from sessiond.verify import Verification, scope_of


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "data") as store:
        put_session(store)
        put_session(store, "s2", seed=2, root_seed=5)
        yield store


@pytest.fixture(autouse=True)
def nothing_to_wait_for(monkeypatch):
    """Nobody writes beside these scans."""
    monkeypatch.setattr("sessiond.verify.SECOND_LOOK_SECONDS", 0.0)
    monkeypatch.setattr("sessiond.collector.SECOND_LOOK_SECONDS", 0.0)


def no_pause() -> None:
    pass


def verify(store: Store, *, repair: bool = False, only: list[str] | None = None) -> list[Finding]:
    scope = scope_of(store, only) if only else None
    return [step for step in Verification(store, no_pause, scope, repair=repair).run() if isinstance(step, Finding)]


LOG_KEYS = {
    "session": keys.record_key(TENANT, keys.SESSION, "s1"),
    "revision": keys.record_key(TENANT, keys.REVISION, "s1-head"),
    "root": keys.record_key(TENANT, keys.REVISION, "s1-root"),
    "messages": keys.record_key(TENANT, keys.MESSAGES, "s1-head"),
    "tokens": keys.tokens_key(TENANT, "s1-head", 0),
    "open tokens": keys.tokens_key(TENANT, "s1-unborn", 0),
    "request": keys.record_key(TENANT, keys.REQUEST, "s1", "turn-1"),
    "open request": keys.record_key(TENANT, keys.REQUEST, "s1", "turn-2"),
}
REBUILT_KEYS = {
    "index": keys.record_key(TENANT, keys.REVISION_INDEX, "s1", "s1-head"),
    "cell reference": keys.cell_ref_key(TENANT, cells()[0]),
    "tail reference": keys.record_key(TENANT, keys.TAIL_REF, "s1-head"),
    "prior": keys.record_key(TENANT, keys.PRIOR, "s1-head"),
}


def test_a_sound_store_has_no_findings(store):
    before = contents(store)
    assert verify(store) == []
    assert verify(store, repair=True) == []
    assert contents(store) == before


def test_everything_is_read(store):
    run = Verification(store, no_pause)
    list(run.run())
    assert run.records == store.log.stat().entries + store.blocks.stat().entries
    assert run.n_bytes > sum(map(len, contents(store).values()))  # all of these, and the tally


@pytest.mark.parametrize("what", LOG_KEYS)
@pytest.mark.parametrize("at", [0, 30, -1])
def test_a_damaged_record_of_the_log_is_a_loss_that_repair_leaves_alone(store, what, at):
    key = LOG_KEYS[what]
    flip(store, key, at)
    before = contents(store)
    (found,) = [finding for finding in verify(store) if finding.key == key]
    assert (found.severity, found.kind, found.session_id) == (Severity.LOSS, "checksum", "s1")
    assert all(not finding.repaired for finding in verify(store, repair=True) if finding.severity is Severity.LOSS)
    assert contents(store) == before


def test_a_damaged_identity_is_a_loss(store):
    key = keys.global_key(keys.IDENTITY, "id1")
    flip(store, key)
    assert [(f.severity, f.kind, f.key) for f in verify(store)] == [(Severity.LOSS, "checksum", key)]


def test_damaged_tokens_say_which_and_what_can_still_be_read(store):
    flip(store, LOG_KEYS["tokens"])
    (found,) = verify(store)
    assert found.tokens == Span(300, 320)
    assert "before 300 can be read" in found.message


@pytest.mark.parametrize("what", ["revision", "root", "messages", "tokens", "open request"])
def test_a_missing_record_of_the_log_is_a_loss(store, what):
    change(store, LOG_KEYS[what], None)
    before = contents(store)
    found = [finding for finding in verify(store, repair=True) if finding.key == LOG_KEYS[what]]
    assert [(f.severity, f.kind, f.session_id, f.repaired) for f in found] == [(Severity.LOSS, "missing", "s1", False)]
    assert set(before) == set(contents(store))


def test_a_missing_token_segment_names_its_tokens(store):
    change(store, LOG_KEYS["tokens"], None)
    (found,) = verify(store)
    assert found.tokens == Span(300, 320)


@pytest.mark.parametrize("what", REBUILT_KEYS)
def test_what_the_log_rebuilds_is_found_repaired_and_found_clean(store, what):
    flip(store, REBUILT_KEYS[what])
    (found,) = verify(store)
    assert (found.severity, found.kind, found.repaired) == (Severity.REPAIRABLE, "checksum", False)
    assert found.key == REBUILT_KEYS[what]
    assert [finding.repaired for finding in verify(store, repair=True)] == [True]
    assert verify(store) == []


def kv_keys(store: Store, owner: KVOwner) -> list[bytes]:
    return [key for key in contents(store) if key.startswith(owner.prefix)]


OWNERS = [KVOwner(TENANT, "cell", cells()[1]), KVOwner(TENANT, "tail", b"s1-head", 1)]


@pytest.mark.parametrize("owner", OWNERS, ids=["cell", "tail"])
@pytest.mark.parametrize("at", [0, 20, 50, -1])
def test_damaged_kv_is_found_dropped_and_found_clean(store, owner, at):
    key = kv_keys(store, owner)[-1]
    flip(store, key, at)
    (found,) = verify(store)
    assert (found.severity, found.kind, found.key) == (Severity.REPAIRABLE, "checksum", key)
    assert [finding.repaired for finding in verify(store, repair=True)] == [True]
    assert kv_keys(store, owner) == []
    assert verify(store) == []


@pytest.mark.parametrize("owner", OWNERS, ids=["cell", "tail"])
@pytest.mark.parametrize("all_of_it", [False, True])
def test_missing_kv_is_found_and_its_reference_dropped(store, owner, all_of_it):
    records = kv_keys(store, owner)
    for key in records if all_of_it else records[:1]:
        change(store, key, None)
    (found,) = verify(store)
    assert (found.severity, found.kind) == (Severity.REPAIRABLE, "missing")
    assert [finding.repaired for finding in verify(store, repair=True)] == [True]
    assert verify(store) == []


def test_kv_of_another_cell_under_this_ones_key_is_found(store):
    mine, other = kv_keys(store, OWNERS[0])[0], kv_keys(store, KVOwner(TENANT, "cell", cells()[0]))[0]
    change(store, mine, contents(store)[other])
    assert [(f.kind, f.key) for f in verify(store)] == [("checksum", mine)]


def test_kv_of_an_older_generation_is_unreferenced(store):
    old = put_tail(store, "s1-head", 256, 64, generation=7, refer=False)
    (found,) = verify(store)
    assert (found.severity, found.kind, found.key) == (Severity.NOTICE, "unreferenced", old.prefix)
    verify(store, repair=True)
    assert kv_keys(store, old) == []
    assert kv_keys(store, OWNERS[1]) != []
    assert verify(store) == []


def test_a_key_that_is_none_is_found_and_dropped(store):
    store.blocks.environment.submit([lambda txn: txn.put(b"\x05what?", b"?")], 1).result()
    assert [(f.severity, f.kind) for f in verify(store)] == [(Severity.REPAIRABLE, "checksum")]
    verify(store, repair=True)
    assert verify(store) == []


class TestTheIndex:
    def test_a_row_that_lags_is_put_right(self, store):
        store.catalog.remove_session(TENANT, "s1")
        (found,) = verify(store)
        assert (found.severity, found.kind, found.session_id) == (Severity.NOTICE, "index_lags", "s1")
        assert [finding.repaired for finding in verify(store, repair=True)] == [True]
        assert verify(store) == []

    def test_other_labels_are_a_lag(self, store):
        with store.catalog._transaction() as connection:
            connection.exec_driver_sql("UPDATE session_labels SET value = 'c' WHERE session_id = 's1'")
        assert [(f.kind, f.session_id) for f in verify(store)] == [("index_lags", "s1")]

    def test_a_session_that_only_the_index_knows_is_lost(self, store):
        change(store, LOG_KEYS["session"], None)
        before = contents(store)
        found = [finding for finding in verify(store, repair=True) if finding.kind == "index_only"]
        assert [(f.severity, f.session_id, f.repaired) for f in found] == [(Severity.LOSS, "s1", False)]
        assert contents(store) == before


class TestOnlySomeSessions:
    def test_damage_of_another_is_not_theirs(self, store):
        flip(store, LOG_KEYS["messages"])
        store.catalog.remove_session(TENANT, "s1")
        assert verify(store, only=["s2"]) == []
        assert {finding.kind for finding in verify(store, only=["s1"])} == {"checksum", "index_lags"}

    @pytest.mark.parametrize("owner", OWNERS, ids=["cell", "tail"])
    def test_their_kv_is_theirs(self, store, owner):
        flip(store, kv_keys(store, owner)[0])
        assert len(verify(store, only=["s1"])) == 1
        assert verify(store, only=["s2"]) == []

    def test_one_that_is_not_there_is_refused(self, store):
        with pytest.raises(SessionNotFound):
            verify(store, only=["s3"])


def test_repair_lets_kv_be_that_is_being_written(store):
    flip(store, kv_keys(store, OWNERS[0])[0])
    with store.inflight.hold([OWNERS[0].name]):
        assert [finding.repaired for finding in verify(store, repair=True)] == [False]
        assert kv_keys(store, OWNERS[0]) != []
    assert [finding.repaired for finding in verify(store, repair=True)] == [True]


def test_repaired_kv_can_be_stored_again(store):
    flip(store, kv_keys(store, OWNERS[0])[0])
    verify(store, repair=True)
    put_cell(store, cells()[1], 1)
    assert verify(store) == []


CHANGES = {"kv": kv_keys, "reference": lambda store, owner: [REBUILT_KEYS["cell reference"]]}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_right_again_at_the_second_look_is_no_finding(store, monkeypatch, what):
    """A change seen in part: the first look finds the store without it, the second one with it."""
    changed = {key: contents(store)[key] for key in CHANGES[what](store, KVOwner(TENANT, "cell", cells()[0]))}
    for key in changed:
        flip(store, key)
    looked = []

    def settled(self, suspects) -> None:
        if suspects:
            looked.extend(suspects)
            for key, value in changed.items():
                change(store, key, value)

    monkeypatch.setattr(Verification, "_wait", settled)
    assert verify(store, repair=True) == []
    assert looked != []
