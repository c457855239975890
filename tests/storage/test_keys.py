from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond import errors
from sessiond.storage import keys
from sessiond.types import Part

names = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=12)


@given(a=st.tuples(names, names, names), b=st.tuples(names, names, names))
def test_different_tenants_and_ids_never_share_a_key(a, b):
    key_a = keys.record_key(a[0], keys.REQUEST, a[1], a[2])
    key_b = keys.record_key(b[0], keys.REQUEST, b[1], b[2])
    assert (key_a == key_b) == (a == b)


@given(tenant=names, other=names, ids=st.lists(names, min_size=1, max_size=2))
def test_no_key_lies_in_another_tenants_range(tenant, other, ids):
    key = keys.record_key(tenant, keys.REQUEST, *ids)
    assert key.startswith(keys.tenant_prefix(other)) == (tenant == other)
    assert keys.tenant_prefix(tenant) < key < keys.after(keys.tenant_prefix(tenant))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", "s1"), ("as", "1")),
        (("a\1", "b"), ("a", "\1b")),
        (("a/b", "c"), ("a", "b/c")),
    ],
)
def test_shifted_boundaries_do_not_collide(left, right):
    assert keys.record_key(left[0], keys.SESSION, left[1]) != keys.record_key(right[0], keys.SESSION, right[1])


@pytest.mark.parametrize("tenant", ["", "a\0b", "x" * 129, "ü" * 65, "\ud800"])
def test_bad_tenants_are_refused(tenant):
    with pytest.raises(errors.BadRequest):
        keys.tenant_prefix(tenant)


def test_the_longest_names_fit_lmdb():
    longest = keys.record_key("t" * 128, keys.REQUEST, "s" * 64, "q" * 128)
    assert len(longest) <= 511
    assert len(keys.kv_key(keys.kv_owner_prefix("t" * 128, keys.KV_TAIL, b"r" * 64, 1), 0, Part.K, 0)) <= 511
    for kind, ids in ((keys.SESSION, ("s" * 65,)), (keys.REQUEST, ("s", "q" * 129)), (keys.SESSION, ("",))):
        with pytest.raises(errors.BadRequest):
            keys.record_key("t", kind, *ids)


def test_readable_names_what_people_know():
    assert keys.readable(keys.record_key("acme", keys.REQUEST, "s", "q")) == "acme/request/s/q"
    assert keys.readable(keys.tokens_key("acme", "r", 5)) == "acme/tokens/r/5"
    assert keys.readable(keys.cell_ref_key("acme", bytes(16))) == "acme/cell-ref/" + "00" * 16
    assert keys.readable(keys.global_key(keys.IDENTITY, "i")) == "-/identity/i"
    tail = keys.kv_owner_prefix("acme", keys.KV_TAIL, b"rev", 2)
    assert keys.readable(keys.kv_key(tail, 128, Part.V, 15)) == "acme/kv-tail/rev/g2/@128/V/layer15/head0"


@given(st.binary(max_size=60))
def test_readable_never_fails(raw):
    assert isinstance(keys.readable(raw), str)
