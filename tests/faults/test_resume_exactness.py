"""All ways of resuming continue exactly. A restore that is off by one bit is found."""

from __future__ import annotations


def test_every_way_of_resuming_continues_as_if_nothing_had_happened(run_slice):
    run_slice("resume_exactness")


def test_a_restore_that_is_off_by_one_bit_is_found(run_control):
    run_control("resume_exactness", "careless_restore", 1)
