"""The daemon as a contender: `sessiond serve` in a process of its own, asked through gRPC."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from _contender import Stream, together, wait_for_tokens
from _daemon import DaemonProcess
from _turns import wait_settled

from sessiond.clients import Session

FIRST_TOKENS = 8  # of every session, before anything is looked at


class Ours:
    """One daemon. `policy`: of decoding turns; None: the daemon's own, full attention.

    A held prompt is a session whose head lacks its last token: a turn adds that one and decodes, and is rolled back.
    """

    def __init__(self, name: str, daemon: DaemonProcess, stop_ids: Sequence[int]) -> None:
        self.name = name
        self.policy: str | None = None
        self._daemon = daemon
        self._client = daemon.client()
        info = self._client.server_info()
        self._cell_tokens, self._max_context = info.cell_tokens, int(info.max_context_tokens)
        self._no_end = dict.fromkeys(stop_ids, -100.0)  # decode as many tokens as were asked for
        self._held: dict[int, tuple[Session, str, list[int]]] = {}

    def pids(self) -> list[int]:
        return [self._daemon.pid]

    def prefill(self, ids: list[int]) -> Stream:
        session = self._client.create_session(token_ids=ids[:1])
        stream = Stream()
        self._prefill(stream, session, ids)
        self._forget(session)
        return stream

    def hold(self, prompts: dict[int, list[int]]) -> None:
        for number, ids in prompts.items():
            session = self._client.create_session(token_ids=ids[:1])
            for _ in session.generate(token_ids=ids[1:-1], mode="append_only"):
                pass
            self._held[number] = session, session.head, ids
            self._turn(Stream(), session, ids[-1:], max_tokens=2)
            self._go_back([number])

    def decode(self, numbers: Sequence[int], n_tokens: int) -> list[Stream]:
        streams = together(lambda stream, number: self._go_on(stream, number, n_tokens), numbers)
        self._go_back(numbers)
        return streams

    def decode_beside_prefill(self, numbers: Sequence[int], ids: list[int]) -> tuple[list[Stream], Stream]:
        """Decode held sessions until a new one has prefilled `ids`; returns their streams and its own."""
        names = {number: uuid.uuid4().hex for number in numbers}
        session = self._client.create_session(token_ids=ids[:1])
        other = Stream()

        def beside(streams: list[Stream]) -> None:
            wait_for_tokens(streams, FIRST_TOKENS)
            try:
                other.began = time.perf_counter()
                self._prefill(other, session, ids)
                wait_for_tokens(streams, min(len(stream.token_ids) for stream in streams) + 2)
            finally:
                for number, name in names.items():
                    self._held[number][0].abort(name)

        def run(stream: Stream, number: int) -> None:
            room = self._max_context - len(self._held[number][2]) - 1
            self._go_on(stream, number, room, request_id=names[number])

        streams = together(run, numbers, beside)
        self._go_back(numbers)
        self._forget(session)
        return streams, other

    def share_of_own_code(self, numbers: Sequence[int], n_tokens: int) -> float:
        """Share of the steps' time outside the model's forward, while all of `numbers` decode."""
        gauges: list[Mapping[str, float]] = []

        def beside(streams: list[Stream]) -> None:
            for n in (n_tokens // 4, 3 * n_tokens // 4):
                wait_for_tokens(streams, n)
                gauges.append(dict(self._client.stats().gauges))

        together(lambda stream, number: self._go_on(stream, number, n_tokens), numbers, beside)
        self._go_back(numbers)
        return own_share(*gauges)

    def release(self) -> None:
        for session, _, _ in self._held.values():
            session.delete(purge_now=True)
        self._held.clear()

    def _go_on(self, stream: Stream, number: int, n_tokens: int, **options: Any) -> None:
        session, _, ids = self._held[number]
        policy = {"policy": {"name": self.policy}} if self.policy else {}
        computed = self._turn(stream, session, ids[-1:], max_tokens=n_tokens, **policy, **options)
        if computed > 2 * self._cell_tokens:
            raise RuntimeError(f"{computed} tokens of a held session were computed again")

    def _go_back(self, numbers: Sequence[int]) -> None:
        """Roll held sessions back to their prompts, once nothing of their last turns goes on behind."""
        for number in numbers:
            session, head, _ = self._held[number]
            wait_settled(session, self._cell_tokens)
            session.rollback(head)

    def _prefill(self, stream: Stream, session: Session, ids: list[int]) -> None:
        computed = self._turn(stream, session, ids[1:], max_tokens=1)
        if computed != len(ids):
            raise RuntimeError(f"{computed} of {len(ids)} tokens were computed: the prefill is not comparable")

    def _forget(self, session: Session) -> None:
        """Erase a session; what goes on behind its turn must be over before a peer is timed."""
        wait_settled(session, self._cell_tokens)
        session.delete(purge_now=True)

    def _turn(self, stream: Stream, session: Session, ids: Sequence[int], **options: Any) -> int:
        """Run a turn to its end; returns how many tokens it computed before the first it generated."""
        computed = 0
        for event in session.generate(token_ids=ids, logit_bias=self._no_end, **options):
            if event.kind == "accepted":
                computed = int(event.proto.accepted.prompt_tokens_new)
            elif event.token_ids:
                stream.receive(event.token_ids)
        return computed


def own_share(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Share of the engine's steps outside the model's forward, between two readings of a daemon's gauges.

    Raises RuntimeError if there was no step between them.
    """
    step, forward = (after[name] - before[name] for name in ("engine_step_seconds", "engine_forward_seconds"))
    if step <= 0:
        raise RuntimeError("no step was run between two readings")
    return 1 - forward / step
