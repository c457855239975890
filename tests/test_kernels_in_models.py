"""Whole models whose sizes the compiled kernels take, in bf16: decoding, short inputs and packed steps go through them.

The peer is plain transformers in fp32 with the same weights. Ours keep the residual stream in fp32 and round what
matrices and attention read, so greedy answers may part at a near tie: ours are fed the peer's tokens, and logits are
compared along these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from engine_harness import (
    CELL,
    KERNEL_SIZED,
    Pair,
    RecordingSampler,
    Session,
    drain,
    make_exact_pair,
    make_pair,
    peer_model,
    random_ids,
    tokens_of,
    torch_threads,
)
from kernel_marks import needs_build
from kernel_spy import KernelSpy
from torch import Tensor

from sessiond.cache import SessionCache
from sessiond.model import Feed, Model
from sessiond.sampling import Sampled
from sessiond.scheduler import Scheduler

pytestmark = needs_build

# Largest difference of a logit, over the largest logit of the peer. One rounding to bf16 is off by up to 2^-9 of its
# value; five of them lie on a path through each of three or four layers. Measured: 0.05 at most.
TOLERANCE = 0.1
PROMPTS = (5, 31, 300)
MANY = 70  # rows: more than any tile of the kernels


@pytest.fixture(autouse=True, params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request):
    with torch_threads(request.param):
        yield


@pytest.fixture(params=KERNEL_SIZED)
def pair(request) -> Pair:
    return make_exact_pair(request.param)


@pytest.fixture
def kernels(monkeypatch) -> KernelSpy:
    return KernelSpy(monkeypatch)


class LedSampler(RecordingSampler):
    """Says what it is told instead of what is likeliest."""

    def __init__(self, told: Sequence[int]) -> None:
        super().__init__()
        self.told = told

    def sample(self, logits: Tensor, token_index: int) -> Sampled:
        return replace(super().sample(logits, token_index), token_id=self.told[token_index])


def difference(ours: Tensor, peer: Tensor) -> float:
    return float((ours - peer).abs().max() / peer.abs().max())


def test_several_sessions_along_the_peers_answers(pair, kernels):
    sessions = [Session(pair.ours, f"s{i}") for i in range(len(PROMPTS))]
    caches = [pair.new_peer_cache() for _ in PROMPTS]
    for turn, lengths in enumerate((PROMPTS, (20, 1, MANY))):  # from nothing, then short inputs
        scheduler = Scheduler(pair.ours, CELL)
        expected = []
        kernels.take()
        for session, cache, length in zip(sessions, caches, lengths, strict=True):
            work = session.turn(random_ids(length, seed=10 * turn + length), 16)
            told, logits = pair.peer_generate(session.log, 16, cache)
            work.sampler = session.sampler = LedSampler(told)
            scheduler.add(work)
            expected.append((told, logits))
        events = drain(scheduler)
        for session, (told, logits) in zip(sessions, expected, strict=True):
            assert tokens_of(events, session.name) == told
            assert difference(torch.stack(session.sampler.rows), logits) <= TOLERANCE
            session.log.extend(told)
        assert kernels.take() >= 15 * pair.ours.shape.n_layers  # 15 packed steps at least


@pytest.mark.parametrize("n_rows", [1, 7, MANY])
def test_closer_to_fp32_than_transformers_in_bf16(pair, kernels, request, n_rows):
    """Computed in short pieces, the mean error is at most three quarters of the peer's: half of it, measured."""
    ids = random_ids(150, seed=11)
    cache = pair.ours.new_cache()
    pieces = [ids[start : start + n_rows] for start in range(0, len(ids), n_rows)]
    rows = [
        pair.ours.step([Feed(cache, piece, start * n_rows)], range(len(piece))) for start, piece in enumerate(pieces)
    ]
    assert kernels.take() == len(pieces) * pair.ours.shape.n_layers
    truth = pair.peer_logits(ids)
    ours = (torch.cat(rows) - truth).abs().mean()
    rounded = make_pair(request.node.callspec.params["pair"], torch.bfloat16)
    assert 0 < ours <= 0.75 * (rounded.peer_logits(ids) - truth).abs().mean()


@pytest.mark.parametrize("name", [name for name in KERNEL_SIZED if "sliding_window" in KERNEL_SIZED[name]])
def test_the_comparison_sees_a_wrong_window(name):
    """The tolerance is small enough: without its window a model is far outside it."""
    pair, ids = make_exact_pair(name), random_ids(200, seed=3)
    other = Pair(pair.ours, peer_model(name, sliding_window=4096))
    assert difference(pair.peer_logits(ids), other.peer_logits(ids)) > 3 * TOLERANCE


# --- alone and beside others ---------------------------------------------------------------------------------------


def filled(model: Model, ids: list[int]) -> SessionCache:
    """A cache with the KV of `ids`, the same each time."""
    cache = model.new_cache()
    for start in range(0, len(ids), CELL):
        model.step([Feed(cache, ids[start : start + CELL], start)], [])
    cache.length = len(ids)
    return cache


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_step_is_the_same_alone_and_beside_others(pair, kernels, place):
    """Bit for bit, in the logits and in the KV it writes."""
    logs = [random_ids(length, seed=length) for length in (70, 131, 260)]
    new = [random_ids(length, seed=50 + length) for length in (1, MANY - 4, 3)]
    feeds = [Feed(filled(pair.ours, log), ids, len(log)) for log, ids in zip(logs, new, strict=True)]
    kernels.take()
    together = pair.ours.step(feeds, range(MANY))
    alone = Feed(filled(pair.ours, logs[place]), new[place], len(logs[place]))
    assert kernels.take() > 0
    first = sum(len(ids) for ids in new[:place])
    rows = pair.ours.step([alone], range(len(new[place])))
    assert torch.equal(rows, together[first : first + len(new[place])])
    n_tokens = len(logs[place]) + len(new[place])
    for ours, theirs in ((alone.cache.keys, feeds[place].cache.keys), (alone.cache.values, feeds[place].cache.values)):
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine[:, :n_tokens], other[:, :n_tokens])


@pytest.mark.parametrize("n_sessions", [2, 5, MANY])
def test_a_session_decodes_the_same_alone_and_beside_others(pair, kernels, n_sessions):
    prompts = [random_ids(3 + 17 * i % 150, seed=i) for i in range(n_sessions)]
    together = [Session(pair.ours, f"s{i}") for i in range(n_sessions)]
    scheduler = Scheduler(pair.ours, CELL)
    for session, prompt in zip(together, prompts, strict=True):
        scheduler.add(session.turn(prompt, 8 + n_sessions))
    drain(scheduler)
    assert kernels.take() > 0
    for i in {0, n_sessions // 2, n_sessions - 1}:
        alone = Session(pair.ours, "alone")
        alone.run(prompts[i], 8 + n_sessions)
        assert torch.equal(torch.stack(alone.sampler.rows), torch.stack(together[i].sampler.rows))
