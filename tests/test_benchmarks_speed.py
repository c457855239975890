"""The arithmetic of bench-speed and bench-kernels, and one short run of the former without llama-server."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from engine_harness import CELL, Session, make_pair, random_ids
from kernel_marks import needs_build
from test_benchmarks import FOLDER, load

from sessiond.forward import ForwardStep
from sessiond.scheduler import Scheduler
from sessiond.stepevents import Ended


@pytest.fixture
def contender(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_contender")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_speed_report")


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_speed_phases")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    # By its place: a folder of the repository has the same name.
    spec = importlib.util.spec_from_file_location("bench_kernels", FOLDER / "kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stream(contender: ModuleType, *times: float, at_once: int = 1) -> Any:
    """Tokens arriving at `times`, `at_once` each."""
    arrivals = [(at, at_once * n) for n, at in enumerate(times, 1)]
    return contender.Stream(0.0, arrivals, list(range(at_once * len(times))))


# --- streams


def test_time_of_a_token_leaves_the_first_arrival_out(contender: ModuleType, report: ModuleType) -> None:
    assert math.isclose(report.token_ms(stream(contender, 5.0, 5.1, 5.4, at_once=2)), 100.0)
    with pytest.raises(ValueError, match="at once"):
        report.token_ms(stream(contender, 1.0))


def test_throughput_counts_only_while_all_decode(contender: ModuleType, report: ModuleType) -> None:
    slow = stream(contender, 1.0, 2.0, 3.0, 4.0)
    fast = stream(contender, *(0.5 * n for n in range(1, 20)))  # begins earlier, and ends later
    assert math.isclose(report.throughput([slow, fast]), 1.0 + 2.0)
    assert math.isclose(report.throughput([slow]), 1.0)
    with pytest.raises(ValueError, match="at the same time"):
        report.throughput([slow, stream(contender, 4.0, 5.0)])


def test_throughput_does_not_depend_on_where_in_a_step_it_begins(contender: ModuleType, report: ModuleType) -> None:
    steps = [stream(contender, *(n + 0.01 * late for n in range(4))) for late in range(16)]
    assert math.isclose(report.throughput(steps), 16.0)


def test_gaps_are_those_that_touch_the_window(contender: ModuleType, report: ModuleType) -> None:
    found = stream(contender, 0.0, 1.0, 3.0, 9.0, 10.0)
    assert report.gaps(found) == [1.0, 2.0, 6.0, 1.0]
    # A stall that swallows the whole window counts, or the worst would be the one that is not seen.
    assert report.gaps(found, 4.0, 8.0) == [6.0]
    assert report.gaps(found, 2.0, 9.5) == [2.0, 6.0, 1.0]


@pytest.mark.parametrize(("percent", "value"), [(0, 1.0), (50, 3.0), (99, 4.96), (100, 5.0)])
def test_percentile(report: ModuleType, percent: float, value: float) -> None:
    assert math.isclose(report.percentile([5.0, 1.0, 4.0, 2.0, 3.0], percent), value)


def test_no_percentile_of_nothing(report: ModuleType) -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        report.percentile([], 99)


# --- ratios


def test_interval_holds_the_median_and_narrows_with_repeats(report: ModuleType) -> None:
    few, many = ([1.0 + 0.1 * (n % 5) for n in range(count)] for count in (5, 200))
    for values in (few, many):
        low, high = report.interval(values)
        assert 1.0 <= low <= 1.2 <= high <= 1.4
    assert math.dist(report.interval(many), (1.2, 1.2)) < math.dist(report.interval(few), (1.2, 1.2))
    assert report.interval([2.0]) == (2.0, 2.0)
    assert report.interval(few) == report.interval(few)


def test_faster_means_less_time_or_more_tokens(report: ModuleType) -> None:
    assert report.times_faster("decode_ms_512", [10.0], [30.0]) == [3.0]
    assert report.times_faster("throughput_16", [300.0], [100.0]) == [3.0]


VALUES = {
    "decode_ms_512": {"ours": [1.0, 2.0, 1.0], "llama": [2.0, 2.0, 4.0], "ours_bf16": [4.0, 4.0, 4.0]},
    "decode_ms_8192": {
        "ours": [2.0, 2.0],
        "llama": [6.0, 6.0],
        "transformers": [20.0, 24.0],
        "ours_sieve": [1.0, 1.0],
        "ours_rocketkv": [1.5, 1.5],
    },
    "prefill_ms_512": {"ours": [10.0], "llama": [40.0]},
    "throughput_1": {"ours": [50.0], "llama": [10.0]},
    "throughput_16": {"ours": [400.0], "llama": [100.0], "transformers": [50.0]},
    "stall_p99_ratio": {"ours": [4.0]},
    "own_code_share_32": {"ours": [0.1, 0.2, 0.3]},
}


def test_figures_carry_the_names_of_the_issue(report: ModuleType) -> None:
    found = report.figures_of(VALUES, "ours", "")
    assert found.figures == {
        "decode_vs_llama_512": 2.0,
        "decode_vs_llama_8192": 3.0,
        "decode_vs_transformers_8192": 11.0,
        "sparse_decode_sieve_vs_llama_8192": 6.0,
        "sparse_decode_rocketkv_vs_llama_8192": 4.0,
        "sparse_decode_vs_llama_8192": 6.0,
        "prefill_vs_llama_512": 4.0,
        "batch16_vs_llama": 4.0,
        "batch16_vs_transformers": 8.0,
        "stall_p99_ratio": 4.0,
        "own_code_share_32": 0.2,
    }
    assert found.of_medians["decode_vs_llama_512"] == 2.0
    assert set(found.intervals) == set(found.figures)


def test_figures_of_further_weights_have_a_suffix(report: ModuleType) -> None:
    assert report.figures_of(VALUES, "ours_bf16", "_bf16").figures == {"decode_vs_llama_512_bf16": 0.5}


def test_runs_that_do_not_pair_up_give_no_figure(report: ModuleType) -> None:
    with pytest.raises(ValueError, match="shorter"):
        report.figures_of({"decode_ms_512": {"ours": [1.0], "llama": [1.0, 2.0]}}, "ours", "")


def test_lines_are_tokens_a_second(report: ModuleType) -> None:
    assert report.lines_of(VALUES, "decode_ms")["llama"] == [(512, 500.0), (8192, 1000 / 6)]
    assert report.lines_of(VALUES, "throughput")["ours"] == [(1, 50.0), (16, 400.0)]


def test_answers_of_another_computation_give_no_figure(report: ModuleType) -> None:
    same = {"decode_512": {"ours": [1, 2, 3], "llama": [1, 2, 4]}, "batch_0": {"ours": [5], "llama": [6]}}
    assert report.agreement(same, "ours") == {"llama": {"first": 1, "of": 2, "median_prefix": 2}}
    with pytest.raises(RuntimeError, match="0 of 1 first tokens"):
        report.agreement({"batch_0": same["batch_0"]}, "ours")


def test_a_step_reads_weights_and_kv_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    floors = load(monkeypatch, "_floors")
    (tmp_path / "model.safetensors").write_bytes(bytes(3200))
    found = [floors.weight_bytes("some", tmp_path, weights) for weights in ("", "bf16", "int8", "int4")]
    assert found == [3200, 3200, 1600, 1000]
    assert floors.weight_bytes("smollm2", tmp_path, "int4") == 98_362_432
    config = {"model_type": "llama", "num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 9, "hidden_size": 576}))
    assert floors.kv_bytes(tmp_path, 2) == 2 * 23_040


# --- the driver


class Fake:
    """A contender whose process is this one, so that it is never at rest."""

    name = "fake"

    def pids(self) -> list[int]:
        return [os.getpid()]


def test_a_contender_that_computes_while_another_is_measured_is_found(phases: ModuleType) -> None:
    one, other = Fake(), Fake()
    other.name = "other"

    def burn() -> None:
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass

    field = phases.Field([one, other], phases.Measured(), print)
    field.alone(one, lambda: time.sleep(0.3))
    field.check_rest()
    field.alone(one, burn)
    with pytest.raises(RuntimeError, match="other used"):
        field.check_rest()


def test_order_alternates_between_repeats(phases: ModuleType) -> None:
    one, other = Fake(), Fake()
    field = phases.Field([one, other], phases.Measured(), print)
    assert [list(field.in_turn(repeat)) for repeat in (0, 1)] == [[one, other], [other, one]]


def test_stretches_of_text_do_not_begin_alike(phases: ModuleType) -> None:
    text = phases.Text(list(range(5000)))
    taken = [text.take(1000) for _ in range(4)]
    assert len({ids[0] for ids in taken}) == 4
    assert all(len(ids) == 1000 for ids in taken)
    with pytest.raises(ValueError, match="holds 5000"):
        text.take(5000)


def test_a_turn_that_ended_early_gives_no_figure(contender: ModuleType, phases: ModuleType) -> None:
    phases.check_lengths([stream(contender, 1.0, 2.0)], 2)
    with pytest.raises(RuntimeError, match="2 of 3 tokens"):
        phases.check_lengths([stream(contender, 1.0, 2.0)], 3)


def test_streams_run_at_once_and_what_one_raises_is_raised(contender: ModuleType) -> None:
    def run(one: Any, number: int) -> None:
        if number == 1:
            raise ValueError("lost")
        one.receive([number])

    with pytest.raises(ValueError, match="lost"):
        contender.together(run, range(3))
    seen: list[int] = []
    streams = contender.together(
        lambda one, number: one.receive([number]), range(3), lambda streams: seen.append(len(streams))
    )
    assert [one.token_ids for one in streams] == [[0], [1], [2]]
    assert seen == [3]


def test_messages_of_llama_server_are_read_and_errors_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = load(monkeypatch, "_peers_llama")
    lines = [b'data: {"tokens": [1]}\n', b"\n", b'data: {"tokens": [], "stop": true}\n']
    assert list(llama.messages(iter(lines))) == [{"tokens": [1]}, {"tokens": [], "stop": True}]
    with pytest.raises(RuntimeError, match="too long"):
        list(llama.messages(iter([b'error: {"message": "too long"}\n'])))


def test_own_share_is_what_the_forward_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load(monkeypatch, "_speed_ours")
    before = {"engine_step_seconds": 1.0, "engine_forward_seconds": 0.9}
    after = {"engine_step_seconds": 3.0, "engine_forward_seconds": 2.5}
    assert math.isclose(ours.own_share(before, after), 0.2)
    with pytest.raises(RuntimeError, match="no step"):
        ours.own_share(before, before)


def test_time_in_the_forward_is_counted_even_when_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_pair("llama").ours

    class Slow(ForwardStep):
        def advance(self, enough: object = None) -> None:
            time.sleep(0.05)
            raise ZeroDivisionError

    monkeypatch.setattr(model, "begin", lambda *_: Slow())
    scheduler = Scheduler(model, CELL)
    scheduler.add(Session(model).turn(random_ids(5, 1), 2))
    [end] = scheduler.step()
    assert isinstance(end, Ended)
    assert isinstance(end.error, ZeroDivisionError)
    assert 0.05 <= scheduler.counters.forward_seconds < 5


@pytest.mark.model
@pytest.mark.timeout(600)
def test_a_quick_run_prints_its_figures(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        str(FOLDER / "speed.py"),
        "--quick",
        "--without",
        "llama",
        "--plots",
        str(tmp_path),
    ]
    path = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=550
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for figure in ("decode_vs_transformers_192", "batch2_vs_transformers", "stall_p99_ratio", "own_code_share_3"):
        assert told[figure] > 0
        assert len(told["intervals_95"][figure]) == 2
    assert told["own_code_share_3"] < 1
    assert told["bounds"]["read_gb_per_s"] > 0
    assert {"speed_decode_ms.png", "speed_throughput.png"} == {file.name for file in tmp_path.iterdir()}


# --- kernels


def case(kernels: ModuleType, name: str = "one", **changes: Any) -> Any:
    ones = torch.ones(3)
    given = {"run": lambda: ones, "reference": lambda: ones, "nbytes": 100, "multiply_adds": 10} | changes
    return kernels.KernelCase(name, **given)


class Fixed:
    """Floors of 100 bytes, or 1000 multiply-adds, in a millisecond."""

    def sample(self) -> None:
        """Nothing changes."""

    def seconds(self, nbytes: int, multiply_adds: int, kind: str) -> float:
        return max(nbytes / 1e5, multiply_adds / 1e6)

    def told(self) -> dict[str, float]:
        return {}


def test_a_share_is_of_the_larger_floor(kernels: ModuleType) -> None:
    slow = case(kernels, run=lambda: time.sleep(0.01))
    found = kernels.measure(slow, Fixed(), rounds=3, at_least=0.0001)
    assert 0.05 < found["floor_share"]["median"] <= 0.1
    assert found["speedup"]["median"] < 1
    assert found["best_share"] == pytest.approx(found["floor_share"]["max"], rel=0.01)
    computes = case(kernels, run=lambda: time.sleep(0.01), multiply_adds=5000, reference=None)
    found = kernels.measure(computes, Fixed(), rounds=3, at_least=0.0001)
    assert 0.25 < found["floor_share"]["median"] <= 0.5
    assert "speedup" not in found


def test_figures_are_the_worst_share_of_their_cases(kernels: ModuleType) -> None:
    cases = [case(kernels, name, figure="share") for name in ("a", "b")] + [case(kernels, "c")]
    told = {name: {"floor_share": {"median": share}} for name, share in (("a", 0.7), ("b", 0.6), ("c", 0.1))}
    found = kernels.report(cases, told, Fixed())
    assert found["share"] == 0.6
    assert found["kernels"] == told


def test_a_kernel_that_computes_something_else_is_not_timed(kernels: ModuleType) -> None:
    kernels.check_agreement(case(kernels, run=lambda: torch.ones(3) * 1.001))
    with pytest.raises(RuntimeError, match="from its reference"):
        kernels.check_agreement(case(kernels, run=lambda: torch.ones(3) * 1.1))
    with pytest.raises(RuntimeError, match="from its reference"):
        kernels.check_agreement(case(kernels, run=lambda: torch.full((3,), torch.nan)))


def test_names_of_cases_differ(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="called one"):
        kernels.check_names([case(kernels), case(kernels)])


def test_every_file_of_cases_is_found_and_gives_the_issues_figures(kernels: ModuleType) -> None:
    topics = {path.stem.removeprefix("_kernels_") for path in FOLDER.glob("_kernels_*.py")}
    assert topics >= {"attention", "matrix", "scoring", "views"}
    with_figures = {one.figure: one for one in kernels.load_cases(["attention", "scoring"]) if one.figure}
    assert set(with_figures) == {"attention_bandwidth_share", "score_bandwidth_share"}
    with pytest.raises(ValueError, match="nothing_such"):
        kernels.load_cases(["nothing_such"])


@needs_build
def test_what_has_a_figure_is_held_against_its_reference(kernels: ModuleType) -> None:
    for one in kernels.load_cases(["attention", "scoring"]):
        if one.figure:
            with torch.inference_mode():
                assert isinstance(one.run(), torch.Tensor)
                kernels.check_agreement(one)
                wrong = replace(one, reference=lambda one=one: one.reference() * 1.1)
                with pytest.raises(RuntimeError, match="from its reference"):
                    kernels.check_agreement(wrong)
