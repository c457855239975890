"""The record of a turn says what a plain count of every choice says."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from engine_harness import CELL, DETOKENIZER, GREEDY, VOCAB, drain, make_pair, random_ids
from small_policies import SMALL
from torch import Tensor

from sessiond import reading as module
from sessiond.explanations import LayerRead
from sessiond.policies import registry
from sessiond.policies.base import Scan, Selector, Taken
from sessiond.policies.full import Full
from sessiond.policies.window import Window
from sessiond.reading import Reading
from sessiond.readsummary import read_share, summarize
from sessiond.sampling import Sampler
from sessiond.scheduler import Scheduler
from sessiond.selection import Selection
from sessiond.textstream import TextStream
from sessiond.turnwork import TurnWork
from sessiond.types import KVShape, Tier

pytestmark = pytest.mark.usefixtures("one_thread")

N_HISTORY, N_PROMPT, N_NEW = 301, 30, 20  # so many that two tokens are looked at closer
SHAPE = KVShape(n_layers=2, n_kv_heads=2, head_dim=4, dtype="float32")


@dataclass
class Step:
    """What one layer attended to in one step: its end, positions by head, and the shares of full attention."""

    end: int
    decoding: bool
    heads: list[set[int]]
    masses: list[float]


@dataclass
class Plain:
    """Every choice, kept as it is."""

    steps: dict[int, list[Step]] = field(default_factory=dict)

    def listen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choose = Selection.choose

        def spy(selection, layer, query, keys, values, position, scaling, rope=None, *, decoding):
            chosen = choose(selection, layer, query, keys, values, position, scaling, rope, decoding=decoding)
            end = position + query.shape[1]
            own = set(range(selection.turn_start, end))
            if chosen is None:
                heads = [set(range(end))] * len(keys)
            else:
                heads = [own | {p for p in row if p >= 0} for row in chosen.positions.tolist()]
            masses = [plain_mass(query, keys[:, :end], g, scaling, heads[g]) for g in range(len(keys))]
            self.steps.setdefault(layer, []).append(Step(end, decoding, heads, masses if decoding else []))
            return chosen

        monkeypatch.setattr(Selection, "choose", spy)


def plain_mass(query: Tensor, keys: Tensor, group: int, scaling: float, attended: set[int]) -> float:
    """Mean over a group's heads of the softmax weights of its last query that fall on `attended`."""
    n_share, held = len(query) // len(keys), 0.0
    for head in range(group * n_share, (group + 1) * n_share):
        logits = [float(query[head, -1] @ key) * scaling for key in keys[group]]
        most = max(logits)
        weights = [math.exp(logit - most) for logit in logits]
        held += sum(weights[p] for p in attended) / sum(weights)
    return held / n_share


def run(policy_name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Reading, Plain]:
    """A turn behind a history, under that policy."""
    model = make_pair("llama").ours
    scheduler = Scheduler(model, CELL)
    cache, ids = model.new_cache(), random_ids(N_HISTORY + N_PROMPT, 3)
    plain = Plain()

    def turn(tokens: list[int], turn_start: int, max_new: int, **options) -> None:
        work = TurnWork(
            "t", cache, tokens, [], cell_tokens=CELL, seal=True, known=0, max_new=max_new, max_context=2000,
            stop_ids=frozenset(), sampler=Sampler(GREEDY, VOCAB, tokens), stream=TextStream(DETOKENIZER, ()),
            turn_start=turn_start, **options,
        )  # fmt: skip
        scheduler.add(work)
        drain(scheduler)

    turn(ids[:N_HISTORY], 0, 1)
    reading = Reading(model.shape, model.facts.attending, model.sliding_window, Tier.DEVICE)
    plain.listen(monkeypatch)
    policy = registry.parse(policy_name, SMALL[policy_name])
    turn(ids, N_HISTORY, N_NEW, policy=policy, reading=reading)
    return reading, plain


def spans_of(positions: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for position in sorted(positions):
        if found and found[-1][1] == position:
            found[-1] = found[-1][0], position + 1
        else:
            found.append((position, position + 1))
    return found


def by_head(reads: tuple[LayerRead, ...], layer: int) -> dict[int, LayerRead]:
    return {
        head: read
        for read in reads
        if read.layer == layer
        for head in range(read.head_start, read.head_start + read.n_heads)
    }


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"full"}))
def test_it_agrees_with_a_plain_count(name: str, monkeypatch):
    reading, plain = run(name, monkeypatch)
    reads = summarize(reading)
    for layer, steps in plain.steps.items():
        generated = [step for step in steps if step.decoding]
        generated = [[step for step in steps if not step.decoding][-1], *generated]
        assert len(generated) == N_NEW
        for head, read in by_head(reads, layer).items():
            assert read.available == steps[-1].end
            assert read.attended == len(steps[-1].heads[head])
            assert read.mean_attended == pytest.approx(sum(len(step.heads[head]) for step in generated) / N_NEW)
            assert list(map(tuple, read.spans.tolist())) == spans_of(steps[-1].heads[head])[:64]
            exact = read.views[0]
            if exact.view == "exact" and all(form == "exact" for form, *_ in reading.layers[layer].forms):
                assert exact.tokens == sum(len(step.heads[head]) for step in steps)
                assert exact.nbytes == exact.tokens * read.n_heads * 2 * 10 * 4  # heads of 10, float32
    assert reading.n_steps == len(steps)


@pytest.mark.parametrize("name", ["adakv", "sieve", "quest"])
def test_mass_is_full_attentions_softmax_over_what_was_attended(name: str, monkeypatch):
    reading, plain = run(name, monkeypatch)
    assert N_NEW > module.SAMPLE_EVERY
    for layer, steps in plain.steps.items():
        sampled = [step for step in steps if step.decoding][:: module.SAMPLE_EVERY]
        for read in (one for one in summarize(reading) if one.layer == layer):
            heads = range(read.head_start, read.head_start + read.n_heads)
            masses = [step.masses[head] for step in sampled for head in heads]
            assert read.mass == pytest.approx(sum(masses) / len(masses), abs=1e-5)
            assert 0 < read.mass < 1


def test_shares_of_reads_by_range_are_those_of_a_plain_count(monkeypatch):
    reading, plain = run("window", monkeypatch)
    counts: Counter[int] = Counter()
    share, width = read_share(reading)
    for steps in plain.steps.values():
        prompt = [step for step in steps if not step.decoding][-1]
        for step in [prompt, *(step for step in steps if step.decoding)]:
            counts.update(position // width for head in step.heads for position in head)
    expected = [counts[i] / counts.total() for i in range(len(share))]
    assert list(share) == pytest.approx(expected, abs=0.005)
    assert sum(share) == pytest.approx(1)


class Dense(Selector):
    """Answers with every position."""

    def step(self, view):
        return torch.arange(view.turn_start).expand(view.keys.shape[0], -1)


class Gone(Dense):
    """One head answers with fewer, in a form of its own, found in an index."""

    @property
    def scan(self):
        return Scan("marks", 10, 40)

    def step(self, view):
        positions = torch.tensor([[0, 1, 5, 6], [2, -1, -1, -1]])
        return Taken(positions, torch.zeros(2, 4, 4), None, "coarse", 100)


def selection_of(selector: Selector) -> tuple[Selection, Reading]:
    selection = Selection(Window(), SHAPE.n_layers)
    selection._selectors = [selector, None]
    selection.reading = reading = Reading(SHAPE, (0, 1), None, Tier.DEVICE)
    reading.begin(8)
    selection.begin_turn(8)
    return selection, reading


def step(selection: Selection, position: int) -> None:
    query, kv = torch.randn(4, 1, 4), torch.randn(2, 64, 4)
    selection.reading.token(position)
    selection.choose(0, query, kv, kv, position, 0.5, decoding=True)


def test_a_choice_of_everything_holds_all_of_the_mass():
    selection, reading = selection_of(Dense())
    step(selection, 9)
    assert [(read.attended, read.mass) for read in summarize(reading)] == [(10, 1.0), (10, 1.0)]


def test_heads_with_forms_of_their_own_are_told_apart():
    selection, reading = selection_of(Gone())
    step(selection, 9)
    step(selection, 10)
    first, second, other_layer = summarize(reading)
    assert (first.attended, second.attended, other_layer.attended) == (4 + 3, 1 + 3, 11)
    assert second.spans.tolist() == [[2, 3], [8, 11]]
    # The own tokens whole, and of the chosen ones the values: 4 numbers of 4 bytes.
    assert [(view.view, view.tokens, view.nbytes) for view in first.views] == [
        ("exact", 5 + 8, 5 * 32 + 8 * 16),
        ("coarse", 8, 160),
        ("marks", 20, 40),
    ]
    assert [(view.view, view.tokens, view.nbytes) for view in second.views] == [
        ("exact", 5 + 2, 5 * 32 + 2 * 16),
        ("coarse", 2, 40),
        ("marks", 20, 40),
    ]


def test_exact_kv_is_told_where_it_lies_and_what_is_derived_in_memory():
    selection, reading = selection_of(Gone())
    reading.tier = Tier.DISK
    step(selection, 9)
    first = summarize(reading)[0]
    assert [(view.view, view.tier, view.tokens) for view in first.views][:1] == [("exact", Tier.DISK, 6)]
    assert {view.tier for view in first.views[1:]} <= {Tier.DEVICE}


def test_long_choices_are_cut_after_64_ranges():
    selection, reading = selection_of(Dense())
    reading.begin(400)
    selection.begin_turn(400)
    reading.token(400)
    positions = torch.arange(0, 400, 2).expand(2, -1)
    taken = Taken(positions, None, None, "exact", 0)
    reading.chose(0, taken, decoding=True, padded=False)
    read = summarize(reading)[0]
    assert (len(read.spans), read.spans_cut, read.attended) == (64, True, 201)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_layers_with_a_window_read_that(name: str):
    model = make_pair(name).ours
    reading = Reading(model.shape, model.facts.attending, model.sliding_window, Tier.DEVICE)
    reading.begin(0)
    reading.piece(0, 128)
    reading.token(128)
    window = model.sliding_window
    for read in summarize(reading):
        if read.layer in model.facts.attending:
            assert (read.attended, read.mass) == (129, 1.0)
        else:
            assert (read.attended, read.mass) == (window, None)
            assert read.spans.tolist() == [[129 - window, 129]]
            assert read.views[0].tokens == 128 + window  # the piece's first token sees its window too


def test_more_layers_are_weighed_the_shorter_the_context(monkeypatch):
    monkeypatch.setattr(module, "WEIGHED_TOKENS", 100)
    reading = Reading(KVShape(6, 2, 4, "float32"), range(6), None, Tier.DEVICE)
    reading.begin(9)
    seen: list[frozenset[int]] = []
    for position in range(10, 10 + 2 * module.SAMPLE_EVERY + 1):
        reading.token(position)
        seen.append(reading._weighing)
    assert [len(layers) for layers in seen if layers] == [6, 3, 2]
    assert seen[module.SAMPLE_EVERY].isdisjoint(seen[2 * module.SAMPLE_EVERY])


def test_full_needs_no_word_from_any_layer():
    reading = Reading(SHAPE, (0, 1), None, Tier.DEVICE)
    reading.begin(0)
    reading.piece(0, 5)
    reading.token(5)
    (first, _) = summarize(reading)
    assert (first.n_heads, first.available, first.attended, first.mean_attended, first.mass) == (2, 6, 6, 5.5, 1.0)
    assert Full().name == "full"
