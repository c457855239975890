"""The seeded slice of the storage kinds. Negative controls: with a defence switched off the same run must fail."""

from __future__ import annotations


def test_nothing_acknowledged_is_lost_or_torn_by_kill_9(run_slice):
    assert run_slice("store_kill").counts["acknowledged"] > 0


def test_kill_finds_tokens_shown_before_they_are_durable(run_control):
    assert run_control("store_kill", "stream_first", 40).lost_tokens > 0


def test_kill_finds_references_written_before_what_they_name(run_control):
    run_control("store_kill", "refs_first", 40)
