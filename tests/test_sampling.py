"""Sampling: the processors of transformers are the reference; the generator has published known answers."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as reference

from sessiond.errors import BadSampling
from sessiond.sampling import Sampler, SamplingParams, philox4x32, support, uniform

VOCAB = 997


def random_logits(seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def reference_scores(params: SamplingParams, context: list[int], logits: torch.Tensor) -> torch.Tensor:
    """The processors in the order of transformers' generate; float32 [V], -inf where removed."""
    chain = LogitsProcessorList()
    if params.logit_bias:
        chain.append(reference.SequenceBiasLogitsProcessor({(i,): b for i, b in params.logit_bias}))
    if params.repetition_penalty != 1.0:
        chain.append(reference.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature > 0:
        chain.append(reference.TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            chain.append(reference.TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            chain.append(reference.TopPLogitsWarper(params.top_p))
        if params.min_p:
            chain.append(reference.MinPLogitsWarper(params.min_p))
    return chain(torch.tensor([context]), logits[None].clone())[0]


KNOBS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": VOCAB},
    {"top_p": 0.01},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"logit_bias": ((3, 5.0), (8, -100.0), (996, 2.5))},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"top_k": 100, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.1, "logit_bias": ((5, 10.0),)},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distribution_equals_that_of_transformers_processors(knobs: dict[str, Any], seed: int) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": 1} | knobs)
    context = [1, 5, 5, 77, 996]
    logits = random_logits(seed)
    expected = reference_scores(params, context, logits).double().softmax(-1).numpy()
    sampler = Sampler(params, VOCAB, context)
    edited = sampler._edit(logits.numpy()) if sampler._edited else logits.numpy()
    ids, weights = support(edited, params)
    got = np.zeros(VOCAB)
    got[slice(None) if ids is None else ids] = weights / weights.sum()
    # Below 1e-40 an fp32 exponential may or may not have become zero.
    assert ((got > 1e-40) == (expected > 1e-40)).all()
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_draw_is_the_inverse_cdf_of_the_reference_distribution(knobs: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": 99} | knobs)
    context = [4, 9]
    logits = random_logits(7)
    cumulative = reference_scores(params, context, logits).double().softmax(-1).cumsum(-1).numpy()
    for index in range(20):
        token_id = Sampler(params, VOCAB, context).sample(logits, index).token_id
        point = uniform(99, index)
        low = cumulative[token_id - 1] if token_id else 0.0
        assert low - 1e-6 <= point <= cumulative[token_id] + 1e-6


@pytest.mark.parametrize("knobs", [k for k in KNOBS if "temperature" not in k], ids=str)
def test_greedy_is_the_argmax_of_biased_and_penalized_logits(knobs: dict[str, Any]) -> None:
    params = SamplingParams(**knobs)
    context = [int(i) for i in random_logits(3).topk(5).indices]
    logits = random_logits(3)
    expected = int(reference_scores(params, context, logits).argmax())
    assert Sampler(params, VOCAB, context).sample(logits, 0).token_id == expected


def test_greedy_ties_go_to_the_lowest_id_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logits = torch.zeros(50, dtype=dtype)
        logits[[17, 31, 40]] = 2
        before = logits.clone()
        assert Sampler(SamplingParams(logit_bias=((2, 0.5),)), 50).sample(logits, 0).token_id == 17
        assert Sampler(SamplingParams(), 50).sample(logits, 0).token_id == 17
        assert torch.equal(logits, before)


def test_ties_at_the_edge_of_the_nucleus_go_to_the_lowest_ids() -> None:
    ids, weights = support(np.zeros(10, np.float32), SamplingParams(temperature=1, seed=0, top_p=0.35))
    assert ids is not None
    assert ids.tolist() == [0, 1, 2, 3]
    assert (weights == 1).all()


@given(st.lists(st.sampled_from([0.0, 1.0, 1.5, 4.0, -7.0, 20.0]), min_size=1, max_size=40), st.floats(0.001, 0.999))
def test_nucleus_is_the_smallest_sufficient_set(values: list[float], top_p: float) -> None:
    logits = np.array(values, np.float32)
    weights = np.exp((logits - logits.max()).astype(np.float64))
    order = sorted(range(len(values)), key=lambda i: (-weights[i], i))
    share = np.cumsum(weights[order]) / weights.sum()
    n = int(np.argmax(share >= top_p)) + 1
    ids, _ = support(logits, SamplingParams(temperature=1, seed=0, top_p=top_p))
    assert ids is not None
    near_edge = np.abs(share - top_p).min() < 1e-6
    assert ids.tolist() == sorted(order[:n]) or near_edge


def test_philox_known_answers() -> None:
    # Random123 kat_vectors, philox4x32 with 10 rounds.
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi_counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(pi_counter, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_numbers_are_uniform_and_differ_by_seed_and_index() -> None:
    numbers = np.array([uniform(seed, index) for seed in range(40) for index in range(250)])
    assert len(set(numbers.tolist())) == len(numbers)
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert uniform(2**64 - 1, 2**40) != uniform(2**64 - 1, 0)


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    expected = logits.softmax(-1).double().numpy() * 8000
    sampler = Sampler(SamplingParams(temperature=1.0, seed=20240), 5)
    drawn = [sampler.sample(logits, index).token_id for index in range(8000)]
    counts = np.bincount(drawn, minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # 4 degrees of freedom, p = 0.001


def test_draw_depends_only_on_seed_index_and_logits() -> None:
    params = SamplingParams(temperature=1.3, top_p=0.9, seed=5)
    rows = [random_logits(row) for row in range(30)]
    one = Sampler(params, VOCAB)
    forward = [one.sample(row, index).token_id for index, row in enumerate(rows)]
    backward = [Sampler(params, VOCAB).sample(rows[index], index).token_id for index in reversed(range(30))]
    assert forward == backward[::-1]
    other = Sampler(params.with_seed(6), VOCAB)
    assert forward != [other.sample(row, index).token_id for index, row in enumerate(rows)]


def test_incremental_repetition_penalty_equals_one_built_from_scratch() -> None:
    params = SamplingParams(temperature=0.9, repetition_penalty=1.4, seed=3)
    context = [1, 2, 2, 5000, -1]  # an id outside the vocabulary is ignored
    running = Sampler(params, VOCAB, context)
    for index in range(60):
        logits = random_logits(index)
        fresh = Sampler(params, VOCAB, context).sample(logits, index)
        assert running.sample(logits, index) == fresh
        context.append(fresh.token_id)
        running.observe(index)
        running.observe(index)
        context.append(index)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(1).bfloat16()
    expected = logits.float().log_softmax(-1)
    params = SamplingParams(temperature=0.5, top_k=3, seed=1, logprobs=7, logit_bias=((0, 9.0),))
    sampled = Sampler(params, VOCAB).sample(logits, 0)
    assert sampled.logprob == pytest.approx(float(expected[sampled.token_id]), abs=1e-5)
    likeliest = sorted(range(VOCAB), key=lambda i: (-float(expected[i]), i))[:7]
    assert [token_id for token_id, _ in sampled.top] == likeliest
    for token_id, logprob in sampled.top:
        assert logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
    alone = Sampler(SamplingParams(logprobs=0), VOCAB).sample(logits, 0)
    assert alone.top == ()
    assert alone.logprob is not None
    assert Sampler(SamplingParams(), VOCAB).sample(logits, 0).logprob is None
    assert len(Sampler(SamplingParams(logprobs=20), 6).sample(torch.randn(6), 0).top) == 6


def test_extreme_logits_and_temperatures_stay_finite() -> None:
    logits = torch.tensor([-math.inf, 3e38, -3e38, 0.0])
    for temperature in (5e-324, 1e-9, 1.0, 100.0):
        params = SamplingParams(temperature=temperature, top_p=0.5, min_p=0.1, seed=0, logprobs=4)
        assert Sampler(params, 4).sample(logits, 0).token_id == 1
    for bad in (torch.tensor([0.0, math.nan]), torch.tensor([-math.inf, -math.inf]), torch.tensor([math.inf, 0])):
        with pytest.raises(AssertionError):
            Sampler(SamplingParams(), 2).sample(bad, 0)


NAN, INF = math.nan, math.inf
BAD: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-0.1, 100.5, NAN, INF, -INF, "1", True)],
    *[("top_p", value) for value in (0.0, -1, 1.01, NAN, INF)],
    *[("top_k", value) for value in (-1, 1.5, 2**31)],
    *[("min_p", value) for value in (-0.1, 1.1, NAN)],
    *[("repetition_penalty", value) for value in (0.0, -1, 101, NAN, INF)],
    *[("seed", value) for value in (-1, 2**64, 1.0)],
    *[("max_tokens", value) for value in (0, -5, 1.0)],
    *[("logprobs", value) for value in (-1, 21, True)],
    *[("logit_bias", value) for value in (((1, NAN),), ((1, 100.5),), ((-1, 1.0),), ((1, 1.0), (1, 2.0)))],
    ("logit_bias", tuple((i, 0.0) for i in range(1025))),
    *[("stop", value) for value in (("",), ("x" * 1025,), ("é" * 513,), ("\ud800",), ("x",) * 17, "x", (3,))],
    *[("stop_token_ids", value) for value in ((-1,), (1.0,), tuple(range(1025)))],
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: ascii(value)[:30])
def test_each_field_refuses_values_outside_its_range(field: str, value: Any) -> None:
    with pytest.raises(BadSampling) as caught:
        SamplingParams(**{field: value})
    assert caught.value.metadata["field"] == field
    assert caught.value.metadata["range"]
    assert len(caught.value.metadata["value"]) <= 200


@pytest.mark.parametrize("knobs", [{"top_k": 11}, {"logit_bias": ((10, 1.0),)}, {"stop_token_ids": (10,)}])
def test_ids_outside_the_vocabulary_are_refused(knobs: dict[str, Any]) -> None:
    params = SamplingParams(**knobs)
    params.check_vocab(11)
    with pytest.raises(BadSampling, match=next(iter(knobs))):
        Sampler(params, 10)


def test_json_round_trip_keeps_every_field() -> None:
    params = SamplingParams(
        0.7, 0.9, 40, 0.05, 1.1, None, ((5, -1.5), (7, 100.0)), ("\n\n", "终"), (2, 0), 256, 5
    ).with_seed(2**64 - 1)
    assert SamplingParams.from_json(json.loads(json.dumps(params.to_json()))) == params
    assert SamplingParams.from_json({}) == SamplingParams()


@pytest.mark.parametrize(
    "record", [{"heat": 1}, {"stop": "x"}, {"logit_bias": [[1]]}, {"logit_bias": 3}, {"seed": "1"}]
)
def test_a_malformed_record_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(BadSampling):
        SamplingParams.from_json(record)
