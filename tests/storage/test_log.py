from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_samples import all_values, cell_ref, overwrite, request, revision, session, tail_ref

from sessiond import errors
from sessiond.storage import envelope, keys
from sessiond.storage.batch import TOKEN_TEMPLATE, LogBatch


def write(log, *puts):
    batch = LogBatch()
    for name, *arguments in puts:
        getattr(batch, name)(*arguments)
    log.write(batch).result()


def fill(log):
    """One record of every kind, for tenant t; returns kind -> a call that reads it."""
    write(
        log,
        ("put_session", session()),
        ("put_revision", revision(), b"messages"),
        ("append_tokens", "t", "r1", 0, np.array([5, 6, 7])),
        ("put_request", request()),
        ("put_cell_ref", cell_ref()),
        ("put_tail_ref", tail_ref()),
        ("put_prior", "t", "r1", {"start": 0}, b"scores"),
        ("put_identity", "id1", {"weights": "abc"}),
        ("put_profile", "p1", {"torch": "2"}),
    )
    return {
        keys.SESSION: lambda: log.session("t", "s1"),
        keys.REVISION: lambda: log.revision("t", "r1"),
        keys.REVISION_INDEX: lambda: log.revisions_of_session("t", "s1"),
        keys.MESSAGES: lambda: log.messages("t", "r1"),
        keys.TOKENS: lambda: log.tokens("t", "r1")[0].tolist(),
        keys.REQUEST: lambda: log.request("t", "s1", "q1"),
        keys.CELL_REF: lambda: log.cell_ref("t", bytes(range(16))),
        keys.TAIL_REF: lambda: log.tail_ref("t", "r1"),
        keys.PRIOR: lambda: log.prior("t", "r1"),
        keys.IDENTITY: lambda: log.identity("id1"),
        keys.PROFILE: lambda: log.profile("p1"),
    }


def test_every_kind_reads_back_equal(log):
    reads = fill(log)
    assert [read() for read in reads.values()] == [
        session(), revision(), [revision()], b"messages", [5, 6, 7], request(), cell_ref(), tail_ref(),
        ({"start": 0}, b"scores"), {"weights": "abc"}, {"torch": "2"},
    ]  # fmt: skip
    assert log.requests("t", "s1") == [request()]
    assert log.all_cell_refs("t") == [cell_ref()]
    assert log.tenants() == ["t"]


def test_absent_and_foreign_look_the_same(log):
    fill(log)
    for tenant, session_id, revision_id in (("t", "none", "none"), ("other", "s1", "r1")):
        with pytest.raises(errors.SessionNotFound):
            log.session(tenant, session_id)
        for read in (log.revision, log.chain):
            with pytest.raises(errors.RevisionNotFound):
                read(tenant, revision_id)
        assert log.messages(tenant, revision_id) is None
        assert log.tail_ref(tenant, revision_id) is None
        assert log.prior(tenant, revision_id) is None
        assert log.request(tenant, session_id, "q1") is None
        assert log.revisions_of_session(tenant, session_id) == []
        assert len(log.tokens(tenant, revision_id)[0]) == 0
    assert log.cell_ref("other", bytes(range(16))) is None
    assert log.identity("none") is None


def test_damage_to_any_record_kind_is_found_and_named(log, log_env):
    reads = fill(log)
    for key, value in all_values(log_env).items():
        read = reads[keys.split(key)[1]]
        good = read()
        step = max(1, (len(value) - envelope.HEAD_BYTES) // 20)
        for position in [
            *range(envelope.HEAD_BYTES),
            *range(envelope.HEAD_BYTES, len(value), step),
            len(value) - 1,
        ]:
            damaged = bytearray(value)
            damaged[position] ^= 0x10
            overwrite(log_env, key, bytes(damaged))
            with pytest.raises(errors.RecordCorrupt) as caught:
                read()
            assert caught.value.metadata["key"] == keys.readable(key)
        for damaged in (b"", value[:-1], value + b"\0", bytes(len(value))):
            overwrite(log_env, key, damaged)
            with pytest.raises(errors.RecordCorrupt):
                read()
        overwrite(log_env, key, value)
        assert read() == good


def test_without_the_checksum_a_flipped_token_is_silent(log, log_env, monkeypatch):
    fill(log)
    key = keys.tokens_key("t", "r1", 0)
    value = bytearray(all_values(log_env)[key])
    value[-15] ^= 1  # the first token id
    overwrite(log_env, key, bytes(value))
    monkeypatch.setattr(envelope, "_authentic", lambda *_: True)
    assert log.tokens("t", "r1")[0].tolist() == [4, 6, 7]


def test_a_record_copied_to_another_tenant_or_id_is_found(log, log_env):
    fill(log)
    value = all_values(log_env)[keys.record_key("t", keys.SESSION, "s1")]
    for tenant, session_id in (("u", "s1"), ("t", "s2")):
        overwrite(log_env, keys.record_key(tenant, keys.SESSION, session_id), value)
        with pytest.raises(errors.RecordCorrupt):
            log.session(tenant, session_id)


def test_a_record_whose_fields_do_not_fit_is_corrupt_even_with_a_good_checksum(log, log_env):
    key = keys.record_key("t", keys.SESSION, "s1")
    overwrite(log_env, key, envelope.pack(key, {"tenant": "t"}))
    with pytest.raises(errors.RecordCorrupt, match="lacks"):
        log.session("t", "s1")


def test_generation_is_compared_inside_the_transaction(log):
    def put(record, expect):
        batch = LogBatch()
        batch.put_session(record, expect_generation=expect)
        log.write(batch).result()

    with pytest.raises(errors.SessionNotFound):
        put(session(), 1)
    put(session(generation=1), 0)
    with pytest.raises(errors.SessionExists):
        put(session(generation=1), 0)
    put(session(generation=2), 1)
    with pytest.raises(errors.EtagMismatch):
        put(session(generation=2, labels={}), 1)
    assert log.session("t", "s1") == session(generation=2)


def test_a_failed_batch_changes_nothing(log):
    write(log, ("put_session", session()))
    batch = LogBatch()
    batch.put_request(request())
    batch.put_session(session(generation=9), expect_generation=5)
    with pytest.raises(errors.EtagMismatch):
        log.write(batch).result()
    assert log.request("t", "s1", "q1") is None


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), data=st.data())
def test_segments_join_in_order(sizes, data):
    # Segments are pure values here: no store is needed to join them.
    from sessiond.storage.batch import join_segments

    ids = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=sum(sizes), max_size=sum(sizes)))
    parts, at = [], 0
    for size in sizes:
        key = keys.tokens_key("t", "r", at)
        part = np.array(ids[at : at + size], np.uint32)
        body = part.astype("<u4").tobytes() + bytes([TOKEN_TEMPLATE] * size)
        parts.append((key, memoryview(envelope.pack(key, {"n": size}, body))))
        at += size
    joined, flags = join_segments(parts)
    assert joined.tolist() == ids
    assert flags.tolist() == [TOKEN_TEMPLATE] * len(ids)


def test_a_commit_replaces_the_segments_by_one(log, log_env):
    for start in (0, 2, 4):
        write(log, ("append_tokens", "t", "r1", start, np.array([start, start + 1]), np.array([1, 0], np.uint8)))
    ids, flags = log.tokens("t", "r1")
    ids, flags = np.append(ids, np.uint32(2**32 - 1)), np.append(flags, np.uint8(0))
    write(log, ("delete_revision", "t", "r1"), ("append_tokens", "t", "r1", 0, ids, flags))
    found_ids, found_flags = log.tokens("t", "r1", expected=7)
    assert found_ids.tolist() == [0, 1, 2, 3, 4, 5, 2**32 - 1]
    assert found_flags.tolist() == [1, 0, 1, 0, 1, 0, 0]
    ids, flags = found_ids, found_flags
    assert ids.dtype == np.uint32
    assert flags.dtype == np.uint8
    assert [key for key in all_values(log_env) if keys.split(key)[1] == keys.TOKENS] == [keys.tokens_key("t", "r1", 0)]


def test_a_segment_that_would_leave_a_gap_is_refused(log):
    write(log, ("append_tokens", "t", "r1", 0, np.array([1, 2])), ("append_tokens", "t", "r2", 0, np.array([9])))
    for revision_id, start in (("r1", 3), ("r1", 1), ("r2", 2), ("r3", 1)):
        with pytest.raises(errors.SessiondError, match="gap"):
            write(log, ("append_tokens", "t", revision_id, start, np.array([7])))
    write(log, ("append_tokens", "t", "r1", 2, np.array([3])))
    assert log.tokens("t", "r1")[0].tolist() == [1, 2, 3]
    assert log.tokens("t", "r2")[0].tolist() == [9]


@pytest.mark.parametrize("gone", [0, 2])
def test_a_missing_segment_is_found_when_reading(log, log_env, gone):
    for start in (0, 2, 4):
        write(log, ("append_tokens", "t", "r1", start, np.array([1, 2])))
    overwrite(log_env, keys.tokens_key("t", "r1", gone), None)
    with pytest.raises(errors.RecordCorrupt, match="gap"):
        log.tokens("t", "r1")


def test_a_missing_last_segment_is_found_by_the_expected_count(log, log_env):
    write(log, ("append_tokens", "t", "r1", 0, np.array([1, 2])), ("append_tokens", "t", "r1", 2, np.array([3])))
    overwrite(log_env, keys.tokens_key("t", "r1", 2), None)
    assert log.tokens("t", "r1")[0].tolist() == [1, 2]
    with pytest.raises(errors.RecordCorrupt, match="holds 2 tokens"):
        log.tokens("t", "r1", expected=3)


@pytest.mark.parametrize(
    ("ids", "flags"),
    [
        (np.array([-1]), None),
        (np.array([2**32]), None),
        (np.array([], np.uint32), None),
        (np.zeros((1, 2), int), None),
        (np.array([1]), np.zeros(2, np.uint8)),
    ],
)
def test_bad_token_arrays_are_refused(ids, flags):
    with pytest.raises(errors.BadTokens):
        LogBatch().append_tokens("t", "r", 0, ids, flags)


def test_chain_runs_from_root_to_head_across_a_fork(log):
    write(
        log,
        ("put_revision", revision()),
        ("put_revision", revision(revision_id="r2", parent="r1", created_us=11)),
        ("put_revision", revision(revision_id="r3", parent="r2", session_id="s2", created_us=12)),
    )
    assert [r.revision_id for r in log.chain("t", "r3")] == ["r1", "r2", "r3"]
    assert [r.revision_id for r in log.revisions_of_session("t", "s1")] == ["r1", "r2"]
    assert [r.revision_id for r in log.revisions_of_session("t", "s2")] == ["r3"]


def test_a_lost_ancestor_and_a_ring_are_corruption(log, log_env):
    write(log, ("put_revision", revision(revision_id="r2", parent="r1")))
    with pytest.raises(errors.RecordCorrupt, match="missing"):
        log.chain("t", "r2")
    write(log, ("put_revision", revision(parent="r2")))
    with pytest.raises(errors.RecordCorrupt, match="ancestor"):
        log.chain("t", "r2")


def test_deleting_a_revision_takes_everything_that_is_its_own(log, log_env):
    fill(log)
    write(
        log,
        ("put_revision", revision(revision_id="r11"), b"keep"),
        ("append_tokens", "t", "r11", 0, np.array([1])),
    )
    write(log, ("delete_revision", "t", "r1"), ("delete_revision", "t", "never"))
    left = {(keys.split(key)[1], keys.readable(key)) for key in all_values(log_env)}
    assert not any(name.endswith("/r1") or "/r1/" in name for _, name in left)
    assert log.messages("t", "r11") == b"keep"
    assert log.revisions_of_session("t", "s1") == [revision(revision_id="r11")]


def test_a_damaged_revision_can_still_be_purged(log, log_env):
    fill(log)
    overwrite(log_env, keys.record_key("t", keys.REVISION, "r1"), b"damaged")
    write(log, ("delete_revision", "t", "r1"))
    assert log.revisions_of_session("t", "s1") == []


def test_deleting_requests_spares_other_sessions(log):
    write(
        log,
        ("put_request", request()),
        ("put_request", request(request_id="q2")),
        ("put_request", request(session_id="s11")),
    )
    write(log, ("delete_requests", "t", "s1"), ("delete_session", "t", "s1"))
    assert log.requests("t", "s1") == []
    assert len(log.requests("t", "s11")) == 1


def test_sessions_page_through_all_tenants_in_order(log):
    everything = [(tenant, f"s{i}") for tenant in ("a", "bb", "cc") for i in range(5)]
    for tenant, session_id in everything:
        write(log, ("put_session", session(tenant, session_id)), ("put_request", request(tenant, session_id)))
    assert log.tenants() == ["a", "bb", "cc"]
    for limit in (1, 4, 5, 100):
        seen, after = [], None
        while page := log.sessions(None, after, limit):
            assert len(page) <= limit
            seen += [(r.tenant, r.session_id) for r in page]
            after = seen[-1]
        assert seen == everything
    assert [r.session_id for r in log.sessions("bb", ("bb", "s2"))] == ["s3", "s4"]
    assert log.sessions("none") == []


def test_one_damaged_session_does_not_hide_the_others(log, log_env):
    for session_id in ("s1", "s2", "s3"):
        write(log, ("put_session", session(session_id=session_id)))
    overwrite(log_env, keys.record_key("t", keys.SESSION, "s2"), b"damaged")
    with pytest.raises(errors.RecordCorrupt, match="s2"):
        log.sessions("t")
    found = []
    assert [r.session_id for r in log.sessions("t", on_corrupt=found.append)] == ["s1", "s3"]
    assert [error.metadata["key"] for error in found] == ["t/session/s2"]


def test_what_json_cannot_carry_is_refused_before_it_is_queued():
    for bad in (
        session(labels={"a": "\ud800"}),
        session(policy={"x": float("nan")}),
        session(policy={"x": b""}),
    ):
        with pytest.raises(errors.BadRequest):
            LogBatch().put_session(bad)


@pytest.mark.parametrize("labels", [{"": "x"}, {"a\0": "x"}, {"a": "\0"}, {"k" * 129: "x"}, {"k": "x" * 257}])
def test_labels_that_the_index_could_not_hold_are_refused(labels):
    with pytest.raises(errors.BadRequest, match="label"):
        LogBatch().put_session(session(labels=labels))


def test_reads_and_writes_after_close_say_so(log):
    log.close()
    log.close()
    with pytest.raises(errors.Draining):
        log.tenants()
    with pytest.raises(errors.Draining):
        log.write(LogBatch())
