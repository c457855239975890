"""A tree is cut at its forks, its head and its leaves; each segment's KV begins where its parent's ends."""

from __future__ import annotations

import numpy as np
import pytest

from sessiond.history import MAX_REVISIONS, MAX_SEGMENTS, History, Told, too_many
from sessiond.segments import walk
from sessiond.storage.prefix import prefix_hashes


def told(parent: int | None, n: int) -> Told:
    return Told(
        name=f"r{n}",
        parent=parent,
        kind="root" if parent is None else "turn",
        ids=np.arange(n, dtype=np.uint32),
        flags=np.zeros(n, np.uint8),
        n_prompt=n,
        asked=(),
        said=(),
        ended=None,
        finish_reason=None,
        aborted=False,
        usage={},
        computed=0,
        created_us=0,
        request_id="",
    )


def tree(*parents: int | None, head: int) -> History:
    return History(tuple(told(parent, 10 * (i + 1)) for i, parent in enumerate(parents)), head)


@pytest.mark.parametrize(
    ("history", "ends", "before"),
    [
        (tree(None, head=0), [0], [-1]),
        (tree(None, 0, 1, head=2), [2], [-1]),
        (tree(None, 0, 1, head=1), [1, 2], [-1, 1]),  # rolled back, all revisions kept
        (tree(None, 0, 1, 1, 2, head=3), [1, 3, 4], [-1, 1, 1]),
        (tree(None, 0, 0, 0, head=2), [0, 1, 2, 3], [-1, 0, 0, 0]),
    ],
)
def test_segments(history: History, ends: list[int], before: list[int]) -> None:
    found = list(walk("t", "model", history, 4))
    assert [segment.end for segment in found] == ends
    assert [segment.after for segment in found] == before
    for segment in found:
        assert segment.hashes == prefix_hashes("t", "model", history.ids(segment.end), 4)


def test_a_walk_reads_each_revision_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What made a small archive cost hours: the whole branch again for every segment."""
    n = 1500
    parents = [None, *(i // 2 * 2 if i % 2 else i for i in range(n))]
    history = tree(*(None if p is None else max(0, p - 1) for p in parents), head=0)
    monkeypatch.setattr(History, "chain", lambda *_: pytest.fail("a branch was walked from its root"))
    found = list(walk("t", "model", history, 1 << 20))
    assert sum(len(segment.revisions) for segment in found) == len(history.revisions)


def test_a_tree_that_is_too_large_to_carry_says_so() -> None:
    chain = [None, *range(MAX_REVISIONS - 1)]
    assert too_many(chain, len(chain) - 1) == ""
    assert "revisions" in too_many([*chain, 0], 0)
    star = [None, *[0] * (MAX_SEGMENTS - 1)]
    assert too_many(star, 0) == ""
    assert "segments" in too_many([*star, 0], 0)


def test_offsets_follow_the_branch() -> None:
    history = tree(None, 0, 0, head=2)
    assert history.ends == (10, 30, 40)
    assert (history.start(1), history.start(2)) == (10, 10)
    assert history.chain(2) == [0, 2]
    assert len(history.ids(2)) == 40
    assert history.n_tokens == 60
