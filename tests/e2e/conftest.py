"""Daemons on a tiny model, in this process and in others."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_daemon import Daemons, Peer, Process, peer_of
from e2e_model import write_chat_model

from sessiond.server import Daemon


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "tiny-chat")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No setting and no cache of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("SESSIOND_") and name != "SESSIOND_POSTGRES_BIN"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SESSIOND_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def settings(chat_model: Path, tmp_path: Path) -> dict[str, Any]:
    """What every daemon of a test starts with; a test may change it before."""
    settings = {"model": str(chat_model), "data_dir": tmp_path / "data", "listen": "127.0.0.1:0", "threads": 1}
    return {**settings, "scrub_bytes_per_second": 0}  # damage is to be found by what the test looks at


@pytest.fixture
async def daemons(settings: dict[str, Any]) -> AsyncIterator[Daemons]:
    """Daemons in this process; those still running are stopped at the end."""
    daemons = Daemons(settings)
    yield daemons
    await daemons.stop_all()


@pytest.fixture
async def daemon(daemons: Daemons) -> Daemon:
    return await daemons.start()


@pytest.fixture
async def peer(daemon: Daemon) -> AsyncIterator[Peer]:
    async with peer_of(daemon.port) as peer:
        yield peer


@pytest.fixture
def spawn(settings: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts daemons in processes; those still running are killed at the end."""
    started: list[Process] = []

    def spawn(**changes: Any) -> Process:
        started.append(Process(tmp_path, {**settings, **changes}))
        return started[-1]

    yield spawn
    for process in started:
        process.kill()
