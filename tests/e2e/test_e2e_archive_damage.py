"""Archives that are not what they should be: one typed error, and nothing changed in the store."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_archive import Blocks, arrays, export, hashed, import_, parts, put_together, send, take_apart
from e2e_daemon import PATIENCE, Daemons, Peer, peer_of, refused
from google.protobuf.json_format import MessageToDict
from grpc import StatusCode

from sessiond.clients.errors import SessiondClientError
from sessiond.errors import DiskFull
from sessiond.server import Daemon
from sessiond.v1 import archive_pb2, types_pb2
from sessiond.v1 import sessions_pb2 as pb

TEXT = "word " * 60
N_FLIPS, N_CUTS, N_RESEALED = 150, 60, 300
HEAD = struct.Struct("<8sIIQ")

Manifest = archive_pb2.ArchiveManifest


@pytest.fixture
async def away(daemons: Daemons, tmp_path: Path) -> Daemon:
    return await daemons.start(data_dir=tmp_path / "away")


@pytest.fixture
async def other(away: Daemon):
    async with peer_of(away.port) as peer:
        yield peer


@pytest.fixture
async def archive(peer: Peer) -> bytes:
    session = (await peer.create(system="Be brief.")).session_id
    for text in (TEXT, "And?"):
        await peer.turn(session, text, max_tokens=10)
    await peer.settled(session)
    return (await export(peer, session))[0]


def contents(daemon: Daemon) -> tuple[Any, ...]:
    """All of a store: every key of both environments, and the files beside them."""
    store = daemon.desk.store
    found: list[Any] = []
    for env in (store.log._env, store.blocks._env):
        with env.read() as txn, txn.cursor() as cursor:
            found.append([bytes(key) for key in cursor.iternext(keys=True, values=False)])
    return *found, sorted(path.name for path in store.root.iterdir())


async def refusal(other: Peer, away: Daemon, archive: bytes, **header: Any) -> SessiondClientError | None:
    """How an import is refused, after which the store must be as it was; None if it is not."""
    before = contents(away)
    refused_with: SessiondClientError | None = None
    try:
        done = await import_(other, archive, **header)
    except SessiondClientError as error:
        refused_with = error
    if refused_with is not None:
        assert contents(away) == before, refused_with
        return refused_with
    await other.delete(done.session.session_id, purge_now=True)
    assert contents(away)[1:] == before[1:]
    return None


async def test_an_archive_that_is_whole_is_taken(other: Peer, away: Daemon, archive: bytes):
    """And so the tests below fail an import for what they do to it."""
    assert await refusal(other, away, archive) is None
    assert await refusal(other, away, put_together(*take_apart(archive))) is None
    assert put_together(*take_apart(archive)) == archive


async def test_bits_that_flipped_anywhere_are_found(other: Peer, away: Daemon, archive: bytes):
    rng = random.Random(0)
    for _ in range(N_FLIPS):
        at = rng.randrange(len(archive)) if rng.random() < 0.7 else rng.randrange(2048)
        bad = bytearray(archive)
        bad[at] ^= 1 << rng.randrange(8)
        error = await refusal(other, away, bytes(bad))
        assert error is not None, at
        assert error.reason == ("BAD_REQUEST" if at < 8 else "RECORD_CORRUPT"), at


async def test_an_archive_cut_off_anywhere_is_refused(other: Peer, away: Daemon, archive: bytes):
    rng = random.Random(1)
    lengths = [0, 1, 7, 8, 12, 23, 24, 55, 71, 72, 73, len(archive) - 1, len(archive) - 32, len(archive) - 48]
    for length in [*lengths, *(rng.randrange(len(archive)) for _ in range(N_CUTS))]:
        error = await refusal(other, away, archive[:length])
        assert error is not None, length
        assert error.reason in ("BAD_REQUEST", "RECORD_CORRUPT"), (length, error)
    error = await refusal(other, away, archive + b"\0")
    assert error is not None
    assert error.reason == "RECORD_CORRUPT"


async def test_what_is_wrong_under_a_hash_that_fits_is_refused_or_harmless(other: Peer, away: Daemon, archive: bytes):
    """Bytes changed by someone who can hash: no internal error, no half session, whatever they are."""
    rng = random.Random(2)
    content, refusals = archive[:-32], 0
    for number in range(N_RESEALED):
        bad = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(bad)) if rng.random() < 0.3 else rng.randrange(min(len(bad), 6000))
            bad[at] = rng.randrange(256) if rng.random() < 0.5 else rng.choice([0, 0x7F, 0xFF])
        if rng.random() < 0.2:
            at = rng.randrange(len(bad))
            del bad[at : at + rng.randrange(1, 200)]
        error = await refusal(other, away, hashed(bytes(bad)))
        refusals += error is not None
        assert error is None or error.reason != "INTERNAL", (number, error)
    assert refusals > N_RESEALED // 3


def block(change: Callable[[archive_pb2.ArchiveBlock], Any], which: int = 1) -> Callable[[Manifest, Blocks], None]:
    def apply(manifest: Manifest, blocks: Blocks) -> None:
        change(blocks[which][0])

    return apply


def revision(
    change: Callable[[archive_pb2.ArchiveRevision], Any], which: int = 1
) -> Callable[[Manifest, Blocks], None]:
    def apply(manifest: Manifest, blocks: Blocks) -> None:
        change(manifest.revisions[which])

    return apply


def whole(change: Callable[[Manifest], Any]) -> Callable[[Manifest, Blocks], None]:
    return lambda manifest, blocks: change(manifest)


def tensors(change: Callable[[dict[str, Any]], str | None]) -> Callable[[Manifest, Blocks], None]:
    """Change the first block's tensor header; a text that is returned takes its place."""

    def apply(manifest: Manifest, blocks: Blocks) -> None:
        header, blob = blocks[0]
        n = int.from_bytes(blob[:8], "little")
        entries = json.loads(blob[8 : 8 + n])
        raw = (change(entries) or json.dumps(entries)).encode()
        blocks[0] = header, struct.pack("<Q", len(raw)) + raw + blob[8 + n :]

    return apply


def data(change: Callable[[bytes], bytes]) -> Callable[[Manifest, Blocks], None]:
    def apply(manifest: Manifest, blocks: Blocks) -> None:
        blocks[0] = blocks[0][0], change(blocks[0][1])

    return apply


def twice(entries: dict[str, Any]) -> str:
    first = json.dumps(entries)
    return first[:-1] + f', "layers.0.k": {json.dumps(entries["layers.0.k"])}}}'


def swap(entries: dict[str, Any]) -> None:
    """Keys where values are: the same bytes under the other's name."""
    k, v = entries["layers.0.k"], entries["layers.0.v"]
    k["data_offsets"], v["data_offsets"] = v["data_offsets"], k["data_offsets"]


WRONG: dict[str, Callable[[Manifest, Blocks], Any]] = {
    "a parent that comes later": revision(lambda r: setattr(r, "parent", 2)),
    "its own parent": revision(lambda r: setattr(r, "parent", 1)),
    "a second root": revision(lambda r: r.ClearField("parent")),
    "a root with a parent": revision(lambda r: setattr(r, "parent", 0), 0),
    "no revisions": whole(lambda m: m.ClearField("revisions")),
    "a head that is not there": whole(lambda m: setattr(m, "head", 3)),
    "an unknown kind": revision(lambda r: setattr(r, "kind", 77)),
    "a root of kind turn": revision(lambda r: setattr(r, "kind", types_pb2.REVISION_KIND_TURN), 0),
    "an unknown finish reason": revision(lambda r: setattr(r, "finish_reason", 77)),
    "an unknown end": revision(lambda r: setattr(r, "ended", 77)),
    "an offset that does not join": revision(lambda r: setattr(r, "log_start", 1)),
    "an absurd end": revision(lambda r: setattr(r, "log_end", 1 << 60)),
    "more input than tokens": revision(lambda r: setattr(r, "n_prompt", 1 << 40)),
    "more computed than there is": revision(lambda r: setattr(r, "computed_tokens", 1 << 40)),
    "ids that are cut": revision(lambda r: setattr(r, "token_ids", r.token_ids[:-1])),
    "flags that are cut": revision(lambda r: setattr(r, "token_flags", r.token_flags[:-1])),
    "unknown flags": revision(lambda r: setattr(r, "token_flags", b"\x02" * len(r.token_flags))),
    "two answers": revision(lambda r: r.answers.append(r.answers[0])),
    "an unknown role": revision(lambda r: setattr(r.messages[0], "role", "devil")),
    "a time before the epoch": revision(lambda r: setattr(r.create_time, "seconds", -1)),
    "a time after all": revision(lambda r: setattr(r.create_time, "seconds", 1 << 60)),
    "tools that are no JSON": revision(lambda r: setattr(r, "tools_json", "{"), 0),
    "tools nested too deeply": revision(lambda r: setattr(r, "tools_json", "[" * 100_000), 0),
    "tools that no JSON holds": revision(lambda r: setattr(r, "tools_json", '[{"a": NaN}]'), 0),
    "tools of a turn": revision(lambda r: setattr(r, "tools_json", "[{}]")),
    "a request_id that is no id": revision(lambda r: setattr(r, "request_id", "x" * 129)),
    "another identity's id": whole(lambda m: setattr(m.identity, "identity_id", "0" * 32)),
    "fields without an identity": whole(lambda m: m.identity.fields.clear()),
    "no cells": whole(lambda m: setattr(m, "cell_tokens", 0)),
    "cells beyond measure": whole(lambda m: setattr(m, "cell_tokens", 1 << 31)),
    "no profile": whole(lambda m: m.ClearField("profiles")),
    "a block of no revision": block(lambda b: setattr(b, "revision", 9)),
    "a block inside a segment": block(lambda b: setattr(b, "revision", 1)),
    "a block that leaves a gap": block(lambda b: setattr(b, "start", b.start + 1)),
    "a block that goes back": block(lambda b: setattr(b, "start", 0)),
    "a block far away": block(lambda b: setattr(b, "start", (1 << 64) - 1)),
    "an empty block": block(lambda b: setattr(b, "n_tokens", 0)),
    "a block beyond measure": block(lambda b: setattr(b, "n_tokens", 1 << 31)),
    "a block longer than it says": block(lambda b: setattr(b, "n_tokens", b.n_tokens - 1), -1),
    "a block beyond its branch": block(lambda b: setattr(b, "n_tokens", b.n_tokens + 2), -1),
    "a profile that is not there": block(lambda b: setattr(b, "profile", 5)),
    "a block missing between others": lambda m, blocks: blocks.pop(1),
    "a block that comes twice": lambda m, blocks: blocks.insert(1, blocks[0]),
    "blocks in another order": lambda m, blocks: blocks.reverse(),
    "a tensor name that comes twice": tensors(twice),
    "a tensor too few": tensors(lambda e: e.pop("layers.1.v") and None),
    "a tensor too many": tensors(lambda e: e.update({"layers.2.k": e["layers.1.k"]})),
    "a tensor of another name": tensors(lambda e: e.update({"layers.x.k": e.pop("layers.0.k")})),
    "another dtype": tensors(lambda e: e["layers.0.k"].update(dtype="F64")),
    "another dtype of that size": tensors(lambda e: e["layers.0.k"].update(dtype="I32")),
    "another shape": tensors(lambda e: e["layers.0.k"].update(shape=[1, 1, 1])),
    "the shape of as many bytes": tensors(lambda e: e["layers.0.k"].update(shape=e["layers.0.k"]["shape"][::-1])),
    "an absurd shape": tensors(lambda e: e["layers.0.k"].update(shape=[1 << 62, 1 << 62, 8])),
    "offsets beyond the block": tensors(lambda e: e["layers.1.v"].update(data_offsets=[0, 1 << 60])),
    "keys and values exchanged": tensors(swap),
    "an entry that is none": tensors(lambda e: e.update({"layers.0.k": 7})),
    "a tensor header that is a list": tensors(lambda e: "[]"),
    "a tensor header nested too deeply": tensors(lambda e: '{"a":' * 50_000),
    "a tensor header that is no JSON": tensors(lambda e: "{nothing"),
    "bytes behind the tensors": data(lambda blob: blob + b"\0"),
    "tensors that are cut": data(lambda blob: blob[:-1]),
    "no tensors": data(lambda blob: b""),
    "an absurd tensor header": data(lambda blob: b"\xff" * 8 + blob[8:]),
}


async def test_a_malformed_archive_is_refused(other: Peer, away: Daemon, archive: bytes):
    for what, change in WRONG.items():
        manifest, blocks = take_apart(archive)
        assert len(manifest.revisions) == 3
        assert len(blocks) >= 3
        change(manifest, blocks)
        error = await refusal(other, away, put_together(manifest, blocks))
        assert error is not None, what
        assert (error.reason, error.code) == ("BAD_REQUEST", StatusCode.INVALID_ARGUMENT), (what, error)


OWN_REASONS: dict[str, tuple[Callable[[Manifest, Blocks], Any], str]] = {
    "other bytes": (data(lambda blob: blob[:-1] + bytes([blob[-1] ^ 1])), "RECORD_CORRUPT"),
    "another digest": (block(lambda b: setattr(b, "kv_digest", "0" * 32)), "RECORD_CORRUPT"),
    "unknown tokens": (revision(lambda r: setattr(r, "token_ids", b"\xff" * len(r.token_ids))), "BAD_TOKENS"),
    "an unknown policy": (whole(lambda m: setattr(m.policy, "name", "psychic")), "UNKNOWN_POLICY"),
    "an unknown knob": (whole(lambda m: m.policy.knobs.update({"sharpness": 11})), "UNKNOWN_POLICY"),
}


async def test_what_has_a_reason_of_its_own_says_so(other: Peer, away: Daemon, archive: bytes):
    for what, (change, reason) in OWN_REASONS.items():
        manifest, blocks = take_apart(archive)
        change(manifest, blocks)
        error = await refusal(other, away, put_together(manifest, blocks))
        assert error is not None, what
        assert error.reason == reason, what


class TestTheContainer:
    def frame(self, archive: bytes) -> int:
        """Where the first block begins."""
        return HEAD.size + HEAD.unpack_from(archive)[3]

    async def test_of_a_newer_format_says_so(self, other: Peer, away: Daemon, archive: bytes):
        bad = bytearray(archive[:-32])
        bad[8] = 2
        error = await refusal(other, away, hashed(bytes(bad)))
        assert error is not None
        assert (error.reason, error.metadata["format"], error.metadata["supported"]) == ("FORMAT_TOO_NEW", "2", "1")

    async def test_of_no_version_is_refused(self, other: Peer, away: Daemon, archive: bytes):
        bad = bytearray(archive[:-32])
        bad[8] = 0
        error = await refusal(other, away, hashed(bytes(bad)))
        assert error is not None
        assert error.reason == "BAD_REQUEST"

    async def test_with_lengths_that_do_not_fit_is_refused(self, other: Peer, away: Daemon, archive: bytes):
        at = self.frame(archive)
        frames = [(0, 0, 5), (5000, 0, 5), (10, 1, 5), (10, 0, 1 << 62), (1 << 31, 0, 0)]
        bad = [archive[:at] + struct.pack("<IIQ", *frame) + archive[at + 16 : -32] for frame in frames]
        for length in (1 << 63, (64 << 20) + 1, 1 << 20, 0):
            bad.append(archive[:16] + struct.pack("<Q", length) + archive[24:-32])
        for content in bad:
            error = await refusal(other, away, hashed(content))
            assert error is not None, content[:24]
            assert error.reason == "BAD_REQUEST"

    async def test_that_has_no_end_or_goes_on_behind_it_is_refused(self, other, away, archive: bytes):
        for content in (archive[:-48], archive[:-32] + b"more", archive[: self.frame(archive)]):
            error = await refusal(other, away, hashed(content))
            assert error is not None
            assert error.reason == "BAD_REQUEST"

    async def test_is_readable_by_the_safetensors_library(self, archive: bytes):
        for header, blob in take_apart(archive)[1]:
            found = arrays(blob)
            assert sorted(found) == ["layers.0.k", "layers.0.v", "layers.1.k", "layers.1.v"]
            assert {a.shape for a in found.values()} == {(2, header.n_tokens, 8)}

    async def test_says_what_it_holds(self, archive: bytes):
        manifest, blocks = take_apart(archive)
        assert manifest.created_by.startswith("sessiond ")
        assert [r.kind for r in manifest.revisions] == [1, 2, 2]
        assert [header.sealed for header, _ in blocks] == [True] * (len(blocks) - 1) + [False]
        assert "labels" not in MessageToDict(manifest)


class TestTheStream:
    def cut(self, archive: bytes, **trailer: Any) -> Iterator[pb.ImportSessionRequest]:
        yield from list(parts(archive))[:-1]
        if trailer:
            yield pb.ImportSessionRequest(trailer=pb.ArchiveTrailer(**trailer))

    async def nothing_made(self, other: Peer, away: Daemon, messages: Any, reason: str) -> None:
        before = contents(away)
        with pytest.raises(SessiondClientError) as caught:
            await send(other, messages)
        assert caught.value.reason == reason
        assert contents(away) == before

    async def test_without_a_trailer_is_refused(self, other, away, archive: bytes):
        await self.nothing_made(other, away, self.cut(archive), "BAD_REQUEST")

    async def test_with_another_hash_or_length_is_damage(self, other, away, archive: bytes):
        right = hashlib.sha256(archive).digest()
        await self.nothing_made(
            other, away, self.cut(archive, sha256=b"x" * 32, total_bytes=len(archive)), "RECORD_CORRUPT"
        )
        await self.nothing_made(
            other, away, self.cut(archive, sha256=right, total_bytes=len(archive) + 1), "RECORD_CORRUPT"
        )

    async def test_out_of_order_is_refused(self, other, away, archive: bytes):
        header, *chunks, trailer = parts(archive, chunk=1 << 16)
        for messages in (
            [],
            [*chunks, trailer],
            [header, header, *chunks, trailer],
            [header, *chunks, trailer, chunks[0]],
            [header, *chunks, trailer, trailer],
            [header, pb.ImportSessionRequest(), *chunks, trailer],
            [trailer],
            [header, trailer],
        ):
            expected = "RECORD_CORRUPT" if messages == [header, trailer] else "BAD_REQUEST"
            await self.nothing_made(other, away, messages, expected)

    async def test_in_chunks_that_are_too_large_is_refused(self, other, away):
        await self.nothing_made(other, away, parts(b"x" * ((1 << 20) + 1), chunk=2 << 20), "BAD_REQUEST")

    async def test_in_small_chunks_is_taken(self, other: Peer, archive: bytes):
        assert (await send(other, parts(archive, chunk=1000))).verdict == pb.IMPORT_VERDICT_EXACT

    async def test_with_a_bad_header_is_refused(self, other, away, archive: bytes):
        for header in ({"labels": {"Bad Key": "x"}}, {"request_id": "x" * 129}):
            await self.nothing_made(other, away, parts(archive, **header), "BAD_REQUEST")

    async def test_that_a_client_gives_up_leaves_nothing(self, other: Peer, away: Daemon, archive: bytes):
        before = contents(away)
        for _ in range(6):  # more than there are places
            call = other.sessions.ImportSession(metadata=other.metadata)
            for message in list(parts(archive, chunk=1 << 14))[:5]:
                await call.write(message)
            await asyncio.sleep(0.05)
            call.cancel()
        await eventually_free(other, archive)
        assert contents(away) == before

    async def test_is_kept_from_other_users_and_has_no_name(self, other: Peer, away: Daemon, archive: bytes):
        before = contents(away)[2]
        seen: list[list[str]] = []

        async def watched() -> Any:
            for message in parts(archive, chunk=1 << 14):
                yield message
                await asyncio.sleep(0.005)
                seen.append(contents(away)[2])

        await other.sessions.ImportSession(watched(), metadata=other.metadata)
        assert len(seen) > 3
        assert all(names == before for names in seen)


async def eventually_free(other: Peer, archive: bytes) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await import_(other, archive, dry_run=True)
                return
            except SessiondClientError as error:
                if error.reason != "QUEUE_FULL":
                    raise
                await asyncio.sleep(0.05)


class TestAStoreThatTakesNothing:
    @pytest.mark.parametrize("part", ["log", "blocks"])
    async def test_leaves_no_trace_of_an_import(
        self, other: Peer, away: Daemon, archive: bytes, monkeypatch, part: str
    ):
        store = away.desk.store
        before = contents(away)

        def refuse(*args: Any) -> Any:
            raise DiskFull("no space", retry_after=1.0)

        with monkeypatch.context() as patch:
            patch.setattr(getattr(store, part), "write", refuse)
            with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED):
                await import_(other, archive, request_id="import-1")
        assert contents(away) == before
        assert (await import_(other, archive, request_id="import-1")).verdict == pb.IMPORT_VERDICT_EXACT

    async def test_refuses_before_the_disk_is_full(self, other: Peer, away: Daemon, archive: bytes, monkeypatch):
        before = contents(away)
        monkeypatch.setattr("sessiond.importing.DEFAULT_RESERVE_BYTES", 1 << 60)
        with refused("DISK_FULL", StatusCode.RESOURCE_EXHAUSTED):
            await import_(other, archive)
        assert contents(away) == before

    async def test_says_the_verdict_of_a_dry_run_all_the_same(
        self, other: Peer, away: Daemon, archive: bytes, monkeypatch
    ):
        def refuse(*args: Any) -> Any:
            raise DiskFull("no space", retry_after=1.0)

        monkeypatch.setattr(away.desk.store.log, "write", refuse)
        assert (await import_(other, archive, dry_run=True)).verdict == pb.IMPORT_VERDICT_EXACT


async def test_without_its_hash_damage_would_go_unseen(other: Peer, away: Daemon, archive: bytes, monkeypatch):
    """The defence switched off: a flipped bit in a message is then just another message."""
    at = archive.index(b"word word")
    bad = bytearray(archive)
    bad[at] ^= 1
    assert await refusal(other, away, bytes(bad)) is not None
    monkeypatch.setattr("sessiond.storage.archive.ArchiveReader._verify", lambda self: bytes(32))
    assert await refusal(other, away, bytes(bad)) is None


async def test_an_archive_of_too_many_revisions_is_refused_before_any_work(
    peer: Peer, other: Peer, away: Daemon, archive: bytes, monkeypatch
):
    monkeypatch.setattr("sessiond.history.MAX_REVISIONS", 2)
    error = await refusal(other, away, archive)
    assert error is not None
    assert (error.reason, "revisions" in str(error)) == ("BAD_REQUEST", True)
    session = (await peer.list()).sessions[0].session_id
    with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT) as caught:
        await export(peer, session, all_revisions=True)
    assert "without all_revisions" in str(caught.value)
