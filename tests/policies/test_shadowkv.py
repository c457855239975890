"""ShadowKV chooses the chunks that plain loops choose; their keys come from the factors, those of outliers do not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from policy_views import SCALING, D, G, H, Layer, best, rows
from torch import Tensor

from sessiond.errors import InvalidConfig
from sessiond.kernels.rope import Rope
from sessiond.policies.base import LayerView, ModelFacts, Taken
from sessiond.policies.lowrank import WHOLE
from sessiond.policies.registry import parse
from sessiond.policies.shadowkv import ShadowKV, ShadowKVSelector

RANK = 6
ROPE = Rope(10000.0 ** -(torch.arange(D // 2) / (D // 2)))
POLICY = ShadowKV(rank=RANK, chunk=4, budget=24, outliers=1, local=1, drift=0.02)


class Rotated(Layer):
    """Keys that before their rotary embedding are of rank RANK, and a little more, about a mean."""

    def __init__(self, n: int, seed: int = 0, noise: float = 0.05, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(n, seed, dtype=dtype)
        draw = torch.Generator().manual_seed(100 + seed)
        basis, mean = torch.randn(RANK, G * D, generator=torch.Generator().manual_seed(7)), torch.ones(G * D)
        joined = mean + torch.randn(n, RANK, generator=draw) @ basis + noise * torch.randn(n, G * D, generator=draw)
        self.plain = joined.view(n, G, D).transpose(0, 1)
        self.keys = ROPE.rotate(self.plain, torch.arange(n)).to(dtype)

    def view(self, start: int, end: int, turn_start: int) -> LayerView:
        return replace(super().view(start, end, turn_start), rope=ROPE)

    def rest(self, selector: ShadowKVSelector, n: int) -> None:
        selector.rest(self.view(n, n, n))

    def taken(self, selector: ShadowKVSelector, position: int, turn_start: int) -> Taken:
        taken = selector.step(self.view(position, position + 1, turn_start))
        assert taken is not None
        return taken


def selector(policy: ShadowKV = POLICY) -> ShadowKVSelector:
    made = policy.selector(0, 30)
    assert isinstance(made, ShadowKVSelector)
    return made


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def plain_outliers(keys: list[list[float]], chunk: int, n_ranked: int, n_outliers: int) -> list[int]:
    """The chunks with the smallest cosine between their mean and one of their keys."""
    worst = []
    for i in range(n_ranked):
        members = keys[i * chunk : (i + 1) * chunk]
        mean = [sum(column) / chunk for column in zip(*members, strict=True)]
        worst.append(min(dot(mean, key) / math.sqrt(dot(mean, mean) * dot(key, key)) for key in members))
    return best([-cosine for cosine in worst], n_outliers)


def plain_chunks(view: LayerView, group: int, policy: ShadowKV) -> tuple[list[int], list[int]]:
    """The outliers among the chunks to choose from, and all chunks that take part but the newest."""
    keys = view.keys[group].tolist()
    n_ranked = view.turn_start // policy.chunk - policy.local
    outliers = plain_outliers(keys, policy.chunk, n_ranked, policy.outliers)
    others = [i for i in range(n_ranked) if i not in outliers]
    most = [0.0] * len(others)
    for query in view.grouped[group, :, 0].tolist():
        products = []
        for i in others:
            members = keys[i * policy.chunk : (i + 1) * policy.chunk]
            mean = [sum(column) / policy.chunk for column in zip(*members, strict=True)]
            products.append(math.exp(dot(query, mean) * view.scaling))
        most = [max(a, b / sum(products)) for a, b in zip(most, products, strict=True)]
    n_chosen = policy.budget // policy.chunk - policy.local - policy.outliers
    chosen = [others[i] for i in best(most, n_chosen)]
    return outliers, sorted(outliers + chosen)


def plain_positions(view: LayerView, policy: ShadowKV) -> tuple[list[list[int]], list[list[int]]]:
    """By group: the positions that take part, and those of them that do exactly."""
    all_of_them, exactly = [], []
    kept = list(range((view.turn_start // policy.chunk - policy.local) * policy.chunk, view.turn_start))
    for group in range(G):
        outliers, chunks = plain_chunks(view, group, policy)
        spread = [[i * policy.chunk + j for i in some for j in range(policy.chunk)] for some in (chunks, outliers)]
        all_of_them.append(spread[0] + kept)
        exactly.append(spread[1] + kept)
    return all_of_them, exactly


def low_rank(layer: Rotated, n: int, rank: int) -> Tensor:
    """Rotated keys [G, n, D] of which the first `n` before their embedding are cut to `rank` by an SVD."""
    joined = layer.plain[:, :n].transpose(0, 1).flatten(1).double()
    mean = joined.mean(0)
    u, s, vh = torch.linalg.svd(joined - mean, full_matrices=False)
    cut = (u[:, :rank] * s[:rank] @ vh[:rank] + mean).float()
    return ROPE.rotate(cut.view(n, G, D).transpose(0, 1), torch.arange(n))


def at(keys: Tensor, positions: Tensor) -> Tensor:
    return keys.gather(1, positions[..., None].expand(-1, -1, D))


@pytest.mark.parametrize("turn_start", [60, 61, 63, 64])
@pytest.mark.parametrize(("chunk", "outliers", "local"), [(4, 1, 1), (4, 0, 0), (5, 2, 1), (1, 0, 2)])
def test_a_step_chooses_as_the_loops_do(turn_start: int, chunk: int, outliers: int, local: int):
    policy = replace(POLICY, chunk=chunk, outliers=outliers, local=local)
    layer = Rotated(70)
    view = layer.view(66, 67, turn_start)
    taken = selector(policy).step(view)
    assert taken is not None
    assert rows(taken.positions) == plain_positions(view, policy)[0]


def test_keys_come_from_the_factors_and_outliers_and_newest_chunks_are_exact():
    layer = Rotated(70)
    view = layer.view(66, 67, 63)
    taken = selector().step(view)
    assert taken is not None
    assert taken.keys is not None
    assert taken.values is None
    exact, cut = at(layer.keys, taken.positions), at(low_rank(layer, 63, RANK), taken.positions)
    torch.testing.assert_close(taken.keys, cut, rtol=0, atol=0.3)
    for group, exactly in enumerate(plain_positions(view, POLICY)[1]):
        for i, position in enumerate(taken.positions[group].tolist()):
            assert torch.equal(taken.keys[group, i], exact[group, i]) == (position in exactly)


def attended(layer: Layer, keys: Tensor, positions: Tensor) -> Tensor:
    """What the last query sees of `keys` [G, K, D] with the values at `positions`: [H, D]."""
    values, share = at(layer.values, positions).float(), H // G
    weights = [(layer.query[h, -1].float() @ keys[h // share].float().T * SCALING).softmax(-1) for h in range(H)]
    return torch.stack([weights[h] @ values[h // share] for h in range(H)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_full_rank_a_step_attends_as_by_the_exact_keys(dtype: torch.dtype):
    """Up to factors in bf16: 2^-8 of a key of 16 numbers about 3."""
    layer = Rotated(65, dtype=dtype)
    taken = layer.taken(selector(replace(POLICY, rank=G * D, outliers=0)), 64, 64)
    assert taken.keys is not None
    assert taken.keys.dtype == dtype
    exact = at(layer.keys, taken.positions)
    torch.testing.assert_close(taken.keys, exact, rtol=0.02, atol=0.1)
    found, wanted = (attended(layer, keys, taken.positions) for keys in (taken.keys, exact))
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_all_take_part_exactly_while_history_fits_the_budget():
    layer, shadow = Rotated(40), selector()
    for turn_start in (0, 3, 24, 27):
        assert shadow.step(layer.view(30, 31, turn_start)) is None
        assert shadow.scan is None
    assert shadow.step(layer.view(30, 31, 28)) is not None


def test_prompts_attend_to_everything():
    assert POLICY.dense_prompt
    assert POLICY.offloads
    assert Rotated(40).prompt(selector(), [35, 40], 30) == [None, None]


def sunk(layer: Rotated) -> Rotated:
    """A key that points elsewhere than its neighbours, and that every query looks at."""
    layer.query.abs_()
    layer.keys[:, :4] = -4.0
    layer.keys[:, 0] = 4.0
    return layer


def test_a_sink_that_its_chunks_mean_hides_is_an_outlier():
    layer = sunk(Rotated(70))
    taken = layer.taken(selector(), 66, 64)
    assert (taken.positions[:, 0] == 0).all()
    hidden = layer.taken(selector(replace(POLICY, outliers=0)), 66, 64)
    assert (hidden.positions != 0).all()
    assert hidden.positions.shape == taken.positions.shape


def same(one: Taken, other: Taken) -> bool:
    assert one.keys is not None
    assert other.keys is not None
    return torch.equal(one.positions, other.positions) and torch.allclose(one.keys, other.keys, rtol=0, atol=0.3)


def test_growth_over_turns_is_building_at_once():
    """Turns rest, or do not; prompts are seen, or not."""
    layer, followed = Rotated(200), selector()
    for turn, (turn_start, end) in enumerate([(13, 31), (31, 63), (63, 126), (126, 131), (131, 190)]):
        if turn % 2:
            layer.prompt(followed, [turn_start + 2, turn_start + 3], turn_start)
        if turn_start > 28:
            assert same(layer.taken(followed, end - 1, turn_start), layer.taken(selector(), end - 1, turn_start))
        if turn % 3:
            layer.rest(followed, end)


def test_steps_after_a_prompt_or_a_rest_compute_nothing_but_the_choice(monkeypatch: pytest.MonkeyPatch):
    for hook in ("prompt", "rest"):
        layer, shadow = Rotated(70), selector()
        if hook == "rest":
            layer.rest(shadow, 63)
        else:
            layer.prompt(shadow, [65], 63)
        wanted = layer.taken(selector(), 66, 63)
        with monkeypatch.context() as patched:
            patched.setattr(Rope, "undo", None)
            assert same(layer.taken(shadow, 66, 63), wanted)


def test_a_turns_own_tokens_are_not_factored_in_it():
    layer = Rotated(90)
    shadow = selector()
    before = layer.taken(shadow, 63, 63)
    nbytes = shadow.nbytes
    layer.keys[:, 63:] = 100
    after = layer.taken(shadow, 80, 63)
    assert shadow.nbytes == nbytes
    assert int(after.positions.max()) == int(before.positions.max()) == 62


def test_other_keys_have_all_factored_again_and_keys_like_those_before_do_not():
    like, other = Rotated(140), Rotated(140)
    other.plain[:, 70:] = torch.randn(G, 70, D, generator=torch.Generator().manual_seed(3)) * 3
    other.keys = ROPE.rotate(other.plain, torch.arange(140))
    for layer, factored in ((like, 70), (other, 140)):
        shadow = selector()
        layer.rest(shadow, 70)
        layer.rest(shadow, 140)
        assert shadow._factors.factored == factored
        assert shadow._factors.n == 140


@pytest.mark.parametrize("forget", ["keep", "renew"])
@pytest.mark.parametrize("n", [0, 3, 40, 62, 63, 64, 80])
def test_what_was_cut_or_computed_again_is_forgotten(forget: str, n: int):
    layer, changed = Rotated(100), Rotated(100, seed=5)
    changed.keys[:, :n], changed.plain[:, :n] = layer.keys[:, :n], layer.plain[:, :n]
    shadow = selector()
    layer.rest(shadow, 63)
    layer.rest(shadow, 90)
    getattr(shadow, forget)(n)
    for turn_start in (83, 95):
        assert same(changed.taken(shadow, 97, turn_start), changed.taken(selector(), 97, turn_start))


def test_the_cut_of_the_test_above_is_one_that_shows():
    layer, changed = Rotated(100), Rotated(100, seed=5)
    shadow = selector()
    layer.rest(shadow, 90)
    assert not same(changed.taken(shadow, 97, 90), changed.taken(selector(), 97, 90))


def test_keys_without_a_rotary_embedding_are_refused():
    shadow = selector()
    view = replace(Rotated(70).view(63, 64, 63), rope=None)
    for hook in (shadow.step, shadow.prompt, shadow.rest):
        with pytest.raises(InvalidConfig, match="rotary"):
            hook(view)


def test_a_rank_above_that_of_the_keys_does_not_fit_the_model():
    facts = ModelFacts(2, n_kv_heads=2, head_dim=16, attending=(0, 1), max_context=100)
    ShadowKV(rank=32).fits(facts)
    ShadowKV().fits(facts)
    with pytest.raises(InvalidConfig) as caught:
        ShadowKV(rank=33).fits(facts)
    assert caught.value.metadata == {"policy": "shadowkv", "knob": "rank", "range": "[0, 32]"}
    with pytest.raises(InvalidConfig, match="sliding"):
        ShadowKV().fits(replace(facts, attending=()))


def test_a_scan_tells_the_landmarks_and_memory_all_that_is_held():
    layer, shadow = Rotated(70, dtype=torch.bfloat16), selector()
    assert shadow.nbytes == 0
    taken = layer.taken(shadow, 66, 63)
    n_ranked, n_chunks = 14, 15
    assert shadow.scan is not None
    assert (shadow.scan.form, shadow.scan.n_tokens) == ("landmarks", 4 * n_ranked)
    assert shadow.scan.nbytes == 2 * G * n_ranked * D
    factors = 2 * WHOLE * (63 + G * D) + 4 * (3 * G * D + (G * D) ** 2)
    assert (taken.form, taken.nbytes) == ("low rank", factors)
    assert shadow.nbytes == factors + G * n_chunks * (2 * D + 4) + G * n_ranked


def test_knobs_round_trip():
    for policy in (ShadowKV(), POLICY):
        assert parse("shadowkv", policy.knobs()) == policy


@pytest.mark.parametrize(
    ("knobs", "knob", "allowed"),
    [
        ({"rank": -1}, "rank", "[0, 65536]"),
        ({"energy": 0}, "energy", "(0, 1]"),
        ({"drift": 0}, "drift", "(0, 1]"),
        ({"chunk": 0}, "chunk", "[1, 1024]"),
        ({"outliers": -1}, "outliers", "[0, 65536]"),
        ({"local": -1}, "local", "[0, 65536]"),
        ({"chunk": 8, "outliers": 2, "local": 1, "budget": 31}, "budget", "[32, 1048576]"),
    ],
)
def test_bad_knobs_are_refused_with_their_range(knobs: dict[str, Any], knob: str, allowed: str):
    with pytest.raises(InvalidConfig) as caught:
        parse("shadowkv", knobs)
    assert caught.value.metadata == {"policy": "shadowkv", "knob": knob, "range": allowed}
