"""The k-th write, fsync, open or mmap below the data directory fails, for each k, with each error.

A trial ends with a store that went on, refused with a typed error, or went read-only and said so; never with an
acknowledgement of what was refused. Then the store is opened again without faults: everything acknowledged is there
and it takes writes.

Negative controls: `false_ack` acknowledges what a failed commit held, `go_on` lets writes go on after a failed fsync.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import child
from check import Checker
from faultinject import CALLS, Faults
from oracle import Oracle, read_oracle
from outcome import Outcome
from script import TENANT, session_id
from workload import Workload, session_record

from sessiond import errors
from sessiond.storage.batch import LogBatch
from sessiond.storage.environment import Environment
from sessiond.storage.store import Store

OPTIONS = {"log_map_bytes": 64 << 20, "block_map_bytes": 256 << 20}
SHORT_WRITE = 0
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
NEVER = 1 << 60
SCRIPT = 1  # one script for all trials: then a number names the same call in all of them, or nearly so


@dataclass(frozen=True)
class Fault:
    on_new: bool  # a directory that is being made; otherwise one with a session in it
    call: str
    error: int
    k: int
    persist: bool


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    faults = Faults()
    template = scratch / "template"
    prepare(template)
    todo = list(sweep(scratch, template, faults))
    failures: list[str] = []
    lost = hits = 0
    for i in range(count):
        fault = todo[(seed * count + i) % len(todo)]  # chunks with seeds in a row cover the sweep
        root = scratch / "trial"
        make(root, template, fault.on_new)
        problems, lost_now, hit = trial(root, fault, faults, variant)
        shutil.rmtree(root)
        lost, hits = lost + lost_now, hits + hit
        if problems:
            failures.append(f"seed {seed}: {asdict(fault)}: {problems[:5]}")
    if hits < count * 0.7:  # group commit makes the number of calls differ from run to run
        failures.append(f"seed {seed}: only {hits} of {count} faults took place")
    return Outcome("store_io_error", count, len(failures), lost_tokens=lost, details=failures,
                   counts={"faults_hit": hits})  # fmt: skip


def prepare(template: Path) -> None:
    """A directory that holds a session and a bit."""

    def write() -> None:
        template.mkdir()
        with Store.open(template / "data", **OPTIONS) as store:
            Workload(store, Oracle(template / "oracle"), SCRIPT).run(1)

    assert child.wait(child.fork(write)) == 0


def make(root: Path, template: Path, on_new: bool) -> None:
    if on_new:
        root.mkdir()
    else:
        shutil.copytree(template, root)


def sweep(scratch: Path, template: Path, faults: Faults) -> Iterator[Fault]:
    """Every fault there is, in rounds that each hold every k once; a run without faults counts the calls first."""
    places = []
    for call in CALLS:
        for on_new in (True, False):
            root = scratch / "count"
            make(root, template, on_new)
            code, said = child.ask(lambda: write(root, Fault(on_new, call, errno.EIO, NEVER, False), faults, ""))  # noqa: B023
            assert code == 0, "a run without faults fails"
            shutil.rmtree(root)
            places += [(on_new, call, k) for k in range(1, json.loads(said)["seen"] + 1)]
    for turn in range(len(ERRORS) + 1):
        for on_new, call, k in places:
            choice = (*ERRORS, SHORT_WRITE) if call == "write" else ERRORS
            if turn < len(choice):
                yield Fault(on_new, call, choice[(k + turn) % len(choice)], k, persist=(k // len(choice)) % 2 == 0)


def trial(root: Path, fault: Fault, faults: Faults, variant: str) -> tuple[list[str], int, int]:
    """(problems, tokens lost, whether the fault took place)."""
    code, said = child.ask(lambda: write(root, fault, faults, variant), report=(words := root / "last_words"))
    if code != 0:
        return [f"the writer ended with {code}: {words.read_text()[-1500:] if words.exists() else ''}"], 0, 0
    report = json.loads(said)
    problems: list[str] = report["problems"]
    code, said = child.ask(lambda: reopen(root))
    if code != 0:
        return [*problems, f"after a restart the checker ended with {code}"], 0, report["hits"] > 0
    found: dict[str, Any] = json.loads(said)
    return [*problems, *found["problems"]], found["lost"] + report["lost"], int(report["hits"] > 0)


def write(root: Path, fault: Fault, faults: Faults, variant: str) -> str:
    """Work until a step fails, then look at what the store does; the report as JSON."""
    switch_off(variant)
    oracle = Oracle(root / "oracle")
    report: dict[str, Any] = {"problems": [], "lost": 0}
    data = root / "data"
    faults.arm(data, fault.call, fault.k, fault.error, persist=fault.persist, report=oracle.fd)
    try:
        store = Store.open(data, **OPTIONS)
    except errors.SessiondError:
        store = None
    if store is not None:
        try:
            Workload(store, oracle, SCRIPT).run(1 if fault.on_new else 2)
        except errors.SessiondError as exc:
            report["problems"] += after_failure(store, exc)
        found = Checker(store, read_oracle(root / "oracle"), SCRIPT, live=True).check()
        report["problems"] += [f"while it fails: {problem}" for problem in found.problems]
        report["problems"] += acknowledged_too_much(root / "oracle")
        report["lost"] = found.lost_tokens
        store.close()
    report |= {"seen": faults.seen, "hits": faults.hits}
    return json.dumps(report)


def after_failure(store: Store, exc: errors.SessiondError) -> list[str]:
    """A step failed with `exc`: the log says whether it takes more, and keeps to what it says."""
    log: Environment = store.log._env
    problems = []
    of_the_copy = isinstance(exc, errors.DataDirectoryReadOnly) and "compact" in exc.message
    if type(exc) not in (errors.StoreReadOnly, errors.DiskFull) and not of_the_copy:
        problems.append(f"a failed step raised {exc!r}")
    batch = LogBatch()
    batch.put_session(session_record(999))
    again = store.log.write(batch).exception(30)
    if log.read_only != isinstance(again, errors.StoreReadOnly) or (again and not log.read_only):
        problems.append(f"read_only is {log.read_only}, a later write gives {again!r}")
    if again is None:
        batch = LogBatch()
        batch.delete_session(TENANT, session_id(999))
        store.log.write(batch).result(30)
    return problems


def acknowledged_too_much(oracle: Path) -> list[str]:
    """After a failed write or fsync of an environment's file nothing that needs it may be acknowledged."""
    lines = [json.loads(line) for line in oracle.read_text().split("\n")[:-1]]  # a line may be under way
    at = next((i for i, line in enumerate(lines) if line[0] == "h"), len(lines))
    failed = lines[at][1] if at < len(lines) else ""
    needs = {"/log/data.mdb": {"create", "open", "token", "commit", "discard", "cell", "tail", "purge"},
             "/blocks/data.mdb": {"cell", "tail"}}.get(failed, set())  # fmt: skip
    late = [line for line in lines[at:] if line[0] == "a" and line[1] in needs]
    return [f"acknowledged after {failed} had failed: {late[:3]}"] if late else []


def reopen(root: Path) -> str:
    """Everything promised is there; the store takes writes again and keeps those too."""
    oracle, problems, lost = Oracle(root / "oracle"), [], 0
    with Store.open(root / "data", **OPTIONS) as store:
        found = Checker(store, read_oracle(root / "oracle"), SCRIPT).check()
        problems, lost = [f"after a restart: {problem}" for problem in found.problems], found.lost_tokens
        Workload(store, oracle, SCRIPT).run(1)
        found = Checker(store, read_oracle(root / "oracle"), SCRIPT).check()
        problems += [f"after a restart and more: {problem}" for problem in found.problems]
    return json.dumps({"problems": problems, "lost": lost + found.lost_tokens})


def switch_off(defence: str) -> None:
    if defence == "false_ack":

        def acknowledge(self: Environment, group: list[Any], exc: Exception) -> None:
            self._leave_panic()
            for batch in group:
                batch.done.set_result(None)

        Environment._fail = acknowledge  # type: ignore[method-assign]
    elif defence == "go_on":
        fail = Environment._fail

        def forget(self: Environment, group: list[Any], exc: Exception) -> None:
            fail(self, group, exc)
            self._failed = None

        Environment._fail = forget  # type: ignore[method-assign]
    elif defence:
        raise ValueError(defence)
