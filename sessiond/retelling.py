"""A history told again to another model: the same messages, the tokens that model would have logged, no KV.

Where both models have the same tokenizer the tokens stay as they are. Else each revision is rendered behind those
before it, as its turn would have been, and its answer encoded; answers are then open, so that the next turn closes them
in this model's way. Revisions stay apart, with their messages: a history can move as often as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from sessiond.desk import Desk
from sessiond.errors import IdentityMismatch
from sessiond.history import Flags, History, Told
from sessiond.storage.batch import LogBatch
from sessiond.storage.records import SessionRecord
from sessiond.template import Message
from sessiond.transplant import check_fits, transplant
from sessiond.views import NewSession

TOKENIZER = "tokenizer"


def untellable(history: History) -> str | None:
    """Name of the first revision that another tokenizer cannot take, as its input came as raw token ids."""
    for told in history.revisions:
        if (told.n_prompt and not told.asked) or (len(told.ids) > told.n_prompt and not told.said):
            return told.name
    return None


def retell(desk: Desk, history: History, theirs: Mapping[str, str], ours: Mapping[str, str]) -> History:
    """The history as this daemon's model takes it. `theirs`, `ours`: identity fields.

    Raises IdentityMismatch (raw token ids and another tokenizer), BadMessage (the template refuses), ContextTooLong,
    BadTokens.
    """
    if theirs.get(TOKENIZER) == ours.get(TOKENIZER):
        told = tuple(replace(one, computed=history.ends[i], moved=True) for i, one in enumerate(history.revisions))
        history = History(told, history.head)
    else:
        name = untellable(history)
        if name is not None:
            raise IdentityMismatch(
                f"revision {name} was given as token ids, which mean nothing to another tokenizer", field=TOKENIZER
            )
        history = _render(desk, history)
    check_fits(desk, history)
    return history


def retold_session(
    desk: Desk,
    tenant: str,
    history: History,
    source: SessionRecord,
    new: NewSession,
    model_name: str,
) -> tuple[SessionRecord, LogBatch]:
    """A session of this daemon's model that shares neither revisions nor KV with `source`: its record and its batch.

    `history`: of `source`, from `read_history`. Raises what `retell` raises.
    """
    log = desk.store.log
    theirs, ours = log.identity(source.identity_id) or {}, log.identity(desk.identity_id) or {}
    told = retell(desk, history, theirs, ours)
    record, _, batch = transplant(desk, tenant, told, new, model_name, {})
    return record, batch


def _render(desk: Desk, history: History) -> History:
    out: list[Told] = []
    lengths: list[int] = []  # of each revision's branch
    last_ids: list[int | None] = []
    said_before: list[list[Message]] = []
    tools = history.revisions[0].tools
    for told in history.revisions:
        at = told.parent
        before = said_before[at] if at is not None else []
        ids, flags = _rendered(
            desk,
            told,
            before,
            tools,
            open_ended=at is not None and out[at].ended is not None,
            last_id=None if at is None else last_ids[at],
        )
        n_prompt = len(ids)
        for answer in told.said:
            ids += desk.encode(answer.content) if answer.content else []
        flags += [0] * (len(ids) - n_prompt)
        length = (0 if at is None else lengths[at]) + len(ids)
        out.append(
            replace(
                told,
                ids=np.array(ids, np.uint32),
                flags=_flags(flags),
                n_prompt=n_prompt,
                ended="open" if told.kind == "turn" else None,
                computed=length,
                moved=True,
            )
        )
        lengths.append(length)
        last_ids.append(ids[-1] if ids else (None if at is None else last_ids[at]))
        said_before.append([*before, *told.asked, *told.said])
    return History(tuple(out), history.head)


def _rendered(
    desk: Desk,
    told: Told,
    before: list[Message],
    tools: tuple[dict[str, object], ...],
    *,
    open_ended: bool,
    last_id: int | None,
) -> tuple[list[int], list[int]]:
    """Ids and flags of a revision's input: none where it only went on with the last answer."""
    if not told.asked:
        return [], []
    if told.kind == "root":
        delta = desk.template.render_root(told.asked, list(tools))
    else:
        delta = desk.template.render_turn(
            before,
            told.asked,
            tools=list(tools),
            open_tail=desk.template.open_tail("open", last_id) if open_ended and last_id is not None else None,
            at_start=last_id is None,
            add_generation_prompt=told.kind == "turn",
        )
    return list(delta.ids), list(delta.flags)


def _flags(flags: list[int]) -> Flags:
    return np.array(flags, np.uint8)
