"""Calls from other threads reach the loop once each, in order, and many of them with one wake."""

from __future__ import annotations

import asyncio
import threading
from collections import deque

import pytest

from sessiond.handover import Handover


def test_each_call_runs_once_and_in_its_threads_order():
    async def main() -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        handover = Handover(asyncio.get_running_loop())

        def send(thread: int) -> None:
            for number in range(5000):
                handover.call(lambda item=(thread, number): seen.append(item))
                if number % 500 == 0:
                    while (thread, number) not in seen:
                        pass

        await asyncio.gather(*(asyncio.to_thread(send, thread) for thread in range(3)))
        await asyncio.sleep(0)
        return seen

    seen = asyncio.run(main())
    assert len(seen) == 15000
    for thread in range(3):
        assert [number for who, number in seen if who == thread] == list(range(5000))


def test_what_gathers_while_the_loop_is_busy_wakes_it_once():
    async def main() -> tuple[int, list[int]]:
        loop, seen, wakes = asyncio.get_running_loop(), [], []

        class Counting:
            def call_soon_threadsafe(self, function) -> None:
                wakes.append(1)
                loop.call_soon_threadsafe(function)

        handover = Handover(Counting())
        sender = threading.Thread(target=lambda: [handover.call(lambda i=i: seen.append(i)) for i in range(8)])
        sender.start()
        sender.join()  # on the loop's thread: it is busy
        assert seen == []
        await asyncio.sleep(0.01)
        return len(wakes), seen

    assert asyncio.run(main()) == (1, list(range(8)))


def test_a_call_that_fails_does_not_keep_the_next_from_running():
    async def main() -> list[str]:
        seen: list[str] = []
        handover = Handover(asyncio.get_running_loop())
        handover.call(lambda: 1 / 0)
        handover.call(lambda: seen.append("next"))
        await asyncio.sleep(0.01)
        return seen

    assert asyncio.run(main()) == ["next"]


class SteppedLoop:
    """A loop that is run by hand; `inside` is called in the middle of waking it."""

    def __init__(self) -> None:
        self.ready = []
        self.inside = lambda: None

    def call_soon_threadsafe(self, function) -> None:
        self.inside()
        self.ready.append(function)

    def run(self) -> None:
        while self.ready:
            self.ready.pop(0)()


def test_a_call_that_meets_another_waking_the_loop_is_before_what_its_thread_asks_next():
    """The other thread is held between deciding to wake the loop and doing so."""
    loop, seen, deciding, go_on = SteppedLoop(), [], threading.Event(), threading.Event()
    handover = Handover(loop)

    def hold() -> None:
        loop.inside = lambda: None
        deciding.set()
        assert go_on.wait(10)

    loop.inside = hold
    other = threading.Thread(target=lambda: handover.call(lambda: seen.append("other")))
    other.start()
    assert deciding.wait(10)

    def mine() -> None:
        handover.call(lambda: seen.append("mine"))
        loop.call_soon_threadsafe(lambda: seen.append("mine next"))

    me = threading.Thread(target=mine)
    me.start()
    me.join(0.2)  # it must wait for the other one
    go_on.set()
    other.join()
    me.join()
    loop.run()
    assert seen.index("mine") < seen.index("mine next")


def test_a_call_that_comes_as_the_last_one_was_taken_is_not_lost():
    """A call from another thread at every moment of emptying: the waiting line itself makes it."""
    loop, seen = SteppedLoop(), []
    handover = Handover(loop)

    class Line(deque):
        late = 3

        def __len__(self) -> int:  # what `while self._waiting` asks
            n = super().__len__()
            if n == 0 and self.late:
                self.late -= 1
                late = threading.Thread(target=lambda: handover.call(lambda: seen.append("late")))
                late.start()
                late.join()
            return n

    handover._waiting = Line()
    handover.call(lambda: seen.append("first"))
    loop.run()
    assert seen == ["first", "late", "late", "late"]


def test_a_closed_loop_is_told_every_time():
    loop = asyncio.new_event_loop()
    handover = Handover(loop)
    loop.close()
    for _ in range(3):
        with pytest.raises(RuntimeError):
            handover.call(lambda: None)
