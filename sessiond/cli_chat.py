"""`sessiond chat`: a conversation in the terminal. Ctrl-C stops an answer, Ctrl-D leaves; the daemon remembers."""

from __future__ import annotations

import contextlib
import itertools
import sys
import uuid
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import typer

from sessiond.cli_output import AsJson, connected, enum_name, err, out, plain, print_json, printable
from sessiond.cli_sessions import sessions_table
from sessiond.clients import Client, Event, NotFoundError, Session, SessiondClientError
from sessiond.v1 import sessions_pb2

HELP = """\
/help      this
/new       start another session
/sessions  list the latest sessions
/quit      leave (or Ctrl-D); come back with --session
A line that ends in \\ goes on in the next. Ctrl-C stops an answer; what you saw stays in the conversation."""


@dataclass
class Chat:
    """One terminal's conversation: the session it is in, and how tokens are chosen."""

    client: Client
    session: Session
    system: str
    sampling: dict[str, Any]
    as_json: bool = False
    quitting: bool = field(default=False, init=False)

    def run(self) -> None:
        """Read lines and answer them, until /quit or the end of input."""
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() a history and editing)
            err.print(f"[dim]session {self.session.id} - /help for commands, Ctrl-D to leave[/]")
        while not self.quitting:
            try:
                line = _read_line(interactive)
            except EOFError:
                break
            except KeyboardInterrupt:
                err.print("[dim]Ctrl-D leaves[/]")
                continue
            if line.strip().startswith("/"):
                self.obey(line.strip())
            elif line.strip():
                try:
                    self.answer(line)
                except SessiondClientError as error:
                    if not interactive:
                        raise
                    # One refused turn is no reason to leave a conversation.
                    err.print(f"[red]{error.code.name}[/]", printable(error.message), markup=True)
        if interactive:
            err.print(f"[dim]come back with: sessiond chat --session {self.session.id}[/]")

    def obey(self, line: str) -> None:
        """Run a command."""
        match line.split()[0]:
            case "/help":
                err.print(HELP, markup=False, style="dim")
            case "/new":
                self.session = self.client.create_session(system=self.system)
                err.print(f"[dim]session {self.session.id}[/]")
            case "/sessions":
                err.print(sessions_table(list(itertools.islice(self.client.sessions(), 20))))
            case "/quit" | "/exit":
                self.quitting = True
            case other:
                err.print(f"{printable(other)} is no command; /help lists them", markup=False, style="yellow")

    def answer(self, text: str) -> None:
        """Run one turn and show it as it comes. An answer that was cut off before is kept as far as it came."""
        try:
            self._answer(text)
        except SessiondClientError as error:
            if error.reason != "TURN_SUSPENDED":
                raise
            kept = self.session.abort(error.metadata["request_id"], commit=True)
            self.session.refresh()
            err.print(f"[dim]the last answer had been cut off; its {kept.generated_tokens} tokens are kept[/]")
            self._answer(text)

    def _answer(self, text: str) -> None:
        request_id = uuid.uuid4().hex
        parts: list[str] = []
        finished: sessions_pb2.Finished | None = None
        restored: sessions_pb2.Restored | None = None
        # A generator: closing it ends the stream, whatever interrupts us.
        events = cast(Generator[Event, None, None], self.session.generate(text, request_id=request_id, **self.sampling))
        try:
            with contextlib.closing(events):
                for event in events:
                    if event.text:
                        parts.append(event.text)
                        self._show(event.text)
                    elif event.kind == "restored":
                        restored = event.proto.restored
                    elif event.kind == "finished":
                        finished = event.proto.finished
        except KeyboardInterrupt:
            self._abort(request_id)
            return
        if self.as_json:
            print_json(
                {"session_id": self.session.id, "request_id": request_id, "text": "".join(parts)}
                | {"restored": plain(restored) if restored else None}
                | {"finished": plain(finished) if finished else None}
            )
            return
        out.file.write("\n")
        out.file.flush()
        if finished is not None:
            err.print(stats_line(finished, restored), style="dim", markup=False)

    def _show(self, text: str) -> None:
        if not self.as_json:
            out.file.write(printable(text) if out.is_terminal else text)
            out.file.flush()

    def _abort(self, request_id: str) -> None:
        """Stop the turn; what was seen becomes part of the conversation."""
        out.file.write("\n")
        try:
            response = self.session.abort(request_id, commit=True)
        except NotFoundError:  # it was stopped before the server had accepted it
            err.print("[dim]stopped before it began[/]")
            return
        self.session.refresh()
        err.print(f"[dim]stopped after {response.generated_tokens} tokens[/]")


def stats_line(finished: sessions_pb2.Finished, restored: sessions_pb2.Restored | None) -> str:
    """What a turn cost, in one line."""
    usage = finished.usage
    parts = [
        f"{usage.prompt_tokens_new:,} new + {usage.prompt_tokens_reused:,} reused",
        f"{usage.generated_tokens:,} generated",
        f"first token {finished.time_to_first_token_ms:.0f} ms",
        f"{finished.tokens_per_second:.1f} tok/s",
    ]
    if restored is not None and (restored.tokens_restored or restored.tokens_recomputed):
        computed = f", {restored.tokens_recomputed:,} computed again" if restored.tokens_recomputed else ""
        source = enum_name(restored, "tier", "TIER_")
        parts.append(f"restored {restored.tokens_restored:,} ({source}) in {restored.milliseconds:.0f} ms{computed}")
    reason = enum_name(finished, "finish_reason", "FINISH_REASON_")
    if reason not in ("stop", "unspecified"):
        parts.append(reason.replace("_", " "))
    return " · ".join(parts)


def _read_line(interactive: bool) -> str:
    """A line of input; one that ends in a backslash takes the next along. Raises EOFError."""
    lines = [input("> " if interactive else "")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  " if interactive else ""))
    return "\n".join(lines)


@connected
def chat(
    client: Client,
    session_id: Annotated[str | None, typer.Option("--session", "-s", help="Go on with this session.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, answer, and leave.")] = None,
    system: Annotated[str, typer.Option(help="System prompt of a new session.")] = "You are a helpful assistant.",
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Makes the choice repeatable.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in an answer.")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Talk with the model. Without a terminal, each line of stdin is one turn."""
    session = client.session(session_id) if session_id else client.create_session(system=system)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    sampling |= {"seed": seed} if seed is not None else {}
    talk = Chat(client, session, system, sampling, as_json)
    if message is not None:
        talk.answer(message)
    else:
        talk.run()
