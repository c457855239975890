"""Streams dropped at a random message, asked for again. Without the lookup of requests, turns run twice."""

from __future__ import annotations


def test_a_turn_whose_stream_is_dropped_runs_once(run_slice):
    run_slice("dropped_retries")


def test_turns_run_twice_if_requests_are_not_looked_up(run_control):
    run_control("dropped_retries", "no_request_lookup", 48, shows=lambda outcome: outcome.turns_twice > 0)
