"""Serve with the settings given as name=value; says `ready PORT` when it does."""

from __future__ import annotations

import sys

from sessiond.config import Settings
from sessiond.server import Daemon, serve


def ready(daemon: Daemon) -> None:
    sys.stdout.write(f"ready {daemon.port}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(Settings(**dict(flag.split("=", 1) for flag in sys.argv[1:])), ready)
