"""What is told of turns afterwards: from a turn that has ended, and to a client that asks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sessiond.explanations import Explanation
from sessiond.reading import Reading
from sessiond.readsummary import read_share, summarize
from sessiond.storage.records import SessionRecord
from sessiond.tree import find_revision

if TYPE_CHECKING:
    from sessiond.desk import Desk
    from sessiond.turn import Turn


@dataclass(slots=True)
class Clock:
    """When a turn came to what, by time.perf_counter; 0: not yet."""

    began: float
    began_us: int
    restoring: float = 0.0  # seconds
    ended: float = 0.0  # the engine was done with it

    def phases(self, reading: Reading | None) -> dict[str, float]:
        """Milliseconds up to now. `select` is part of `prefill` and `decode`; the others follow each other."""
        now = time.perf_counter()
        ended = self.ended or now
        computing = reading.began if reading and reading.began else ended
        computed = reading.computed if reading and reading.computed else computing
        seconds = {
            "queue": computing - self.began - self.restoring,
            "restore": self.restoring,
            "prefill": computed - computing,
            "decode": ended - computed,
            "select": reading.select_seconds if reading else 0.0,
            "commit": now - ended,
        }
        return {phase: max(0.0, one) * 1e3 for phase, one in seconds.items()}


def explanation(turn: Turn) -> Explanation:
    """What a turn read that has ended, in whatever way, or stands suspended. The engine is done with it."""
    plan, reading, stream = turn.plan, turn.reading, turn.stream
    policy, revision = plan.policy, stream.finished.revision if stream.finished else ""
    share, width = read_share(reading) if reading else ((), 0)
    return Explanation(
        revision_id=revision,
        request_id=plan.request.request_id,
        policy=policy.name,
        knobs=policy.knobs(),
        context_tokens=len(turn.live.ids) + (0 if revision else len(plan.prompt) + len(turn.generated)),
        n_steps=reading.n_steps if reading else 0,
        reads=summarize(reading) if reading else (),
        restored=stream.restored,
        milliseconds=turn.clock.phases(reading),
        notes=tuple(_notes(turn)),
        began_us=turn.clock.began_us,
        read_share=share,
        range_tokens=width,
    )


def _notes(turn: Turn) -> list[str]:
    reading, failure = turn.reading, turn.stream.failure
    notes = list(turn.notices())
    if turn.plan.logged:
        notes.append(f"it went on behind {len(turn.plan.logged)} tokens of its own; reads before that are not in here")
    if failure is not None:
        notes.append(f"{failure.reason}: {failure.message}")
    if reading and reading.n_tokens and reading.turn_start and turn.plan.policy.name != "full" and not notes:
        n_chose = sum(reads.n_generated > 0 for reads in reading.layers.values())
        if n_chose < len(reading.layers):
            everywhere = "every layer" if not n_chose else f"{len(reading.layers) - n_chose} layers"
            notes.append(f"policy {turn.plan.policy.name!r} left nothing out for generated tokens in {everywhere}")
    return [turn.plan.policy_why, *notes] if turn.plan.policy_why else notes


def explain(desk: Desk, record: SessionRecord, revision_id: str, last_turns: int) -> list[Explanation]:
    """The turn that made a revision, or a session's last ones, newest first; what is no longer remembered is left out.

    Raises RevisionNotFound.
    """
    if not revision_id:
        return desk.explanations.last(record.tenant, record.session_id)[: max(1, last_turns)]
    made_by = find_revision(desk.store.log, record, revision_id).session_id  # before a fork, another session
    return [turn for turn in desk.explanations.last(record.tenant, made_by) if turn.revision_id == revision_id]
