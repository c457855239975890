"""Long work rests while turns run, ends when it is told to, and is closed when nobody wants its results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sessiond.errors import Draining
from sessiond.pacing import REST_SECONDS, WORK_SECONDS, Pacer, stepped


def test_it_rests_only_while_turns_run():
    busy: list[int] = []
    pacer = Pacer(lambda: busy, lambda: False)
    time.sleep(2 * WORK_SECONDS)
    began = time.monotonic()
    pacer()
    assert time.monotonic() - began < REST_SECONDS
    busy.append(1)
    began = time.monotonic()
    pacer()
    assert time.monotonic() - began >= REST_SECONDS


def test_it_ends_the_work_when_it_is_over_or_stopped():
    over: list[int] = []
    pacer = Pacer(lambda: False, lambda: over)
    pacer()
    over.append(1)
    with pytest.raises(Draining):
        pacer()
    pacer = Pacer(lambda: False, lambda: False)
    pacer.stopped.set()
    with pytest.raises(Draining):
        pacer()


class Work:
    """Steps that go on for ever, unless the pacer ends them."""

    def __init__(self) -> None:
        self.closed = False
        self.pacer = Pacer(lambda: False, lambda: False)

    def steps(self) -> Iterator[int]:
        n = 0
        try:
            while True:
                self.pacer()
                yield (n := n + 1)
        finally:
            self.closed = True


async def test_leaving_early_closes_the_work():
    work = Work()
    with ThreadPoolExecutor(1) as pool:
        async with contextlib.aclosing(stepped(pool, work.steps(), work.pacer)) as steps:
            async for step in steps:
                if step == 3:
                    break
    assert work.closed
    assert work.pacer.stopped.is_set()


async def test_what_ends_the_work_reaches_who_waits():
    work = Work()

    async def take() -> None:
        async for step in stepped(pool, work.steps(), work.pacer):
            if step == 3:
                work.pacer.stopped.set()

    with ThreadPoolExecutor(1) as pool, pytest.raises(Draining):
        await take()
    assert work.closed
