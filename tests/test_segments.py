"""A tree is cut at its forks, its head and its leaves; each segment's KV begins where its parent's ends."""

from __future__ import annotations

import numpy as np
import pytest

from sessiond.history import History, Told
from sessiond.segments import parent_segment, segment_ends


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
    assert segment_ends(history) == ends
    assert [parent_segment(history, set(ends), end) for end in ends] == before


def test_offsets_follow_the_branch() -> None:
    history = tree(None, 0, 0, head=2)
    assert history.ends == (10, 30, 40)
    assert (history.start(1), history.start(2)) == (10, 10)
    assert history.chain(2) == [0, 2]
    assert len(history.ids(2)) == 40
    assert history.n_tokens == 60
