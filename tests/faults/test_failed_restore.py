"""Restores that fail leave the live session alone. Without checksums, or restored into its memory, they do not."""

from __future__ import annotations

import pytest


def test_a_failed_restore_leaves_the_live_session_unchanged(run_slice):
    run_slice("failed_restore")


@pytest.mark.parametrize("defence", ["no_checksum", "restore_over_live"])
def test_a_missing_defence_is_found(run_control, defence: str):
    run_control("failed_restore", defence, 6)
