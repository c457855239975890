"""`sessiond doctor`: will the daemon run here?"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sessiond import doctor as checks
from sessiond.cli_output import AsJson, fail, out, print_json

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    model: Annotated[str | None, typer.Option(help="As for serve.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="As for serve.")] = None,
    database_url: Annotated[str | None, typer.Option(help="As for serve.")] = None,
    listen: Annotated[str | None, typer.Option(help="As for serve.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check what the daemon needs, and say how to mend what is not well. Exits with status 1 on any failure."""
    given = {"model": model, "data_dir": data_dir, "database_url": database_url, "listen": listen}
    found = checks.examine(_subject({name: value for name, value in given.items() if value is not None}))
    failed = any(check.verdict is checks.Verdict.FAIL for check in found)
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in found]})
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for check in found:
            text = Text(check.found)
            if check.mend:
                text.append(f"\n→ {check.mend}", style="bold")
            table.add_row(Text(check.verdict.value, style=_STYLES[check.verdict.value]), check.name, text)
        out.print(table)
    if failed:
        raise typer.Exit(1)


def _subject(given: dict[str, Any]) -> checks.Subject:
    """The daemon's settings as `serve` would see them; without its libraries, their defaults."""
    try:
        from pydantic import ValidationError

        from sessiond.config import Settings
    except ImportError:
        host, _, port = given.get("listen", "127.0.0.1:7431").rpartition(":")
        return checks.Subject(
            model=given.get("model", "smollm2"),
            data_dir=given.get("data_dir", Path.home() / ".local" / "share" / "sessiond"),
            database_url=given.get("database_url"),
            host=host or "127.0.0.1",
            port=int(port) if port.isdigit() else 7431,
            threads=os.cpu_count() or 1,
            memory_budget_bytes=8 << 30,
        )
    try:
        settings = Settings(**given)
    except ValidationError as error:
        fail("; ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors()))
    return checks.Subject(
        model=settings.model,
        data_dir=settings.data_dir,
        database_url=settings.database_url,
        host=settings.host,
        port=int(settings.listen.rpartition(":")[2]),
        threads=settings.threads,
        memory_budget_bytes=settings.memory_budget_bytes,
    )
