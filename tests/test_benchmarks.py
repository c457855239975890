"""The arithmetic of the benchmarks; what they measure takes a model and a quiet machine (docs/benchmarks.md)."""

from __future__ import annotations

import importlib
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sessiond.cli_serve import SPIN_COUNT
from sessiond.v1 import sessions_pb2

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A script or module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module(name)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_bench")


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_turns")


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_daemon")


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "decode")


@pytest.fixture
def resume(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "resume")


def test_spread_has_median_quartiles_and_extremes(bench: ModuleType) -> None:
    assert bench.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "min": 1.0,
        "max": 5.0,
        "n": 5,
    }


def test_spread_of_one_value_is_that_value(bench: ModuleType) -> None:
    assert bench.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0, "min": 7.0, "max": 7.0, "n": 1}


def test_nothing_measured_is_an_error(bench: ModuleType) -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        bench.median([])


def test_ratios_are_of_pairs(bench: ModuleType) -> None:
    assert bench.ratios([10.0, 9.0], [5.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        bench.ratios([1.0, 2.0], [1.0])


def test_order_alternates(bench: ModuleType) -> None:
    assert [bench.alternating(i) for i in range(4)] == [True, False, True, False]


@pytest.mark.parametrize(("value", "shown"), [(0.123456, 0.1235), (12345.6, 12350.0), (2.0, 2.0), (0.0, 0.0)])
def test_rounding_keeps_four_digits(bench: ModuleType, value: float, shown: float) -> None:
    assert math.isclose(bench.rounded(value), shown)


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([1], [2], 0), ([], [], 0)],
)
def test_agreeing_prefix(bench: ModuleType, first: list[int], second: list[int], agree: int) -> None:
    assert bench.agreeing_prefix(first, second) == agree


MOUNTS = """/dev/vda / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/vdb /tmp/disk xfs rw 0 0
tmpfs /with\\040space tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/someone", "ext4"),
        ("/tmp/x", "tmpfs"),
        ("/tmp/disk/x", "xfs"),
        ("/tmp/diskette", "tmpfs"),
        ("/with space/x", "tmpfs"),
    ],
)
def test_file_system_of_the_innermost_mount(bench: ModuleType, path: str, kind: str) -> None:
    assert bench.file_system(Path(path), MOUNTS) == kind


def test_folders_for_data_are_never_in_memory(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "file_system", lambda path: "tmpfs")
    with pytest.raises(RuntimeError, match="TMPDIR"):
        bench.disk_folder("test-")


def test_a_data_folder_says_where_it_is_and_goes_away(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(bench, "file_system", lambda path: "ext4")
    monkeypatch.setattr(bench, "exit_on_sigterm", lambda: None)
    with bench.data_folder("bench", bench.console(), "; quietly") as folder:
        assert folder.parent == tmp_path
        conditions = bench.Conditions(folder)
    assert not folder.exists()
    assert capsys.readouterr().out == f"data in {folder}, on ext4; quietly\n"
    told = conditions.told()
    assert set(told) == {"others_cpu_share", "file_system", "date", "machine"}
    assert told["file_system"] == "ext4"


def test_arguments_know_the_model_and_the_scripts_first_line(bench: ModuleType) -> None:
    parser = bench.arguments("What it measures.\n\nAnd how.")
    assert parser.description == "What it measures."
    assert parser.parse_args([]).model == "smollm2"
    assert parser.parse_args(["--model", "x"]).model == "x"


def test_busy_seconds_leave_idle_and_waiting_out(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 100)
    assert bench.busy_seconds("cpu  100 10 200 9999 888 5 5 80 0 0\ncpu0 1 1 1 1\n") == 4.0


def test_last_line_is_one_json_object(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    result: dict[str, Any] = {"figure": 1.5, "spreads": {"figure": bench.spread([1.0, 2.0])}}
    sys.stdout.write("a table\n")
    bench.print_json(result)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == result


def test_time_of_a_token_leaves_the_first_out(turns: ModuleType) -> None:
    assert math.isclose(turns.token_ms([(1.0, 1), (1.2, 3), (1.5, 6)]), 100.0)
    with pytest.raises(ValueError, match="first token"):
        turns.token_ms([(1.0, 1)])


@pytest.mark.parametrize(
    ("exact", "persisted", "is_settled"),
    [(6016, 6090, True), (6016, 6089, False), (5888, 6090, False), (6016, 6091, True)],
)
def test_settled_means_sealed_and_on_disk(turns: ModuleType, exact: int, persisted: int, is_settled: bool) -> None:
    assert turns.settled(6091, exact, persisted, 128) is is_settled


def test_prose_is_the_same_every_time_and_long(turns: ModuleType) -> None:
    text = turns.prose()
    assert text == turns.prose()
    assert len(text) > 200_000


@pytest.mark.parametrize(
    ("line", "port"),
    [
        ("2026-01-01 00:00:00 [info     ] serving                        address=127.0.0.1:38835 model=smollm2", 38835),
        ("\x1b[2mnow\x1b[0m \x1b[1mserving\x1b[0m \x1b[36maddress\x1b[0m=\x1b[35m127.0.0.1:7431\x1b[0m", 7431),
        ('{"event": "serving", "address": "127.0.0.1:4711"}', 4711),
        ("[info] loading address=127.0.0.1:9", 0),
        ("", 0),
    ],
)
def test_port_is_read_from_the_log(daemon: ModuleType, line: str, port: int) -> None:
    assert daemon.port_in_log(f"starting\n{line}\n") == port


def test_copies_leave_lock_files_behind(daemon: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data" / "log").mkdir(parents=True)
    for name in ("FORMAT", "lock", "log/data.mdb", "log/lock.mdb"):
        (tmp_path / "data" / name).write_bytes(b"x")
    copy = daemon.copy_data(tmp_path / "data", tmp_path / "copy")
    assert sorted(str(f.relative_to(copy)) for f in copy.rglob("*") if f.is_file()) == ["FORMAT", "log/data.mdb"]


def test_a_turn_that_ended_early_gives_no_figure(decode: ModuleType) -> None:
    decode.check_length(decode.Sample(1.0, 1.0, [5, 6, 7]), 3)
    with pytest.raises(RuntimeError, match="3 of 4 tokens"):
        decode.check_length(decode.Sample(1.0, 1.0, [5, 6, 7]), 4)


def prepared(resume: ModuleType, tmp_path: Path) -> Any:
    return resume.Prepared("ses", tmp_path, tmp_path, [1] * 90, [2] * 10, 89, [7, 8], {})


@pytest.mark.parametrize(
    ("reused", "recomputed", "answer", "wrong"),
    [
        (89, 0, [7, 8], None),
        (88, 0, [7, 8], "88 of 89"),
        (89, 3, [7, 8], "3 tokens of the history were computed again"),
        (89, 0, [7, 9], "answers"),
    ],
)
def test_a_resumed_turn_that_is_not_what_it_claims_gives_no_figure(
    resume: ModuleType, tmp_path: Path, reused: int, recomputed: int, answer: list[int], wrong: str | None
) -> None:
    turn = resume.Turn(token_ids=answer, arrivals=[(0.1, 1)])
    turn.accepted.prompt_tokens_reused = reused
    turn.restored = sessions_pb2.Restored(tokens_recomputed=recomputed)
    with pytest.raises(RuntimeError, match=wrong) if wrong else nullcontext():
        resume.check_resumed(prepared(resume, tmp_path), turn)


def test_kv_that_differs_gives_no_figure(resume: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"resume_kv_identical": True}
    monkeypatch.setattr(resume, "run_script", lambda *command: found)
    assert resume.check_identity(tmp_path, "m") == found
    found["resume_kv_identical"] = False
    with pytest.raises(RuntimeError, match="not what was computed"):
        resume.check_identity(tmp_path, "m")


@pytest.mark.parametrize("own", [None, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_threads_spin_as_the_daemons_unless_the_user_says_otherwise(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, "x")
    started: list[Any] = []
    monkeypatch.setattr(bench.os, "execve", lambda *given: started.append(given))
    monkeypatch.setattr(bench.sys, "orig_argv", ["python", "-u", "decode.py", "--repeats", "2"])
    bench.spin_as_the_daemon()
    if own:
        assert started == []
    else:
        [(program, command, environment)] = started
        assert command == [program, "-u", "decode.py", "--repeats", "2"]
        assert environment["GOMP_SPINCOUNT"] == SPIN_COUNT
