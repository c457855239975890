"""Where the whole daemon is killed: functions by name, and the moment before, inside or after a call of them."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BEFORE, AFTER, COMMITTED = "before", "after", "committed"


@dataclass(frozen=True)
class Point:
    """The `nth` call of `target` ("module:name" or "module:Class.name") since `since` was first called.

    COMMITTED: within the log's transaction, when it is durable and nobody has been told.
    """

    name: str
    target: str
    when: str
    nth: int = 1
    since: str = ""


COMMIT = "sessiond.storage.environment:Environment._commit_applied"
POST = "sessiond.desk:Desk.post"
OPEN_TURN = "sessiond.turn:open_turn"
LOG_TOKEN = "sessiond.turn:Turn.log_token"
DELETE = "sessiond.storage.blocks:BlockStore.delete"
COLLECT = "sessiond.care:collect"
COMPACTION = "sessiond.storage.compaction"
MAP_FILE = "sessiond.storage.mapfile:MapFile"
TAKE_COPY = f"{MAP_FILE}.take_copy"
IMPORT_BLOCKS = "sessiond.foreignkv:TailWriter.write"
POINTS = (
    # The first start makes the directory.
    Point("format-before-its-rename", "pathlib:Path.replace", BEFORE),
    Point("format-made", "sessiond.storage.store:read_or_create_format", AFTER),
    Point("sql-before-its-migration", "sessiond.storage.catalog:migrate", BEFORE),
    Point("sql-migrated-not-committed", "sessiond.storage.catalog:migrate", AFTER),
    Point("identity-registered", "sessiond.storage.batch:LogBatch.put_profile", AFTER),
    # Create.
    Point("create-before", "sessiond.sessions:begin_session", AFTER),
    Point("create-durable-untold", COMMIT, COMMITTED, since="sessiond.sessions:begin_session"),
    Point("index-before", "sessiond.storage.catalog:Catalog.upsert_sessions", BEFORE),
    Point("index-written", "sessiond.storage.catalog:Catalog.upsert_sessions", AFTER),
    # A turn.
    Point("turn-before-its-opening", OPEN_TURN, BEFORE),
    Point("turn-opened-untold", COMMIT, COMMITTED, since=OPEN_TURN),
    Point("turn-opened", OPEN_TURN, AFTER),
    Point("first-token-before-its-write", LOG_TOKEN, BEFORE),
    Point("first-token-queued", POST, AFTER, since=OPEN_TURN),
    Point("first-token-durable-unsent", "sessiond.turn:Turn._durable", BEFORE),
    Point("token-before-its-write", LOG_TOKEN, BEFORE, nth=23),
    Point("token-durable-unsent", "sessiond.turn:Turn._durable", BEFORE, nth=27),
    Point("token-in-the-transaction", COMMIT, COMMITTED, nth=9, since=LOG_TOKEN),
    Point("last-token-queued", POST, AFTER, nth=20, since=OPEN_TURN),
    Point("revision-before-its-commit", "sessiond.turn:commit_turn", BEFORE, nth=2),
    Point("revision-before-the-transaction-ends", COMMIT, BEFORE, since="sessiond.turn:commit_turn"),
    Point("revision-durable-untold", COMMIT, COMMITTED, since="sessiond.turn:commit_turn"),
    Point("revision-committed", "sessiond.turn:commit_turn", AFTER, nth=2),
    Point("suspend-before", "sessiond.turn:suspend_turn", BEFORE),
    Point("suspended", "sessiond.turn:suspend_turn", AFTER),
    Point("discard-before", "sessiond.conversation:discard_turn", BEFORE),
    Point("discarded", "sessiond.conversation:discard_turn", AFTER),
    Point("abort-before", "sessiond.turn:discard_turn", BEFORE),
    Point("aborted", "sessiond.turn:discard_turn", AFTER),
    # Behind the turns.
    Point("settling-begins", "sessiond.desk:Desk._settle", BEFORE, nth=2),
    Point("first-cell-sealed", "sessiond.scheduler:Scheduler._seal", AFTER),
    Point("cell-blocks-before", "sessiond.tiers:Tiers._write_cell", BEFORE),
    Point("cell-blocks-queued", "sessiond.tiers:Tiers._write_cell", AFTER, nth=2),
    Point("cell-ref-before-its-write", "sessiond.storage.batch:LogBatch.put_cell_ref", AFTER),
    Point("cell-ref-durable", "sessiond.tiers:Tiers.persist_cells", AFTER, nth=2),
    Point("tail-blocks-before", "sessiond.tiers:Tiers.persist_tail", BEFORE, nth=2),
    Point("tail-ref-before-its-write", "sessiond.storage.batch:LogBatch.put_tail_ref", BEFORE, nth=2),
    Point("old-tail-before-its-deletion", DELETE, BEFORE, since="sessiond.tiers:Tiers.persist_tail"),
    Point("old-tail-deleted", DELETE, AFTER, since="sessiond.tiers:Tiers.persist_tail"),
    Point("tail-durable", "sessiond.tiers:Tiers.persist_tail", AFTER, nth=3),
    # Out of memory and back.
    Point("eviction-persisted", "sessiond.live:Live.drop_cache", BEFORE),
    Point("evicted", "sessiond.desk:Desk.suspend", AFTER),
    Point("restored", "sessiond.tiers:Tiers.restore", AFTER, since="sessiond.desk:Desk.suspend"),
    # What clients change.
    Point("update-before", "sessiond.sessions:Sessions.update", BEFORE),
    Point("update-durable-untold", "sessiond.sessions:Sessions.update", AFTER),
    Point("fork-before", "sessiond.storage.batch:LogBatch.pin_revision", BEFORE),
    Point("fork-durable-untold", COMMIT, COMMITTED, since="sessiond.storage.batch:LogBatch.pin_revision"),
    Point("rollback-before", "sessiond.branching:_move_head", BEFORE),
    Point("rollback-durable-untold", "sessiond.branching:_move_head", AFTER),
    Point("delete-before", "sessiond.sessions:Sessions._soft_delete", BEFORE),
    Point("delete-durable-untold", "sessiond.sessions:Sessions._soft_delete", AFTER),
    Point("undelete-untold", "sessiond.sessions:Sessions.undelete", AFTER),
    Point("purge-before", "sessiond.storage.catalog:Catalog.remove_session", BEFORE),
    Point("purge-index-removed", "sessiond.storage.catalog:Catalog.remove_session", AFTER),
    Point("purge-log-before", "sessiond.storage.batch:LogBatch.delete_requests", AFTER),
    Point("purge-blocks-left", DELETE, BEFORE, since="sessiond.sessions:erase_session"),
    Point("purge-untold", "sessiond.sessions:erase_session", AFTER),
    # A session travels.
    Point("export-planned", "sessiond.exporting:_prepare", AFTER),
    Point("export-first-block", "sessiond.storage.archive:ArchiveWriter.block", AFTER),
    Point("export-ends", "sessiond.storage.archive:ArchiveWriter.end", AFTER),
    Point("import-arriving", "sessiond.storage.incoming:Incoming.append", AFTER),
    Point("import-received", "sessiond.importing:Imports._make", BEFORE),
    Point("import-blocks-before", IMPORT_BLOCKS, BEFORE),
    Point("import-blocks-queued", "sessiond.storage.blocks:BlockStore.write", AFTER, since=IMPORT_BLOCKS),
    Point("import-blocks-before-the-transaction-ends", COMMIT, BEFORE, since=IMPORT_BLOCKS),
    Point("import-blocks-durable", IMPORT_BLOCKS, AFTER),
    Point("import-log-queued", "sessiond.storage.log:LogStore.write", AFTER, since=IMPORT_BLOCKS),
    Point("import-durable-untold", COMMIT, COMMITTED, since=IMPORT_BLOCKS),
    Point("import-untold", "sessiond.importing:Imports.receive", AFTER),
    # The care of the store. The log is compacted first, then blocks.
    Point("compact-purged", "sessiond.care:Care._collect", BEFORE),
    Point("collector-looked", "sessiond.collector:reachable", AFTER),
    Point("collector-before-the-references", "sessiond.storage.batch:LogBatch.delete_cell_ref", BEFORE, since=COLLECT),
    Point("collector-references-gone", "sessiond.collector:delete_unreferenced", BEFORE),
    Point("collector-kv-queued", DELETE, AFTER, since=COLLECT),
    Point("collector-kv-gone", "sessiond.collector:delete_unreferenced", AFTER),
    Point("collected", COLLECT, AFTER),
    Point("compact-before-the-copy", f"{COMPACTION}:_write_copy", BEFORE),
    Point("compact-copied-not-synced", "os:fsync", BEFORE, since=f"{COMPACTION}:_write_copy"),
    Point("compact-copied", f"{COMPACTION}:_write_copy", AFTER),
    Point("compact-opened", f"{MAP_FILE}._open", AFTER, since=TAKE_COPY),
    Point("compact-renamed", "os:replace", AFTER, since=TAKE_COPY),
    Point("compact-lock-file-renamed", "os:replace", AFTER, since=TAKE_COPY, nth=2),
    Point("compact-name-synced", f"{COMPACTION}:sync_folder", AFTER),
    Point("compact-blocks-copied", f"{COMPACTION}:_write_copy", AFTER, nth=2),
    Point("compact-blocks-taken", TAKE_COPY, AFTER, nth=2),
    Point("compact-blocks-name-synced", f"{COMPACTION}:sync_folder", AFTER, nth=2),
    Point("compact-untold", "sessiond.care:Care.compact", AFTER),
    Point("repair-before", "sessiond.verify:mend", BEFORE),
    Point("repair-reference-gone", "sessiond.mending:delete_unreferenced", BEFORE, since="sessiond.verify:mend"),
    Point("repair-kv-gone", "sessiond.mending:delete_unreferenced", AFTER, since="sessiond.verify:mend"),
    Point("repaired", "sessiond.verify:mend", AFTER),
    Point("scrub-before-mending", "sessiond.scrub:mend", BEFORE),
    Point("scrub-reference-gone", "sessiond.mending:delete_unreferenced", BEFORE, since="sessiond.scrub:mend"),
    Point("scrub-mended", "sessiond.scrub:mend", AFTER),
    Point("sweep-before-expiry", "sessiond.sessions:Sessions.expire_due", BEFORE),
    Point("sweep-expired", "sessiond.sessions:Sessions.expire_due", AFTER),
    Point("drain-begins", "sessiond.keeper:Keeper.drain", BEFORE),
    Point("drained", "sessiond.keeper:Keeper.drain", AFTER),
)
BY_NAME = {point.name: point for point in POINTS}


def arm(point: Point) -> None:
    """Let this process be killed there. Call it before the daemon is made."""
    state = {"since": not point.since, "calls": 0}

    def counted() -> bool:
        state["calls"] += state["since"]
        return bool(state["since"]) and state["calls"] == point.nth

    if point.since:
        _wrap(point.since, lambda function: _noting(function, state))
    if point.when == COMMITTED:
        _wrap(point.target, lambda function: _committing(function, counted))
    else:
        _wrap(point.target, lambda function: _dying(function, counted, after=point.when == AFTER))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(target: str, wrapper: Callable[[Any], Any]) -> None:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, name, functools.wraps(getattr(owner, name))(wrapper(getattr(owner, name))))


def _noting(function: Any, state: dict[str, Any]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        state["since"] = True
        return function(*args, **kwargs)

    return call


def _dying(function: Any, counted: Callable[[], bool], *, after: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        here = counted()
        if here and not after:
            die()
        result = function(*args, **kwargs)
        if inspect.isawaitable(result):
            return awaited(result, here)
        if here:
            die()
        return result

    async def awaited(result: Any, here: bool) -> Any:
        value = await result
        if here:
            die()
        return value

    return call


def _committing(function: Any, counted: Callable[[], bool]) -> Any:
    def call(self: Any, txn: Any, applied: Any, *args: Any) -> Any:
        here = bool(applied) and self._path.endswith("log") and counted()
        return function(self, _Dying(txn) if here else txn, applied, *args)

    return call


class _Dying:
    """A transaction after whose commit the process is no more."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._txn, name)

    def commit(self) -> None:
        self._txn.commit()
        die()
