"""What the driver of bench-speed asks of each contender, and what one stream of tokens looks like to a client."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

WAIT_LIMIT_S = 120.0


@dataclass(slots=True)
class Stream:
    """One turn by the client's clock, `time.perf_counter`. `arrivals`: when, and tokens received by then."""

    began: float = field(default_factory=time.perf_counter)
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def receive(self, ids: Sequence[int]) -> None:
        """Note tokens that have just come."""
        self.token_ids += ids
        self.arrivals.append((time.perf_counter(), len(self.token_ids)))

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals[0][0] - self.began) * 1e3


class Contender(Protocol):
    """An engine behind its real interface, in a process of its own.

    `hold` computes prompts once, each under a number; `decode` goes on from the end of held prompts, all at once, as
    often as it is asked, each time from there. Greedy; as many tokens as asked for, whatever they are. When a call
    returns, nothing of it goes on behind.
    """

    name: str

    def prefill(self, ids: list[int]) -> Stream:
        """Compute a prompt of which nothing is known yet, and its first token."""

    def hold(self, prompts: dict[int, list[int]]) -> None: ...

    def decode(self, numbers: Sequence[int], n_tokens: int) -> list[Stream]: ...

    def release(self) -> None:
        """Drop what is held."""

    def pids(self) -> list[int]:
        """The processes that compute."""


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time that processes have used, in user and kernel mode, all threads together."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def together(
    run: Callable[[Stream, int], None],
    numbers: Sequence[int],
    beside: Callable[[list[Stream]], None] | None = None,
) -> list[Stream]:
    """run(stream, number) of all numbers at once, each in a thread, and `beside` in this one.

    Raises what the first of them that fails raises, after all have ended.
    """
    streams = [Stream() for _ in numbers]
    errors: list[BaseException] = []

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    pairs = list(zip(streams, numbers, strict=True))
    threads = [threading.Thread(target=guarded, args=(partial(run, *pair),)) for pair in pairs]
    for stream, thread in zip(streams, threads, strict=True):
        stream.began = time.perf_counter()
        thread.start()
    if beside:
        guarded(partial(beside, streams))
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return streams


def wait_for_tokens(streams: Sequence[Stream], n_tokens: int) -> None:
    """Return once every stream has so many tokens. Raises RuntimeError after a while."""
    deadline = time.perf_counter() + WAIT_LIMIT_S
    while min(len(stream.token_ids) for stream in streams) < n_tokens:
        if time.perf_counter() > deadline:
            raise RuntimeError(f"not every session had {n_tokens} tokens within {WAIT_LIMIT_S:.0f} s")
        time.sleep(0.002)
