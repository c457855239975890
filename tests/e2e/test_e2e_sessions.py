"""Sessions as things: made, listed, filtered, changed; and what each tenant sees of them."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from e2e_daemon import PATIENCE, Daemons, Peer, everything, peer_of, refused
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from sessiond.v1 import admin_pb2, types_pb2
from sessiond.v1 import sessions_pb2 as pb


async def listed(peer: Peer, count: int, **fields) -> list[str]:
    """Ids of one page, once the index has caught up to `count` of them."""
    async with asyncio.timeout(PATIENCE):
        while True:
            page = [session.session_id for session in (await peer.list(**fields)).sessions]
            if len(page) == count:
                return page
            await asyncio.sleep(0.02)


class TestCreating:
    async def test_twice_with_one_request_id_makes_one_session(self, peer: Peer):
        first = await peer.create(system="Be brief.", labels={"a": "b"}, request_id="make-1")
        again = await peer.create(system="Be brief.", labels={"a": "b"}, request_id="make-1")
        assert again == first
        other = await peer.create(system="Be brief.", labels={"a": "b"}, request_id="make-2")
        assert other.session_id != first.session_id

    async def test_at_once_with_one_request_id_makes_one_session(self, peer: Peer):
        made = await asyncio.gather(*(peer.create(system="Be brief.", request_id="make-1") for _ in range(6)))
        assert len({session.session_id for session in made}) == 1
        assert len({session.head_revision_id for session in made}) == 1

    async def test_another_session_with_that_id_is_refused(self, peer: Peer):
        first = await peer.create(system="Be brief.", request_id="make-1")
        before = await everything(peer, first.session_id)
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await peer.create(system="Be long.", request_id="make-1")
        assert await everything(peer, first.session_id) == before

    async def test_again_after_turns_returns_the_session_as_it_is_now(self, peer: Peer):
        first = await peer.create(system="Be brief.", request_id="make-1")
        turn = await peer.turn(first.session_id, "Tell me", max_tokens=3)
        again = await peer.create(system="Be brief.", request_id="make-1")
        assert again.head_revision_id == turn.finished.revision_id

    async def test_keeps_what_it_was_given(self, peer: Peer, chat_model):
        session = await peer.create(
            system="Be brief.", labels={"project": "x", "kind": "y"}, policy="full", model=chat_model.name
        )
        assert session.labels == {"project": "x", "kind": "y"}
        assert session.policy.name == "full"
        assert session.model == chat_model.name
        assert session.tenant == "default"
        assert session.state == types_pb2.SESSION_STATE_ACTIVE
        assert session.head_revision_id == session.root_revision_id
        assert session.etag
        (root,) = await peer.revisions(session.session_id)
        assert root.kind == types_pb2.REVISION_KIND_ROOT
        assert [(m.role, m.content[0].text) for m in root.messages] == [("system", "Be brief.")]
        assert root.log_end == session.token_count
        assert await peer.get(session.session_id) == session

    async def test_a_model_that_is_not_served_is_missing(self, peer: Peer):
        with refused("MODEL_MISSING", StatusCode.FAILED_PRECONDITION):
            await peer.create(system="Be brief.", model="another")
        with refused("MODEL_MISSING", StatusCode.FAILED_PRECONDITION):
            await peer.create(system="Be brief.", adapter="another")


class TestListing:
    async def test_pages_hold_all_sessions_once_newest_first(self, peer: Peer):
        made = [(await peer.create(system="Be brief.")).session_id for _ in range(7)]
        assert await listed(peer, 7) == made[::-1]
        pages, token = [], ""
        while True:
            page = await peer.list(page_size=3, page_token=token)
            pages.append([session.session_id for session in page.sessions])
            token = page.next_page_token
            if not token:
                break
        assert [session for page in pages for session in page] == made[::-1]
        assert [len(page) for page in pages if page] == [3, 3, 1]

    async def test_filters_by_label(self, peer: Peer):
        made = {
            name: (await peer.create(system="Be brief.", labels=labels)).session_id
            for name, labels in {
                "both": {"team": "a", "env": "dev"},
                "one": {"team": "a"},
                "other": {"team": "b"},
                "none": {},
            }.items()
        }
        await listed(peer, 4)
        assert await listed(peer, 2, filter='labels.team = "a"') == [made["one"], made["both"]]
        assert await listed(peer, 1, filter='labels.team="a" AND labels.env="dev"') == [made["both"]]
        assert await listed(peer, 0, filter='labels.team = "c"') == []

    async def test_takes_any_label_value_in_a_filter(self, peer: Peer):
        for value in ("this AND that", 'a "quote"', "a \\ slash", "ünïcödé", ""):
            session = await peer.create(system="Be brief.", labels={"note": value})
            quoted = value.replace("\\", "\\\\").replace('"', '\\"')
            assert await listed(peer, 1, filter=f'labels.note = "{quoted}"') == [session.session_id], value

    async def test_filters_by_state_and_tier(self, peer: Peer):
        cold, hot, gone = [(await peer.create(system="Be brief.")).session_id for _ in range(3)]
        await peer.turn(hot, "Tell me", max_tokens=2)
        await peer.delete(gone)
        assert await listed(peer, 2) == [hot, cold]
        assert await listed(peer, 2, filter="state = ACTIVE") == [hot, cold]
        assert await listed(peer, 1, filter="state = DELETED") == [gone]
        assert await listed(peer, 3, show_deleted=True) == [gone, hot, cold]
        assert await listed(peer, 1, filter="tier = HOT") == [hot]
        assert await listed(peer, 1, filter="tier = COLD AND state = ACTIVE") == [cold]
        assert await listed(peer, 0, filter="tier = WARM") == []

    async def test_a_filter_that_does_not_parse_is_refused(self, peer: Peer):
        for text in (
            "labels.a",
            'labels.a = "b" OR labels.c = "d"',
            "state = SLEEPING",
            "tier = LUKEWARM",
            'name = "x"',
            "AND",
            'labels.a = "b" AND',
            "state = ACTIVE AND state = DELETED",
            'labels.a = "unclosed',
        ):
            with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
                await peer.list(filter=text)

    async def test_a_page_token_of_ones_own_making_is_refused(self, peer: Peer):
        for _ in range(3):
            await peer.create(system="Be brief.")
        await listed(peer, 3)
        token = (await peer.list(page_size=1)).next_page_token
        for forged in ("x", ":", "1:", "1:abc", "²:abc", f"{'9' * 40}:abc", token + "x", token[:-1], "-1:a"):
            with refused("INVALID_PAGE_TOKEN", StatusCode.INVALID_ARGUMENT):
                await peer.list(page_token=forged)

    async def test_a_page_token_of_another_query_is_refused(self, peer: Peer):
        for _ in range(3):
            await peer.create(system="Be brief.", labels={"a": "b"})
        await listed(peer, 3)
        token = (await peer.list(page_size=1)).next_page_token
        with refused("INVALID_PAGE_TOKEN", StatusCode.INVALID_ARGUMENT):
            await peer.list(page_size=1, page_token=token, filter='labels.a = "b"')

    async def test_a_negative_page_size_is_refused(self, peer: Peer):
        with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
            await peer.list(page_size=-1)

    async def test_revisions_come_in_pages_too(self, peer: Peer):
        session = (await peer.create(system="Be brief.")).session_id
        for _ in range(3):
            await peer.turn(session, "A fact", mode="append_only")
        whole = [r.revision_id for r in await peer.revisions(session)]
        found, token = [], ""
        while True:
            request = pb.ListRevisionsRequest(session_id=session, page_size=3, page_token=token)
            page = await peer.call(peer.sessions.ListRevisions, request)
            found += [r.revision_id for r in page.revisions]
            token = page.next_page_token
            if not token:
                break
        assert found == whole
        with refused("INVALID_PAGE_TOKEN", StatusCode.INVALID_ARGUMENT):
            await peer.revisions(session, page_token="forged")
        with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
            await peer.revisions(session, page_size=-1)


class TestChanging:
    async def test_changes_what_the_mask_names_and_nothing_else(self, peer: Peer):
        session = await peer.create(system="Be brief.", labels={"a": "b"}, ttl=100)
        wanted = types_pb2.Session(session_id=session.session_id, labels={"c": "d"}, model="ignored")
        changed = await peer.update(wanted, "labels")
        assert changed.labels == {"c": "d"}
        assert changed.ttl == session.ttl
        assert changed.model == session.model
        assert changed.etag != session.etag
        assert await peer.get(session.session_id) == changed
        assert await listed(peer, 1, filter='labels.c = "d"') == [session.session_id]

    async def test_without_a_mask_changes_what_is_set(self, peer: Peer):
        session = await peer.create(system="Be brief.", labels={"a": "b"})
        changed = await peer.update(types_pb2.Session(session_id=session.session_id, ttl=Duration(seconds=50)))
        assert changed.ttl.seconds == 50
        assert changed.labels == {"a": "b"}

    async def test_a_field_in_the_mask_that_is_not_set_is_cleared(self, peer: Peer):
        session = await peer.create(system="Be brief.", labels={"a": "b"}, ttl=100)
        bare = types_pb2.Session(session_id=session.session_id)
        assert not (await peer.update(bare, "labels")).labels
        cleared = await peer.update(bare, "expire_time")
        assert not cleared.HasField("expire_time")
        assert not cleared.HasField("ttl")

    async def test_expiry_is_a_ttl_or_a_fixed_time(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        ahead = Timestamp()
        ahead.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
        fixed = await peer.update(types_pb2.Session(session_id=session.session_id, expire_time=ahead), "expire_time")
        assert fixed.expire_time.seconds == ahead.seconds
        assert not fixed.HasField("ttl")
        moving = await peer.update(types_pb2.Session(session_id=session.session_id, ttl=Duration(seconds=60)), "ttl")
        assert moving.ttl.seconds == 60
        assert moving.expire_time.ToDatetime() < fixed.expire_time.ToDatetime()

    async def test_with_an_old_etag_is_refused(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        await peer.turn(session.session_id, "Tell me", max_tokens=2)
        before = await everything(peer, session.session_id)
        stale = types_pb2.Session(session_id=session.session_id, etag=session.etag, labels={"a": "b"})
        with refused("ETAG_MISMATCH", StatusCode.ABORTED):
            await peer.update(stale, "labels")
        with refused("ETAG_MISMATCH", StatusCode.ABORTED):
            await peer.delete(session.session_id, etag=session.etag)
        with refused("ETAG_MISMATCH", StatusCode.ABORTED):
            await peer.delete(session.session_id, etag="nonsense", purge_now=True)
        assert await everything(peer, session.session_id) == before
        fresh = types_pb2.Session(session_id=session.session_id, etag=before[0].etag, labels={"a": "b"})
        assert (await peer.update(fresh, "labels")).labels == {"a": "b"}
        gone = (await peer.delete(session.session_id)).session
        with refused("ETAG_MISMATCH", StatusCode.ABORTED):
            await peer.undelete(session.session_id, etag=session.etag)
        assert (await peer.undelete(session.session_id, etag=gone.etag)).state == types_pb2.SESSION_STATE_ACTIVE

    async def test_of_what_cannot_change_is_refused(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        before = await everything(peer, session.session_id)
        for path in ("model", "tenant", "session_id", "head_revision_id", "labels.a", "nonsense", ""):
            with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
                await peer.update(types_pb2.Session(session_id=session.session_id, model="x"), path)
        assert await everything(peer, session.session_id) == before

    async def test_at_once_without_etags_loses_nothing(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        writers = [types_pb2.Session(session_id=session.session_id, labels={"n": str(i)}) for i in range(10)]
        changed = await asyncio.gather(*(peer.update(writer, "labels") for writer in writers))
        assert len({one.etag for one in changed}) == 10


class TestTenants:
    @pytest.fixture(params=["metadata", "tokens"])
    async def pair(self, request, daemons: Daemons, tmp_path):
        """Peers of two tenants, known by trusted metadata or by their bearer tokens."""
        if request.param == "metadata":
            daemon = await daemons.start(trust_tenant_metadata=True)
            names = [{"tenant": "alice"}, {"tenant": "bob"}]
        else:
            path = tmp_path / "tokens.json"
            path.write_text(json.dumps({"secret-a": "alice", "secret-b": "bob"}))
            daemon = await daemons.start(auth_tokens=path)
            # Metadata does not help against a token.
            names = [{"token": "secret-a"}, {"token": "secret-b", "tenant": "alice"}]
        async with peer_of(daemon.port, **names[0]) as alice, peer_of(daemon.port, **names[1]) as bob:
            yield alice, bob

    async def test_see_only_their_own_sessions(self, pair):
        alice, bob = pair
        hers = await alice.create(system="Be brief.")
        his = await bob.create(system="Be brief.")
        assert (hers.tenant, his.tenant) == ("alice", "bob")
        assert await listed(alice, 1, show_deleted=True) == [hers.session_id]
        assert await listed(bob, 1, show_deleted=True) == [his.session_id]

    async def test_find_nothing_of_each_other(self, pair):
        alice, bob = pair
        session = await alice.create(system="Be brief.")
        await alice.turn(session.session_id, "Tell me", max_tokens=3, request_id="turn-1")
        before = await everything(alice, session.session_id)
        name = session.session_id
        for attempt in (
            lambda: bob.get(name),
            lambda: bob.revisions(name),
            lambda: bob.update(types_pb2.Session(session_id=name, labels={"a": "b"}), "labels"),
            lambda: bob.delete(name),
            lambda: bob.delete(name, purge_now=True),
            lambda: bob.undelete(name),
            lambda: bob.turn(name, "Tell me", max_tokens=3, request_id="turn-1"),
            lambda: bob.abort(name, "turn-1"),
            lambda: bob.warm(name),
            lambda: bob.suspend(name),
            lambda: bob.count(name, "Tell me"),
        ):
            with refused("SESSION_NOT_FOUND", StatusCode.NOT_FOUND):
                await attempt()
        assert await everything(alice, name) == before

    async def test_share_no_request_ids_and_no_cells(self, pair):
        alice, bob = pair
        hers = await alice.create(system="Be brief.", request_id="make-1")
        his = await bob.create(system="Be brief.", request_id="make-1")
        assert hers.session_id != his.session_id
        text = "word " * 60
        first = await alice.turn(hers.session_id, text, max_tokens=3, request_id="turn-1")
        await alice.settled(hers.session_id)
        second = await bob.turn(his.session_id, text, max_tokens=3, request_id="turn-1")
        assert second.accepted.prompt_tokens_reused == 0
        assert second.accepted.prompt_tokens_new == first.accepted.prompt_tokens_new
        await bob.settled(his.session_id)
        await alice.delete(hers.session_id, purge_now=True)
        await bob.suspend(his.session_id)
        then = await bob.turn(his.session_id, "And?", max_tokens=3)
        assert then.restored.tokens_recomputed == 0

    async def test_metadata_counts_only_where_it_is_trusted(self, daemon):
        async with peer_of(daemon.port, tenant="alice") as peer:
            assert (await peer.create(system="Be brief.")).tenant == "default"

    async def test_a_missing_or_wrong_token_is_refused(self, daemons: Daemons, tmp_path):
        path = tmp_path / "tokens.json"
        path.write_text(json.dumps({"secret-a": "alice"}))
        daemon = await daemons.start(auth_tokens=path)
        for wrong in ({}, {"token": "wrong"}, {"token": ""}, {"tenant": "alice"}):
            async with peer_of(daemon.port, **wrong) as peer:
                with refused("UNAUTHENTICATED", StatusCode.UNAUTHENTICATED):
                    await peer.create(system="Be brief.")
                with refused("UNAUTHENTICATED", StatusCode.UNAUTHENTICATED):
                    await peer.list()
                with refused("UNAUTHENTICATED", StatusCode.UNAUTHENTICATED):
                    await peer.turn("any", "Tell me")
                with refused("UNAUTHENTICATED", StatusCode.UNAUTHENTICATED):
                    await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())

    async def test_a_tenant_of_no_or_too_many_bytes_is_refused(self, daemons: Daemons):
        daemon = await daemons.start(trust_tenant_metadata=True)
        for tenant in ("", "t" * 129):
            async with peer_of(daemon.port, tenant=tenant) as peer:
                with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
                    await peer.create(system="Be brief.")
