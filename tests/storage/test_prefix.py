from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sessiond.storage.prefix import prefix_hashes, prefix_root

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40).map(lambda ids: np.array(ids, np.uint32))


@given(ids=tokens, cell=st.integers(1, 9), cut=st.integers(0, 4))
def test_incremental_equals_at_once(ids, cell, cut):
    whole = prefix_hashes("t", "id", ids, cell)
    assert len(whole) == len(ids) // cell
    assert all(len(name) == 16 for name in whole)
    head = prefix_hashes("t", "id", ids[: cut * cell], cell)
    parent = head[-1] if head else None
    assert head + prefix_hashes("t", "id", ids[cut * cell :], cell, parent=parent) == whole


@given(ids=tokens.filter(lambda ids: len(ids) > 0), at=st.integers(0, 39))
def test_a_changed_token_changes_its_cell_and_all_later_ones_only(ids, at):
    at %= len(ids)
    changed = ids.copy()
    changed[at] ^= 1
    before, after = prefix_hashes("t", "id", ids, 4), prefix_hashes("t", "id", changed, 4)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (old == new) == (index < at // 4)


def test_tenant_identity_and_boundaries_are_bound():
    ids = np.arange(8)
    names = {
        prefix_hashes(tenant, identity, ids, cell)[-1]
        for tenant, identity in (("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("b", "bc"))
        for cell in (4, 8)
    }
    assert len(names) == 10


def test_the_chain_is_pinned():
    # A change here orphans every stored cell: raise FORMAT first.
    assert prefix_root("default", "model").hex() == "179a5982d29b79291f6bd4a3f5febbce"
    assert prefix_hashes("default", "model", np.arange(4), 4)[0].hex() == "6545f5c287e12ec46c57a088cc5cc5b3"
    assert prefix_hashes("default", "model", np.arange(4, dtype=np.uint16), 4) == prefix_hashes(
        "default", "model", np.arange(4, dtype=np.int64), 4
    )
