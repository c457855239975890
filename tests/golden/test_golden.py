"""Data directories of earlier versions, and of this one: all of each is read, and its turns go on."""

from __future__ import annotations

import json
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
from fake_daemon import FakeDaemon
from fake_model import answer_to
from golden_content import TENANT, codecs, described, said

HERE = Path(__file__).parent
VERSIONS = sorted(path.parent.name for path in HERE.glob("*/content.json"))


@pytest.fixture(params=VERSIONS)
def golden(request, tmp_path: Path):
    """(a copy of the directory, what it holds)."""
    folder = HERE / request.param
    with tarfile.open(folder / "data.tar.xz") as archive:
        archive.extractall(tmp_path / "data", filter="data")
    return tmp_path / "data", json.loads((folder / "content.json").read_text())


def test_there_is_one_of_the_current_version():
    assert version("sessiond") in VERSIONS


async def test_all_of_it_reads_as_recorded(golden):
    root, content = golden
    daemon = await FakeDaemon(root).start()
    try:
        assert not daemon.store.lost
        assert not daemon.store.damaged
        assert described(daemon) == content
        assert codecs(daemon) == {"raw", "blosc2-shuffle-zstd"}
    finally:
        await daemon.stop()


async def test_turns_go_on(golden):
    root, content = golden
    daemon = await FakeDaemon(root, detached_turn_seconds=0.0).start()
    try:
        for session_id, told in content.items():
            if told["deleted"]:
                await daemon.sessions.undelete(TENANT, session_id, "")
            history = told["tokens"]
            if told["open"]:
                answer = await said(daemon, session_id, "open", (97,))
                assert answer == answer_to([*history, 97], 20)
                assert answer[: len(told["open"]) - 1] == told["open"][1:]
                history = [*history, 97, *answer]
            assert await said(daemon, session_id, "now", (33, 34)) == answer_to([*history, 33, 34], 20)
    finally:
        await daemon.stop()


async def test_an_old_turn_is_replayed_not_run(golden):
    root, content = golden
    daemon = await FakeDaemon(root).start()
    try:
        for session_id, told in content.items():
            if "talk-1" in told["requests"]:
                assert await said(daemon, session_id, "talk-1", (80, 81, 82)) == answer_to(told["tokens"][:16], 20)
        assert described(daemon) == content
    finally:
        await daemon.stop()
