"""Every supported architecture against transformers' own `generate` and forward, as tiny random fp32 models.

The peer is an instance of its own with eager attention and its own DynamicCache. Ours is read from the peer's files
and driven by the real Scheduler: canonical cells, provisional pieces, packed decodes.
"""

from __future__ import annotations

import pytest
import torch
from engine_harness import (
    ARCHITECTURES,
    CELL,
    VOCAB,
    WINDOWED,
    Pair,
    Session,
    StepSpy,
    config_of,
    drain,
    make_pair,
    peer_model,
    random_ids,
    tokens_of,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from sessiond.errors import ModelUnsupported
from sessiond.model import SUPPORTED, Feed, Model
from sessiond.scheduler import Scheduler

pytestmark = pytest.mark.usefixtures("one_thread")

# Largest difference of a logit, over the largest logit of the peer. Measured: 5e-6 at most.
TOLERANCE = 2e-5
LENGTHS = (1, 63, 127, 128, 129, 300)


@pytest.fixture(params=ARCHITECTURES)
def pair(request) -> Pair:
    return make_pair(request.param)


def difference(ours: Tensor, peer: Tensor) -> float:
    return float((ours - peer).abs().max() / peer.abs().max())


def assert_same_turn(pair: Pair, session: Session, new_ids: list[int], n_new: int, cache) -> None:
    """Run a turn here and there; equal tokens, close logits."""
    tokens = session.run(new_ids, n_new)
    expected, logits = pair.peer_generate(session.log[:-n_new], n_new, cache)
    assert_same(session, tokens, expected, logits)


def assert_same(session: Session, tokens: list[int], expected: list[int], logits: Tensor) -> None:
    # Equal tokens prove something only where the best two logits are further apart than the tolerance.
    best = logits.topk(2).values
    assert ((best[:, 0] - best[:, 1]) > 2 * TOLERANCE * logits.abs().max()).all(), "choose another seed"
    assert tokens == expected
    assert difference(torch.stack(session.sampler.rows), logits) <= TOLERANCE


def test_every_supported_architecture_is_here():
    assert {config["model_type"] for config in ARCHITECTURES.values()} == set(SUPPORTED)


@pytest.mark.parametrize("first", LENGTHS)
def test_turns_of_odd_lengths(pair, first):
    session, cache = Session(pair.ours), pair.new_peer_cache()
    at = LENGTHS.index(first)
    for turn, length in enumerate((LENGTHS * 2)[at : at + 3]):
        assert_same_turn(pair, session, random_ids(length, seed=100 * at + turn), 3 + turn, cache)


def test_a_long_conversation(pair):
    session, cache = Session(pair.ours), pair.new_peer_cache()
    for turn, length in enumerate((300, 1, 129, 63, 128, 127, 1)):
        assert_same_turn(pair, session, random_ids(length, seed=turn), 12, cache)
    assert len(set(session.log)) > VOCAB // 2
    # sealing replaces provisional KV; the conversation goes on as before
    session.seal()
    assert session.cache.sealed == len(session.log) // CELL * CELL
    assert_same_turn(pair, session, random_ids(5, seed=99), 12, cache)


def test_sessions_decoding_together(pair, monkeypatch):
    spy = StepSpy(pair.ours)
    monkeypatch.setattr(pair.ours, "begin", spy)
    sessions = [Session(pair.ours, f"s{i}") for i in range(3)]
    prompts = [random_ids(length, seed=length) for length in (5, 129, 300)]
    scheduler = Scheduler(pair.ours, CELL)
    for session, prompt in zip(sessions, prompts, strict=True):
        scheduler.add(session.turn(prompt, 16))
    events = drain(scheduler)
    assert sum(len(feeds) == 3 for feeds in spy.steps) >= 10
    for session, prompt in zip(sessions, prompts, strict=True):
        expected, logits = pair.peer_generate(prompt, 16, pair.new_peer_cache())
        assert_same(session, tokens_of(events, session.name), expected, logits)


def test_rows_of_several_sessions_in_one_step(pair):
    """Any mix of feeds: every row is what the peer computes for that session alone, without any cache."""
    logs = [random_ids(length, seed=7 * length) for length in (1, 64, 200, 331)]
    caches = [pair.ours.new_cache() for _ in logs]
    cuts = [0, 63, 70, 201]
    for log, cache, cut in zip(logs, caches, cuts, strict=True):
        if cut:
            pair.ours.step([Feed(cache, log[:cut], 0)], [])
    feeds = [Feed(cache, log[cut:], cut) for log, cache, cut in zip(logs, caches, cuts, strict=True)]
    n_rows = sum(len(feed.ids) for feed in feeds)
    ours = pair.ours.step(feeds, range(n_rows))
    assert ours.shape == (n_rows, VOCAB)
    peer = torch.cat([pair.peer_logits(log)[cut:] for log, cut in zip(logs, cuts, strict=True)])
    assert difference(ours, peer) <= TOLERANCE


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_counts(name):
    """These tests can fail: another window, even by one token, changes the logits a hundred times the tolerance."""
    pair, window = make_pair(name), ARCHITECTURES[name]["sliding_window"]
    session, ids = Session(pair.ours), random_ids(300, seed=3)
    session.run(ids, 1)
    row = session.sampler.rows[0]
    assert difference(row, pair.peer_logits(ids)[-1]) <= TOLERANCE
    for other in (None, window + 1, window - 1):
        changed = {} if other else {"use_sliding_window": False} if "use_sliding_window" in ARCHITECTURES[name] else {}
        peer = peer_model(name, sliding_window=other or 4096, **changed)
        logits = Pair(pair.ours, peer).peer_logits(ids)
        assert difference(row, logits[-1]) > 100 * TOLERANCE
        shorter = min(window, other or window)
        assert difference(logits[:shorter], pair.peer_logits(ids)[:shorter]) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_is_as_close_to_fp32_as_transformers(name):
    """In bf16 both round differently; ours may be off by no more than half again the peer's mean error."""
    exact, rounded = make_pair(name), make_pair(name, torch.bfloat16)
    ids = random_ids(300, seed=11)
    cache = rounded.ours.new_cache()
    rows = []
    for start in range(0, len(ids), CELL):
        piece = ids[start : start + CELL]
        rows.append(rounded.ours.step([Feed(cache, piece, start)], range(len(piece))))
    with torch.inference_mode():
        weights = {key: value.float() for key, value in rounded.peer.state_dict().items()}
        reference = peer_model(name)
        reference.load_state_dict(weights)
        truth = Pair(exact.ours, reference).peer_logits(ids)
    ours = (torch.cat(rows) - truth).abs().mean()
    peer = (rounded.peer_logits(ids) - truth).abs().mean()
    assert 0 < ours <= 1.5 * peer


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_rope_that_depends_on_the_length_is_refused(rope_type):
    """transformers picks these frequencies by the longest position of a step: a session's KV would depend on others."""
    rope = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    config = config_of(
        "phi3" if rope_type == "longrope" else "llama", hidden_size=48, rope_parameters=rope, head_dim=12
    )
    with pytest.raises(ModelUnsupported, match=rope_type):
        Model(AutoModelForCausalLM.from_config(config))
