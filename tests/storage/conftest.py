"""Stores in temporary folders, and a private PostgreSQL where its programs are installed."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from storage_samples import BLOCK_MAP, LOG_MAP

from sessiond.storage.blocks import BlockStore
from sessiond.storage.environment import Environment
from sessiond.storage.log import LogStore


@pytest.fixture
def log_env(tmp_path):
    with contextlib.closing(Environment(str(tmp_path / "log"), map_bytes=LOG_MAP)) as env:
        yield env


@pytest.fixture
def log(log_env):
    return LogStore(log_env)


@pytest.fixture
def block_env(tmp_path):
    with contextlib.closing(Environment(str(tmp_path / "blocks"), map_bytes=BLOCK_MAP)) as env:
        yield env


@pytest.fixture
def blocks(block_env):
    return BlockStore(block_env)


def postgres_bin() -> Path | None:
    """The folder of PostgreSQL's programs: $SESSIOND_POSTGRES_BIN, PATH, or Debian's place."""
    found = shutil.which("initdb")
    places = [os.environ.get("SESSIOND_POSTGRES_BIN"), found and os.path.dirname(os.path.realpath(found))]
    places += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    for place in places:
        if place and (Path(place) / "initdb").exists() and (Path(place) / "pg_ctl").exists():
            return Path(place)
    return None


def _other_user() -> dict[str, object]:
    """subprocess arguments: the server refuses to run as root, so become someone else."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("running as root and neither user postgres nor nobody exists")


@pytest.fixture(scope="session")
def postgres_server():
    """URL prefix of a running private server; skips when there are no programs."""
    programs = postgres_bin()
    if programs is None:
        pytest.skip("no PostgreSQL programs (initdb, pg_ctl) found; set SESSIOND_POSTGRES_BIN")
    who = _other_user()
    folder = tempfile.mkdtemp(prefix="sessiond-pg-")
    data = os.path.join(folder, "data")
    if who:
        os.chown(folder, who["user"], who["group"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def call(*arguments: str) -> None:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
        subprocess.run(arguments, check=True, cwd=folder, timeout=120, env=environment, **quiet, **who)

    try:
        call(str(programs / "initdb"), "-D", data, "-U", "sessiond", "--auth=trust", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        call(
            str(programs / "pg_ctl"),
            "-w",
            "-D",
            data,
            "-l",
            os.path.join(folder, "log"),
            "-o",
            options,
            "start",
        )
        try:
            yield f"postgresql://sessiond@127.0.0.1:{port}"
        finally:
            call(str(programs / "pg_ctl"), "-w", "-m", "immediate", "-D", data, "stop")
    finally:
        time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


_databases = itertools.count()


@pytest.fixture
def postgres_url(postgres_server):
    """URL of a fresh, empty database."""
    import psycopg

    name = f"test_{next(_databases)}"
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres_server}/{name}"
