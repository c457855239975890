"""What a daemon that is to be killed runs, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import kill_points
from weaknesses import WEAKNESSES

from sessiond.config import Settings
from sessiond.server import serve

PATIENCE = 30.0  # seconds after which a daemon that should start or die counts as hanging


def run(settings: dict[str, Any], pipe: Connection, log: str, point: str, weakness: str) -> None:
    """Serve, armed with a point, without the defence that `weakness` names; send the port through `pipe`.

    The output goes to the file `log`.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with WEAKNESSES[weakness]():
        if point:
            kill_points.arm(kill_points.BY_NAME[point])
        serve(Settings(**settings), lambda daemon: pipe.send(daemon.port))


class Mortal:
    """A daemon in a process of its own; `port` is None if it died before it served."""

    def __init__(self, folder: Path, settings: dict[str, Any], point: str = "", weakness: str = "") -> None:
        context = multiprocessing.get_context("forkserver")  # forked from a process that has imported everything
        context.set_forkserver_preload(["sessiond.server", "kill_runner"])
        here, there = context.Pipe(duplex=False)
        self.log = folder / "daemon.log"
        self.process = context.Process(target=run, args=(settings, there, str(self.log), point, weakness), daemon=True)
        self.process.start()
        there.close()
        self.port: int | None = None
        with here:
            try:
                if not here.poll(PATIENCE):
                    raise AssertionError(f"the daemon does not start: {self.report()}")
                self.port = here.recv()
            except EOFError:
                self.process.join(PATIENCE)

    @property
    def was_killed(self) -> bool:
        return self.process.exitcode == -signal.SIGKILL

    def wait(self) -> bool:
        """Whether it is dead within some seconds."""
        self.process.join(PATIENCE)
        return not self.process.is_alive()

    def terminate(self) -> None:
        """SIGTERM; return when it has ended."""
        self.process.terminate()
        self.process.join(PATIENCE)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def report(self) -> str:
        """The end of what it said."""
        return self.log.read_text()[-1500:] if self.log.exists() else ""
