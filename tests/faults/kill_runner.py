"""What a daemon that is to be killed runs, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import kill_points
from weaknesses import WEAKNESSES

from sessiond.cache import SessionCache
from sessiond.config import Settings
from sessiond.server import Daemon, serve
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.storage.environment import Environment
from sessiond.storage.kv import KVOwner
from sessiond.tiers import Tiers

STRANDED = bytes(16)  # the hash of no tokens
PATIENCE = 30.0  # seconds after which a daemon that should start or die counts as hanging


def run(settings: dict[str, Any], pipe: Connection, log: str, point: str, weakness: str) -> None:
    """Serve, armed with a point, without the defence that `weakness` names; send the port through `pipe`, obey it.

    The output goes to the file `log`.
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with WEAKNESSES[weakness]():
        if point:
            kill_points.arm(kill_points.BY_NAME[point])
        serve(Settings(**settings), lambda daemon: _served(daemon, pipe))


def _served(daemon: Daemon, pipe: Connection) -> None:
    pipe.send(daemon.port)
    threading.Thread(target=_obey, args=(daemon, pipe), daemon=True).start()


def _obey(daemon: Daemon, pipe: Connection) -> None:
    """What no client can ask for: "damage" a cell of KV, "strand" one, "scrub" the store. Answers a number."""
    assert daemon.desk is not None
    desk = daemon.desk
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        if command == "damage":
            pipe.send(_damage(desk.store.blocks.environment))
        elif command == "strand":
            pipe.send(_strand(desk.tiers))
        else:
            rounds, repaired = desk.scrub.rounds, desk.scrub.repaired
            while desk.scrub.rounds < rounds + 2:  # the first may have begun anywhere
                desk.scrub.step()
            pipe.send(desk.scrub.repaired - repaired)


def _strand(tiers: Tiers) -> int:
    """Write a cell that no session's tokens lead to."""
    with tiers.store.inflight.hold([KVOwner("default", "cell", STRANDED).name]):
        ref, durable = tiers._write_cell("default", STRANDED, 0, SessionCache(tiers.shape, tiers.cell_tokens))
        durable.result()
        batch = LogBatch()
        batch.put_cell_ref(ref)
        tiers.store.log.write(batch).result()
    return 1


def _damage(blocks: Environment) -> int:
    """Flip a bit of one record of a sealed cell."""
    with blocks.read() as txn:
        found = [bytes(key) for key, _ in txn.cursor() if keys.split(bytes(key))[1] == keys.KV_CELL]
        value = bytearray(txn.get(found[0]))
    value[-1] ^= 1
    blocks.submit([lambda txn: txn.put(found[0], bytes(value))], len(value)).result()
    return len(found)


class Mortal:
    """A daemon in a process of its own; `port` is None if it died before it served."""

    def __init__(self, folder: Path, settings: dict[str, Any], point: str = "", weakness: str = "") -> None:
        context = multiprocessing.get_context("forkserver")  # forked from a process that has imported everything
        context.set_forkserver_preload(["sessiond.server", "kill_runner"])
        self._pipe, there = context.Pipe()
        self.log = folder / "daemon.log"
        self.process = context.Process(target=run, args=(settings, there, str(self.log), point, weakness), daemon=True)
        self.process.start()
        there.close()
        self.port: int | None = None
        try:
            if not self._pipe.poll(PATIENCE):
                raise AssertionError(f"the daemon does not start: {self.report()}")
            self.port = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(PATIENCE)

    def tell(self, command: str) -> int:
        """Have it done in the daemon: see `_obey`. Raises EOFError or OSError if the daemon dies of it."""
        self._pipe.send(command)
        if not self._pipe.poll(PATIENCE):
            raise AssertionError(f"the daemon does not answer {command}: {self.report()}")
        return int(self._pipe.recv())

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
