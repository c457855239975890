"""Sequences of calls and crashes against a plain model. With a defence switched off they must find it."""

from __future__ import annotations

import pytest


def test_every_sequence_leaves_the_store_as_the_plain_model(run_slice):
    outcome = run_slice("state_machine")
    assert outcome.counts["steps"] > 15 * outcome.run


@pytest.mark.parametrize("defence", ["no_request_lookup", "no_truncation"])
def test_a_missing_defence_is_found(run_control, defence: str):
    run_control("state_machine", defence, 30)
