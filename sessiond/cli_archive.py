"""`sessiond sessions export` and `import`: a session as one file."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sessiond.cli_output import AsJson, connected, enum_name, err, fail, out, plain, print_json, progress_bar
from sessiond.cli_sessions import Labels, Revision, SessionId, parse_labels
from sessiond.clients import Client
from sessiond.v1 import sessions_pb2


@connected
def export(
    client: Client,
    session_id: SessionId,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; - for stdout.")],
    revision: Revision = "",
    all_revisions: Annotated[bool, typer.Option(help="Also the other branches.")] = False,
    tokens_only: Annotated[bool, typer.Option(help="Leave key/value state out; it is computed again.")] = False,
) -> None:
    """Write a session to an archive."""
    header = sessions_pb2.ArchiveHeader()
    pieces = client.session(session_id).export(
        revision, all_revisions=all_revisions, tokens_only=tokens_only, on_header=header.CopyFrom
    )
    if str(output) == "-":
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    done = 0
    with progress_bar() as progress, _replacing(output) as file:
        for piece in pieces:
            file.write(piece)
            done += len(piece)
            progress("exporting", min(done, header.estimated_bytes), header.estimated_bytes)
    held = f"{header.n_tokens} tokens, {header.tokens_with_kv} with state"
    err.print(f"wrote {output}: {held}, {done} bytes", markup=False)


@connected
def import_(
    client: Client,
    archive: Annotated[Path, typer.Argument(help="Archive to read; - for stdin.")],
    label: Labels = None,
    allow_recompute: Annotated[bool, typer.Option(help="Accept another model's archive; compute again.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, make nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a session from an archive and print its id."""
    if str(archive) != "-" and not archive.is_file():
        fail(f"{archive} is not a file")
    with progress_bar() as progress:
        response = client.import_session(
            _read(archive, progress),
            labels=parse_labels(label),
            allow_recompute=allow_recompute,
            dry_run=dry_run,
        )
    if as_json:
        print_json(plain(response))
        return
    verdict = enum_name(response, "verdict", "IMPORT_VERDICT_")
    err.print(f"{verdict}: {response.tokens} tokens, {response.tokens_with_kv} with state", markup=False)
    if response.HasField("session"):
        out.print(response.session.session_id, markup=False)


def _read(path: Path, progress: Any) -> Iterator[bytes]:
    total = path.stat().st_size if str(path) != "-" else 0
    done = 0
    with contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if str(path) == "-" else stack.enter_context(path.open("rb"))
        while piece := file.read(1 << 20):
            yield piece
            done += len(piece)
            progress("importing", done, total)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A file that takes `path`'s place only once it is whole."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
