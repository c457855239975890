from __future__ import annotations

import json
from dataclasses import MISSING, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_samples import cell_ref, request, revision, session, tail_ref

from sessiond.storage.envelope import canonical_json
from sessiond.storage.records import (
    CellRef,
    RequestRecord,
    RevisionRecord,
    SessionRecord,
    TailRef,
    from_header,
    to_header,
)

scalars = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.text(max_size=10)
json_dicts = st.dictionaries(st.text(max_size=6), scalars | st.lists(scalars, max_size=3), max_size=4)
st.register_type_strategy(dict, json_dicts)


def record_strategy(cls):
    known = {
        "policy": json_dicts, "usage": json_dicts, "params": json_dicts, "extra": json_dicts,
        "finished": st.none() | json_dicts, "prefix_hash": st.binary(min_size=16, max_size=16),
        "labels": st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3),
    }  # fmt: skip
    return st.builds(cls, **{name: strategy for name, strategy in known.items() if name in cls.__slots__})


@pytest.mark.parametrize("cls", [SessionRecord, RevisionRecord, RequestRecord, CellRef, TailRef])
def test_any_record_survives_json(cls):
    @given(record_strategy(cls))
    def check(record):
        assert from_header(cls, json.loads(canonical_json(to_header(record)))) == record

    check()


@pytest.mark.parametrize("record", [session(), revision(), request(), cell_ref(), tail_ref()])
def test_unknown_keys_are_ignored_and_missing_ones_named(record):
    cls, header = type(record), to_header(record)
    assert from_header(cls, header | {"from_the_future": [1]}) == record
    for field in fields(cls):
        less = {name: value for name, value in header.items() if name != field.name}
        if field.default is MISSING and field.default_factory is MISSING:
            with pytest.raises(ValueError, match=field.name):
                from_header(cls, less)
        else:
            from_header(cls, less)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation", "1"),
        ("generation", True),
        ("generation", None),
        ("ttl_us", 1.5),
        ("labels", {"a": 1}),
        ("policy", []),
        ("seal", 1),
    ],
)
def test_values_of_the_wrong_type_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        from_header(SessionRecord, to_header(session()) | {field: value})


def test_unknown_state_and_kind_are_refused():
    with pytest.raises(ValueError, match="state"):
        from_header(RequestRecord, to_header(request()) | {"state": "odd"})
    with pytest.raises(ValueError, match="kind"):
        from_header(RevisionRecord, to_header(revision()) | {"kind": "odd"})


def test_bytes_travel_as_hex():
    ref = cell_ref(prefix_hash=b"\xff" * 16)
    assert to_header(ref)["prefix_hash"] == "ff" * 16
    with pytest.raises(ValueError, match="hex"):
        from_header(CellRef, to_header(ref) | {"prefix_hash": "zz"})
    assert from_header(CellRef, to_header(replace(ref, index=4))).index == 4
