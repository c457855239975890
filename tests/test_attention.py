"""`attend` against softmax attention written as a plain loop, on awkward shapes; and packing, masks and memory."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sessiond.attention import PackedStep, attend, sessiond_attention
from sessiond.cache import PackedSpan, SessionCache
from sessiond.kernels import attention as kernel
from sessiond.kernels.attention import Scratch
from sessiond.types import KVShape

pytestmark = pytest.mark.usefixtures("one_thread")

CAPACITY = 640
LAYER = 1
SCALING = 0.3
# Largest difference from the loop in fp64, over the largest value. Measured: fp32 7e-7, bf16 7e-3 (scores and
# weights are rounded to bf16, 8 bits).
TOLERANCE = {"float32": 3e-6, "bfloat16": 1.5e-2}


def reference(query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None) -> Tensor:
    """query [H, Q, D]; keys, values [G, T, D] -> [Q, H, D], in fp64: the definition."""
    query, keys, values = query.double(), keys.double(), values.double()
    n_heads, n_new, head_dim = query.shape
    share = n_heads // keys.shape[0]
    out = torch.empty(n_new, n_heads, head_dim, dtype=torch.float64)
    for row, head in itertools.product(range(n_new), range(n_heads)):
        end = position + row + 1
        start = max(0, end - window) if window else 0
        scores = keys[head // share, start:end] @ query[head, row] * SCALING
        out[row, head] = scores.softmax(0) @ values[head // share, start:end]
    return out


def filled(shape: KVShape, length: int, seed: int = 0) -> SessionCache:
    """A cache whose layer LAYER holds random keys and values up to `length`."""
    torch.manual_seed(seed)
    cache = SessionCache(shape, CAPACITY)
    dims = (shape.n_kv_heads, length, shape.head_dim)
    cache.write(LAYER, 0, torch.randn(dims), torch.randn(dims))
    cache.length = length
    return cache


def random_query(cache: SessionCache, share: int, n_new: int) -> Tensor:
    query = torch.randn(cache.shape.n_kv_heads * share, n_new, cache.shape.head_dim)
    return query.to(cache.keys[0].dtype)


def run(cache: SessionCache, query: Tensor, length: int, window: int | None, scratch: Scratch | None = None) -> Tensor:
    n_new = query.shape[1]
    span = PackedSpan(cache, 0, n_new, length - n_new)
    return attend(query, PackedStep([span], scratch or Scratch()), LAYER, SCALING, window)


def check(shape: KVShape, share: int, n_new: int, length: int, window: int | None) -> None:
    cache = filled(shape, length)
    query = random_query(cache, share, n_new)
    ours = run(cache, query, length, window)
    keys, values = cache.keys[LAYER], cache.values[LAYER]
    expected = reference(query, keys, values, length - n_new, window)
    assert ours.shape == (n_new, query.shape[0], shape.head_dim)
    assert (ours.double() - expected).abs().max() <= TOLERANCE[shape.dtype] * values.abs().max()


LENGTHS = [(q, t) for q, t in itertools.product((1, 2, 63, 128), (1, 63, 64, 65, 500)) if q <= t]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 1, 64, 100])
@pytest.mark.parametrize(("n_new", "length"), LENGTHS)
def test_lengths_and_windows(n_new, length, window, dtype):
    check(KVShape(2, 2, 33, dtype), 3, n_new, length, window)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("n_groups", "share", "head_dim"), list(itertools.product((1, 2, 3), (1, 3, 4), (8, 33, 64))), ids=str
)
def test_heads(n_groups, share, head_dim, dtype):
    for n_new, window in ((1, None), (5, 64), (63, 100)):
        check(KVShape(2, n_groups, head_dim, dtype), share, n_new, 131, window)


@pytest.mark.parametrize("window", [None, 64, 100])
@pytest.mark.parametrize(("n_new", "length"), LENGTHS)
def test_memory_that_takes_no_part_does_not_matter(n_new, length, window):
    """Rows after the length (left by an abandoned step) and before the window change no bit."""
    cache = filled(KVShape(2, 2, 8, "float32"), length)
    query = random_query(cache, 3, n_new)
    before = run(cache, query, length, window).clone()
    junk = torch.full((2, CAPACITY - length, 8), 3e30)
    cache.write(LAYER, length, junk, -junk)
    if window and length - n_new - window + 1 > 0:
        old = torch.full((2, length - n_new - window + 1, 8), 3e30)
        cache.write(LAYER, 0, old, -old)
    assert torch.equal(run(cache, query, length, window), before)


def test_memory_that_was_never_written_is_zero():
    cache = filled(KVShape(2, 2, 8, "bfloat16"), 1)
    assert not cache.keys[LAYER][:, 1:].any()
    assert not cache.values[LAYER][:, 1:].any()
    out = run(cache, random_query(cache, 3, 1), 1, None)
    # a single key takes all the weight
    assert torch.equal(out[0], cache.values[LAYER][:, 0].repeat_interleave(3, 0))


@pytest.mark.parametrize("window", [None, 100])
def test_every_element_of_output_and_scratch_is_written(window, monkeypatch):
    cache = filled(KVShape(2, 2, 33, "float32"), 131)
    query = random_query(cache, 3, 5)
    expected = run(cache, query, 131, window)
    scratch = Scratch()
    for name in ("scores", "weights"):
        scratch.take(name, 1 << 20, query.dtype).fill_(torch.nan)
    monkeypatch.setattr(kernel.torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    assert torch.equal(run(cache, query, 131, window, scratch), expected)


def test_scratch_grows_and_follows_the_dtype():
    scratch = Scratch()
    small = scratch.take("scores", 6, torch.float32)
    assert scratch.take("scores", 5, torch.float32).data_ptr() == small.data_ptr()
    assert scratch.take("scores", 10000, torch.float32).shape == (10000,)
    assert scratch.take("scores", 6, torch.bfloat16).dtype == torch.bfloat16
    other = scratch.take("weights", 6, torch.bfloat16)
    assert other.data_ptr() != scratch.take("scores", 6, torch.bfloat16).data_ptr()


# rows of a packed step of 12, as (start, end, length of the session with the new tokens)
PACKINGS = [
    [(0, 1, 1), (1, 2, 500), (2, 12, 75)],
    [(1, 3, 65), (5, 6, 64), (9, 11, 300)],  # gaps before, between and after
    [(0, 11, 64)],
    [(4, 12, 100)],
    [(3, 7, 100)],
]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packed_spans(packing, window):
    """Each span sees its own session only; rows outside every span are zero."""
    shape, share, n_rows = KVShape(2, 2, 33, "float32"), 3, 12
    caches = [filled(shape, length, seed=length) for _, _, length in packing]
    query = torch.randn(1, shape.n_kv_heads * share, n_rows, shape.head_dim)
    spans = [
        PackedSpan(cache, start, end, length - (end - start))
        for cache, (start, end, length) in zip(caches, packing, strict=True)
    ]
    out, weights = sessiond_attention(
        SimpleNamespace(layer_idx=LAYER), query, query, query, None,
        scaling=SCALING, packed=PackedStep(spans, Scratch()), sliding_window=window, dropout=0.0,
    )  # fmt: skip
    assert weights is None
    assert out.shape == (1, n_rows, shape.n_kv_heads * share, shape.head_dim)
    outside = torch.ones(n_rows, dtype=torch.bool)
    for cache, (start, end, length) in zip(caches, packing, strict=True):
        outside[start:end] = False
        expected = reference(
            query[0, :, start:end], cache.keys[LAYER], cache.values[LAYER], length - (end - start), window
        )
        assert (out[0, start:end].double() - expected).abs().max() <= TOLERANCE["float32"] * 5
    assert not out[0, outside].any()
