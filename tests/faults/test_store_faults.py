"""The seeded slice of the storage kinds. Negative controls: with a defence switched off the same run must fail."""

from __future__ import annotations

LOG_WRITES = 8  # a seed whose part of the sweep is writes to the log


def test_nothing_acknowledged_is_lost_or_torn_by_kill_9(run_slice):
    assert run_slice("store_kill").counts["acknowledged"] > 0


def test_kill_finds_tokens_shown_before_they_are_durable(run_control):
    assert run_control("store_kill", "stream_first", 40).lost_tokens > 0


def test_kill_finds_references_written_before_what_they_name(run_control):
    assert any("its KV is not" in line for line in run_control("store_kill", "refs_first", 40).details)


def test_nothing_acknowledged_is_lost_by_a_power_loss(run_slice):
    assert run_slice("store_power").counts["acknowledged"] > 0


def test_power_loss_finds_a_log_that_is_not_synced(run_control):
    assert run_control("store_power", "lmdb_no_sync", 15).lost_tokens > 0


def test_power_loss_finds_a_catalog_that_is_not_synced(run_control):
    assert any("quota" in line for line in run_control("store_power", "sqlite_no_sync", 15).details)


def test_power_loss_finds_names_that_are_not_synced(run_control):
    run_control("store_power", "names_not_synced", 20)


def test_a_full_disk_refuses_writes_only_until_there_is_space(run_slice):
    counts = run_slice("store_disk_full").counts
    assert counts["refused"] == counts["returned"] > 0


def test_without_a_reserve_nothing_can_be_deleted_from_a_full_disk(run_control):
    assert any("nothing can be deleted" in line for line in run_control("store_disk_full", "no_reserve", 6).details)


def test_a_store_that_stays_read_only_after_a_full_disk_is_found(run_control):
    outcome = run_control("store_disk_full", "stay_read_only", 6)
    assert any("there is space again, but" in line for line in outcome.details)


def test_failing_system_calls_are_told_and_never_acknowledged(run_slice):
    assert run_slice("store_io_error").counts["faults_hit"] > 0


def test_failing_calls_find_an_acknowledgement_of_what_was_not_written(run_control):
    assert any(
        "acknowledged after" in line for line in run_control("store_io_error", "false_ack", 30, LOG_WRITES).details
    )


def test_failing_calls_find_a_store_that_goes_on_after_a_failed_fsync(run_control):
    outcome = run_control("store_io_error", "go_on", 30, LOG_WRITES)
    assert any("read_only is False" in line for line in outcome.details)


def test_every_flipped_bit_is_refused_or_harmless(run_slice):
    run_slice("store_bit_flips")


def test_without_checksums_flipped_bits_go_unnoticed(run_control):
    assert run_control("store_bit_flips", "no_checksum", 1000).silent_corruptions > 0


def test_every_damaged_page_and_record_is_refused_or_harmless(run_slice):
    counts = run_slice("store_pages").counts
    assert counts["refused_at_open"] > 0
    assert counts["refused_at_read"] > 0


def test_without_checksums_damaged_pages_go_unnoticed(run_control):
    assert run_control("store_pages", "no_checksum", 120).silent_corruptions > 0


def test_without_a_tally_stale_pages_go_unnoticed(run_control):
    assert run_control("store_pages", "no_tally", 240).silent_corruptions > 0


def test_without_a_look_at_tree_pages_damaged_ones_end_the_process(run_control):
    assert run_control("store_pages", "no_structure", 120).counts["crashed"] > 0
