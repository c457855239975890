"""Sieve: the index says what the keys say, and a step takes what its mass needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sessiond.errors import InvalidConfig
from sessiond.policies.base import LayerView
from sessiond.policies.keyindex import QuantizedKeys
from sessiond.policies.prior import Prior
from sessiond.policies.registry import parse

G, SHARE, D = 2, 3, 16
SCALING = D**-0.5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(n: int, turn_start: int, *, query: torch.Tensor | None = None, keys: torch.Tensor | None = None) -> LayerView:
    keys = draw(G, n, D, seed=1) if keys is None else keys
    query = draw(G * SHARE, 1, D, seed=2) * 4 if query is None else query
    return LayerView(query, keys, draw(G, n, D, seed=3), n - 1, turn_start, SCALING)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.5), (4, 0.1), (8, 0.02)])
def test_scores_are_those_of_the_keys_up_to_half_a_step(bits, error):
    keys, query = draw(G, 50, D), draw(G, SHARE, D, seed=5)
    index = QuantizedKeys(bits)
    index.extend(keys)
    spread = keys.amax(-1) - keys.amin(-1)
    bound = query.abs().sum(-1)[..., None] * spread[:, None] * error
    assert ((index.scores(query, 50) - query @ keys.transpose(1, 2)).abs() <= bound).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_growing_in_pieces_and_after_a_cut_is_growing_at_once(bits):
    keys, query = draw(G, 3000, D), draw(G, 1, D, seed=5)
    whole, pieces = QuantizedKeys(bits), QuantizedKeys(bits)
    whole.extend(keys)
    other = keys.clone()
    other[:, 700:] = 0
    for end in (1, 10, 1500):
        pieces.extend(other[:, :end])
    pieces.keep(700)
    for end in (900, 3000):
        pieces.extend(keys[:, :end])
    assert torch.equal(whole.scores(query, 3000), pieces.scores(query, 3000))
    held = G * 3000 * (D * bits // 8 + 4)
    assert held <= whole.nbytes <= 1.3 * held


@pytest.mark.parametrize("bits", [2, 4])
def test_heads_that_do_not_fill_their_last_byte(bits):
    keys, query = draw(1, 20, 13), draw(1, 1, 13, seed=5)
    index, whole = QuantizedKeys(bits), QuantizedKeys(8)
    index.extend(keys)
    whole.extend(keys)
    wanted = query @ keys.transpose(1, 2)
    assert torch.allclose(whole.scores(query, 20), wanted, atol=0.2)
    assert (index.scores(query, 20) - wanted).abs().mean() < 1.5


def test_a_key_of_equal_numbers_is_no_division_by_zero():
    index = QuantizedKeys(4)
    index.extend(torch.full((1, 2, D), 0.5))
    assert torch.allclose(index.scores(torch.ones(1, 1, D), 2), torch.full((1, 1, 2), D / 2))


def test_it_takes_the_tokens_with_the_greatest_weights():
    """With eight bits the choice is that of the true weights, mean over a group's heads."""
    seen = view(200, 180)
    chosen = parse("sieve", {"bits": 8, "least": 16, "most": 16}).selector(0, 1).step(seen)
    weights = (seen.grouped[:, :, 0] @ seen.keys.transpose(1, 2) * SCALING).softmax(-1).mean(1)[:, :180]
    for group in range(G):
        best = weights[group].topk(16).indices.tolist()
        assert len(set(best) & set(chosen[group].tolist())) >= 15
    assert chosen.tolist() == chosen.sort(-1).values.tolist()


def test_a_peaked_head_needs_few_and_a_flat_one_many():
    keys = draw(G, 400, D, seed=1)
    query = draw(G * SHARE, 1, D, seed=2)
    policy = parse("sieve", {"least": 16, "most": 390, "mass": 0.9})
    counts = [policy.selector(0, 1).step(view(400, 399, query=query * f, keys=keys)).shape[1] for f in (0.01, 3, 30)]
    assert counts[0] > counts[1] > counts[2] >= 16


def test_the_mass_that_is_asked_is_held():
    seen = view(400, 390)
    chosen = parse("sieve", {"bits": 8, "least": 1, "most": 390, "mass": 0.95}).selector(0, 1).step(seen)
    weights = (seen.grouped[:, :, 0] @ seen.keys.transpose(1, 2) * SCALING).softmax(-1).mean(1)
    held = weights.gather(1, chosen).sum(-1) + weights[:, 390:].sum(-1)
    assert (held >= 0.945).all()


def test_kv_computed_again_is_looked_at_again():
    selector = parse("sieve", {"least": 4, "most": 4, "bits": 8}).selector(0, 1)
    first, second = draw(G, 100, D, seed=1), draw(G, 100, D, seed=9)
    selector.step(view(100, 99, keys=first))
    selector.keep(0)
    fresh = parse("sieve", {"least": 4, "most": 4, "bits": 8}).selector(0, 1)
    assert torch.equal(selector.step(view(100, 99, keys=second)), fresh.step(view(100, 99, keys=second)))


def test_knobs():
    policy = parse("sieve", {"most": 100.0})
    assert parse("sieve", policy.knobs()) == policy
    assert parse("sieve", {"dense_layers": 1}).selector(0, 3) is None
    for bad in ({"bits": 3}, {"mass": 0}, {"mass": 1.5}, {"least": 600}, {"most": 0}, {"dense_layers": -1}):
        with pytest.raises(InvalidConfig) as caught:
            parse("sieve", bad)
        assert caught.value.metadata["range"]


def test_a_prior_decides_between_tokens_that_weigh_the_same_and_no_others():
    keys = torch.zeros(G, 100, D)
    keys[:, 7] = 3.0
    query = torch.ones(G * SHARE, 1, D)
    scores = torch.zeros(2, G, 80)
    scores[1, 0, [20, 60]], scores[1, 1, [3, 79]] = 0.5, 0.9
    scores[0] = 1.0  # another layer's
    selector = parse("sieve", {"least": 3, "most": 3}).selector(1, 2)
    plain = view(100, 90, query=query, keys=keys)
    assert selector.step(plain).tolist() == [[0, 1, 7]] * G
    told = replace(plain, prior=Prior(torch.cat([scores, torch.zeros(2, G, 10)], 2).half()))
    assert selector.step(told).tolist() == [[7, 20, 60], [3, 7, 79]]


def test_a_prior_decides_between_tokens_that_weigh_nothing():
    keys = torch.zeros(G, 100, D)
    keys[:, 7] = 200.0
    query = torch.ones(G * SHARE, 1, D) * 4
    scores = torch.zeros(1, G, 90)
    scores[0, :, [20, 60]] = 0.5
    selector = parse("sieve", {"least": 3, "most": 3}).selector(0, 1)
    told = replace(view(100, 90, query=query, keys=keys), prior=Prior(scores.half()))
    assert selector.step(told).tolist() == [[7, 20, 60]] * G
