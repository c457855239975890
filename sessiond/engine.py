"""The engine thread: owns model, caches and tensors; takes work through a queue, hands results back once a step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from sessiond.idlework import ScoreWork, SealWork
from sessiond.model import Model
from sessiond.scheduler import Scheduler
from sessiond.stepevents import Counters, Event
from sessiond.turnwork import TurnWork

T = TypeVar("T")


class Engine:
    """Runs a Scheduler on its own thread. Every method may be called from any thread.

    `deliver` is called on the engine thread with the events of one step; it must only hand them over,
    to the loop and to the log's writer.
    """

    def __init__(
        self,
        model: Model,
        cell_tokens: int,
        threads: int,
        deliver: Callable[[list[Event]], None],
        *,
        batch_invariant: bool = False,
    ) -> None:
        self.model = model
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._urgent = 0  # of what waits in the inbox: a turn, who stands between a turn and its start, or the end
        self._count = threading.Lock()
        most_rows = model.invariant_rows if batch_invariant else None
        self._scheduler = Scheduler(model, cell_tokens, gives_way=lambda: self._urgent > 0, most_rows=most_rows)
        self._threads = threads
        self._deliver = deliver
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def counters(self) -> Counters:
        return self._scheduler.counters

    @property
    def running_turns(self) -> int:
        return len(self._scheduler.decoding) + len(self._scheduler.prefilling)

    def start(self) -> Future[None]:
        """Start the thread. The future resolves when the model is warm, and fails with what kept it from that."""
        warm = self.call(lambda: self.model.warm_up(self._scheduler.cell_tokens))
        self._thread.start()
        return warm

    def stop(self) -> None:
        """End the thread after the current step, which gives way if it may. Work under way and queued is dropped: its
        tokens are in the log."""
        with self._count:
            self._urgent += 1
        self._inbox.put(None)
        self._thread.join()

    def submit(self, work: TurnWork) -> None:
        self._put_urgent(lambda: self._scheduler.add(work))

    def cancel(self, turn_id: str) -> None:
        self._put_urgent(lambda: self._emit(self._scheduler.cancel(turn_id)))

    def seal(self, work: SealWork) -> None:
        self._inbox.put(lambda: self._scheduler.sealing.append(work))

    def score(self, work: ScoreWork) -> None:
        self._inbox.put(lambda: self._scheduler.scoring.append(work))

    def cancel_idle(self, owner: str) -> None:
        self._inbox.put(lambda: self._scheduler.cancel_idle(owner))

    def call(self, function: Callable[[], T], *, urgent: bool = False) -> Future[T]:
        """Run `function` between two steps, on the engine thread. `urgent`: a turn waits for it."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - carried to the caller whole
                future.set_exception(error)

        (self._put_urgent if urgent else self._inbox.put)(run)
        return future

    def _put_urgent(self, command: Callable[[], None]) -> None:
        """Queue what a step that may wait gives way to."""
        with self._count:
            self._urgent += 1

        def run() -> None:
            with self._count:
                self._urgent -= 1
            command()

        self._inbox.put(run)

    def _emit(self, events: list[Event]) -> None:
        if events:
            self._deliver(events)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while True:
            while not self._inbox.empty() or self._scheduler.idle:
                command = self._inbox.get()
                if command is None:
                    return
                command()
            began = time.perf_counter()
            self._emit(self._scheduler.step())
            self.counters.step_seconds += time.perf_counter() - began
