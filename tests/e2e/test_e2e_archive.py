"""Sessions that move between daemons as archives, and what becomes of them there."""

from __future__ import annotations

import pytest
from e2e_archive import export, import_
from e2e_daemon import Daemons, Peer, peer_of

from sessiond.server import Daemon
from sessiond.v1 import sessions_pb2 as pb

LONG = 64
TEXT = "word " * 60  # whole cells and a tail


def stored(daemon: Daemon) -> tuple[int, int, int]:
    """Sessions, entries of the log, and entries of the blocks."""
    assert daemon.desk is not None
    store = daemon.desk.store
    return len(store.log.sessions()), store.log.stat().entries, store.blocks.stat().entries


def files(daemon: Daemon) -> list[str]:
    assert daemon.desk is not None
    return sorted(path.name for path in daemon.desk.store.root.iterdir())


async def talked(peer: Peer, *texts: str, **options) -> str:
    session = (await peer.create(system="Be brief.")).session_id
    for text in texts or (TEXT, "And?"):
        await peer.turn(session, text, max_tokens=20, **options)
        await peer.settled(session)
    return session


@pytest.fixture
async def other(daemons: Daemons, tmp_path):
    """A second daemon of the same model, with a data directory of its own."""
    daemon = await daemons.start(data_dir=tmp_path / "other")
    async with peer_of(daemon.port) as peer:
        peer.daemon = daemon  # type: ignore[attr-defined]
        yield peer


async def test_an_imported_session_answers_as_it_would_have_at_home(peer: Peer, other: Peer):
    session = await talked(peer)
    archive, header = await export(peer, session)
    done = await import_(other, archive, labels={"from": "afar"})
    assert done.verdict == pb.IMPORT_VERDICT_EXACT
    assert not done.differing_fields
    before = await peer.get(session)
    assert done.tokens == header.n_tokens == before.token_count
    assert done.tokens_with_kv == header.tokens_with_kv == before.token_count - 1
    assert dict(done.session.labels) == {"from": "afar"}
    assert done.session.session_id != session
    here = await peer.turn(session, "Go on", max_tokens=LONG)
    there = await other.turn(done.session.session_id, "Go on", max_tokens=LONG)
    assert there.ids == here.ids
    assert there.restored.tokens_recomputed == 0
    assert there.accepted.prompt_tokens_new == here.accepted.prompt_tokens_new
    assert there.accepted.prompt_tokens_reused == before.token_count - 1
