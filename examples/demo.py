"""A conversation survives SIGKILL: ask about a long document, kill the daemon, start it again, go on at once.

The same conversation with a daemon that is never killed shows that the answer is the same; a fresh session that must
compute everything shows what was saved. Greedy throughout. The last line is one JSON object; status 0 only if the
answers agree and state was really used again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

# The daemon process and the timed turns are shared with the benchmarks.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _bench import console, data_folder, print_json
from _daemon import DaemonProcess
from _turns import (
    FIRST_QUESTION,
    SECOND_QUESTION,
    SYSTEM,
    THIRD_QUESTION,
    Turn,
    document,
    run_turn,
    wait_settled,
)

from sessiond.clients import Session

MAX_TOKENS = 32
out = console()


@dataclass(frozen=True, slots=True)
class Conversation:
    """A document and what was said about it: user and assistant in turn, the third question still to come."""

    session_id: str
    said: list[str]
    bytes_raw_kv: int
    bytes_on_disk: int

    def with_third_question(self) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        texts = [*self.said, THIRD_QUESTION]
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def say(text: str) -> None:
    out.print(f"[bold]==>[/] {text}")


def timed(session: Session, messages: str | list[dict[str, str]]) -> Turn:
    """A turn, with a clock on the terminal while it runs."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    quiet = not out.is_terminal
    with Progress(*columns, console=out, transient=True, refresh_per_second=2, disable=quiet) as progress:
        progress.add_task("the model works", total=None)
        return run_turn(session, messages, max_tokens=MAX_TOKENS)


def ask(session: Session, question: str) -> Turn:
    turn = timed(session, question)
    shown = question if len(question) < 200 else f"[{len(question):,} characters] … {question.rpartition(chr(10))[2]}"
    out.print(f"    user:      {shown}", markup=False)
    out.print(f"    assistant: {' '.join(turn.text.split())}", markup=False)
    out.print(
        f"    {turn.reused:,} tokens reused, {turn.computed:,} computed; first token after {turn.ttft_ms:,.0f} ms"
    )
    if turn.restored:
        back = turn.restored
        out.print(f"    {back.bytes_read:,} bytes read from disk in {back.milliseconds:,.0f} ms")
        out.print(f"    {back.tokens_recomputed:,} tokens of the past computed again")
    return turn


def converse(daemon: DaemonProcess) -> Conversation:
    """Two questions about the document; on return all KV is sealed and on disk."""
    client = daemon.client()
    session = client.create_session(system=SYSTEM)
    text, n_tokens = document(session)
    say(f"a document of {n_tokens:,} tokens (CPython's help text) and two questions")
    said = []
    for question in (f"{text}\n\n{FIRST_QUESTION}", SECOND_QUESTION):
        answer = ask(session, question)
        said += [question, answer.text]
        wait_settled(session, client.server_info().cell_tokens)
    proto = session.proto
    stats = client.stats()
    on_disk = int(stats.gauges["kv_coded_page_bytes"])
    say(
        f"KV is on disk: GetSession says persisted_upto = {proto.persisted_upto:,} of {proto.token_count:,} tokens "
        "(the last one is not computed before it is needed)"
    )
    return Conversation(session.id, said, stats.disk.kv_raw_bytes, on_disk)


def killed(folder: Path) -> tuple[Conversation, Turn, Turn]:
    """The conversation through a kill: (it, its third turn resumed, that turn in a session that shares nothing)."""
    data = folder / "killed"
    say("start a daemon")
    with DaemonProcess(data) as daemon:
        say(f"it serves after {daemon.start_seconds:.1f} s")
        talk = converse(daemon)
        say("SIGKILL")
        daemon.kill()
    say("start it again")
    # The fresh session belongs to another tenant: tenants share no state.
    with DaemonProcess(data, "--trust-tenant-metadata") as daemon:
        say(f"it serves after {daemon.start_seconds:.1f} s; the third question in the same session")
        resumed = ask(daemon.client().session(talk.session_id), THIRD_QUESTION)
        say("the same history and question in a fresh session, which must compute everything")
        fresh = daemon.client(tenant="fresh").create_session(system=SYSTEM)
        computed = timed(fresh, talk.with_third_question())
        out.print(f"    {computed.computed:,} tokens computed; first token after {computed.ttft_ms:,.0f} ms")
    return talk, resumed, computed


def never_killed(folder: Path) -> Turn:
    """The third turn of the same conversation with a daemon that lives through it."""
    say("control: the same conversation with a daemon that is never killed")
    with DaemonProcess(folder / "control") as daemon:
        talk = converse(daemon)
        return ask(daemon.client().session(talk.session_id), THIRD_QUESTION)


def show(talk: Conversation, resumed: Turn, computed: Turn) -> None:
    table = Table(title="The third question")
    for name in ("", "tokens reused", "tokens computed", "time to first token"):
        table.add_column(name, justify="left" if not name else "right")
    for name, turn in (("after the kill, same session", resumed), ("fresh session", computed)):
        table.add_row(name, f"{turn.reused:,}", f"{turn.computed:,}", f"{turn.ttft_ms:,.1f} ms")
    out.print(table)
    share = talk.bytes_on_disk / talk.bytes_raw_kv
    out.print(f"KV of the conversation: {talk.bytes_on_disk:,} bytes on disk, {talk.bytes_raw_kv:,} raw ({share:.2f})")


def main() -> int:
    with data_folder("demo", out) as folder:
        talk, resumed, computed = killed(folder)
        control = never_killed(folder)
    total = resumed.reused + resumed.computed
    same = resumed.token_ids == control.token_ids
    # Reused means: all but the question came from disk, and nothing of the history was computed again.
    reused = resumed.reused > 0.9 * total and resumed.recomputed == 0 and resumed.restored is not None
    honest = computed.reused == 0
    ratio = computed.ttft_ms / resumed.ttft_ms
    show(talk, resumed, computed)
    if not same:
        verdict = "[red]The resumed session's answer differs from that of a daemon that was never killed.[/]"
    elif not (reused and honest):
        verdict = "[red]The answers agree, but the comparison is void: see the tokens reused and computed.[/]"
    else:
        verdict = (
            f"Killed and started again, the session went on after {resumed.ttft_ms:,.0f} ms where computing its past "
            f"again takes {computed.ttft_ms:,.0f} ms, {ratio:,.0f} times as long; its answer is, token for token, "
            "that of a daemon that was never killed."
        )
    out.print(verdict)
    print_json(
        {
            "resume_ttft_ms": round(resumed.ttft_ms, 1),
            "prefill_ttft_ms": round(computed.ttft_ms, 1),
            "ttft_ratio": round(ratio, 1),
            "tokens_reused": resumed.reused,
            "tokens_total": total,
            "same_answer": same,
            "bytes_on_disk": talk.bytes_on_disk,
            "bytes_raw_kv": talk.bytes_raw_kv,
        }
    )
    return 0 if same and reused and honest else 1


if __name__ == "__main__":
    sys.exit(main())
