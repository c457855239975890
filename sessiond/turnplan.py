"""A turn before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from sessiond.policies import registry
from sessiond.policies.base import Policy
from sessiond.sampling import SamplingParams
from sessiond.storage.records import RequestRecord, SessionRecord
from sessiond.template import Message


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """What a turn will do, settled before anything is written."""

    record: SessionRecord
    request: RequestRecord
    prompt: list[int]
    flags: list[int]
    messages: tuple[Message, ...]
    sampling: SamplingParams
    kind: str = "turn"
    drift: bool = False
    logged: tuple[int, ...] = ()
    attachment: str = "started"
    abort_on_disconnect: bool = False
    priority: int = 0

    @property
    def policy(self) -> Policy:
        """As it was when the turn began: its own, or else the session's."""
        own = self.request.params.get("policy")
        return registry.parse(*own) if own else registry.stored(self.record.policy)

    @property
    def policy_why(self) -> str:
        """Why it runs under that policy, if one was asked for that settles on others."""
        return str(self.request.params.get("policy_why", ""))
