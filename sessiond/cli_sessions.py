"""`sessiond sessions`: make, look at, branch and move sessions."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import typer
from rich.table import Table

from sessiond.cli_output import (
    AsJson,
    connected,
    enum_name,
    err,
    fail,
    out,
    plain,
    print_json,
    printable,
)
from sessiond.clients import Client, Session
from sessiond.v1 import types_pb2

app = typer.Typer(help="Make, look at, branch and move sessions.", no_args_is_help=True)

SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="A session's id.")]
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", metavar="KEY=VALUE", help="Repeatable.")]
Revision = Annotated[str, typer.Option(help="A revision; default: the head.")]


@app.command("list")
@connected
def list_(
    client: Client,
    filter_: Annotated[str, typer.Option("--filter", help='As in: labels.team = "a" AND tier = COLD')] = "",
    deleted: Annotated[bool, typer.Option(help="Soft-deleted ones too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List sessions, newest first."""
    found = list(itertools.islice(client.sessions(filter_, show_deleted=deleted), limit))
    if as_json:
        print_json([plain(session.proto) for session in found])
        return
    if found:
        out.print(sessions_table(found))
    err.print(f"[dim]{len(found)} session{'' if len(found) == 1 else 's'}[/]")


@app.command()
@connected
def show(client: Client, session_id: SessionId, as_json: AsJson = False) -> None:
    """Show a session and its revisions."""
    session = client.session(session_id)
    revisions = session.revisions()
    if as_json:
        print_json({"session": plain(session.proto), "revisions": [plain(item) for item in revisions]})
        return
    _print_session(session.proto)
    out.print(_revisions_table(revisions, session.head))


@app.command()
@connected
def create(
    client: Client,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    label: Labels = None,
    ttl: Annotated[float | None, typer.Option(help="Seconds from last use until it expires.")] = None,
    policy: Annotated[str, typer.Option(help="Policy of its turns; default: the server's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a session and print its id."""
    options: dict[str, Any] = {"system": system, "labels": parse_labels(label)}
    options |= {"ttl": ttl} if ttl is not None else {}
    options |= {"policy": policy} if policy else {}
    _print_new(client.create_session(**options), as_json)


@app.command()
@connected
def delete(
    client: Client,
    session_id: SessionId,
    purge: Annotated[bool, typer.Option("--purge", help="Erase it now; cannot be undone.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a session; `undelete` brings it back until it is purged."""
    if purge and not yes and not typer.confirm(f"Erase {session_id} for good?", err=True):
        raise typer.Exit(1)
    response = client.session(session_id).delete(purge_now=purge)
    if as_json:
        print_json(plain(response))
    elif purge:
        err.print(f"erased {printable(session_id)}", markup=False)
    else:
        until = response.session.purge_time.ToJsonString() if response.session.HasField("purge_time") else "purged"
        err.print(f"deleted {printable(session_id)}; it can be undeleted until {until}", markup=False)


@app.command()
@connected
def undelete(client: Client, session_id: SessionId, as_json: AsJson = False) -> None:
    """Bring a deleted session back."""
    session = client.session(session_id).undelete()
    if as_json:
        print_json(plain(session.proto))
    else:
        _print_session(session.proto)


@app.command()
@connected
def fork(
    client: Client,
    session_id: SessionId,
    revision: Revision = "",
    label: Labels = None,
    recompute: Annotated[bool, typer.Option(help="Take messages along and compute their state again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a session that goes on from any revision of this one, and print its id."""
    session = client.session(session_id)
    _print_new(session.fork(revision=revision, labels=parse_labels(label), recompute=recompute), as_json)


@app.command()
@connected
def rollback(
    client: Client,
    session_id: SessionId,
    revision: Annotated[str, typer.Argument(help="The revision to go back to.")],
    as_json: AsJson = False,
) -> None:
    """Move a session's head to an earlier revision; later ones stay reachable."""
    session = client.session(session_id).rollback(revision)
    if as_json:
        print_json(plain(session.proto))
    else:
        _print_session(session.proto)


def sessions_table(sessions: list[Session]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("session", "state", "tier", "tokens", "last used", "labels"):
        table.add_column(column, justify="right" if column == "tokens" else "left", no_wrap=column == "session")
    for session in sessions:
        proto = session.proto
        table.add_row(
            printable(proto.session_id),
            enum_name(proto, "state", "SESSION_STATE_"),
            enum_name(proto, "tier", "TIER_"),
            f"{proto.token_count:,}",
            _time(proto, "last_used_time"),
            printable(" ".join(f"{key}={value}" for key, value in sorted(proto.labels.items()))),
        )
    return table


def parse_labels(labels: list[str] | None) -> dict[str, str]:
    """KEY=VALUE strings as a dictionary; exits with a message for anything else."""
    parsed = {}
    for label in labels or []:
        key, equals, value = label.partition("=")
        if not equals or not key:
            fail(f"a label is KEY=VALUE, not {label!r}")
        parsed[key] = value
    return parsed


def _print_new(session: Session, as_json: bool) -> None:
    if as_json:
        print_json(plain(session.proto))
    else:
        out.print(session.id, markup=False)


def _print_session(proto: types_pb2.Session) -> None:
    rows = {
        "session": proto.session_id,
        "state": enum_name(proto, "state", "SESSION_STATE_"),
        "tier": enum_name(proto, "tier", "TIER_"),
        "model": proto.model,
        "head": proto.head_revision_id,
        "tokens": f"{proto.token_count:,} ({proto.exact_upto:,} exact, {proto.persisted_upto:,} on disk)",
        "created": _time(proto, "create_time"),
        "last used": _time(proto, "last_used_time"),
        "expires": _time(proto, "expire_time"),
        "labels": " ".join(f"{key}={value}" for key, value in sorted(proto.labels.items())),
        "running": proto.running_request_id,
        "suspended": proto.suspended_request_id,
    }
    for name, value in rows.items():
        if value:
            out.print(f"{name:<10} {printable(value)}", markup=False)


def _revisions_table(revisions: list[types_pb2.Revision], head: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "revision", "parent", "kind", "log", "finish", "text"):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for revision in revisions:
        table.add_row(
            "*" if revision.revision_id == head else "",
            printable(revision.revision_id),
            printable(revision.parent_revision_id),
            enum_name(revision, "kind", "REVISION_KIND_"),
            f"{revision.log_start}-{revision.log_end}",
            enum_name(revision, "finish_reason", "FINISH_REASON_") if revision.finish_reason else "",
            printable(_first_words(revision)),
        )
    return table


def _first_words(revision: types_pb2.Revision) -> str:
    messages = [*revision.messages, *([revision.answer] if revision.HasField("answer") else [])]
    text = " / ".join(part.text for message in messages for part in message.content)
    words = " ".join(text[:200].split())
    return words if len(words) <= 60 else words[:59] + "…"


def _time(proto: types_pb2.Session, field: str) -> str:
    if not proto.HasField(field):  # type: ignore[arg-type]
        return ""
    local = getattr(proto, field).ToDatetime().astimezone()
    return str(local.strftime("%Y-%m-%d %H:%M:%S"))
