"""What the commands share: consoles, JSON, failure, progress, and how they reach the daemon."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sessiond.clients import Client, SessiondClientError, UnavailableError

#: Answers go to stdout, everything else to stderr: a pipe gets the answer only.
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script to read.")]

_INTEGERS = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)


def fail(message: str) -> NoReturn:
    """Say what went wrong and exit with status 1."""
    err.print("[bold red]error:[/]", end=" ")
    err.print(message, markup=False)
    raise typer.Exit(1)


def print_json(value: object) -> None:
    """One line of JSON on stdout, whatever the terminal's width."""
    out.file.write(json.dumps(value, ensure_ascii=False) + "\n")
    out.file.flush()


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON values under its field names, with every field, and 64-bit integers as numbers."""
    value = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _with_numbers(message, value)


def _with_numbers(message: Message, value: dict[str, Any]) -> dict[str, Any]:
    for field in message.DESCRIPTOR.fields:
        if field.name not in value:
            continue
        content = value[field.name]
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            if entry.fields_by_name["value"].cpp_type in _INTEGERS:
                value[field.name] = {key: int(number) for key, number in content.items()}
        elif field.cpp_type in _INTEGERS:
            value[field.name] = [int(n) for n in content] if isinstance(content, list) else int(content)
        elif entry is not None and not entry.full_name.startswith("google."):
            inner = getattr(message, field.name)
            if isinstance(content, list):
                for part, parsed in zip(inner, content, strict=True):
                    _with_numbers(part, parsed)
            else:
                _with_numbers(inner, content)
    return value


def enum_name(message: Message, field: str, prefix: str) -> str:
    """The value of an enum field, lower case and without its prefix: `active`."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    number = getattr(message, field)
    assert kind is not None, field
    values = kind.values_by_number
    return values[number].name.removeprefix(prefix).lower() if number in values else str(number)


def printable(text: str) -> str:
    """`text` without the control characters by which a model or a stored label could drive the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, in a terminal; called with what is going on, bytes done, bytes in all (0: unknown)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                if not err.is_terminal:
                    err.print(f"{what} ...", markup=False)
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield update


def _option(name: str, help_: str, variable: str | None = None, default: Any = None, kind: Any = str | None) -> Any:
    option = typer.Option(name, help=help_, envvar=variable, rich_help_panel="Connection", show_default=bool(default))
    return inspect.Parameter(
        name.lstrip("-").replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


_CONNECTION = [
    _option("--address", "The daemon's host:port.", "SESSIOND_ADDRESS", "localhost:7431", str),
    _option("--token", "Bearer token.", "SESSIOND_TOKEN"),
    _option("--tenant", "Tenant, where the daemon trusts it.", "SESSIOND_TENANT"),
    _option("--tls", "Connect with TLS and the system's roots.", default=False, kind=bool),
    _option("--tls-ca", "PEM roots to trust instead.", kind=Path | None),
    _option("--tls-cert", "PEM certificate to present.", kind=Path | None),
    _option("--tls-key", "PEM private key of that certificate.", kind=Path | None),
]


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the connection options, and a Client as its first argument; print its errors plainly."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        chosen = {parameter.name: options.pop(parameter.name) for parameter in _CONNECTION}
        try:
            with open_client(**chosen) as client:
                command(client, *args, **options)
        except SessiondClientError as error:
            fail(describe(error, chosen["address"]))
        except (ValueError, OSError) as error:
            fail(str(error))

    signature = inspect.signature(command)
    hints = typing.get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in list(signature.parameters.values())[1:]]
    parameters = [*own, *_CONNECTION]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # typer would ask it for its parameters
    return run


def open_client(
    address: str,
    token: str | None,
    tenant: str | None,
    tls: bool,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
) -> Client:
    # gRPC's C core writes its own notes on failed connections to stderr; ours say more.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return Client(
        address,
        token=token,
        tenant=tenant,
        tls=tls,
        root_certificates=tls_ca.read_bytes() if tls_ca else None,
        certificate=tls_cert.read_bytes() if tls_cert else None,
        private_key=tls_key.read_bytes() if tls_key else None,
        retry_seconds=float(os.environ.get("SESSIOND_RETRY_SECONDS", "5")),
    )


def describe(error: SessiondClientError, address: str) -> str:
    """One line: what the server said, its code and reason, and what to do where that is known."""
    if isinstance(error, UnavailableError) and not error.reason:
        return f"no daemon answers at {address}; start one with: sessiond serve"
    code = error.code.name + (f" / {error.reason}" if error.reason else "")
    again = f"; retry after {error.retry_after:g} s" if error.retry_after else ""
    return f"{printable(error.message)} ({code}){again}"
