"""Will the daemon run here? Each check says what it found and, where that is not well, how to mend it.

Nothing is changed, downloaded or created; torch and transformers are not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sessiond.doctor_check import Check, Verdict
from sessiond.doctor_machine import check_cpu, check_kernels, check_libraries, check_memory, check_python, check_sqlite
from sessiond.doctor_place import check_data_dir, check_database, check_disk, check_model, check_port

__all__ = ["Check", "Subject", "Verdict", "examine"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The daemon's settings that can be wrong for this machine."""

    model: str
    data_dir: Path
    database_url: str | None
    host: str
    port: int
    threads: int
    memory_budget_bytes: int


def examine(subject: Subject) -> list[Check]:
    """Run every check, in the order in which to mend what they find."""
    checks: list[Callable[[], Iterator[Check]]] = [
        check_python,
        check_libraries,
        check_sqlite,
        lambda: check_cpu(subject.threads),
        check_kernels,
        lambda: check_memory(subject.memory_budget_bytes),
        lambda: check_data_dir(subject.data_dir),
        lambda: check_disk(subject.data_dir),
        lambda: check_database(subject.database_url),
        lambda: check_model(subject.model),
        lambda: check_port(subject.host, subject.port),
    ]
    return [found for check in checks for found in check()]
