"""Restores and imports that fail beside a live session: it is unchanged, and the damaged one is computed again.

A real daemon over gRPC on the fake model, of which any wrong bit of KV changes the answer. What damage the token log
has is DATA_LOSS, and says what is left.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import lmdb
from e2e_archive import export, import_, put_together, take_apart
from e2e_daemon import PATIENCE, Peer, peer_of
from fake_daemon import model_folder
from fake_model import FakeModel, answer_to
from outcome import Outcome
from weaknesses import WEAKNESSES

from sessiond import server
from sessiond.clients.errors import SessiondClientError
from sessiond.config import Settings
from sessiond.modelidentity import identity_id
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.environment import Environment
from sessiond.storage.kv import kv_digest
from sessiond.types import Span
from sessiond.v1 import sessions_pb2 as pb

TENANT = "default"
CELL = 128
HEAD_BYTES = 40  # of an envelope; header, body and payload follow


@dataclass
class Victim:
    """A cold session with two sealed cells and a tail, and where its records are."""

    store: Any
    session_id: str
    head: str
    history: list[int]
    rng: random.Random

    def records(self, kind: int, start: int) -> list[bytes]:
        """Keys of its KV records of that kind that begin at a position; no other session shares them."""
        wanted = []
        prefix = keys.kind_prefix(TENANT, kind)
        owner = self.head.encode() if kind == keys.KV_TAIL else None
        with self.store.blocks._env.read() as txn:
            for key, _ in txn.cursor():
                key = bytes(key)
                if key.startswith(prefix) and int.from_bytes(key[-13:-5], "big") == start:
                    wanted.append(key)
        mine = [ref.prefix_hash for ref in self.refs()] if owner is None else [owner]
        return [key for key in wanted if any(name in key for name in mine)]

    def refs(self) -> list[Any]:
        from sessiond.storage.prefix import prefix_hashes

        identity = self.store.log.session(TENANT, self.session_id).identity_id
        hashes = prefix_hashes(TENANT, identity, self.history, CELL)
        return [ref for ref in self.store.log.cell_refs(TENANT, hashes) if ref]

    def value(self, key: bytes) -> bytes:
        with self.store.blocks._env.read() as txn:
            return bytes(txn.get(key))

    def put(self, env: Environment, key: bytes, value: bytes | None) -> None:
        env.submit([lambda txn: txn.delete(key) if value is None else txn.put(key, value)], 0, frees=True).result()

    def flip(self, env: Environment, key: bytes, first: int, last: int = 0) -> None:
        """Flip a bit between byte `first` and the end, or byte `last`."""
        with env.read() as txn:
            value = bytearray(txn.get(key))
        value[self.rng.randrange(first, last or len(value))] ^= 1 << self.rng.randrange(8)
        self.put(env, key, bytes(value))


# --- the ways in which a restore fails; each damages the victim and says how many tokens of its cells that costs ----


def missing_block(v: Victim) -> int:
    v.put(v.store.blocks._env, v.rng.choice(v.records(keys.KV_CELL, 0)), None)
    return 2 * CELL


def flipped_frame(v: Victim) -> int:
    key = v.rng.choice(v.records(keys.KV_CELL, CELL))
    v.flip(v.store.blocks._env, key, len(v.value(key)) - 60)
    return CELL


def flipped_header(v: Victim) -> int:
    v.flip(v.store.blocks._env, v.rng.choice(v.records(keys.KV_CELL, CELL)), HEAD_BYTES, HEAD_BYTES + 60)
    return CELL


def swapped_cells(v: Victim) -> int:
    (one, *_), (other, *_) = v.records(keys.KV_CELL, 0), v.records(keys.KV_CELL, CELL)
    first, second = v.value(one), v.value(other)
    v.put(v.store.blocks._env, one, second)
    v.put(v.store.blocks._env, other, first)
    return 2 * CELL


def truncated_record(v: Victim) -> int:
    key = v.rng.choice(v.records(keys.KV_CELL, 0))
    value = v.value(key)
    v.put(v.store.blocks._env, key, value[: v.rng.randrange(len(value))])
    return 2 * CELL


def foreign_record(v: Victim) -> int:
    """The KV of another session's cell under this one's key."""
    mine = v.rng.choice(v.records(keys.KV_CELL, 0))
    with v.store.blocks._env.read() as txn:
        others = [bytes(key) for key, _ in txn.cursor() if bytes(key)[-13:] == mine[-13:] and bytes(key) != mine]
    v.put(v.store.blocks._env, mine, v.value(v.rng.choice(others)))
    return 2 * CELL


def wrong_generation(v: Victim) -> int:
    """The reference names a generation under whose key lie the bytes of another."""
    for key in v.records(keys.KV_TAIL, 2 * CELL):
        at = len(key) - 13 - 8
        newer = key[:at] + (int.from_bytes(key[at : at + 8], "big") + 1).to_bytes(8, "big") + key[at + 8 :]
        v.put(v.store.blocks._env, newer, v.value(key))
    _rewritten_tail(v, lambda ref: replace(ref, generation=ref.generation + 1))
    return 0


def wrong_length(v: Victim) -> int:
    _rewritten_tail(v, lambda ref: replace(ref, length=ref.length - 1))
    return 0


def damaged_cell_ref(v: Victim) -> int:
    v.flip(v.store.log._env, keys.cell_ref_key(TENANT, v.refs()[1].prefix_hash), 0)
    return CELL


def damaged_tail_ref(v: Victim) -> int:
    v.flip(v.store.log._env, keys.record_key(TENANT, keys.TAIL_REF, v.head), 0)
    return 0


def damaged_tail(v: Victim) -> int:
    v.flip(v.store.blocks._env, v.rng.choice(v.records(keys.KV_TAIL, 2 * CELL)), 0)
    return 0


def _rewritten_tail(v: Victim, change: Callable[[Any], Any]) -> None:
    batch = LogBatch()
    batch.put_tail_ref(change(v.store.log.tail_ref(TENANT, v.head)))
    v.store.log.write(batch).result()


DAMAGES: dict[str, Callable[[Victim], int]] = {
    function.__name__: function
    for function in (
        missing_block, flipped_frame, flipped_header, swapped_cells, truncated_record, foreign_record,
        wrong_generation, wrong_length, damaged_cell_ref, damaged_tail_ref, damaged_tail,
    )
}  # fmt: skip
IMPORTS = ("import_damaged", "import_of_another_model")
WAYS = (*DAMAGES, "failing_read", "failing_read_beside_a_turn", "full_memory", *IMPORTS, "damaged_tokens")


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    """`count` failed restores, the ways in turn. `variant`: see `WEAKNESSES`."""
    details: list[str] = []
    with WEAKNESSES[variant](), mock.patch.object(server.Model, "load", return_value=FakeModel()):
        asyncio.run(_run(count, seed, scratch, details))
    silent = sum("silently" in line for line in details)
    return Outcome("failed_restore", count, len(details), silent_corruptions=silent, details=details)


async def _run(count: int, seed: int, scratch: Path, details: list[str]) -> None:
    settings = Settings(
        model=str(model_folder()), data_dir=scratch / "data", listen="127.0.0.1:0", threads=1, settle_seconds=0.0,
        sweep_seconds=3600.0, scrub_bytes_per_second=0.0,
    )  # fmt: skip
    daemon = server.Daemon(settings)
    await daemon.start()
    try:
        async with peer_of(daemon.port) as peer:
            for trial in range(count):
                way, rng = WAYS[trial % len(WAYS)], random.Random(f"{seed}:{trial}")
                try:
                    await _Trial(daemon, peer, rng).run(way)
                except (AssertionError, SessiondClientError) as error:
                    details.append(f"seed {seed} trial {trial} {way}: {type(error).__name__}: {error}")
    finally:
        await daemon.stop()


class _Trial:
    """A live session and a victim; then the victim's next turn."""

    def __init__(self, daemon: server.Daemon, peer: Peer, rng: random.Random) -> None:
        assert daemon.desk is not None
        self.desk, self.peer, self.rng = daemon.desk, peer, rng

    async def run(self, way: str) -> None:
        live, live_history = await self._session()
        session, history = await self._session()
        await self.peer.suspend(session)
        now = await self.peer.get(session)
        before = self._kv(live)
        victim = Victim(self.desk.store, session, now.head_revision_id, history, self.rng)
        prompt = self._ids(5)
        if way in DAMAGES:
            cost = DAMAGES[way](victim)
            await self._recomputes(session, history, prompt, cost + len(history) - 1 - 2 * CELL if cost else None)
        elif way == "failing_read":
            with self._failing_reads():
                await self._recomputes(session, history, prompt, None)
        elif way == "failing_read_beside_a_turn":
            live_history = await self._beside_a_turn(live, live_history, session, history)
            before = self._kv(live)
        elif way in IMPORTS:
            await self._refused_import(session, way)
            await self._continues(session, history, prompt)
        elif way == "full_memory":
            await self._refused_for_memory(live, session, prompt)
        else:
            await self._told_of_loss(victim, prompt)
        assert self._kv(live) == before, "the live session's KV has changed"
        turn = await self.peer.turn(live, token_ids=prompt, max_tokens=16)
        assert turn.ids == answer_to([*live_history, *prompt], 16), "the live session says something else, silently"
        for one in (live, session):
            await self.peer.delete(one, purge_now=True)

    async def _recomputes(self, session: str, history: list[int], prompt: list[int], least: int | None) -> None:
        """The turn says what it would have said, how many tokens it computed again, and that damage is why."""
        turn = await self.peer.turn(session, token_ids=prompt, max_tokens=16)
        assert turn.ids == answer_to([*history, *prompt], 16), "the damaged session says something else, silently"
        causes = {reason.reason for reason in turn.restored.reasons}
        assert causes == {pb.RECOMPUTE_CAUSE_CORRUPT}, f"told of {causes}"
        lost = turn.restored.tokens_recomputed
        assert lost == sum(reason.tokens for reason in turn.restored.reasons)
        assert 0 < lost <= len(history) - 1
        assert lost + turn.restored.tokens_restored == len(history) - 1, "not all of the history is accounted for"
        assert least is None or lost == least, f"{lost} tokens were computed again, not {least}"

    async def _continues(self, session: str, history: list[int], prompt: list[int]) -> None:
        """Nothing of it needs computing again."""
        turn = await self.peer.turn(session, token_ids=prompt, max_tokens=16)
        assert turn.ids == answer_to([*history, *prompt], 16), "the stored session says something else, silently"
        assert turn.restored.tokens_recomputed == 0, turn.restored

    async def _refused_import(self, session: str, way: str) -> None:
        """Of an archive of the stored session; no record changes."""
        archive, _ = await export(self.peer, session)
        if way == "import_damaged":
            damaged = bytearray(archive)
            damaged[self.rng.randrange(len(damaged))] ^= 1 << self.rng.randrange(8)
            archive, reasons = bytes(damaged), ("RECORD_CORRUPT", "BAD_REQUEST", "FORMAT_TOO_NEW")
        else:
            manifest, blocks = take_apart(archive)
            manifest.identity.fields["weights_sha256"] = "0" * 64
            manifest.identity.identity_id = identity_id(dict(manifest.identity.fields))
            archive, reasons = put_together(manifest, blocks), ("IDENTITY_MISMATCH",)
        before = self._records()
        try:
            await import_(self.peer, archive)
        except SessiondClientError as error:
            if error.reason not in reasons:
                raise
        else:
            raise AssertionError(f"{way}: it was imported, silently")
        assert self._records() == before, "a refused import changed the store"

    def _records(self) -> list[tuple[bytes, bytes]]:
        found = []
        for part in (self.desk.store.log, self.desk.store.blocks):
            with part.environment.read() as txn:
                found += [(bytes(key), bytes(value)) for key, value in txn.cursor()]
        return found

    async def _beside_a_turn(self, live: str, live_history: list[int], session: str, history: list[int]) -> list[int]:
        """While the live session says something, a read of the other's KV fails. Returns the live session's history."""
        asked = self._ids(5)
        while len(expected := answer_to([*live_history, *asked], 48)) < 32:  # long enough to be held in the middle
            asked = self._ids(5)
        model = cast(FakeModel, self.desk.engine.model)
        model.hold(4)
        stream = self.peer.open(live, token_ids=asked, max_tokens=48)
        with self._failing_reads() as left:
            await stream.read(lambda turn: len(turn.ids) >= 4)
            other = asyncio.create_task(self._recomputes(session, history, self._ids(5), None))
            async with asyncio.timeout(PATIENCE):
                while left[0] >= 0:  # noqa: ASYNC110 - a thread of the store reads
                    await asyncio.sleep(0.01)
            model.release()
            await other
        turn = await stream.read()
        assert turn.error is None, turn.error
        assert turn.ids == expected, "the running turn says something else, silently"
        await self.peer.settled(live)
        return [*live_history, *asked, *turn.ids]

    async def _refused_for_memory(self, live: str, session: str, prompt: list[int]) -> None:
        settings = self.desk.settings
        holder = self.desk.live(TENANT, live)
        self.desk.settings = settings.model_copy(update={"memory_budget_bytes": self.desk.hot_bytes})
        try:
            async with holder.lease:  # as a running turn holds it: the live session cannot be pushed out
                turn = await self.peer.open(session, token_ids=prompt, max_tokens=16).read()
        finally:
            self.desk.settings = settings
        assert turn.error is not None
        assert turn.error.reason == "MEMORY_BUDGET", turn.error

    async def _told_of_loss(self, victim: Victim, prompt: list[int]) -> None:
        key = keys.tokens_key(TENANT, victim.head, 0)
        victim.flip(self.desk.store.log._env, key, 0)
        self.desk.lives.pop((TENANT, victim.session_id), None)
        self.desk._known.pop((TENANT, victim.session_id), None)  # as after a restart: its history must be read
        turn = await self.peer.open(victim.session_id, token_ids=prompt, max_tokens=16).read()
        assert turn.error is not None, "lost tokens are not told: silently"
        told = turn.error.metadata
        assert turn.error.reason == "RECORD_CORRUPT", turn.error
        assert (told["session"], told["repairable"]) == (victim.session_id, "false"), told
        assert told["key"].startswith(f"{TENANT}/tokens/{victim.head}"), told
        assert told["readable"] == f"0-{len(victim.history) - self.n_last}", told

    async def _session(self) -> tuple[str, list[int]]:
        """A session of two cells and a tail, settled; and its tokens."""
        root, prompt = self._ids(100), self._ids(self.rng.randint(180, 220))
        session = (await self.peer.create(token_ids=root)).session_id
        turn = await self.peer.turn(session, token_ids=prompt, max_tokens=12)
        await self.peer.settled(session)
        self.n_last = len(prompt) + len(turn.ids)
        return session, [*root, *prompt, *turn.ids]

    def _ids(self, count: int) -> list[int]:
        return [self.rng.randrange(3, 260) for _ in range(count)]

    def _kv(self, session: str) -> str:
        cache = self.desk.live(TENANT, session).cache
        assert cache is not None
        return kv_digest(cache.arrays(Span(0, cache.length)))

    @contextmanager
    def _failing_reads(self) -> Iterator[list[int]]:
        """One read of a KV record fails. Gives how many reads come before it: negative when it has failed."""
        blocks = self.desk.store.blocks._env
        left = [self.rng.randint(0, 3)]
        read = Environment.read

        @contextmanager
        def failing(env: Environment) -> Iterator[Any]:
            with read(env) as txn:
                yield _Failing(txn, left) if env is blocks else txn

        with mock.patch.object(Environment, "read", failing):
            yield left


class _Failing:
    """A read transaction of which one `get` fails."""

    def __init__(self, txn: Any, left: list[int]) -> None:
        self._txn, self._left = txn, left

    def get(self, key: bytes) -> Any:
        self._left[0] -= 1
        if self._left[0] == -1:
            raise lmdb.CorruptedError("a page cannot be read")
        return self._txn.get(key)
