"""int8, int4 and KIVI: what stands in for keys and values is what plain loops over numbers make of them."""

from __future__ import annotations

import pytest
import torch
from policy_views import read_out
from torch import Tensor

from sessiond.policies import quantized
from sessiond.policies.base import LayerView, Taken
from sessiond.policies.registry import parse

G, SHARE = 2, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def view(n: int, turn_start: int, dim: int = 16, dtype: torch.dtype = torch.float32) -> LayerView:
    keys, values = (draw(G, 400, dim, seed=seed)[:, :n].to(dtype) for seed in (1, 2))
    return LayerView(draw(G * SHARE, 1, dim).to(dtype), keys, values, n - 1, turn_start, dim**-0.5)


def rounded(numbers: list[float], bits: int) -> list[float]:
    """The numbers in `bits` bits: the nearest of equal steps from about the smallest to about the largest."""
    low, high, steps = min(numbers), max(numbers), 2**bits - 1
    scale = float(torch.tensor(max((high - low) / steps, 1e-8)).to(torch.bfloat16))
    low = float(torch.tensor(low).to(torch.bfloat16))
    return [low + scale * min(steps, max(0, round((x - low) / scale))) for x in numbers]


def by_row(rows: Tensor, bits: int, group: int) -> Tensor:
    """[G, N, D], each row in groups of `group` numbers."""
    width = rows.shape[-1]
    told = [
        [
            [x for start in range(0, width, group) for x in rounded(row[start : start + group], bits)]
            for row in one.tolist()
        ]
        for one in rows
    ]
    return torch.tensor(told)


def by_channel(keys: Tensor, bits: int, group: int) -> Tensor:
    """[G, N, D], each channel in groups of `group` tokens."""
    return by_row(keys.transpose(1, 2), bits, group).transpose(1, 2)


def step(name: str, seen: LayerView, **knobs: object) -> Taken:
    taken = read_out(parse(name, knobs).selector(0, 1).step(seen), seen.keys.dtype)
    assert taken.positions.tolist() == [list(range(seen.turn_start))] * G
    return taken


@pytest.mark.parametrize("dim", [10, 14, 18, 22, 64])
@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_all_of_history_is_read_in_groups_of_channels(name: str, bits: int, dim: int):
    """Groups of 8: the last one of odd heads is shorter."""
    seen = view(40, 37, dim)
    taken = step(name, seen, group=8)
    assert taken.form == name
    for form, exact in ((taken.keys, seen.keys), (taken.values, seen.values)):
        assert torch.allclose(form, by_row(exact[:, :37], bits, 8), atol=1e-5)


@pytest.mark.parametrize("dim", [10, 14, 18, 22, 64])
@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_reads_keys_by_channel_and_values_by_token_and_the_newest_exactly(bits: int, dim: int):
    """99 tokens before the turn, 20 of them at least exact: nine groups of 8 are not."""
    seen = view(103, 99, dim)
    taken = step("kivi", seen, bits=bits, group=8, residual=20)
    assert torch.allclose(taken.keys[:, :72], by_channel(seen.keys[:, :72], bits, 8), atol=1e-5)
    assert torch.allclose(taken.values[:, :72], by_row(seen.values[:, :72], bits, 8), atol=1e-5)
    assert torch.equal(taken.keys[:, 72:], seen.keys[:, 72:99])
    assert torch.equal(taken.values[:, 72:], seen.values[:, 72:99])


def test_a_history_that_is_all_newest_is_exact_under_kivi():
    selector = parse("kivi", {"residual": 32, "group": 8}).selector(0, 1)
    assert selector.step(view(41, 39)) is None
    assert selector.step(view(42, 40)) is not None


def test_an_outlier_channel_spoils_no_other_under_kivi_and_only_its_group_by_token():
    seen = view(64, 64)
    seen.keys[..., 3] += 100

    def error(taken: Taken, channels: slice) -> float:
        return float((taken.keys - seen.keys)[..., channels].abs().max())

    assert error(step("kivi", seen, bits=4, group=16, residual=0), slice(0, 3)) < 0.3
    assert error(step("int4", seen, group=16), slice(4, 16)) > 2
    assert error(step("int4", seen, group=4), slice(4, 16)) < 0.3


@pytest.mark.parametrize("name", ["int8", "int4", "kivi"])
def test_numbers_come_back_in_the_models_dtype(name: str):
    taken = step(name, view(200, 190, dtype=torch.bfloat16))
    assert taken.keys.dtype == taken.values.dtype == torch.bfloat16


@pytest.mark.parametrize("hooks", [("step",), ("prompt", "step"), ("rest", "step"), ("rest", "prompt", "step")])
@pytest.mark.parametrize("name", ["int8", "int4", "kivi"])
def test_when_history_is_quantized_changes_no_answer(name: str, hooks: tuple[str, ...]):
    """A rest covers the whole turn, of which the next one's prompt takes the last token back."""
    selector = parse(name, {"group": 8, **({"residual": 0} if name == "kivi" else {})}).selector(0, 1)
    for hook in hooks:
        answer = getattr(selector, hook)(view(64, 64) if hook == "rest" else view(68, 63))
    fresh = parse(name, {"group": 8, **({"residual": 0} if name == "kivi" else {})}).selector(0, 1)
    taken, wanted = (read_out(one, torch.float32) for one in (answer, fresh.step(view(68, 63))))
    assert torch.equal(taken.keys, wanted.keys)
    assert torch.equal(taken.values, wanted.values)
    assert taken.nbytes == wanted.nbytes


@pytest.mark.parametrize("name", ["int8", "int4", "kivi"])
def test_a_step_quantizes_nothing_that_was(name: str, monkeypatch):
    selector = parse(name, {}).selector(0, 1)
    selector.prompt(view(302, 300))
    held, packed = selector.nbytes, []
    monkeypatch.setattr(quantized, "quantize", lambda rows, *rest: packed.append(rows))
    selector.step(view(303, 300))
    selector.step(view(304, 300))
    assert packed == []
    assert selector.nbytes == held


@pytest.mark.parametrize(
    ("name", "knobs", "per_token"),
    [
        ("int8", {}, 2 * (64 + 2 * 4)),
        ("int4", {}, 2 * (32 + 2 * 4)),
        ("int4", {"group": 64}, 2 * (32 + 4)),
        ("kivi", {"residual": 0}, 2 * (16 + 2 * 4)),  # a key's channels share 4 bytes among 32 tokens
        ("kivi", {"residual": 0, "bits": 4}, 2 * (32 + 2 * 4)),
    ],
)
def test_bytes_of_a_token_and_head(name: str, knobs: dict[str, int], per_token: int):
    assert step(name, view(321, 320, 64), **knobs).nbytes == G * 320 * per_token
