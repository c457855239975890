"""Each check of `sessiond doctor` finds what is wrong, and says how to mend it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from cli_server import CannedServer, serve
from tiny_models import write_directory, write_gguf
from typer.testing import CliRunner

from sessiond import doctor_machine, doctor_place
from sessiond.cli_app import app
from sessiond.doctor import Subject, Verdict, examine
from sessiond.doctor_check import Check

NAMES = [
    "python", "libraries", "sqlite", "cpu", "threads", "kernels", "memory", "data directory", "disk", "database",
    "model", "port",
]  # fmt: skip


def only(checks: object) -> Check:
    (found,) = checks  # type: ignore[misc]
    assert bool(found.mend) == (found.verdict is not Verdict.OK), found
    return found  # type: ignore[no-any-return]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSIOND_CACHE", str(tmp_path / "cache"))


def test_a_good_machine_passes_every_check(tmp_path: Path, port: int) -> None:
    model = write_directory(tmp_path / "model")
    subject = Subject(str(model), tmp_path / "data", None, "127.0.0.1", port, 1, 1 << 20)
    checks = examine(subject)
    assert [check.name for check in checks] == NAMES
    assert [check.name for check in checks if check.verdict is Verdict.FAIL] == []
    assert not (tmp_path / "data").exists()


# -- the machine ---------------------------------------------------------------------------------------


def test_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "MIN_PYTHON", (9, 0))
    assert only(doctor_machine.check_python()).verdict is Verdict.FAIL
    monkeypatch.setattr(doctor_machine, "MIN_PYTHON", (3, 11))
    monkeypatch.setattr(doctor_machine.sys, "platform", "win32")
    assert "WSL" in only(doctor_machine.check_python()).mend


def test_missing_and_old_libraries_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ['torch>=99; extra == "server"', 'no-such-thing>=1; extra == "server"', 'other>=1; extra == "dev"']
    monkeypatch.setattr(doctor_machine.importlib.metadata, "requires", lambda name: wanted)
    found = only(doctor_machine.check_libraries())
    assert found.verdict is Verdict.FAIL
    assert "is older than 99" in found.found
    assert "no-such-thing is missing" in found.found
    assert "other" not in found.found


def test_lower_bounds_follow_extras_and_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.sys, "platform", "linux")
    requirements = [
        "grpcio>=1.70",
        'torch>=2.6; extra == "server"',
        "psycopg[binary]>=3.2; extra == 'postgres'",
        'pysqlite3>=0.6.1; sys_platform == "linux" and extra == "server"',
        'mac>=1; sys_platform == "darwin" and extra == "server"',
        "unbounded",
    ]
    bounds = doctor_machine.lower_bounds(requirements, "server")
    assert bounds == {"grpcio": "1.70", "torch": "2.6", "pysqlite3": "0.6.1"}
    assert doctor_machine.lower_bounds(requirements, "postgres") == {"grpcio": "1.70", "psycopg": "3.2"}


@pytest.mark.parametrize(
    ("older", "newer"),
    [("1.9", "1.10"), ("2.13.0+cpu", "2.13.1"), ("3", "3.0.1"), ("5.0.0rc1", "5.1")],
)
def test_versions_compare_by_number(older: str, newer: str) -> None:
    assert doctor_machine._numbers(older) < doctor_machine._numbers(newer)
    assert doctor_machine._numbers("3.0") == doctor_machine._numbers("3")


def test_sqlite_with_the_wal_bug_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor_machine.check_sqlite()).verdict is Verdict.OK
    monkeypatch.setattr(doctor_machine, "MIN_SQLITE", (99,))
    assert "corrupt" in only(doctor_machine.check_sqlite()).mend


def test_cpu_without_vectors_and_too_many_threads_warn(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("flags\t\t: fpu sse2\n")
    cpu, threads = doctor_machine.check_cpu(10_000, info)
    assert (cpu.verdict, threads.verdict) == (Verdict.WARN, Verdict.WARN)
    info.write_text("flags\t\t: fpu avx2 avx512_bf16\n")
    cpu, threads = doctor_machine.check_cpu(1, info)
    assert (cpu.found, threads.verdict) == ("avx2 avx512_bf16", Verdict.OK)
    assert next(doctor_machine.check_cpu(1, tmp_path / "none")).verdict is Verdict.OK


def test_kernels_that_were_not_compiled_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "BUILT", True)
    monkeypatch.setattr(doctor_machine, "ISA", 1)
    assert "avx2" in only(doctor_machine.check_kernels()).found
    monkeypatch.setattr(doctor_machine, "BUILT", False)
    assert "compiler" in only(doctor_machine.check_kernels()).mend


def test_cores_follow_the_container_quota(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("150000 100000\n")
    assert doctor_machine.usable_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert doctor_machine.usable_cores(quota) == doctor_machine.usable_cores(tmp_path / "none") >= 1


def test_a_budget_beyond_memory_warns() -> None:
    assert only(doctor_machine.check_memory(1 << 60)).verdict is Verdict.WARN
    assert only(doctor_machine.check_memory(1 << 20)).verdict is Verdict.OK


# -- places ---------------------------------------------------------------------------------------------


def test_data_directory_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    assert only(doctor_place.check_data_dir(tmp_path / "file" / "data")).verdict is Verdict.FAIL
    monkeypatch.setattr(doctor_place.os, "access", lambda path, mode: False)
    assert "Permission denied" in only(doctor_place.check_data_dir(tmp_path / "new")).found

    def refuse(**options: object) -> object:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor_place.tempfile, "TemporaryFile", refuse)
    assert "Read-only" in only(doctor_place.check_data_dir(tmp_path)).found


@pytest.mark.parametrize(("kind", "word"), [("tmpfs", "reboot"), ("nfs4", "local disk"), ("ext4", "")])
def test_file_systems_that_do_not_keep_data_warn(tmp_path: Path, kind: str, word: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nx {tmp_path.resolve()} {kind} rw 0 0\n")
    found = only(doctor_place.check_data_dir(tmp_path, mounts))
    assert found.verdict is (Verdict.WARN if word else Verdict.OK)
    assert word in found.mend


def test_little_disk_space_warns_and_none_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_place, "GOOD_FREE_BYTES", 1 << 60)
    assert only(doctor_place.check_disk(tmp_path / "a" / "b")).verdict is Verdict.WARN
    monkeypatch.setattr(doctor_place, "MIN_FREE_BYTES", 1 << 60)
    assert only(doctor_place.check_disk(tmp_path)).verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("postgresql://me:secret@127.0.0.1:1/db", "start the server"),
        ("not a url", "write it as postgresql://"),
        ("nosuch://x/y", "write it as postgresql://"),
    ],
)
def test_database_that_does_not_answer_fails_without_its_password(url: str, word: str) -> None:
    found = only(doctor_place.check_database(url))
    assert found.verdict is Verdict.FAIL
    assert word in found.mend
    assert "secret" not in found.found


def test_sqlite_needs_no_server(tmp_path: Path) -> None:
    assert only(doctor_place.check_database(None)).verdict is Verdict.OK
    assert only(doctor_place.check_database(f"sqlite:///{tmp_path}/x.db")).verdict is Verdict.OK


def test_models_are_checked_where_they_are(tmp_path: Path) -> None:
    assert "sessiond model fetch smollm2" in only(doctor_place.check_model("smollm2")).mend
    assert only(doctor_place.check_model(str(tmp_path / "missing.gguf"))).verdict is Verdict.FAIL
    assert only(doctor_place.check_model("owner/name")).verdict is Verdict.WARN
    path = write_gguf(tmp_path / "tiny.gguf")
    assert only(doctor_place.check_model(str(path))).verdict is Verdict.OK
    path.write_bytes(path.read_bytes()[:1000])
    assert only(doctor_place.check_model(str(path))).verdict is Verdict.FAIL


def test_port_in_use_fails_and_a_running_daemon_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
        assert only(doctor_place.check_port("127.0.0.1", used)).verdict is Verdict.FAIL
        monkeypatch.setattr(doctor_place, "_daemon_answers", lambda address: True)
        assert only(doctor_place.check_port("127.0.0.1", used)).verdict is Verdict.WARN
    assert only(doctor_place.check_port("192.0.2.1", 7431)).verdict is Verdict.FAIL
    assert only(doctor_place.check_port("no.such.host.invalid", 7431)).verdict is Verdict.FAIL


def test_something_else_on_the_port_is_no_daemon() -> None:
    with serve(CannedServer()) as address:  # gRPC, but without a health service
        assert not doctor_place._daemon_answers(address)


# -- the command ------------------------------------------------------------------------------------------


def test_exit_status_follows_the_worst(tmp_path: Path, port: int) -> None:
    model = write_directory(tmp_path / "model")
    flags = ["doctor", "--model", str(model), "--data-dir", str(tmp_path), "--listen", f"127.0.0.1:{port}"]
    good = CliRunner().invoke(app, [*flags, "--json"])
    assert good.exit_code == 0, good.output
    told = json.loads(good.stdout)
    assert told["ok"] is True
    assert [check["name"] for check in told["checks"]] == NAMES
    bad = CliRunner().invoke(app, [*flags, "--model", "./nowhere"])
    assert bad.exit_code == 1
    assert "name another with --model" in bad.stdout
    assert CliRunner().invoke(app, ["doctor", "--listen", "x"]).exit_code == 1
