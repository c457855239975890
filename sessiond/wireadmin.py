"""What the Admin service says: domain values to protobuf. No behaviour."""

from __future__ import annotations

from sessiond.care import Summary
from sessiond.diskuse import DiskTotals
from sessiond.storage import keys
from sessiond.storage.findings import Finding, Severity
from sessiond.v1 import admin_pb2 as admin
from sessiond.v1 import types_pb2 as types
from sessiond.verify import Progress

SEVERITIES = {
    Severity.NOTICE: admin.SEVERITY_NOTICE,
    Severity.REPAIRABLE: admin.SEVERITY_REPAIRABLE,
    Severity.LOSS: admin.SEVERITY_LOSS,
}


def disk_usage(totals: DiskTotals, free_bytes: int) -> admin.DiskUsage:
    return admin.DiskUsage(
        log_file_bytes=totals.log_file,
        blocks_file_bytes=totals.blocks_file,
        kv_coded_bytes=totals.coded,
        kv_raw_bytes=totals.raw,
        index_bytes=totals.index,
        free_bytes=free_bytes,
    )


def verify_event(step: Finding | Progress | Summary) -> admin.VerifyStoreResponse:
    if isinstance(step, Finding):
        return admin.VerifyStoreResponse(finding=_finding(step))
    if isinstance(step, Progress):
        progress = admin.VerifyProgress(records_done=step.records, records_total=step.total, bytes_done=step.n_bytes)
        return admin.VerifyStoreResponse(progress=progress)
    summary = admin.VerifySummary(
        records=step.records,
        bytes=step.n_bytes,
        cells_recomputed=step.cells_recomputed,
        cells_other_profile=step.cells_other_profile,
        findings={severity.name.lower(): count for severity, count in step.findings.items()},
        repaired=step.repaired,
        milliseconds=step.milliseconds,
    )
    return admin.VerifyStoreResponse(summary=summary)


def _finding(finding: Finding) -> admin.Finding:
    span = finding.tokens
    return admin.Finding(
        severity=SEVERITIES[finding.severity],
        kind=finding.kind,
        tenant=finding.tenant,
        session_id=finding.session_id,
        key=keys.readable(finding.key) if finding.key else "",
        tokens=types.TokenSpan(start=span.start, end=span.end) if span else None,
        message=finding.message,
        repaired=finding.repaired,
    )
