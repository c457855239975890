"""Scores on disk: a revision's own lie with it, a branch's are joined, and what is damaged is as if never scored."""

from __future__ import annotations

import pytest
import torch
from care_store import IDENTITY, N_PROMPT, TENANT, change, flip, open_store, put_session

from sessiond.errors import RevisionNotFound
from sessiond.policies.prior import Prior
from sessiond.priors import find_prior, store_prior
from sessiond.storage import keys
from sessiond.storage.batch import LogBatch
from sessiond.types import KVShape

SHAPE = KVShape(2, 3, 8)


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "data") as store:
        put_session(store, kv=False)
        change(store, key("s1-head"), None)
        yield store


def key(revision_id: str) -> bytes:
    return keys.record_key(TENANT, keys.PRIOR, revision_id)


def prior_of(n: int) -> Prior:
    return Prior(torch.rand(2, 3, 400, generator=torch.Generator().manual_seed(1)).half()[:, :, :n])


def chain(store, revision_id: str = "s1-head"):
    return store.log.chain(TENANT, revision_id)


def put(store, n: int, revision_id: str = "s1-head") -> int:
    return store_prior(store, TENANT, chain(store, revision_id), IDENTITY, SHAPE, prior_of(n))


def found(store, revision_id: str = "s1-head", identity: str = IDENTITY) -> Prior | None:
    return find_prior(store, TENANT, chain(store, revision_id), identity, SHAPE)


def test_each_revision_holds_what_was_scored_with_it_and_a_branch_all_of_it(store):
    bytes_a_token = 2 * 3 * 2
    assert put(store, 200, "s1-root") == 200 * bytes_a_token
    assert put(store, 310) == 110 * bytes_a_token
    assert torch.equal(found(store).scores, prior_of(310).scores)
    assert torch.equal(found(store, "s1-root").scores, prior_of(200).scores)
    assert put(store, 310) == 0
    assert put(store, 320) == 120 * bytes_a_token  # the revision's record is written whole again
    assert torch.equal(found(store).scores, prior_of(320).scores)


def test_without_records_there_is_none(store):
    assert found(store) is None


def test_a_damaged_part_hides_what_is_behind_it_and_is_scored_again(store):
    put(store, 200, "s1-root")
    put(store, 310)
    flip(store, key("s1-root"))
    assert found(store) is None
    put(store, 315)
    assert torch.equal(found(store).scores, prior_of(315).scores)


def test_another_models_scores_and_those_of_more_tokens_than_there_are_do_not_count(store):
    put(store, 200, "s1-root")
    assert found(store, identity="other") is None
    batch = LogBatch()
    header = {"identity_id": IDENTITY, "start": 0}
    batch.put_prior(TENANT, "s1-root", header, prior_of(N_PROMPT + 1).to_bytes())
    batch.put_prior(TENANT, "s1-head", header, prior_of(10).to_bytes()[:-1])
    store.log.write(batch).result()
    assert found(store) is None


def test_they_go_with_their_revision_and_do_not_come_back(store):
    branch = chain(store)
    put(store, 310)
    batch = LogBatch()
    batch.delete_revision(TENANT, "s1-head")
    store.log.write(batch).result()
    assert store.log.prior(TENANT, "s1-head") is None
    with pytest.raises(RevisionNotFound):
        store_prior(store, TENANT, branch, IDENTITY, SHAPE, prior_of(320))
