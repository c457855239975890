"""What a golden data directory holds: how it is made, and how it is read again."""

from __future__ import annotations

import asyncio
from typing import Any

from fake_daemon import FakeDaemon

from sessiond import branching
from sessiond.admission import TurnRequest
from sessiond.branch import read_branch
from sessiond.sampling import SamplingParams
from sessiond.storage.codec import codec_config
from sessiond.storage.kv import kv_digest, open_record
from sessiond.turnevents import Finished, Tokens
from sessiond.types import Span
from sessiond.views import Fork, NewSession

TENANT = "golden"


async def held(daemon: FakeDaemon, name: str, ids: tuple[int, ...]) -> str:
    """A session of two turns: cells of 8 tokens and a tail."""
    new = NewSession(name, name, token_ids=(*range(100, 110), *ids))
    session_id = (await daemon.sessions.create(TENANT, new)).record.session_id
    await said(daemon, session_id, f"{name}-1", (80, 81, 82))
    await said(daemon, session_id, f"{name}-2", (90,))
    await daemon.sessions.suspend(TENANT, session_id)
    return session_id


async def said(daemon: FakeDaemon, session_id: str, request_id: str, ids: tuple[int, ...]) -> list[int]:
    """A turn; the tokens of its answer."""
    out: list[int] = []
    async for event in daemon.conversations.generate(TENANT, asked(session_id, request_id, ids)):
        if isinstance(event, Tokens):
            out += [sampled.token_id for sampled in event.sampled]
        if isinstance(event, Finished):
            return out
    raise AssertionError("the turn has no end")


def asked(session_id: str, request_id: str, ids: tuple[int, ...]) -> TurnRequest:
    return TurnRequest(session_id, request_id, repr(ids), token_ids=ids, sampling=SamplingParams(max_tokens=20))


async def labelled(daemon: FakeDaemon, session_id: str) -> None:
    await daemon.sessions.update(TENANT, session_id, "", {"labels": {"colour": "blau"}})


async def forked(daemon: FakeDaemon, session_id: str) -> None:
    """A branch from the first turn, in which another is held."""
    first = daemon.store.log.revisions_of_session(TENANT, session_id)[1].revision_id
    view = await branching.fork(daemon.sessions, TENANT, Fork(session_id, first, "fork", "fork"))
    await said(daemon, view.record.session_id, "fork-1", (95, 96))
    await daemon.sessions.suspend(TENANT, view.record.session_id)


async def deleted(daemon: FakeDaemon, session_id: str) -> None:
    await daemon.sessions.delete(TENANT, session_id, "", purge_now=False)


async def suspended(daemon: FakeDaemon, session_id: str) -> None:
    """A turn that stands open after a few tokens."""
    daemon.model.hold(3)
    events = daemon.conversations.generate(TENANT, asked(session_id, "open", (97,)))
    async for event in events:
        if isinstance(event, Tokens) and event.first_index == 2:
            break
    await events.aclose()  # type: ignore[attr-defined]
    await daemon.left()
    await asyncio.sleep(0)


def described(daemon: FakeDaemon) -> dict[str, Any]:
    """All that is to be read again, by session id."""
    return {record.session_id: _session(daemon, record) for record in daemon.store.log.sessions(TENANT)}


def _session(daemon: FakeDaemon, record: Any) -> dict[str, Any]:
    log = daemon.store.log
    chain, ids = read_branch(log, TENANT, record.head_revision)
    open_id = record.extra.get("open_request")
    row = log.request(TENANT, record.session_id, open_id) if open_id else None
    requests = {request.request_id: request.state for request in log.requests(TENANT, record.session_id)}
    return {
        "head": record.head_revision,
        "chain": [revision.revision_id for revision in chain],
        "tokens": ids.tolist(),
        "labels": record.labels,
        "deleted": record.deleted_us is not None,
        "requests": requests,
        "open": log.tokens(TENANT, row.revision_id)[0].tolist() if row else [],
        "kv": _kv(daemon, chain, ids),
    }


def _kv(daemon: FakeDaemon, chain: Any, ids: Any) -> dict[str, Any]:
    """What of the session's KV the disk has, decoded; and the codecs it is in."""
    cache, report = daemon.desk.tiers.restore(TENANT, chain, ids)
    assert not report.corrupt, report.corrupt
    digest = kv_digest(cache.arrays(Span(0, cache.length))) if cache.length else ""
    return {"tokens": cache.length, "sealed": cache.sealed, "digest": digest}


def codecs(daemon: FakeDaemon) -> set[str]:
    """Names of the codecs of all KV records."""
    with daemon.store.blocks._env.read() as txn:
        return {str(codec_config(open_record(bytes(key), value).codec)["name"]) for key, value in txn.cursor()}
