"""Compare a reopened store with what was promised: nothing acknowledged is missing, nothing that is there is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from oracle import Promises, Session, Turn
from script import (
    CELL_TOKENS,
    DIM,
    N_GROUPS,
    N_LAYERS,
    TENANT,
    Script,
    request_id,
    revision_id,
    session_id,
)

from sessiond import errors
from sessiond.storage import keys
from sessiond.storage.kv import KVOwner
from sessiond.storage.records import RevisionRecord
from sessiond.storage.store import Store
from sessiond.types import Part


@dataclass
class Findings:
    lost_tokens: int = 0
    problems: list[str] = field(default_factory=list)

    def lose(self, what: str, tokens: int = 0) -> None:
        self.lost_tokens += tokens
        self.problems.append(what)


class Checker:
    """Checks one reopened store. Problems are collected, not raised."""

    def __init__(self, store: Store, promises: Promises, seed: int) -> None:
        self.store = store
        self.promises = promises
        self.script = Script(seed)
        self.found = Findings()

    def check(self) -> Findings:
        present = set(self.store.log.ids(TENANT, keys.SESSION))
        unknown = present - {session_id(n) for n in self.promises.sessions}
        if unknown:
            self.found.lose(f"sessions that nobody began: {sorted(unknown)}")
        for number, session in sorted(self.promises.sessions.items()):
            try:
                self._session(number, session, session_id(number) in present)
            except errors.SessiondError as exc:
                tokens = sum(self._acknowledged(number, t, turn) for t, turn in session.turns.items())
                self.found.lose(f"session {number}: {exc!r}", tokens)
        self._references()
        self._catalog(present)
        return self.found

    def _acknowledged(self, number: int, t: int, turn: Turn) -> int:
        """Tokens of a turn that were acknowledged and not discarded since."""
        if "discard" in (turn.ended, turn.may_end):
            return 0
        said = self.script.said(number, t)
        return len(said.ids) if turn.ended else turn.opened * len(said.prompt) + turn.tokens

    def _session(self, number: int, session: Session, is_present: bool) -> None:
        if session.purged or (session.may_be_purged and not is_present):
            self._purged(number, is_present)
            return
        if not is_present:
            if session.created:
                tokens = sum(self._acknowledged(number, t, turn) for t, turn in session.turns.items())
                self.found.lose(f"session {number} is gone", tokens)
            return
        record = self.store.log.session(TENANT, session_id(number))
        chain = self.store.log.chain(TENANT, record.head_revision)
        listed = self.store.log.revisions_of_session(TENANT, session_id(number))
        if [r.revision_id for r in chain] != [r.revision_id for r in listed]:
            self.found.lose(f"session {number}: the index lists other revisions than the chain")
        committed = {r.revision_id: r for r in chain}
        for t, turn in sorted(session.turns.items()):
            self._turn(number, t, turn, committed.get(revision_id(number, t)))
        if self.store.log.messages(TENANT, revision_id(number, -1)) != b"[]":
            self.found.lose(f"session {number}: the root's messages are wrong")
        self._tail(number, session, record.head_revision)

    def _purged(self, number: int, is_present: bool) -> None:
        names = [revision_id(number, t) for t in range(-1, 8)]
        left = is_present or self.store.log.ids(TENANT, keys.REVISION_INDEX, session_id(number))
        left = left or self.store.log.ids(TENANT, keys.REQUEST, session_id(number))
        left = left or any(len(self.store.log.tokens(TENANT, name)[0]) for name in names)
        if left:
            self.found.lose(f"session {number} was purged, but records of it are there")

    def _turn(self, number: int, t: int, turn: Turn, revision: RevisionRecord | None) -> None:
        said, where = self.script.said(number, t), f"session {number} turn {t}"
        request = self.store.log.request(TENANT, session_id(number), request_id(number, t))
        if request is None:
            if turn.opened:
                self.found.lose(f"{where}: request is gone", self._acknowledged(number, t, turn))
            return
        ids, flags = self.store.log.tokens(TENANT, revision_id(number, t))
        if revision is not None:
            whole = np.array_equal(ids, said.ids) and np.array_equal(flags, said.flags)
            if not whole or self.store.log.messages(TENANT, revision.revision_id) != said.messages:
                self.found.lose(f"{where}: revision is torn", self._acknowledged(number, t, turn))
            if turn.may_end != "commit" or request.state != "finished":
                self.found.lose(f"{where}: revision beside a {request.state} request, {turn}")
        elif turn.ended == "commit":
            self.found.lose(f"{where}: acknowledged revision is gone", self._acknowledged(number, t, turn))
        elif request.state == "running" and turn.ended != "discard":
            self._open_turn(where, turn, len(ids) - len(said.prompt))
            if not np.array_equal(ids, said.ids[: len(ids)]) or not np.array_equal(flags, said.flags[: len(ids)]):
                self.found.lose(f"{where}: logged tokens are wrong", self._acknowledged(number, t, turn))
        elif request.state != "aborted" or turn.may_end != "discard" or len(ids):
            self.found.lose(f"{where}: request is {request.state} with {len(ids)} tokens, {turn}")

    def _open_turn(self, where: str, turn: Turn, n_generated: int) -> None:
        if n_generated < turn.tokens:
            self.found.lose(
                f"{where}: {turn.tokens} tokens acknowledged, {n_generated} there", turn.tokens - n_generated
            )
        if n_generated > turn.may_tokens:
            self.found.lose(f"{where}: {n_generated} tokens there, {turn.may_tokens} begun")

    def _tail(self, number: int, session: Session, head: str) -> None:
        turn = session.tail
        if turn < 0 or turn != session.may_tail or head != revision_id(number, turn):
            return  # a later turn's tail was begun: either may be there, and _references reads what is
        if self.store.log.tail_ref(TENANT, head) is None:
            self.found.lose(f"session {number}: acknowledged tail of turn {turn} is gone")

    def _references(self) -> None:
        """Whatever is referenced is readable and right; every acknowledged cell of a present session is referenced."""
        refs = {ref.prefix_hash: ref for ref in self.store.log.all_cell_refs(TENANT)}
        for number, session in self.promises.sessions.items():
            turns = max(session.turns, default=-1)
            names = self.script.cells(self.script.history(number, turns))
            if not session.may_be_purged:
                missing = [index for index in session.cells if names[index] not in refs]
                if missing:
                    self.found.lose(f"session {number}: acknowledged cells {missing} are gone")
            for index, name in enumerate(names):
                if refs.pop(name, None) is not None:
                    self._kv(KVOwner(TENANT, "cell", name), number, index * CELL_TOKENS, CELL_TOKENS)
            for t in range(-1, turns + 1):
                tail = self.store.log.tail_ref(TENANT, revision_id(number, t))
                if tail is not None:
                    owner = KVOwner(TENANT, "tail", tail.revision_id.encode(), tail.generation)
                    self._kv(owner, number, tail.start, tail.length)
        if refs:
            self.found.lose(f"{len(refs)} cell references that nobody wrote")

    def _kv(self, owner: KVOwner, number: int, start: int, n: int) -> None:
        out = {
            (layer, part): np.zeros((N_GROUPS, n, DIM), np.uint16)
            for layer in range(N_LAYERS)
            for part in (Part.K, Part.V)
        }
        try:
            self.store.blocks.read_into(owner, start, n, N_LAYERS, lambda layer, part: out[layer, part])
        except errors.RecordCorrupt as exc:
            self.found.lose(f"session {number}: a reference is there, its KV is not: {exc}")
            return
        for layer, pair in enumerate(self.script.kv(number, start, n)):
            if not all(np.array_equal(out[layer, part], pair[part]) for part in (Part.K, Part.V)):
                self.found.lose(f"session {number}: wrong KV for {owner.kind} @{start}")
                return

    def _catalog(self, present: set[str]) -> None:
        quota = self.store.catalog.quota(TENANT).max_sessions or 0
        if not self.promises.quota <= quota <= self.promises.may_quota:
            self.found.lose(f"the catalog's quota is {quota}, acknowledged was {self.promises.quota}")
        listed = {row.session_id for row in self.store.catalog.list_sessions(TENANT, page_size=10_000)}
        if not present <= listed:
            self.found.lose(f"the catalog does not list {sorted(present - listed)}")
        if self.store.damaged:
            self.found.lose(f"damaged session records: {self.store.damaged}")
