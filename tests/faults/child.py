"""Forked children: each is a process of its own that opens the store, so that it may be killed or crash."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], object], report: Path | None = None) -> int:
    """Run `work` in a forked child; returns its pid. It exits with 0, or 1 and a traceback on stderr and in `report`.

    The parent must hold no open environment and run no other thread.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:  # noqa: BLE001 - the child's last words
        if report:
            report.write_text(traceback.format_exc())
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def wait(pid: int, timeout_s: float = 60.0) -> int:
    """The child's exit code, negative for a signal. One that hangs is killed: -SIGALRM stands for it."""
    deadline = time.monotonic() + timeout_s
    pause = 0.0005
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGALRM
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def ask(work: Callable[[], str], timeout_s: float = 60.0, report: Path | None = None) -> tuple[int, str]:
    """Run `work` in a forked child and return its exit code and what it returned (empty if it died)."""
    reading, writing = os.pipe()

    def answer() -> None:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(work().encode())

    pid = fork(answer, report)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        # The pipe ends with the child; the alarm ends a child that does not.
        alarm = signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            said = pipe.read()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
    code = wait(pid)
    return code, said.decode()
