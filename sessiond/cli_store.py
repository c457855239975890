"""`sessiond verify` and `compact`: the care of the store."""

from __future__ import annotations

from typing import Annotated

import typer

from sessiond.cli_output import (
    AsJson,
    connected,
    enum_name,
    err,
    out,
    plain,
    print_json,
    printable,
    progress_bar,
)
from sessiond.clients import Client
from sessiond.v1 import admin_pb2


@connected
def verify(
    client: Client,
    session_id: Annotated[list[str] | None, typer.Argument(metavar="[SESSION]...", help="Default: all.")] = None,
    recompute: Annotated[float, typer.Option(min=0, max=1, help="Share of cells to compute again.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Chooses the cells.")] = 0,
    repair: Annotated[bool, typer.Option(help="Mend what the token log can mend.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the store. Exits with status 1 if anything is damaged and not repaired."""
    damaged = False
    with progress_bar() as progress:
        for event in client.verify(session_id or [], recompute=recompute, seed=seed, repair=repair):
            if event.HasField("progress"):
                progress("verifying", event.progress.records_done, event.progress.records_total)
            elif event.HasField("finding"):
                damaged |= _is_damage(event.finding)
                _print_finding(event.finding, as_json)
            elif as_json:
                print_json({"summary": plain(event.summary)})
            else:
                summary = event.summary
                err.print(
                    f"{summary.records:,} records, {summary.bytes:,} bytes, "
                    f"{summary.cells_recomputed:,} cells computed again: {sum(summary.findings.values())} findings, "
                    f"{summary.repaired} repaired, {summary.milliseconds / 1000:.1f} s",
                    markup=False,
                )
    if damaged:
        raise typer.Exit(1)


@connected
def compact(
    client: Client,
    purge_deleted: Annotated[bool, typer.Option(help="Erase soft-deleted sessions first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give unused disk space back."""
    with err.status("compacting"):
        response = client.compact(purge_deleted=purge_deleted)
    if as_json:
        print_json(plain(response))
        return
    before, after = response.before, response.after
    freed = before.log_file_bytes + before.blocks_file_bytes - after.log_file_bytes - after.blocks_file_bytes
    err.print(
        f"freed {freed:,} bytes, erased {response.records_erased:,} records and {response.sessions_purged:,} sessions",
        markup=False,
    )


def _is_damage(finding: admin_pb2.Finding) -> bool:
    return finding.severity in (admin_pb2.SEVERITY_REPAIRABLE, admin_pb2.SEVERITY_LOSS) and not finding.repaired


def _print_finding(finding: admin_pb2.Finding, as_json: bool) -> None:
    if as_json:
        print_json({"finding": plain(finding)})
        return
    severity = enum_name(finding, "severity", "SEVERITY_") + (", repaired" if finding.repaired else "")
    where = " ".join(part for part in (finding.session_id, finding.key) if part)
    out.print(printable(f"{severity}: {finding.kind}: {finding.message} ({where})"), markup=False)
