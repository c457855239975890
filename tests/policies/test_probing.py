"""Chunks and probes of a history: sizes, positions and what is quoted."""

from __future__ import annotations

import itertools

import pytest

from sessiond.policies.probing import LEAST, QUOTED, Instruction, plan_probes

ASK = Instruction([901, 902], [911], [921, 922])
IDS = list(range(600))
ROOM = 10_000


@pytest.mark.parametrize(("first", "chunk"), [(4, 100), (4, 64), (200, 100), (10, 5000), (535, 100)])
def test_chunks_join_and_each_probe_repeats_its_own(first, chunk):
    probes = plan_probes(IDS, first, 4, ROOM, ASK, chunk)
    assert [probe.start for probe in probes] == [first, *(probe.end for probe in probes)][:-1]
    assert probes[-1].end == len(IDS)
    for probe in probes:
        assert LEAST // 2 <= probe.end - probe.start <= chunk
        assert probe.position == len(IDS)
        quoted = IDS[max(4, probe.start - QUOTED) : probe.start]
        asked = ASK.whole if probe.start == 4 else [*ASK.before, *quoted, *ASK.after]
        assert probe.token_ids == [*asked, *IDS[probe.start : probe.end]]


def test_chunks_differ_by_one_token_at_most():
    sizes = [probe.end - probe.start for probe in plan_probes(IDS, 4, 4, ROOM, ASK, 130)]
    assert len(sizes) == 5
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("room", [LEAST + ASK.most, 100, 200])
def test_with_little_room_chunks_are_shorter_and_stay_within_it(room):
    probes = plan_probes(IDS, 4, 4, room, ASK)
    assert [probe.start for probe in probes[1:]] == [probe.end for probe in itertools.islice(probes, len(probes) - 1)]
    assert max(probe.position + len(probe.token_ids) for probe in probes) <= len(IDS) + room
    assert len(probes) == -(-(len(IDS) - 4) // (room - ASK.most))


@pytest.mark.parametrize(
    ("first", "room"), [(4, LEAST + ASK.most - 1), (4, 0), (4, -5), (len(IDS) - LEAST + 1, ROOM), (700, ROOM)]
)
def test_with_too_little_room_or_too_few_tokens_there_are_none(first, room):
    assert plan_probes(IDS, first, 4, room, ASK) == []
