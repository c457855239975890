"""What a spawned daemon runs. Nothing here may import pytest: the process is a daemon and nothing else."""

from __future__ import annotations

import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from step_hooks import StepHook

from sessiond.config import Settings
from sessiond.errors import SessiondError
from sessiond.server import Daemon, serve


def run(settings: dict[str, Any], pipe: Connection, log: str, hold: str) -> None:
    """Serve; send the port, or what it failed with, through `pipe`. Its output goes to the file `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)

    def ready(daemon: Daemon) -> None:
        assert daemon.desk is not None
        StepHook(daemon.desk.engine.model, held(Path(hold)))
        pipe.send(daemon.port)

    try:
        serve(Settings(**settings), ready)
    except SessiondError as error:
        pipe.send(error.reason)


def held(path: Path) -> Any:
    """Lets only as many forwards run as the file `path` says, from when it is there."""
    done = 0

    def limited(feeds: Any) -> None:
        nonlocal done
        assert threading.current_thread().name == "engine"
        while path.exists() and done >= int(path.read_text()):
            time.sleep(0.01)
        done = done + 1 if path.exists() else 0

    return limited
