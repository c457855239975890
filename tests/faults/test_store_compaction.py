"""The storage kinds' workload compacts both files again and again; this is the control of what that proves."""

from __future__ import annotations


def test_power_loss_finds_a_compact_copy_that_was_not_synced(run_control):
    run_control("store_power", "compact_no_sync", 10)
