"""Scores by reconstruction: those of the model's own attention; and a cache that shows no trace of the probes."""

from __future__ import annotations

import pytest
import torch
from engine_harness import CELL, Session, StepSpy, drain, make_pair, random_ids, step_until

from sessiond.cache import SessionCache
from sessiond.idlework import ScoreWork
from sessiond.policies.prior import ALWAYS, Prior
from sessiond.policies.probing import Instruction, plan_probes
from sessiond.policies.registry import parse
from sessiond.scheduler import Scheduler
from sessiond.stepevents import Ended, Scored
from sessiond.zipping import SINKS, Scoring, score

ASK = Instruction(random_ids(7, 91), random_ids(5, 92), random_ids(3, 93))
N_SYSTEM = 9


def filled(model, n: int, name: str = "s", seed: int = 1) -> Session:
    session = Session(model, name, log=random_ids(n + 1, seed))
    session.seal()
    session.run([], 1)
    session.cache.truncate(n, CELL)
    del session.log[n + 1 :]
    return session


def scored(session: Session, chunk: int = 2000, **options):
    return score(session.model, session.cache, session.log, ASK, n_system=N_SYSTEM, chunk=chunk, **options)


def work_of(session: Session, chunk: int = 2000) -> ScoreWork:
    room = session.model.max_context - session.cache.length
    options = {"n_system": N_SYSTEM, "room": room, "piece": CELL, "chunk": chunk}
    return ScoreWork(session.name, Scoring(session.cache, session.log, ASK, **options))


def state(cache: SessionCache) -> tuple[object, ...]:
    """All its memory, and what it says of it."""
    return (cache._raw.tobytes(), cache.length, cache.sealed, cache.borrowed, cache.epoch, cache._written)


@torch.inference_mode()
def by_transformers(pair, ids: list[int], first: int, chunk: int) -> torch.Tensor:
    """Eager attention over history and probe, with the weights of other columns left out of each sum: [L, G, n]."""
    n, n_groups = len(ids), pair.ours.shape.n_kv_heads
    parts = []
    for probe in plan_probes(ids, first, N_SYSTEM, 1000, ASK, chunk):
        out = pair.peer(torch.tensor([ids + probe.token_ids]), output_attentions=True, use_cache=False)
        layers = []
        for weights in out.attentions:
            rows = weights[0, :, n:]
            rest = rows[..., :N_SYSTEM].sum(-1) + rows[..., n:].sum(-1)
            chunk_weights = rows[..., probe.start : probe.end]
            share = chunk_weights / (rest + chunk_weights.sum(-1))[..., None]
            layers.append(share.amax(1).view(n_groups, -1, probe.end - probe.start).amax(1))
        parts.append(torch.stack(layers))
    return torch.cat(parts, 2)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(("chunk", "piece"), [(2000, 128), (100, 128), (100, 37)])
def test_scores_are_those_of_transformers_attention(name, chunk, piece):
    pair = make_pair(name)
    session = filled(pair.ours, 330)
    prior = scored(session, chunk, piece=piece)
    assert prior is session.cache.prior
    assert prior.scores.shape == (pair.ours.shape.n_layers, pair.ours.shape.n_kv_heads, 330)
    assert (prior.scores[:, :, :N_SYSTEM] == ALWAYS).all()
    wanted = by_transformers(pair, session.log[:330], N_SYSTEM, chunk)
    torch.testing.assert_close(prior.scores[:, :, N_SYSTEM:].float(), wanted, rtol=2e-3, atol=1e-5)
    assert wanted.std() > 0.05


def test_layers_with_a_sliding_window_are_left_out():
    session = filled(make_pair("gemma3").ours, 200)
    prior = scored(session)
    whole = [bool((layer == ALWAYS).all()) for layer in prior.scores]
    assert whole == [True, True, False, True]


def test_later_turns_add_scores_of_their_own_tokens_behind_the_whole_history():
    pair = make_pair("llama")
    session = filled(pair.ours, 200)
    before = scored(session).scores.clone()
    session.run(random_ids(150, 5), 3, turn_start=201)
    prior, n = scored(session), session.cache.length
    assert n == 353
    assert prior.n == n
    assert torch.equal(prior.scores[:, :, :200], before)
    wanted = by_transformers(pair, session.log[:n], 200, 2000)
    torch.testing.assert_close(prior.scores[:, :, 200:].float(), wanted, rtol=2e-3, atol=1e-5)


def test_a_few_new_tokens_wait_for_more():
    session = filled(make_pair("llama").ours, 200)
    first = scored(session)
    session.run(random_ids(60, 5), 3, turn_start=201)
    assert session.cache.length - first.n == 63
    assert scored(session) is first
    session.run(random_ids(1, 6), 1, turn_start=session.cache.length)
    assert scored(session).n == session.cache.length


def test_near_the_end_of_the_context_chunks_shrink_and_then_old_scores_stay():
    model = make_pair("llama").ours
    long = filled(model, model.max_context - 100)
    prior = scored(long)
    assert prior is not None
    assert prior.n == model.max_context - 100
    assert long.cache.length == model.max_context - 100
    full = filled(model, model.max_context - 70)
    full.cache.prior = old = prior.before(300)
    assert scored(full) is old


def test_without_a_system_prompt_the_first_tokens_are_kept_as_sinks():
    session = filled(make_pair("llama").ours, 150)
    prior = score(session.model, session.cache, session.log, ASK)
    assert (prior.scores == ALWAYS).sum() == prior.scores[:, :, :SINKS].numel()


def test_it_leaves_memory_as_it_was():
    session = filled(make_pair("llama").ours, 300)
    before = state(session.cache)
    assert scored(session, 100).n == 300
    assert state(session.cache) == before


def test_an_interruption_between_pieces_leaves_memory_clean_and_scores_of_whole_chunks():
    session = filled(make_pair("llama").ours, 300)
    scheduler, before = Scheduler(session.model, CELL), state(session.cache)
    scheduler.scoring.append(work_of(session, 150))
    for _ in range(3):  # a chunk of 146 and its instruction take two pieces
        assert scheduler.step() == []
    assert session.cache.prior.n == N_SYSTEM + 145
    assert state(session.cache) != before
    scheduler.cancel_idle(session.name)
    assert scheduler.idle
    assert state(session.cache) == before
    assert scored(session, 150).n == 300


def test_selection_and_prior_of_a_turn_are_not_disturbed():
    session = filled(make_pair("llama").ours, 300)
    session.run(random_ids(20, 3), 3, turn_start=301, policy=parse("quest", {"budget": 16, "dense_layers": 0}))
    selectors, held = session.cache.selection._selectors, session.cache.selection.nbytes
    kept, renewed = [], []
    for one in selectors:
        one.keep, one.renew = kept.append, renewed.append
    scored(session)
    assert session.cache.selection._selectors is selectors
    assert session.cache.selection.nbytes == held
    assert renewed == []
    assert min(kept) >= session.cache.length


def test_turns_wait_for_one_piece_at_most_and_sealing_goes_first(monkeypatch):
    model = make_pair("llama").ours
    spy = StepSpy(model)
    monkeypatch.setattr(model, "begin", spy)
    done, other, turn = filled(model, 300, "done"), Session(model, "other", random_ids(128, 2)), Session(model, "turn")
    scheduler = Scheduler(model, CELL)
    scheduler.scoring.append(work_of(done))
    scheduler.sealing.append(other.seal_work())
    spy.steps.clear()
    scheduler.step()
    scheduler.step()
    assert other.cache.sealed == 128
    assert scheduler.counters.probed == 0
    scheduler.step()
    assert scheduler.counters.probed == CELL == max(len(feed.ids) for step in spy.steps for feed in step)
    scheduler.add(turn.turn(random_ids(20, 4), 5))
    events = step_until(scheduler, lambda event: isinstance(event, Ended))
    assert scheduler.counters.probed == CELL
    assert not any(isinstance(event, Scored) for event in events)
    assert drain(scheduler) == [Scored("done")]
    assert done.cache.prior.n == 300


def test_a_step_that_breaks_ends_the_scoring_and_leaves_memory_clean(monkeypatch):
    session = filled(make_pair("llama").ours, 300)
    scheduler, before, spy = Scheduler(session.model, CELL), state(session.cache), StepSpy(session.model)
    monkeypatch.setattr(session.model, "begin", spy)
    scheduler.scoring.append(work_of(session))
    scheduler.step()
    spy.broken.append(session.cache)
    (event,) = scheduler.step()
    assert isinstance(event, Scored)
    assert isinstance(event.error, RuntimeError)
    assert scheduler.idle
    assert session.cache.prior is None
    assert state(session.cache) == before


def test_a_turn_after_scoring_attends_to_what_was_kept():
    """Against one that was not scored, where everything takes part."""
    session, other = (filled(make_pair("llama").ours, 300, name) for name in ("s", "t"))
    scored(session)
    for one in (session, other):
        one.run(random_ids(20, 3), 6, turn_start=300, policy=parse("kvzip", {"share": 0.05}))
    assert session.cache.selection.failure is None
    rows = [torch.stack(one.sampler.rows) for one in (session, other)]
    assert torch.equal(rows[0][0], rows[1][0])  # the prompt sees all
    assert not torch.allclose(rows[0][1], rows[1][1], atol=1e-3)


def test_a_head_that_keeps_all_of_history_does_not_make_the_others_keep_it():
    session = filled(make_pair("llama").ours, 300)
    cache, shape = session.cache, session.model.shape
    scores = torch.zeros(shape.n_layers, shape.n_kv_heads, 300)
    scores[:, 0] = 1.0
    cache.prior = Prior(scores.half())
    cache.use(parse("kvzip", {"share": 0.5, "budget": "head"}), 300)
    query = torch.zeros(session.model.config.num_attention_heads, 1, shape.head_dim)
    taken = cache.selection.choose(0, query, cache.keys[0], cache.values[0], 305, 1.0, decoding=True)
    assert [int((row >= 0).sum()) for row in taken.positions] == [300, 0]
    cache.use(parse("kvzip", {"share": 1.0}), 300)
    assert cache.selection.choose(0, query, cache.keys[0], cache.values[0], 305, 1.0, decoding=True) is None
