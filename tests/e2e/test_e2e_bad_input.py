"""What a caller gets wrong: one clear typed error each, and every session stays as it was."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from e2e_daemon import Peer, everything, refused
from e2e_model import CONTEXT
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from sessiond.clients.errors import SessiondClientError, from_rpc_error
from sessiond.errors import BadMessage, BadRequest, BadSampling, EmptyInput
from sessiond.sampling import SamplingParams
from sessiond.template import Message
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2

INVALID = StatusCode.INVALID_ARGUMENT
VOCAB = 261


@pytest.fixture
async def session(peer: Peer) -> str:
    """A session with a turn behind it, sealed and on disk."""
    session = (await peer.create(system="Be brief.", labels={"a": "b"})).session_id
    await peer.turn(session, "Tell me", max_tokens=4)
    await peer.settled(session)
    return session


def user(text: str) -> types_pb2.Message:
    return types_pb2.Message(role="user", content=[types_pb2.ContentPart(text=text)])


def turn_request(session: str, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"session_id": session, "request_id": "bad", **fields})


async def refused_turn(peer: Peer, daemon: Any, request: pb.GenerateRequest, reason: str, code=INVALID):
    """The turn is refused without an event; session, revisions, requests and log are as before. The error."""
    log = daemon.desk.store.log
    before = await everything(peer, request.session_id)
    held = log.requests("default", request.session_id), log.stat().entries
    turn = await peer.send(request).read()
    assert turn.events == []
    assert turn.error is not None
    assert (turn.error.reason, turn.error.code) == (reason, code), turn.error
    assert await everything(peer, request.session_id) == before
    assert (log.requests("default", request.session_id), log.stat().entries) == held
    return turn.error


class TestTheInputOfATurn:
    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({}, "EMPTY_INPUT"),
            ({"messages": [types_pb2.Message(role="user")]}, "EMPTY_INPUT"),
            ({"messages": [user("")]}, "EMPTY_INPUT"),
            ({"token_ids": types_pb2.TokenIds()}, "EMPTY_INPUT"),
            ({"mode": pb.GENERATE_MODE_APPEND_ONLY}, "EMPTY_INPUT"),
            ({"messages": [types_pb2.Message(role="wizard", content=user("Hi").content)]}, "BAD_MESSAGE"),
            ({"messages": [types_pb2.Message(content=user("Hi").content)]}, "BAD_MESSAGE"),
            ({"messages": [types_pb2.Message(role="User", content=user("Hi").content)]}, "BAD_MESSAGE"),
            ({"messages": [types_pb2.Message(role="user", content=[types_pb2.ContentPart()])]}, "BAD_MESSAGE"),
            (
                {"messages": [types_pb2.Message(role="user", content=user("Hi").content, tool_call_id="1")]},
                "BAD_MESSAGE",
            ),
            (
                {
                    "messages": [
                        types_pb2.Message(
                            role="user", content=user("Hi").content, tool_calls=[types_pb2.ToolCall(name="f")]
                        )
                    ]
                },
                "BAD_MESSAGE",
            ),
            ({"token_ids": types_pb2.TokenIds(ids=[5, VOCAB])}, "BAD_TOKENS"),
            ({"token_ids": types_pb2.TokenIds(ids=[2**32 - 1])}, "BAD_TOKENS"),
            ({"messages": [user("Hi")], "token_ids": types_pb2.TokenIds(ids=[5])}, "BAD_REQUEST"),
            ({"messages": [user("Hi")], "mode": pb.GENERATE_MODE_CONTINUE}, "BAD_REQUEST"),
            ({"messages": [user("Hi")], "mode": 99}, "BAD_REQUEST"),
            ({"messages": [user("Hi")], "context_overflow": 99}, "BAD_REQUEST"),
            ({"messages": [user("Hi")], "request_id": ""}, "BAD_REQUEST"),
            ({"messages": [user("Hi")], "request_id": "r" * 129}, "BAD_REQUEST"),
            ({"messages": [user("Hi")], "policy": types_pb2.Policy(name="forget")}, "UNKNOWN_POLICY"),
        ],
    )
    async def test_is_refused(self, peer: Peer, daemon, session: str, fields, reason: str):
        await refused_turn(peer, daemon, turn_request(session, **fields), reason)

    async def test_with_a_knob_that_its_policy_lacks_is_refused(self, peer: Peer, daemon, session: str):
        policy = types_pb2.Policy(name="full")
        policy.knobs.update({"n_recent": 12})
        await refused_turn(peer, daemon, turn_request(session, messages=[user("Hi")], policy=policy), "UNKNOWN_POLICY")

    @pytest.mark.parametrize("fields", [{"context_overflow": pb.CONTEXT_OVERFLOW_SLIDE}, {"retemplate": True}])
    async def test_that_a_later_version_will_take_says_so(self, peer: Peer, daemon, session: str, fields):
        request = turn_request(session, messages=[user("Hi")], **fields)
        await refused_turn(peer, daemon, request, "NOT_IMPLEMENTED_YET", StatusCode.UNIMPLEMENTED)

    async def test_too_long_for_the_context_is_refused_with_the_numbers(self, peer: Peer, daemon, session: str):
        held = (await peer.get(session)).token_count
        for fields, n_new in (
            ({"token_ids": types_pb2.TokenIds(ids=[5] * CONTEXT)}, CONTEXT),
            ({"token_ids": types_pb2.TokenIds(ids=[5] * (CONTEXT - held))}, CONTEXT - held),
            (
                {
                    "token_ids": types_pb2.TokenIds(ids=[5] * (CONTEXT - held + 1)),
                    "mode": pb.GENERATE_MODE_APPEND_ONLY,
                },
                CONTEXT - held + 1,
            ),
            ({"messages": [user("word " * 1000)]}, None),
        ):
            error = await refused_turn(peer, daemon, turn_request(session, **fields), "CONTEXT_TOO_LONG")
            assert error.metadata["history_tokens"] == str(held)
            assert error.metadata["max_context_tokens"] == str(CONTEXT)
            assert n_new is None or error.metadata["new_tokens"] == str(n_new)
            assert str(held) in error.message
            assert str(CONTEXT) in error.message

    async def test_that_needs_tokens_to_go_on_from_is_refused_without_any(self, peer: Peer, daemon):
        empty = (await peer.create()).session_id
        request = turn_request(empty, mode=pb.GENERATE_MODE_CONTINUE)
        await refused_turn(peer, daemon, request, "NOTHING_TO_CONTINUE", StatusCode.FAILED_PRECONDITION)

    async def test_on_a_base_that_is_no_revision_is_refused(self, peer: Peer, daemon, session: str):
        for base in ("nonsense", "0" * 32, "x" * 500):
            turn = await peer.send(turn_request(session, messages=[user("Hi")], base_revision_id=base)).read()
            assert turn.error is not None
            assert turn.error.reason in ("REVISION_MISMATCH", "REVISION_NOT_FOUND", "BAD_REQUEST")


class TestSampling:
    @pytest.mark.parametrize(
        ("field", "values"),
        [
            ("temperature", [-0.1, -1e30, 101.0, math.nan, math.inf, -math.inf]),
            ("top_p", [0.0, -0.1, 1.1, math.nan, math.inf, -math.inf]),
            ("top_k", [VOCAB + 1, 2**31, 2**32 - 1]),
            ("min_p", [-0.1, 1.1, math.nan, math.inf]),
            ("repetition_penalty", [0.0, -1.0, 101.0, math.nan, math.inf, -math.inf]),
            ("max_tokens", [0, 2**31, 2**32 - 1]),
            ("logprobs", [21, 2**32 - 1]),
            ("stop", [[""], ["x" * 1025], ["ok", ""], ["x"] * 17]),
            ("stop_token_ids", [[VOCAB], [2**32 - 1], [5] * 1025]),
            ("logit_bias", [{5: 101.0}, {5: -101.0}, {5: math.nan}, {5: math.inf}, {VOCAB: 1.0}, {2**32 - 1: 1.0}]),
        ],
    )
    async def test_outside_its_range_is_refused_by_name(self, peer: Peer, daemon, session: str, field: str, values):
        for value in values:
            sampling = types_pb2.Sampling(**{field: value})
            request = turn_request(session, messages=[user("Hi")], sampling=sampling)
            error = await refused_turn(peer, daemon, request, "BAD_SAMPLING")
            assert error.metadata["field"] == field
            assert error.metadata["range"]

    async def test_at_the_ends_of_its_range_is_taken(self, peer: Peer, session: str):
        for options in (
            {"temperature": 100.0, "seed": 2**64 - 1},
            {"temperature": 1e-30, "seed": 0},
            {"temperature": 1.0, "top_p": 1e-30, "top_k": VOCAB},
            {"temperature": 1.0, "repetition_penalty": 100.0},
            {"temperature": 1.0, "repetition_penalty": 1e-30},
            {"logit_bias": {5: 100.0, 6: -100.0}, "logprobs": 20},
            {"stop": ["x" * 1024] * 16, "stop_token_ids": [0, VOCAB - 1]},
        ):
            turn = await peer.turn(session, "Hi", max_tokens=2, **options)
            assert turn.finished.revision_id, options


class TestText:
    async def test_malformed_on_the_wire_is_refused(self, peer: Peer, daemon, session: str):
        good = turn_request(session, messages=[user("Hi @@@@")]).SerializeToString()
        assert b"@@@@" in good
        before = await everything(peer, session)
        for bad in (b"\xff\xfe\xfa\xfb", b"\xed\xa0\x80@", b"\xc0\x80@@", b"@@@\xe2", b"\xf5\x80\x80\x80"):
            call = peer.channel.unary_stream("/sessiond.v1.Sessions/Generate")(good.replace(b"@@@@", bad))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            error = from_rpc_error(caught.value)
            assert (error.reason, error.code) == ("BAD_MESSAGE", INVALID)
        assert await everything(peer, session) == before

    async def test_that_is_no_protobuf_is_refused(self, peer: Peer):
        for method in ("GetSession", "CreateSession", "ListSessions"):
            call = peer.channel.unary_unary(f"/sessiond.v1.Sessions/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\x0a\xff\xff\xff\xff\x07nothing like it")
            error = from_rpc_error(caught.value)
            assert error.code is INVALID
            assert error.reason in ("BAD_REQUEST", "BAD_MESSAGE")

    def test_with_a_lone_surrogate_is_refused_inside_too(self):
        for code in (0xD800, 0xDC80, 0xDFFF):
            text = f"a{chr(code)}b"
            with pytest.raises(BadMessage):
                Message("user", text)
            with pytest.raises(BadSampling):
                SamplingParams(stop=(text,))

    async def test_with_a_lone_surrogate_is_no_id(self, daemon):
        with pytest.raises(BadRequest):
            await daemon.sessions.get("default", "\ud800")

    def test_a_message_without_content_is_empty_input(self):
        with pytest.raises(EmptyInput):
            Message("user", "")

    async def test_of_any_script_goes_through(self, peer: Peer, session: str):
        for text in ("日本語", "🦊🦊", "\x00\x01", "‮right to left", "<|im_end|>"):
            turn = await peer.turn(session, text, max_tokens=2)
            (message,) = (await peer.revisions(session))[-1].messages
            assert message.content[0].text == text
            assert turn.finished.revision_id


class TestIds:
    NAMES = ("", " ", "x", "0" * 32, "x" * 64, "x" * 65, "x" * 20_000, "a\x00b", "../../etc/passwd", "ünïcödé", "%s")

    @pytest.mark.parametrize(
        "attempt",
        [
            lambda peer, name: peer.get(name),
            lambda peer, name: peer.revisions(name),
            lambda peer, name: peer.update(types_pb2.Session(session_id=name, labels={"a": "b"}), "labels"),
            lambda peer, name: peer.delete(name),
            lambda peer, name: peer.delete(name, purge_now=True),
            lambda peer, name: peer.undelete(name),
            lambda peer, name: peer.turn(name, "Hi", max_tokens=2),
            lambda peer, name: peer.abort(name, "turn-1"),
            lambda peer, name: peer.warm(name),
            lambda peer, name: peer.suspend(name),
            lambda peer, name: peer.count(name, "Hi"),
        ],
        ids=["get", "revisions", "update", "delete", "purge", "undelete", "turn", "abort", "warm", "suspend", "count"],
    )
    async def test_that_name_no_session_are_refused(self, peer: Peer, daemon, attempt):
        for name in self.NAMES:
            with pytest.raises(SessiondClientError) as caught:
                await attempt(peer, name)
            malformed = not 0 < len(name.encode()) <= 64
            wanted = {"BAD_REQUEST"} if malformed else {"SESSION_NOT_FOUND", "BAD_REQUEST"}
            assert caught.value.reason in wanted, (name[:70], caught.value)
        assert not daemon.desk.lives, "names of nothing take no memory"

    async def test_of_another_sessions_revision_are_not_found(self, peer: Peer, session: str):
        other = await peer.create(system="Be brief.")
        for revision in (other.head_revision_id, "0" * 32):
            with refused("REVISION_NOT_FOUND", StatusCode.NOT_FOUND):
                request = pb.GetRevisionRequest(session_id=session, revision_id=revision)
                await peer.call(peer.sessions.GetRevision, request)
        for revision in ("", "x" * 500):
            request = pb.GetRevisionRequest(session_id=session, revision_id=revision)
            with pytest.raises(SessiondClientError) as caught:
                await peer.call(peer.sessions.GetRevision, request)
            assert caught.value.reason in ("BAD_REQUEST", "REVISION_NOT_FOUND")


class TestANewSession:
    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"system": "x", "token_ids": types_pb2.TokenIds(ids=[5])}, "BAD_REQUEST"),
            ({"token_ids": types_pb2.TokenIds(ids=[VOCAB])}, "BAD_TOKENS"),
            ({"token_ids": types_pb2.TokenIds()}, "EMPTY_INPUT"),
            ({"messages": [user("")]}, "EMPTY_INPUT"),
            ({"token_ids": types_pb2.TokenIds(ids=[5] * CONTEXT)}, "CONTEXT_TOO_LONG"),
            ({"system": "word " * 1000}, "CONTEXT_TOO_LONG"),
            ({"messages": [types_pb2.Message(role="wizard", content=user("x").content)]}, "BAD_MESSAGE"),
            ({"system": "x", "policy": types_pb2.Policy(name="forget")}, "UNKNOWN_POLICY"),
            ({"system": "x", "ttl": Duration(seconds=0)}, "BAD_REQUEST"),
            ({"system": "x", "ttl": Duration(seconds=-5)}, "BAD_REQUEST"),
            ({"system": "x", "ttl": Duration(seconds=2**62)}, "BAD_REQUEST"),
            ({"system": "x", "expire_time": Timestamp(seconds=2**62)}, "BAD_REQUEST"),
            ({"system": "x", "expire_time": Timestamp(seconds=-(2**62))}, "BAD_REQUEST"),
            ({"system": "x", "expire_time": Timestamp(seconds=1)}, "BAD_REQUEST"),
            ({"system": "x", "labels": {"": "v"}}, "BAD_REQUEST"),
            ({"system": "x", "labels": {"Upper": "v"}}, "BAD_REQUEST"),
            ({"system": "x", "labels": {"k" * 64: "v"}}, "BAD_REQUEST"),
            ({"system": "x", "labels": {"k": "v" * 257}}, "BAD_REQUEST"),
            ({"system": "x", "request_id": "r" * 129}, "BAD_REQUEST"),
            ({"system": "x", "tools": [types_pb2.Tool(name="f", parameters_json_schema="{")]}, "BAD_REQUEST"),
            ({"system": "x", "tools": [types_pb2.Tool(name="f", parameters_json_schema="[]")]}, "BAD_REQUEST"),
            ({"system": "x", "tools": [types_pb2.Tool(parameters_json_schema="{}")]}, "BAD_REQUEST"),
        ],
    )
    async def test_of_bad_parts_is_refused_and_not_made(self, peer: Peer, daemon, fields, reason: str):
        entries = daemon.desk.store.log.stat().entries
        with refused(reason, INVALID):
            await peer.call(peer.sessions.CreateSession, pb.CreateSessionRequest(**fields))
        assert daemon.desk.store.log.stat().entries == entries
        assert not (await peer.list(show_deleted=True)).sessions

    async def test_of_an_expiry_behind_is_refused_in_an_update_too(self, peer: Peer, session: str):
        before = await everything(peer, session)
        past = Timestamp()
        past.FromDatetime(datetime.now(UTC) - timedelta(days=1))
        for changes in (
            {"expire_time": past},
            {"ttl": Duration(seconds=-1)},
            {"ttl": Duration(seconds=2**62)},
            {"labels": {"Bad Key": "v"}},
            {"labels": {"k": "v" * 257}},
        ):
            with refused("BAD_REQUEST", INVALID):
                await peer.update(types_pb2.Session(session_id=session, **changes), *changes)
        with refused("UNKNOWN_POLICY", INVALID):
            forget = types_pb2.Policy(name="forget")
            await peer.update(types_pb2.Session(session_id=session, policy=forget), "policy")
        assert await everything(peer, session) == before


class TestCounting:
    async def test_nothing_is_refused(self, peer: Peer, session: str):
        with refused("EMPTY_INPUT", INVALID):
            await peer.call(peer.sessions.CountTokens, pb.CountTokensRequest(session_id=session))

    async def test_more_than_the_context_holds_is_only_counted(self, peer: Peer, session: str):
        counted = await peer.count(session, "word " * 1000)
        assert counted.tokens > CONTEXT


async def test_a_long_bad_value_does_not_hide_its_error(peer: Peer, session: str):
    """Errors travel in HTTP/2 headers, which have a limit: what quotes the caller's value has to cut it."""
    long = "x" * 100_000
    attempts = {
        "UNKNOWN_POLICY": lambda: peer.create(system="x", policy=long),
        "BAD_MESSAGE": lambda: peer.create(messages=[{"role": long, "content": "x"}]),
        "BAD_REQUEST": lambda: peer.update(types_pb2.Session(session_id=session), long),
        "INVALID_PAGE_TOKEN": lambda: peer.list(page_token=long),
        "ETAG_MISMATCH": lambda: peer.delete(session, etag=long),
        "MODEL_MISSING": lambda: peer.create(system="x", model=long),
        "REVISION_MISMATCH": lambda: peer.turn(session, "Hi", base_revision=long),
    }
    for reason, attempt in attempts.items():
        with pytest.raises(SessiondClientError) as caught:
            await attempt()
        assert caught.value.reason in (reason, "BAD_REQUEST"), (reason, caught.value.code)
    with refused("BAD_REQUEST", INVALID):
        await peer.list(filter=long)
    with refused("BAD_REQUEST", INVALID):
        await peer.create(system="x", labels={long: "v"})
    with refused("BAD_REQUEST", INVALID):
        await peer.create(system="x", tools=[{"name": long, "parameters": []}])
