"""What holds for every policy, whatever it chooses: shapes, bounds, forgetting, bytes and refusals."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from policy_views import read_out
from small_policies import SMALL
from torch import Tensor

from sessiond.errors import InvalidConfig, UnknownPolicy
from sessiond.kernels.rope import Rope
from sessiond.policies.base import LayerView, ModelFacts, Policy, Selector, Taken
from sessiond.policies.prior import Prior
from sessiond.policies.registry import parse

SHARE, D, PROMPT, STEPS = 3, 10, 5, 3
CAPACITY = 160
ROPE = Rope(10000.0 ** -torch.arange(0, 1, 2 / D))
LEARNING = {"h2o", "snapkv", "adakv", "rocketkv"}  # from queries, which do not come again

Answer = Tensor | Taken | None
every_policy = pytest.mark.parametrize("name", sorted(SMALL))
WHOLE = {"full", "auto"}  # choose nothing themselves
selecting = pytest.mark.parametrize("name", sorted(SMALL.keys() - WHOLE))
forgetting = pytest.mark.parametrize("name", sorted(SMALL.keys() - LEARNING - WHOLE))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Shown:
    """One layer as an engine shows it: keys and values in buffers with room, which holds NaN."""

    def __init__(self, n_groups: int = 2, seed: int = 0) -> None:
        self.query = draw(n_groups * SHARE, CAPACITY, D, seed=seed)
        self.keys, self.values = (draw(n_groups, CAPACITY, D, seed=seed + i) * 2 for i in (1, 2))
        self.prior: Prior | None = Prior(draw(2, n_groups, 40, seed=seed + 3).sigmoid().half())

    def view(self, start: int, end: int, turn_start: int) -> LayerView:
        keys, values = (torch.full_like(part, float("nan")) for part in (self.keys, self.values))
        keys[:, :end], values[:, :end] = self.keys[:, :end], self.values[:, :end]
        query = self.query[:, start:end]
        return LayerView(query, keys[:, :end], values[:, :end], start, turn_start, D**-0.5, ROPE, self.prior)

    def turn(self, selector: Selector, turn_start: int) -> Iterator[tuple[str, LayerView, Answer]]:
        """A prompt in two pieces and some steps, each with its answer; then rest."""
        first, end = turn_start + 2, turn_start + PROMPT
        for start, stop in ((turn_start, first), (first, end)):
            view = self.view(start, stop, turn_start)
            yield "prompt", view, selector.prompt(view)
        for position in range(end, end + STEPS):
            view = self.view(position, position + 1, turn_start)
            yield "step", view, selector.step(view)
        length = end + STEPS
        selector.rest(self.view(length, length, length))

    def history(self, selector: Selector, n: int) -> None:
        """A first turn of `n` tokens, all of them its prompt."""
        selector.prompt(self.view(0, n, 0))


def made(name: str, layer: int = 0) -> Selector:
    selector = parse(name, SMALL[name]).selector(layer, 2)
    assert selector is not None
    return selector


def check(answer: Answer, view: LayerView) -> None:
    if answer is None:
        return
    positions = answer.positions if isinstance(answer, Taken) else answer
    assert positions.dtype == torch.int64
    assert positions.ndim == 2
    assert positions.shape[0] == view.keys.shape[0]
    for row in positions.tolist():
        real = [p for p in row if p >= 0]
        assert row == real + [-1] * (len(row) - len(real))
        assert real == sorted(set(real))
        assert all(p < view.turn_start for p in real)
    if isinstance(answer, Taken):
        assert answer.form
        assert answer.nbytes > 0
        assert not answer.whole or positions.tolist() == [list(range(positions.shape[1]))] * len(positions)
        told = read_out(answer, view.keys.dtype)
        forms = [form for form in (told.keys, told.values) if form is not None]
        assert forms
        for form in forms:
            assert form.shape == (*positions.shape, D)
            assert form.dtype == view.keys.dtype
            assert not form.isnan().any()


@selecting
@pytest.mark.parametrize("n_groups", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65])
def test_answers_are_earlier_positions_and_come_from_what_there_is(name: str, n: int, n_groups: int):
    """On odd sizes, in buffers whose unused part is NaN; also after a rest, with a turn that begins earlier."""
    shown, policy = Shown(n_groups), parse(name, SMALL[name])
    for layer in range(2):
        selector = made(name, layer)
        shown.history(selector, n)
        for turn_start in (n, n + PROMPT + STEPS - 1):
            for hook, view, answer in shown.turn(selector, turn_start):
                if hook == "step" or not policy.dense_prompt:
                    check(answer, view)


@selecting
def test_dense_prompts_choose_nothing(name: str):
    """What a policy of layers passes on must not depend on who drops it."""
    if not parse(name, SMALL[name]).dense_prompt:
        pytest.skip("prompts are chosen for")
    shown, selector = Shown(), made(name)
    shown.history(selector, 64)
    answers = [answer for hook, _, answer in shown.turn(selector, 64) if hook == "prompt"]
    assert answers == [None, None]


@selecting
def test_the_same_is_answered_again(name: str):
    runs = []
    for _ in range(2):
        shown, selector = Shown(), made(name)
        shown.history(selector, 65)
        runs.append([answer for _, _, answer in shown.turn(selector, 65)])
    assert all(same(one, other) for one, other in zip(*runs, strict=True))


def same(one: Answer, other: Answer) -> bool:
    if isinstance(one, Taken) and isinstance(other, Taken):
        one, other = (read_out(answer, torch.float32) for answer in (one, other))
        pairs = [(one.positions, other.positions), (one.keys, other.keys), (one.values, other.values)]
        return one.form == other.form and all(same(a, b) for a, b in pairs)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other


@forgetting
@pytest.mark.parametrize("hook", ["keep", "renew"])
@pytest.mark.parametrize("n", [0, 1, 30, 33, 64, 65])
def test_what_was_given_up_or_computed_again_leaves_no_trace(name: str, hook: str, n: int):
    """Keys and values from `n` on are others now: the answers are those of a selector that saw only these."""
    before, now = Shown(), Shown()
    for part in ("keys", "values"):
        getattr(now, part)[:, n:] = draw(2, CAPACITY - n, D, seed=99) * 2
    for layer in range(2):
        used, fresh = made(name, layer), made(name, layer)
        before.history(used, 66)
        for turn_start in (66, 80):
            list(before.turn(used, turn_start))
        getattr(used, hook)(n)
        for (_, _, one), (_, _, other) in zip(now.turn(used, 70), now.turn(fresh, 70), strict=True):
            if name == "shadowkv" and hook == "renew" and isinstance(one, Taken) and isinstance(other, Taken):
                one, other = one.positions, other.positions  # the basis stays: no copy of keys (test_shadowkv.py)
            assert same(one, other)


def tensors(value: Any) -> Iterator[Tensor]:
    """All that hang on a selector; what belongs to the session or is a knob is not its own."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | deque):
        for part in value:
            yield from tensors(part)
    elif type(value).__module__.startswith("sessiond.policies") and not isinstance(value, Policy | Prior):
        slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())]
        for part in [*getattr(value, "__dict__", {}).values(), *(getattr(value, slot) for slot in slots)]:
            yield from tensors(part)


@selecting
def test_bytes_are_those_of_its_tensors_and_none_at_first(name: str):
    shown = Shown()
    for layer in range(2):
        selector = made(name, layer)
        assert selector.nbytes == 0
        shown.history(selector, 65)
        for _ in shown.turn(selector, 65):
            held = {id(tensor): tensor.nbytes for tensor in tensors(selector)}
            assert selector.nbytes == sum(held.values())


@every_policy
def test_knobs_survive_json_and_the_wire(name: str):
    policy = parse(name, SMALL[name])
    struct = Struct()
    struct.update(policy.knobs())
    assert parse(name, json.loads(json.dumps(policy.knobs()))) == policy
    assert parse(name, MessageToDict(struct)) == policy


@every_policy
def test_a_wrong_knob_is_refused_by_name_with_what_is_allowed(name: str):
    knobs = parse(name, SMALL[name]).knobs()
    for knob in knobs:
        for wrong in ("nonsense", -1, None, [], {"some": 1}):
            with pytest.raises(InvalidConfig) as caught:
                parse(name, {**knobs, knob: wrong})
            assert caught.value.metadata["policy"] == name
            assert caught.value.metadata["knob"] == knob
            assert caught.value.metadata["range"]
    with pytest.raises(UnknownPolicy):
        parse(name, {**knobs, "wisdom": 3})


@pytest.mark.parametrize("name", ["quest", "sieve", "int8", "int4", "kivi", "shadowkv", "viewed", "h2o"])
def test_the_memory_that_is_set_aside_for_an_index_is_about_what_it_takes(name: str):
    """Two layers, two KV heads of 64 channels, 2,000 tokens in bf16; knobs as they come."""
    n, n_groups, head_dim = 2000, 2, 64
    policy = parse(name, {"dense_layers": 0} if name == "quest" else {})
    facts = ModelFacts(2, n_groups, head_dim, (0, 1), 8192)
    keys, values = (draw(n_groups, n, head_dim, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    rope = Rope(10000.0 ** -torch.arange(0, 1, 2 / head_dim))
    query = draw(n_groups * SHARE, 1, head_dim, seed=3).to(torch.bfloat16)
    held = 0
    for layer in range(2):
        selector = policy.selector(layer, 2)
        assert selector is not None
        nothing = query[:, :0]
        selector.rest(LayerView(nothing, keys, values, n, n, 0.1, rope))
        for start, turn_start in ((n - 3, n - 3), (n - 2, n - 3)):
            view = LayerView(query, keys[:, : start + 1], values[:, : start + 1], start, turn_start, 0.1, rope)
            (selector.prompt if start == turn_start else selector.step)(view)
        held += selector.nbytes
    assert 0.5 * held < policy.index_bytes(facts) * n < 2 * held
    assert held > 0
