"""Sequences of calls and crashes against a plain model. With a defence switched off they must find it."""

from __future__ import annotations


def test_every_sequence_leaves_the_store_as_the_plain_model(run_slice):
    outcome = run_slice("state_machine")
    assert outcome.counts["steps"] > 15 * outcome.run


def test_kv_that_is_not_cut_off_with_its_turn_is_found(run_control):
    run_control("state_machine", "no_truncation", 30)
