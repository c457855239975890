"""What is done to a damaged store that opens: old records go, new ones come and take the pages that became free.

The same always, so that what an undamaged store holds afterwards is what a damaged one must hold, or refuse to read.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

from script import TENANT, Script, revision_id
from truth import Names, Stores, put_cell
from workload import request_record, revision_record, session_record

from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.kv import KVOwner

SCRIPT = Script(0)
SESSION = 1_000  # new ones from here on
ROUNDS = 3  # LMDB gives out what a transaction freed only to the one after the next


def write_later(stores: Stores, names: Names) -> None:
    """Raises what a refused write does; nothing of that write is there then, and nothing after it."""
    oldest = min(names.sessions, key=lambda name: int(name[1:]))
    cells = names.cells[::2]
    tails = [r for r in names.revisions if stores.log.tail_ref(TENANT, r) is not None][::2]
    for i in range(ROUNDS):
        _drop(stores, cells[i::ROUNDS], tails[i::ROUNDS])
        if i == 0:
            _drop_session(stores, oldest)
        _add(stores, SESSION + i)


def _drop(stores: Stores, cells: list[bytes], tails: list[str]) -> None:
    batch = LogBatch()
    for name in cells:
        batch.delete_cell_ref(TENANT, name)
    for revision in tails:
        batch.delete_tail_ref(TENANT, revision)
    stores.log.write(batch).result()
    _all([stores.blocks.delete(KVOwner(TENANT, "cell", name)) for name in cells])
    _all([stores.blocks.delete_tails(TENANT, revision) for revision in tails])


def _drop_session(stores: Stores, session: str) -> None:
    batch = LogBatch()
    for revision in stores.log.ids(TENANT, keys.REVISION_INDEX, session):
        batch.delete_revision(TENANT, revision)
    batch.delete_requests(TENANT, session)
    batch.delete_session(TENANT, session)
    stores.log.write(batch).result()


def _add(stores: Stores, session: int) -> None:
    """A session with a root and a turn, and a cell."""
    said, root = SCRIPT.said(session, 0), session_record(session)
    name = revision_id(session, 0)
    put_cell(stores, SCRIPT.seed, session, 16 + 80 * (session % 3))
    batch = LogBatch()
    batch.put_revision(revision_record(SCRIPT, session, -1, None), b"[]")
    batch.append_tokens(TENANT, name, 0, said.ids, said.flags)
    batch.put_revision(revision_record(SCRIPT, session, 0, root.head_revision), said.messages)
    batch.put_session(replace(root, head_revision=name), expect_generation=0)
    batch.put_request(request_record(session, 0, "finished"))
    stores.log.write(batch).result()


def _all(pending: list[Future[None]]) -> None:
    for done in pending:
        done.result()
