"""Calls from other threads reach the loop once each, in order, and many of them with one wake."""

from __future__ import annotations

import asyncio
import threading

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
