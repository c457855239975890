"""From a Generate request to a TurnPlan: everything that can be refused is refused here, before anything is written."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from sessiond import messages as stored
from sessiond.desk import Desk
from sessiond.errors import (
    BadRequest,
    BadTokens,
    ContextTooLong,
    EmptyInput,
    NothingToContinue,
    RevisionMismatch,
)
from sessiond.live import Live
from sessiond.messages import decode_messages
from sessiond.policies import registry
from sessiond.sampling import SamplingParams
from sessiond.storage.records import RequestRecord, SessionRecord
from sessiond.template import Message
from sessiond.turnplan import TurnPlan

MOST_PRIORITY = 4
NEW_INPUT, CONTINUE, APPEND_ONLY = "new_input", "continue", "append_only"


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """A Generate request in the daemon's own words. `digest` covers all that decides what the turn does."""

    session_id: str
    request_id: str
    digest: str
    base_revision: str = ""
    mode: str = NEW_INPUT
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    policy: tuple[str, dict[str, Any]] | None = None
    resume_after: int = 0
    wait: bool = False
    supersede: bool = False
    abort_on_disconnect: bool = False
    priority: int = 0


def check(desk: Desk, request: TurnRequest) -> None:
    """Refuse what is wrong whatever the session's state."""
    if not request.request_id:
        raise BadRequest(
            "request_id is required: choose one for each turn, and use it again to retry", field="request_id"
        )
    if request.policy:
        desk.check_policy(*request.policy)
    if abs(request.priority) > MOST_PRIORITY:
        raise BadRequest(f"priority is from {-MOST_PRIORITY} to {MOST_PRIORITY}", field="priority")
    request.sampling.check_vocab(desk.vocab_size)
    given = bool(request.messages) or request.token_ids is not None
    if request.mode == CONTINUE:
        if given:
            raise BadRequest("mode CONTINUE takes no input", field="mode")
    elif not given:
        raise EmptyInput("a turn needs messages or token_ids")
    if request.messages and request.token_ids is not None:
        raise BadRequest("a turn takes messages or token_ids, not both", field="token_ids")
    if request.token_ids is not None:
        check_tokens(desk, request.token_ids)


def check_tokens(desk: Desk, ids: tuple[int, ...]) -> None:
    """Raises EmptyInput or BadTokens."""
    if not ids:
        raise EmptyInput("token_ids is empty")
    bad = next((token for token in ids if not 0 <= token < desk.vocab_size), None)
    if bad is not None:
        raise BadTokens(
            f"token id {bad} is outside the vocabulary of {desk.vocab_size}",
            token=bad,
            vocab_size=desk.vocab_size,
        )


def plan_turn(desk: Desk, live: Live, record: SessionRecord, request: TurnRequest) -> TurnPlan:
    """Render the input and check it against the history. The lease must be held, the history loaded."""
    if request.base_revision and request.base_revision != record.head_revision:
        raise RevisionMismatch(
            f"the head is {record.head_revision}, not {request.base_revision}",
            head_revision=record.head_revision,
        )
    ids, flags, drift = render(desk, live, request)
    refuse_overlong(desk, len(live.ids), len(ids), generates=request.mode != APPEND_ONLY)
    sampling = request.sampling
    if sampling.seed is None:
        sampling = sampling.with_seed(secrets.randbits(63))
    now = desk.now_us()
    asked = registry.parse(*request.policy) if request.policy else registry.stored(record.policy)
    policy, why = asked.settle_on(desk.situation(live, len(live.ids) + len(ids)))
    params = {
        "mode": request.mode,
        "sampling": sampling.to_json(),
        "messages": stored.to_json(request.messages),
        "n_prompt": len(ids),
        "flags": flags,
        "drift": drift,
        "policy": [policy.name, policy.knobs()],
        "policy_why": why,
        "abort_on_disconnect": request.abort_on_disconnect,
    }
    row = RequestRecord(
        tenant=record.tenant,
        session_id=record.session_id,
        request_id=request.request_id,
        digest=request.digest,
        state="running",
        base_revision=record.head_revision,
        revision_id=uuid.uuid4().hex,
        params=params,
        created_us=now,
        updated_us=now,
    )
    return TurnPlan(
        record=record,
        request=row,
        prompt=ids,
        flags=flags,
        messages=request.messages,
        sampling=sampling,
        kind="append" if request.mode == APPEND_ONLY else "turn",
        drift=drift,
        abort_on_disconnect=request.abort_on_disconnect,
        priority=request.priority,
    )


def resume_turn(desk: Desk, record: SessionRecord, row: RequestRecord, priority: int = 0) -> TurnPlan:
    """The plan of a turn that was suspended or cut off: its prompt and its generated tokens come from the log."""
    ids, flags = desk.store.log.tokens(record.tenant, row.revision_id)
    n_prompt = int(row.params["n_prompt"])
    return TurnPlan(
        record=record,
        request=replace(row, state="running"),
        prompt=ids[:n_prompt].tolist(),
        flags=flags[:n_prompt].tolist(),
        messages=tuple(stored.from_json(m) for m in row.params["messages"]),
        sampling=SamplingParams.from_json(row.params["sampling"]),
        kind="append" if row.params["mode"] == APPEND_ONLY else "turn",
        drift=bool(row.params["drift"]),
        logged=tuple(ids[n_prompt:].tolist()),
        attachment="resumed",
        abort_on_disconnect=bool(row.params["abort_on_disconnect"]),
        priority=priority,
    )


def render(desk: Desk, live: Live, request: TurnRequest) -> tuple[list[int], list[int], bool]:
    """Token ids that the turn appends, a flag for each (1: template), and whether the template drifted."""
    if request.mode == CONTINUE:
        if not len(live.ids):
            raise NothingToContinue("the session holds no tokens to go on from")
        return [], [], False
    if request.token_ids is not None:
        return list(request.token_ids), [0] * len(request.token_ids), False
    ended = live.chain[-1].extra.get("ended") if live.chain else None
    delta = desk.template.render_turn(
        history_of(desk, live),
        request.messages,
        tools=live.chain[0].extra.get("tools", ()) if live.chain else (),
        open_tail=desk.template.open_tail(ended, int(live.ids[-1])) if ended and len(live.ids) else None,
        at_start=len(live.ids) == 0,
        add_generation_prompt=request.mode != APPEND_ONLY,
    )
    return delta.ids, delta.flags, delta.drift


def history_of(desk: Desk, live: Live) -> list[Message]:
    """All structured messages of the branch, oldest first."""
    out: list[Message] = []
    for revision in live.chain:
        asked, said = decode_messages(desk.store.log.messages(live.tenant, revision.revision_id))
        out += [*asked, *said]
    return out


def refuse_overlong(desk: Desk, history: int, new: int, *, generates: bool) -> None:
    """Raises ContextTooLong, with the numbers, unless history and input leave room for one token."""
    room = desk.max_context - history - (1 if generates else 0)
    if new > room:
        raise ContextTooLong(
            f"{history} tokens of history and {new} new ones exceed the model's context of {desk.max_context}",
            history_tokens=history,
            new_tokens=new,
            max_context_tokens=desk.max_context,
        )
