"""KVzip's selector: the tokens its scores keep, those that have none yet, and nothing of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from policy_views import Layer, rows

from sessiond.errors import InvalidConfig
from sessiond.policies.base import LayerView, Selector
from sessiond.policies.kvzip import KVzip
from sessiond.policies.prior import BUDGETS, Prior
from sessiond.policies.registry import parse

L, G, N, TURN = 4, 3, 40, 50


def prior_of(seed: int = 0, n: int = N) -> Prior:
    return Prior(torch.rand(L, G, n, generator=torch.Generator().manual_seed(seed)).half())


def view(prior: Prior | None, turn_start: int = TURN) -> LayerView:
    return replace(Layer(80).view(60, 61, turn_start), prior=prior)


def selector(layer: int = 1, **knobs: object) -> Selector:
    return parse("kvzip", knobs).selector(layer, L)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("layer", range(L))
def test_a_step_reads_what_is_kept_and_what_has_no_score_yet(budget, layer):
    prior = prior_of()
    kept = prior.kept(0.3, budget)[layer]
    wanted = [[p for p in range(N) if kept[g, p]] + list(range(N, TURN)) for g in range(G)]
    assert rows(selector(layer, budget=budget).step(view(prior))) == wanted


def test_a_prior_that_reaches_into_the_turn_is_cut_there():
    kept = prior_of().kept(0.3, "pair")[1]
    found = rows(selector().step(view(prior_of(), 20)))
    assert found == [[p for p in range(20) if kept[g, p]] for g in range(G)]


def test_without_a_prior_everything_takes_part():
    assert selector().step(view(None)) is None
    assert selector().prompt(view(prior_of())) is None


def test_the_answer_is_made_once_and_again_for_another_prior_or_turn_or_after_a_cut():
    one, first = selector(), prior_of()
    answer = one.step(view(first))
    assert one.step(view(first)) is answer
    one.keep(TURN)
    one.renew(0)
    assert one.step(view(first)) is answer
    assert one.nbytes == answer.nbytes
    assert rows(one.step(view(first, TURN + 1))) != rows(answer)
    assert rows(one.step(view(prior_of(1)))) != rows(answer)
    one.keep(TURN - 1)
    assert one.nbytes == 0
    assert rows(one.step(view(first))) == rows(answer)


@pytest.mark.parametrize("knobs", [{"share": 0}, {"share": 1.5}, {"budget": "token"}, {"chunk": 63}])
def test_knobs_outside_their_range_are_refused(knobs):
    with pytest.raises(InvalidConfig) as caught:
        parse("kvzip", knobs)
    assert caught.value.metadata["knob"] in knobs


def test_it_asks_for_a_prior_and_others_do_not():
    assert KVzip().wants_prior
    assert KVzip(chunk=100).prior_chunk == 100
    assert not parse("sieve", {}).wants_prior
