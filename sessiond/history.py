"""A session's revisions, tokens and messages as a value of their own, in nobody's ids: what can be carried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sessiond.branch import Ids
from sessiond.errors import BadRequest, RecordCorrupt, RevisionNotFound
from sessiond.messages import decode_messages
from sessiond.storage import keys
from sessiond.storage.log import LogStore
from sessiond.storage.records import RevisionRecord, SessionRecord
from sessiond.template import Message
from sessiond.tree import read_tree

Flags = np.ndarray[Any, np.dtype[np.uint8]]
Kind = Literal["root", "turn", "append"]
Ended = Literal["stop_token", "open"]

MAX_REVISIONS = 20_000  # of what is carried: some work on it grows faster than its size
MAX_SEGMENTS = 1_000


@dataclass(frozen=True, slots=True)
class Told:
    """One revision. `parent` is the index of another in the same history; `name` what it was called, for people.

    ids, flags [n]; the first `n_prompt` came in, the others were generated. `computed`: positions of the branch whose
    KV had been computed when it was committed. `moved`: under another identity than the history now has.
    """

    name: str
    parent: int | None
    kind: Kind
    ids: Ids
    flags: Flags
    n_prompt: int
    asked: tuple[Message, ...]
    said: tuple[Message, ...]
    ended: Ended | None
    finish_reason: str | None
    aborted: bool
    usage: dict[str, int]
    computed: int
    created_us: int
    request_id: str
    tools: tuple[dict[str, Any], ...] = ()
    moved: bool = False


@dataclass(frozen=True, slots=True)
class History:
    """Revisions, a parent before its children, the root first; `head` is an index."""

    revisions: tuple[Told, ...]
    head: int
    ends: tuple[int, ...] = field(init=False)  # log offset behind each revision

    def __post_init__(self) -> None:
        ends: list[int] = []
        for index, told in enumerate(self.revisions):
            assert (told.parent is None) == (index == 0), index
            assert told.parent is None or 0 <= told.parent < index, (told.parent, index)
            ends.append((0 if told.parent is None else ends[told.parent]) + len(told.ids))
        object.__setattr__(self, "ends", tuple(ends))

    def start(self, index: int) -> int:
        """Log offset of a revision's first token."""
        return self.ends[index] - len(self.revisions[index].ids)

    def chain(self, index: int) -> list[int]:
        """Indices of the branch from the root to `index`."""
        out: list[int] = []
        at: int | None = index
        while at is not None:
            out.append(at)
            at = self.revisions[at].parent
        return out[::-1]

    def ids(self, index: int) -> Ids:
        """All tokens of the branch that ends at `index`."""
        return np.concatenate([self.revisions[at].ids for at in self.chain(index)])

    def segments(self) -> list[list[int]]:
        """The tree cut at its forks, its head and its leaves: each segment's revisions, by its last one.

        Parents first. The parent of a segment's first revision is the last of the segment before it.
        """
        ends = segment_ends([told.parent for told in self.revisions], self.head)
        known = set(ends)
        found: list[list[int]] = []
        for end in ends:
            own, at = [end], self.revisions[end].parent
            while at is not None and at not in known:
                own.append(at)
                at = self.revisions[at].parent
            found.append(own[::-1])
        return found

    @property
    def n_tokens(self) -> int:
        """Tokens of all revisions."""
        return sum(len(told.ids) for told in self.revisions)


def segment_ends(parents: Sequence[int | None], head: int) -> list[int]:
    """Indices of the revisions at which a segment ends, parents first."""
    children = [0] * len(parents)
    for parent in parents:
        if parent is not None:
            children[parent] += 1
    return [i for i, n in enumerate(children) if n != 1 or i == head]


def too_many(parents: Sequence[int | None], head: int) -> str:
    """What is wrong with the size of a tree that is to be carried; empty if nothing is."""
    if len(parents) > MAX_REVISIONS:
        return f"{len(parents)} revisions, more than {MAX_REVISIONS}"
    n_segments = len(segment_ends(parents, head))
    return f"{n_segments} segments, more than {MAX_SEGMENTS}" if n_segments > MAX_SEGMENTS else ""


def read_history(
    log: LogStore, session: SessionRecord, head: RevisionRecord, *, whole_tree: bool
) -> tuple[History, list[RevisionRecord]]:
    """`head` and its ancestors, with `whole_tree` the session's other branches too; and their records, in that order.

    Raises RecordCorrupt, naming in its metadata the longest branch that can be read.
    """
    tenant = session.tenant
    try:
        records = {record.revision_id: record for record in log.chain(tenant, head.revision_id)}
        records |= {} if not whole_tree else read_tree(log, session)
        index = {revision_id: i for i, revision_id in enumerate(records)}
        parents = [None if one.parent is None else index[one.parent] for one in records.values()]
        if why := too_many(parents, index[head.revision_id]):
            help_ = "; export one branch, without all_revisions" if whole_tree else ""
            raise BadRequest(f"the session has {why}{help_}", field="all_revisions")
        told = tuple(_read(log, record, index) for record in records.values())
    except RecordCorrupt as error:
        raise _still_readable(log, session, error) from error
    return History(told, index[head.revision_id]), list(records.values())


def _read(log: LogStore, record: RevisionRecord, index: dict[str, int]) -> Told:
    ids, flags = log.tokens(record.tenant, record.revision_id, record.log_end - record.log_start)
    asked, said = decode_messages(log.messages(record.tenant, record.revision_id))
    return Told(
        name=record.revision_id,
        parent=None if record.parent is None else index[record.parent],
        kind=record.kind,
        ids=ids,
        flags=flags,
        n_prompt=record.n_prompt,
        asked=tuple(asked),
        said=tuple(said),
        ended=record.extra.get("ended"),
        finish_reason=record.finish_reason,
        aborted=record.aborted,
        usage={name: int(count) for name, count in record.usage.items()},
        computed=int(record.extra.get("computed", 0)),
        created_us=record.created_us,
        request_id=record.request_id,
        tools=tuple(record.extra.get("tools", ())),
        moved=bool(record.extra.get("moved", False)),
    )


def _still_readable(log: LogStore, session: SessionRecord, error: RecordCorrupt) -> RecordCorrupt:
    """The error, with the longest branch of the session that it leaves readable."""
    best, n_best = "", 0
    known: dict[str, bool] = {}
    for revision_id in _candidates(log, session):
        with contextlib.suppress(RecordCorrupt, RevisionNotFound):
            chain = log.chain(session.tenant, revision_id)
            if all(_is_readable(log, record, known) for record in chain) and chain[-1].log_end >= n_best:
                best, n_best = revision_id, chain[-1].log_end
    told = f"{n_best} tokens up to revision {best} can still be read" if best else "nothing of it can be read"
    return RecordCorrupt(
        f"{error.message}; {told}",
        key=error.metadata.get("key", ""),
        readable_revision_id=best,
        readable_tokens=n_best,
    )


def _is_readable(log: LogStore, record: RevisionRecord, known: dict[str, bool]) -> bool:
    if record.revision_id not in known:
        try:
            log.tokens(record.tenant, record.revision_id, record.log_end - record.log_start)
            log.messages(record.tenant, record.revision_id)
            known[record.revision_id] = True
        except RecordCorrupt:
            known[record.revision_id] = False
    return known[record.revision_id]


def _candidates(log: LogStore, session: SessionRecord) -> Iterable[str]:
    """The session's revisions, and the ancestors of its head as far as they lead."""
    yield from log.ids(session.tenant, keys.REVISION_INDEX, session.session_id)
    at: str | None = session.head_revision
    seen: set[str] = set()
    with contextlib.suppress(RecordCorrupt, RevisionNotFound):
        while at is not None and at not in seen:
            seen.add(at)
            yield at
            at = log.revision(session.tenant, at).parent
