"""The command line: what it prints, what a script can read, and its exit status."""

from __future__ import annotations

import inspect
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_server import CannedServer, serve
from typer.testing import CliRunner, Result

from sessiond import cli_output
from sessiond.cli_app import app
from sessiond.clients import SessiondClientError
from sessiond.v1 import admin_pb2, sessions_pb2, types_pb2


@pytest.fixture
def server() -> CannedServer:
    return CannedServer()


@pytest.fixture
def address(server: CannedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("SESSIOND_RETRY_SECONDS", "0.2")
    with serve(server) as address:
        monkeypatch.setenv("SESSIOND_ADDRESS", address)
        yield address


def run(*arguments: str, text: str | bytes | None = None, status: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments, input=text)
    assert result.exit_code == status, result.output
    return result


def answer(*arguments: str, text: str | bytes | None = None, status: int = 0) -> object:
    """What the command printed with --json."""
    return json.loads(run(*arguments, "--json", text=text, status=status).stdout)


# -- what is missing ----------------------------------------------------------------------------------


def blocked(modules: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process where these modules cannot be imported."""
    code = (
        "import sys\n"
        f"for name in {modules!r}.split(): sys.modules[name] = None\n"
        "from sessiond.cli import main\n"
        f"sys.argv[1:] = {list(arguments)!r}\n"
        "main()\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("library", ["typer", "rich"])
def test_without_the_cli_extra_it_says_what_to_install(library: str) -> None:
    result = blocked(library, "chat")
    assert result.returncode == 1
    assert result.stderr == f"sessiond's command line needs {library}: pip install 'sessiond[cli]'\n"


@pytest.mark.parametrize("library", ["pydantic_settings", "torch", "lmdb", "blake3"])
def test_serve_without_the_server_extra_says_what_to_install(library: str) -> None:
    result = blocked(f"{library} transformers", "serve")
    assert result.returncode == 1
    assert "pip install 'sessiond[server]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_client_commands_work_without_the_server_extra(address: str) -> None:
    result = blocked("torch transformers pydantic_settings numpy lmdb blake3 sqlalchemy", "sessions", "list", "--json")
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_model_list_imports_neither_torch_nor_transformers() -> None:
    result = blocked("torch transformers", "model", "list", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)[0]["name"] == "smollm2"


def test_serve_has_a_flag_for_every_setting() -> None:
    from sessiond.cli_serve import serve as command
    from sessiond.config import Settings

    assert set(inspect.signature(command).parameters) == set(Settings.model_fields)


def test_serve_names_the_flag_that_is_wrong() -> None:
    result = run("serve", "--listen", "nowhere", status=1)
    assert "--listen" in result.stderr
    assert "Traceback" not in result.stderr


# -- errors ---------------------------------------------------------------------------------------------


def test_no_daemon_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSIOND_RETRY_SECONDS", "0")
    result = run("sessions", "list", "--address", "localhost:1", status=1)
    assert result.stderr == "error: no daemon answers at localhost:1; start one with: sessiond serve\n"
    assert result.stdout == ""


def test_a_refusal_is_one_line_with_its_reason(address: str) -> None:
    result = run("sessions", "show", "nope", status=1)
    assert result.stderr == "error: no session nope (NOT_FOUND / SESSION_NOT_FOUND)\n"


@pytest.mark.parametrize("command", [["sessions", "fork", "s1"], ["sessions", "rollback", "s1", "r0"]])
def test_what_the_server_does_not_implement_is_said_plainly(address: str, command: list[str]) -> None:
    run("sessions", "create", "--system", "x")
    result = run(*command, status=1)
    assert "UNIMPLEMENTED" in result.stderr
    assert "UNIMPLEMENTED" in run("compact", status=1).stderr


def test_unreadable_certificate_is_an_error(address: str) -> None:
    assert "No such file" in run("sessions", "list", "--tls-ca", "/does/not/exist", status=1).stderr


def test_retry_time_is_told() -> None:
    error = SessiondClientError("full", reason="QUOTA", retry_after=1.5)
    assert cli_output.describe(error, "x") == "full (UNKNOWN / QUOTA); retry after 1.5 s"


# -- sessions --------------------------------------------------------------------------------------------


def test_create_prints_the_id_alone(address: str, server: CannedServer) -> None:
    result = run("sessions", "create", "--system", "Be terse.", "-l", "team=a", "--label", "x=y=z", "--ttl", "60")
    assert result.stdout == "s1\n"
    request = server.requests[-1]
    assert (request.system, dict(request.labels)) == ("Be terse.", {"team": "a", "x": "y=z"})
    assert request.ttl.seconds == 60


def test_bad_label_is_refused(address: str) -> None:
    assert "KEY=VALUE" in run("sessions", "create", "--label", "team", status=1).stderr


def test_list_in_json_has_numbers_as_numbers(address: str) -> None:
    assert answer("sessions", "list") == []
    run("sessions", "create", "--system", "x", "-l", "team=a")
    (listed,) = answer("sessions", "list")  # type: ignore[misc]
    assert listed["token_count"] == 2**60
    assert listed["labels"] == {"team": "a"}
    assert listed["state"] == "SESSION_STATE_ACTIVE"


def test_list_for_people(address: str) -> None:
    run("sessions", "create", "--system", "x", "-l", "team=a")
    result = run("sessions", "list")
    assert "s1" in result.stdout
    assert "active" in result.stdout
    assert "team=a" in result.stdout


def test_list_passes_filter_and_limit_on(address: str, server: CannedServer) -> None:
    for _ in range(3):
        run("sessions", "create", "--system", "x")
    assert len(answer("sessions", "list", "--limit", "2", "--deleted", "--filter", "tier = HOT")) == 2  # type: ignore[arg-type]
    assert (server.requests[-1].filter, server.requests[-1].show_deleted) == ("tier = HOT", True)


def test_show_has_session_and_revisions(address: str) -> None:
    run("sessions", "create", "--system", "x")
    shown = answer("sessions", "show", "s1")
    assert shown["session"]["session_id"] == "s1"  # type: ignore[index]
    assert shown["revisions"][0]["kind"] == "REVISION_KIND_ROOT"  # type: ignore[index]
    text = run("sessions", "show", "s1").stdout
    assert "first [31mwords" in text  # the escape character is gone
    assert "\x1b" not in text


def test_delete_and_undelete(address: str, server: CannedServer) -> None:
    run("sessions", "create", "--system", "x")
    run("sessions", "delete", "s1")
    assert not server.requests[-1].purge_now
    assert "s1" in run("sessions", "undelete", "s1").stdout
    run("sessions", "delete", "s1", "--purge", text="n\n", status=1)
    assert not server.requests[-1].purge_now
    run("sessions", "delete", "s1", "--purge", "--yes")
    assert server.requests[-1].purge_now


def test_export_and_import_keep_the_bytes(address: str, server: CannedServer, tmp_path: Path) -> None:
    run("sessions", "create", "--system", "x")
    archive = tmp_path / "session.archive"
    run("sessions", "export", "s1", "-o", str(archive))
    assert archive.read_bytes() == server.archive
    assert run("sessions", "export", "s1", "-o", "-").stdout_bytes == server.archive
    assert run("sessions", "import", str(archive)).stdout == "s9\n"
    assert server.requests[-1] == server.archive
    assert answer("sessions", "import", "-", text=server.archive)["verdict"] == "IMPORT_VERDICT_EXACT"  # type: ignore[index]
    assert server.requests[-1] == server.archive
    run("sessions", "import", str(tmp_path / "missing"), status=1)


def test_failed_export_leaves_the_old_file(address: str, server: CannedServer, tmp_path: Path) -> None:
    archive = tmp_path / "session.archive"
    archive.write_bytes(b"old")
    run("sessions", "create", "--system", "x")
    server.cuts_archive = True
    assert "DATA_LOSS" in run("sessions", "export", "s1", "-o", str(archive), status=1).stderr
    assert archive.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [archive]


def test_credentials_reach_the_server(address: str, server: CannedServer) -> None:
    run("sessions", "create", "--system", "x")
    run("sessions", "show", "s1", "--token", "secret", "--tenant", "acme")
    assert server.metadata["authorization"] == "Bearer secret"
    assert server.metadata["sessiond-tenant"] == "acme"


# -- store ------------------------------------------------------------------------------------------------


def test_verify_fails_only_on_damage_not_repaired(address: str, server: CannedServer) -> None:
    assert answer("verify")["summary"]["bytes"] == 2**40  # type: ignore[index]
    finding = admin_pb2.Finding(severity=admin_pb2.SEVERITY_LOSS, kind="checksum", message="bad", repaired=True)
    server.findings = [admin_pb2.Finding(severity=admin_pb2.SEVERITY_NOTICE, kind="old", message="m"), finding]
    assert "loss, repaired: checksum: bad" in run("verify", "s1", "--repair", "--recompute", "0.5").stdout
    request = server.requests[-1]
    assert (list(request.session_ids), request.repair, request.recompute) == (["s1"], True, 0.5)
    finding.repaired = False
    run("verify", status=1)


def test_plain_walks_every_kind_of_field() -> None:
    turn = sessions_pb2.TurnExplanation(
        context_tokens=2**55,
        milliseconds_by_phase={"decode": 1.5},
        reads=[sessions_pb2.AttentionRead(tokens_attended=5, spans=[types_pb2.TokenSpan(start=1, end=2**54)])],
    )
    turn.policy.knobs.update({"n": 3})
    value = cli_output.plain(turn)
    assert value["context_tokens"] == 2**55
    assert value["reads"][0]["spans"] == [{"start": 1, "end": 2**54}]
    assert value["milliseconds_by_phase"] == {"decode": 1.5}
    assert value["policy"]["knobs"] == {"n": 3}
    stats = admin_pb2.GetStatsResponse(sessions_by_tier={"hot": 3})
    assert cli_output.plain(stats)["sessions_by_tier"] == {"hot": 3}


# -- chat --------------------------------------------------------------------------------------------------


def test_one_message_in_json(address: str, server: CannedServer) -> None:
    told = answer("chat", "-m", "Hi", "--system", "Be terse.", "--temperature", "0", "--seed", "7")
    assert told["text"] == "Hello, wörld!"  # type: ignore[index]
    assert told["session_id"] == "s1"  # type: ignore[index]
    assert told["finished"]["usage"]["prompt_tokens_reused"] == 6000  # type: ignore[index]
    assert told["restored"]["tokens_restored"] == 6000  # type: ignore[index]
    assert server.requests[0].system == "Be terse."
    assert (server.requests[1].sampling.temperature, server.requests[1].sampling.seed) == (0, 7)


def test_piped_lines_are_turns_of_one_session(address: str, server: CannedServer) -> None:
    result = run("chat", text="one\n\ntwo \\\nand more\n/help\n/nonsense\n/quit\nnot read\n")
    assert result.stdout == "Hello, wörld!\n" * 2
    turns = [item for item in server.requests if isinstance(item, sessions_pb2.GenerateRequest)]
    assert [turn.messages[0].content[0].text for turn in turns] == ["one", "two \nand more"]
    assert {turn.session_id for turn in turns} == {"s1"}
    assert "/nonsense is no command" in result.stderr
    assert "12 new + 6,000 reused · 4 generated · first token 31 ms · 88.9 tok/s" in result.stderr
    assert "restored 6,000 (cold) in 23 ms" in result.stderr


def test_chat_goes_on_with_a_session_and_opens_another(address: str, server: CannedServer) -> None:
    run("sessions", "create", "--system", "x")
    run("chat", "--session", "s1", text="one\n/new\ntwo\n/sessions\n")
    turns = [item for item in server.requests if isinstance(item, sessions_pb2.GenerateRequest)]
    assert [turn.session_id for turn in turns] == ["s1", "s2"]
    assert "no session nope" in run("chat", "--session", "nope", status=1).stderr


def test_chat_keeps_an_answer_that_was_cut_off_and_goes_on(address: str, server: CannedServer) -> None:
    run("sessions", "create", "--system", "x")
    server.suspended = "lost-one"
    result = run("chat", "--session", "s1", "-m", "And now?")
    assert result.stdout == "Hello, wörld!\n"
    assert "its 2 tokens are kept" in result.stderr
    (stopped,) = [item for item in server.requests if isinstance(item, sessions_pb2.AbortTurnRequest)]
    assert (stopped.request_id, stopped.commit) == ("lost-one", True)


def test_help_shows_the_defaults_in_brackets() -> None:
    assert "[smollm2]" in run("serve", "--help").stdout


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert cli_output.printable("a\x1b]0;t\x07b\nc\td\x9b1m\x7fé") == "a]0;tb\nc\td1mé"


class Terminal:
    """The command line in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.child, self.descriptor = os.forkpty()
        if self.child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job starts with it ignored, and hands that on
            os.execv(sys.executable, [sys.executable, "-c", "from sessiond.cli import main; main()", *arguments])
        self.seen = ""

    def expect(self, text: str, seconds: float = 20.0) -> None:
        """Wait until it has shown `text`; what comes next is looked for behind it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.descriptor, 4096).decode("utf-8", "replace")
                except OSError:  # the child is gone
                    assert text in self.seen, self.seen
        self.seen = self.seen.partition(text)[2]

    def send(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def leave(self) -> int:
        _, status = os.waitpid(self.child, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(address: str, server: CannedServer) -> None:
    server.words = ["word "] * 1000
    server.pause = 0.02
    terminal = Terminal("chat", "--address", address)
    try:
        terminal.expect("/help for commands")
        terminal.expect("> ")
        terminal.send("Hi\n")
        terminal.expect("word word")
        terminal.send("\x03")
        terminal.expect("stopped after 2 tokens")
        stop = next(item for item in server.requests if isinstance(item, sessions_pb2.AbortTurnRequest))
        turn = next(item for item in server.requests if isinstance(item, sessions_pb2.GenerateRequest))
        assert (stop.request_id, stop.commit) == (turn.request_id, True)
        server.aborted.clear()
        server.words = ["again"]
        terminal.expect("> ")  # keys that come between two prompts meet the terminal in its other mode: Ctrl-D is lost
        terminal.send("once more\n")
        terminal.expect("first token 31 ms")
        terminal.expect("\n> ")
        terminal.send("\x04")
        terminal.expect("come back with: sessiond chat --session s1")
        assert terminal.leave() == 0
    except BaseException:
        os.kill(terminal.child, signal.SIGKILL)
        raise
