"""The seeded slice of the storage kinds. Negative controls: with a defence switched off the same run must fail."""

from __future__ import annotations

from collections.abc import Callable

from outcome import Outcome

LOG_WRITES = 8  # a seed whose part of the sweep is writes to the log


def tells(text: str) -> Callable[[Outcome], bool]:
    return lambda outcome: any(text in line for line in outcome.details)


def silent(outcome: Outcome) -> bool:
    return outcome.silent_corruptions > 0


def test_nothing_acknowledged_is_lost_or_torn_by_kill_9(run_slice):
    assert run_slice("store_kill").counts["acknowledged"] > 0


def test_kill_finds_tokens_shown_before_they_are_durable(run_control):
    run_control("store_kill", "stream_first", 40, shows=lambda outcome: outcome.lost_tokens > 0)


def test_kill_finds_references_written_before_what_they_name(run_control):
    run_control("store_kill", "refs_first", 40, shows=tells("its KV is not"))


def test_nothing_acknowledged_is_lost_by_a_power_loss(run_slice):
    assert run_slice("store_power").counts["acknowledged"] > 0


def test_power_loss_finds_a_log_that_is_not_synced(run_control):
    run_control("store_power", "lmdb_no_sync", 15, shows=lambda outcome: outcome.lost_tokens > 0)


def test_power_loss_finds_a_catalog_that_is_not_synced(run_control):
    run_control("store_power", "sqlite_no_sync", 15, shows=tells("quota"))


def test_power_loss_finds_names_that_are_not_synced(run_control):
    run_control("store_power", "names_not_synced", 20)


def test_a_full_disk_refuses_writes_only_until_there_is_space(run_slice):
    counts = run_slice("store_disk_full").counts
    assert counts["refused"] == counts["returned"] > 0


def test_without_a_reserve_nothing_can_be_deleted_from_a_full_disk(run_control):
    run_control("store_disk_full", "no_reserve", 6, shows=tells("nothing can be deleted"))


def test_a_store_that_stays_read_only_after_a_full_disk_is_found(run_control):
    run_control("store_disk_full", "stay_read_only", 6, shows=tells("there is space again, but"))


def test_failing_system_calls_are_told_and_never_acknowledged(run_slice):
    assert run_slice("store_io_error").counts["faults_hit"] > 0


def test_failing_calls_find_an_acknowledgement_of_what_was_not_written(run_control):
    run_control("store_io_error", "false_ack", 30, LOG_WRITES, shows=tells("acknowledged after"))


def test_failing_calls_find_a_store_that_goes_on_after_a_failed_fsync(run_control):
    run_control("store_io_error", "go_on", 30, LOG_WRITES, shows=tells("read_only is False"))


def test_every_flipped_bit_is_refused_or_harmless(run_slice):
    run_slice("store_bit_flips")


def test_without_checksums_flipped_bits_go_unnoticed(run_control):
    run_control("store_bit_flips", "no_checksum", 1000, shows=silent)


def test_every_damaged_page_and_record_is_refused_or_harmless(run_slice):
    counts = run_slice("store_pages").counts
    assert counts["refused_at_open"] > 0
    assert counts["refused_at_read"] > 0


def test_without_checksums_damaged_pages_go_unnoticed(run_control):
    run_control("store_pages", "no_checksum", 120, shows=silent)


def test_without_a_tally_stale_pages_go_unnoticed(run_control):
    run_control("store_pages", "no_tally", 240, shows=silent)


def test_without_a_look_at_tree_pages_damaged_ones_end_the_process(run_control):
    run_control("store_pages", "no_structure", 120, shows=lambda outcome: outcome.counts["crashed"] > 0)


def test_without_the_page_count_of_large_values_later_writes_break_the_store(run_control):
    run_control("store_pages", "no_page_count", 500)
