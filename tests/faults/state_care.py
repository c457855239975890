"""What the state machine does with archives and with the care of the store; mixed into it."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import rule
from plain_model import PlainStore
from state_steps import SOME, TENANT, Tally, where_possible

from sessiond import collector, verify
from sessiond.collector import garbage
from sessiond.errors import BadRequest, FormatTooNew, RecordCorrupt
from sessiond.storage import keys
from sessiond.storage.findings import Finding, Severity
from sessiond.verify import Verification
from sessiond.views import ImportRequest

Part = bytes | tuple[bytes, int]


class CareRules:
    """Rules; the rest of the machine is in state_machine.py."""

    daemon: Any
    plain: PlainStore
    run: Any
    session: Any
    compare: Any

    @rule(which=SOME, whole_tree=st.booleans(), tokens_only=st.booleans())
    @where_possible
    def export_and_import(self, which: int, whole_tree: bool, tokens_only: bool) -> None:
        """The session once more, as a new one in the same store."""
        session_id, session = self.session(which)
        names, archive = self.run(self._exported(session_id, whole_tree, tokens_only))
        expected = self.plain.tree(session_id) if whole_tree else self.plain.branch(session.head)
        assert sorted(names) == sorted(expected)
        self.plain.n_requests += 1
        request_id = f"import-{self.plain.n_requests}"
        done = self.run(self._import(archive, request_id))
        again = self.run(self._import(archive, request_id))
        import_id = done.session.record.session_id
        assert again.session.record.session_id == import_id
        assert done.verdict == "exact"
        assert not (tokens_only and done.with_kv)
        self.plain.imported(import_id, names[0], session.head, self._copies(names, import_id))
        self.compare(import_id)
        self.compare(session_id)

    @rule(which=SOME, seed=st.integers(0, 2**32), truncate=st.booleans())
    @where_possible
    def damaged_import(self, which: int, seed: int, truncate: bool) -> None:
        """An archive with one wrong bit, or the first part of one, is refused and changes nothing."""
        session_id, _ = self.session(which)
        _, archive = self.run(self._exported(session_id, False, False))
        self.run(self._settled())
        before = self._everything()
        rng, damaged = random.Random(seed), bytearray(archive)
        if truncate:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            self.run(self._import(bytes(damaged), "import-damaged"))
        except (RecordCorrupt, BadRequest, FormatTooNew):
            assert self._everything() == before, "a refused import changed the store"
            return
        raise AssertionError("a damaged archive was imported")

    @rule()
    def collect(self) -> None:
        """Everything that nobody leads to goes away, and nothing else."""
        Tally.steps += 1
        self.run(self.daemon.care.collect())
        self.run(self._settled())
        with mock.patch.object(collector, "SECOND_LOOK_SECONDS", 0.0):  # nothing runs here now
            assert list(garbage(self.daemon.store, lambda: None, erase=False)) == []
        for session_id in self.plain.sessions:
            self.compare(session_id)

    @rule(purge=st.booleans())
    def compact(self, purge: bool) -> None:
        Tally.steps += 1
        done = self.run(self.daemon.care.compact(purge_deleted=purge))
        assert done.sessions_purged == (self.plain.purge_deleted() if purge else 0)
        for session_id in self.plain.sessions:
            self.compare(session_id)

    # --- how -----------------------------------------------------------------------------------------------------

    async def _exported(self, session_id: str, whole_tree: bool, tokens_only: bool) -> tuple[list[str], bytes]:
        """The names of the revisions, and the archive."""
        exports = self.daemon.exports
        async with exports.open(TENANT, session_id, "", all_revisions=whole_tree, tokens_only=tokens_only) as export:
            archive = b"".join([chunk async for chunk in export.chunks()])
            return [revision.name for revision in export.history.revisions], archive

    async def _import(self, archive: bytes, request_id: str) -> Any:
        asked = ImportRequest(request_id, "", {}, False, False, None, None)

        async def parts() -> AsyncIterator[Part]:
            for at in range(0, len(archive), 1 << 16):
                yield archive[at : at + (1 << 16)]
            yield hashlib.sha256(archive).digest(), len(archive)

        return await self.daemon.imports.receive(TENANT, asked, parts())

    def _copies(self, names: list[str], import_id: str) -> dict[str, str]:
        """New names by old ones: a turn keeps its request id, and a branch has none twice but for its root's."""
        log = self.daemon.store.log
        there = {one.request_id: one.revision_id for one in log.revisions_of_session(TENANT, import_id)}
        assert len(there) == len(names)
        return {name: there[log.revision(TENANT, name).request_id] for name in names}

    async def _settled(self) -> None:
        tasks = [live.settling for live in self.daemon.desk.lives.values() if live.settling]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _everything(self) -> list[tuple[bytes, bytes]]:
        """Every record of both environments, but for when a session was last used."""
        found = []
        for part in (self.daemon.store.log, self.daemon.store.blocks):
            with part.environment.read() as txn:
                pairs = [(bytes(key), bytes(value)) for key, value in txn.cursor()]
            found += [pair for pair in pairs if keys.split(pair[0])[1] != keys.SESSION]
        return found

    def verify_twice(self) -> None:
        """With nothing running: only litter is found, all of it is mended, and then there is nothing."""
        store = self.daemon.store
        with (
            mock.patch.object(verify, "SECOND_LOOK_SECONDS", 0.0),
            mock.patch.object(collector, "SECOND_LOOK_SECONDS", 0.0),
        ):
            runs = [list(Verification(store, lambda: None, repair=repair).run()) for repair in (True, False)]
        first, second = ([step for step in steps if isinstance(step, Finding)] for steps in runs)
        assert all(one.severity is Severity.NOTICE and one.repaired for one in first), first
        assert second == []
