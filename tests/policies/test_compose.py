"""Policies of policies: rules by layer, choices in few bits, choices among what the prior keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_views import read_out
from torch import Tensor

from sessiond.errors import InvalidConfig
from sessiond.policies.base import LayerView, ModelFacts, Taken
from sessiond.policies.compose import ByPrior, Layers, Viewed
from sessiond.policies.full import Full
from sessiond.policies.prior import Prior
from sessiond.policies.registry import parse
from sessiond.policies.sieve import Sieve, SieveSelector
from sessiond.policies.window import Window, WindowSelector

G, SHARE, D = 2, 3, 16
SIEVE = {"name": "sieve", "least": 8, "most": 8}
WINDOW = {"name": "window", "sinks": 2, "recent": 8}
MODEL = ModelFacts(n_layers=6, n_kv_heads=G, head_dim=D, attending=tuple(range(6)), max_context=1000)
SLIDING = ModelFacts(n_layers=6, n_kv_heads=G, head_dim=D, attending=(2, 5), max_context=1000)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(turn_start: int = 60, n: int = 64, prior: Prior | None = None) -> LayerView:
    keys, values = draw(G, n, D, seed=1), draw(G, n, D, seed=2)
    return LayerView(draw(G * SHARE, 1, D, seed=3), keys, values, n - 1, turn_start, D**-0.5, None, prior)


def inner(seen: LayerView, policy: dict[str, Any] = SIEVE) -> Tensor:
    chosen = parse(policy["name"], {k: v for k, v in policy.items() if k != "name"}).selector(0, 6).step(seen)
    assert isinstance(chosen, Tensor)
    return chosen


def rules(*given: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"layers": layers, "policy": policy} for layers, policy in given]


def test_the_first_rule_that_names_a_layer_holds_there():
    policy = parse("layers", {"rules": rules(("0-1", WINDOW), ("1-3", SIEVE), ("5-", WINDOW))})
    kinds = [type(policy.selector(layer, 6)) for layer in range(6)]
    assert kinds == [WindowSelector, WindowSelector, SieveSelector, SieveSelector, type(None), WindowSelector]


def test_otherwise_holds_where_no_rule_does():
    policy = parse("layers", {"rules": rules(("2", {"name": "full"})), "otherwise": SIEVE})
    assert [policy.selector(layer, 4) is None for layer in range(4)] == [False, False, True, False]


def test_prompts_are_dense_only_if_those_of_all_parts_are():
    assert parse("layers", {"rules": rules(("0", SIEVE))}).dense_prompt
    assert not parse("layers", {"rules": rules(("0", SIEVE)), "otherwise": WINDOW}).dense_prompt
    assert not parse("layers", {"rules": rules(("0", WINDOW), ("0", SIEVE))}).dense_prompt
    for name in ("viewed", "prior"):
        assert parse(name, {"of": SIEVE}).dense_prompt
        assert not parse(name, {"of": WINDOW}).dense_prompt


def test_exact_kv_may_lie_lower_only_if_no_part_reads_all_of_it():
    assert parse("layers", {"rules": rules(("0", SIEVE)), "otherwise": {"name": "int4"}}).offloads
    assert not parse("layers", {"rules": rules(("0", SIEVE))}).offloads
    assert parse("prior", {"of": SIEVE}).offloads
    assert not parse("prior", {}).offloads
    assert parse("viewed", {}).offloads


@pytest.mark.parametrize("layers", ["6", "0-6", "6-", "17"])
def test_a_rule_for_a_layer_outside_the_model_is_refused(layers: str):
    with pytest.raises(InvalidConfig) as caught:
        parse("layers", {"rules": rules((layers, SIEVE))}).fits(MODEL)
    assert caught.value.metadata["knob"] == "rules"
    assert "[0, 5]" in caught.value.metadata["range"]


@pytest.mark.parametrize(("layers", "fit"), [("2", True), ("3-", True), ("5", True), ("1-2", False), ("0", False)])
def test_so_is_one_for_a_sliding_layer(layers: str, fit: bool):
    policy = parse("layers", {"rules": rules((layers, SIEVE))})
    if fit:
        policy.fits(SLIDING)
        return
    with pytest.raises(InvalidConfig) as caught:
        policy.fits(SLIDING)
    assert caught.value.metadata["range"].endswith("2, 5")


@pytest.mark.parametrize("name", ["layers", "viewed", "prior"])
def test_every_part_must_fit(name: str):
    beyond = {"name": "layers", "rules": rules(("9", SIEVE))}
    for knobs in [{"rules": rules(("0", beyond))}, {"rules": rules(("0", SIEVE)), "otherwise": beyond}]:
        with pytest.raises(InvalidConfig):
            parse(name, knobs if name == "layers" else {"of": beyond}).fits(MODEL)


@pytest.mark.parametrize(
    "given",
    [
        [],
        "0-1",
        [{"layers": "0-1"}],
        [{"layers": "0-1", "policy": "sieve"}],
        [{"layers": 1, "policy": SIEVE}],
        [{"layers": "2-1", "policy": SIEVE}],
        [{"layers": "-1", "policy": SIEVE}],
        [{"layers": "all", "policy": SIEVE}],
        [{"layers": "0", "policy": SIEVE, "share": 1}],
    ],
    ids=str,
)
def test_rules_that_say_nothing_are_refused(given: Any):
    with pytest.raises(InvalidConfig) as caught:
        parse("layers", {"rules": given})
    assert caught.value.metadata["policy"] == "layers"
    assert caught.value.metadata["knob"] == "rules"
    assert caught.value.metadata["range"]


def test_a_fault_of_a_part_is_told_as_that_parts():
    with pytest.raises(InvalidConfig) as caught:
        parse("viewed", {"of": {**SIEVE, "bits": 3}})
    assert caught.value.metadata["policy"] == "sieve"
    assert caught.value.metadata["knob"] == "bits"


@pytest.mark.parametrize(("bits", "error"), [(8, 0.03), (4, 0.4), (2, 1.6)])
def test_viewed_reads_the_inner_choice_in_few_bits(bits: int, error: float):
    seen = view()
    taken = read_out(parse("viewed", {"of": SIEVE, "bits": bits}).selector(0, 6).step(seen), torch.float32)
    chosen = inner(seen)
    assert torch.equal(taken.positions, chosen)
    assert taken.form == f"int{bits}"
    for form, exact in ((taken.keys, seen.keys), (taken.values, seen.values)):
        at = exact.gather(1, chosen[..., None].expand(-1, -1, D))
        assert 0 < (form - at).abs().max() < error


@pytest.mark.parametrize("of", [{"name": "full"}, {"name": "quest", "budget": 100, "dense_layers": 0}])
def test_viewed_reads_all_where_the_inner_policy_takes_all(of: dict[str, Any]):
    seen = view()
    taken = read_out(parse("viewed", {"of": of, "bits": 4}).selector(0, 6).step(seen), torch.float32)
    plain = read_out(parse("int4", {}).selector(0, 6).step(seen), torch.float32)
    assert torch.equal(taken.positions, plain.positions)
    assert torch.equal(taken.keys, plain.keys)
    assert torch.equal(taken.values, plain.values)


def test_viewed_prompts_too_where_the_inner_policy_chooses_for_them():
    taken = parse("viewed", {"of": WINDOW}).selector(0, 6).prompt(view())
    assert isinstance(taken, Taken)
    assert torch.equal(taken.positions, inner(view(), WINDOW))


def kept(scores: Tensor, share: float, turn_start: int) -> list[set[int]]:
    """Positions that each head may choose, by sorting."""
    n = scores.shape[1]
    best = [sorted(range(n), key=lambda p: -row[p])[: round(share * n)] for row in scores.tolist()]
    return [{p for p in [*row, *range(n, turn_start)] if p < turn_start} for row in best]


@pytest.mark.parametrize("n_scored", [1, 40, 60, 64])
def test_prior_leaves_of_the_inner_choice_what_it_keeps(n_scored: int):
    """60 tokens are history: those that came after the scores stay."""
    prior = Prior(torch.stack([draw(G, n_scored, seed=s).sigmoid() for s in range(6)]))
    seen = view(prior=prior)
    for of, chosen in ((SIEVE, inner(seen)), ({"name": "full"}, torch.arange(60).expand(G, -1))):
        left = parse("prior", {"of": of, "share": 0.25}).selector(4, 6).step(seen)
        allowed = kept(prior.scores[4], 0.25, 60)
        for row, mine, may in zip(left.tolist(), chosen.tolist(), allowed, strict=True):
            real = [p for p in row if p >= 0]
            assert real == [p for p in mine if p in may]
            assert row == real + [-1] * (len(row) - len(real))


def test_prior_keeps_the_form_that_the_inner_choice_came_in():
    prior = Prior(draw(6, G, 60, seed=7).sigmoid())
    seen = view(prior=prior)
    whole = read_out(parse("int8", {}).selector(0, 6).step(seen), torch.float32)
    narrowed = parse("prior", {"of": {"name": "int8"}, "share": 0.5}).selector(0, 6).step(seen)
    left = read_out(narrowed, torch.float32)
    assert (whole.whole, left.whole) == (True, False)
    assert left.positions.shape == (G, 30)
    index = left.positions[..., None].expand(-1, -1, D)
    assert torch.equal(left.keys, whole.keys.gather(1, index))
    assert torch.equal(left.values, whole.values.gather(1, index))


def test_without_a_prior_it_is_the_inner_policy():
    assert torch.equal(parse("prior", {"of": SIEVE}).selector(0, 6).step(view()), inner(view()))
    assert parse("prior", {}).selector(0, 6).step(view()) is None


def test_another_prior_is_looked_at():
    selector = parse("prior", {"share": 0.1}).selector(0, 6)
    one, other = (Prior(draw(6, G, 60, seed=seed).sigmoid()) for seed in (7, 8))
    first, second = selector.step(view(prior=one)), selector.step(view(prior=other))
    assert not torch.equal(first, second)
    assert torch.equal(second, parse("prior", {"share": 0.1}).selector(0, 6).step(view(prior=other)))


def test_wrappers_hold_wrappers_and_tell_their_knobs():
    nested = {"of": {"name": "prior", "of": {"name": "viewed", "of": SIEVE, "bits": 8}, "share": 0.5}, "bits": 2}
    policy = parse("viewed", nested)
    assert policy == Viewed(ByPrior(Viewed(Sieve(least=8, most=8), 8), 0.5), 2)
    assert policy.knobs()["of"]["of"]["of"]["name"] == "sieve"
    taken = policy.selector(0, 6).step(view())
    assert taken.form == "int2"
    assert torch.equal(taken.positions, inner(view()))


def test_rules_are_told_as_they_were_given():
    knobs = parse("layers", {"rules": rules(("0-1", WINDOW), ("5", SIEVE), ("2-", WINDOW))}).knobs()
    assert [rule["layers"] for rule in knobs["rules"]] == ["0-1", "5", "2-"]
    assert knobs["rules"][0]["policy"] == WINDOW
    assert knobs["otherwise"] == {"name": "full"}
    parts = parse("layers", knobs)
    assert isinstance(parts, Layers)
    assert [type(rule.policy) for rule in parts.rules] == [Window, Sieve, Window]
    assert parts.otherwise == Full()
