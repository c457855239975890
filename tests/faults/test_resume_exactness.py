"""All ways of resuming continue exactly. A restore that is off by one bit, or a tail that is not kept, is found."""

from __future__ import annotations

import pytest


def test_every_way_of_resuming_continues_as_if_nothing_had_happened(run_slice):
    run_slice("resume_exactness")


@pytest.mark.parametrize("defence", ["careless_restore", "no_tail"])
def test_a_resume_that_is_not_exact_is_found(run_control, defence: str):
    run_control("resume_exactness", defence, 4)
