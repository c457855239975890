"""SessionCache: writes, truncation, views and snapshots; and that reserved memory costs nothing until it is written."""

from __future__ import annotations

import gc
import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sessiond.cache import KEY_GRANULE, PackedCache, PackedSpan, SessionCache
from sessiond.types import KVShape, Span

CELL = 128
SHAPE = KVShape(n_layers=3, n_kv_heads=2, head_dim=5, dtype="bfloat16")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self, which only Linux has")


def rows(n_tokens: int, first: float = 1.0) -> torch.Tensor:
    """[G, n, D], no two elements equal (bf16 counts exactly up to 256)."""
    n = SHAPE.n_kv_heads * n_tokens * SHAPE.head_dim
    return (torch.arange(n) + first).view(SHAPE.n_kv_heads, n_tokens, SHAPE.head_dim)


@pytest.mark.parametrize(("asked", "got"), [(1, 64), (63, 64), (64, 64), (65, 128), (8192, 8192)])
def test_capacity_is_whole_granules(asked, got):
    cache = SessionCache(SHAPE, asked)
    assert cache.capacity == got
    assert got % KEY_GRANULE == 0
    assert cache.keys[2].shape == cache.values[2].shape == (2, got, 5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_new_cache_is_empty_and_zero(dtype):
    cache = SessionCache(KVShape(2, 3, 4, dtype), 100)
    assert (cache.length, cache.sealed, cache.nbytes) == (0, 0, 0)
    assert all(tensor.dtype == getattr(torch, dtype) and not tensor.any() for tensor in (*cache.keys, *cache.values))


def test_write_touches_its_rows_of_its_layer_only():
    cache = SessionCache(SHAPE, 200)
    cache.write(1, 62, rows(4), rows(4, first=100))
    assert torch.equal(cache.keys[1][:, 62:66].float(), rows(4))
    assert torch.equal(cache.values[1][:, 62:66].float(), rows(4, first=100))
    for layer in range(3):
        for tensor in (cache.keys[layer], cache.values[layer]):
            assert not tensor[:, :62].any()
            assert not tensor[:, 66:].any()
            assert bool(tensor[:, 62:66].any()) == (layer == 1)
    assert cache.length == 0, "the length moves when a step has succeeded"


def test_write_beyond_the_capacity_fails():
    cache = SessionCache(SHAPE, 64)
    with pytest.raises(RuntimeError):
        cache.write(0, 62, rows(4), rows(4))


@pytest.mark.parametrize(
    ("length", "sealed", "cut", "expected"),
    [
        (300, 256, 400, (300, 256)),
        (300, 256, 300, (300, 256)),
        (300, 256, 299, (299, 256)),
        (300, 256, 256, (256, 256)),
        (300, 256, 255, (255, 128)),
        (300, 128, 255, (255, 128)),
        (300, 0, 255, (255, 0)),
        (300, 256, 127, (127, 0)),
        (300, 256, 0, (0, 0)),
    ],
)
def test_truncate(length, sealed, cut, expected):
    cache = SessionCache(SHAPE, 512)
    cache.length, cache.sealed = length, sealed
    cache.truncate(cut, CELL)
    assert (cache.length, cache.sealed) == expected
    assert cache.nbytes == cache.length * SHAPE.bytes_per_token == cache.length * 3 * 2 * 2 * 5 * 2


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", np.uint16), ("float16", np.uint16), ("float32", np.uint32)])
def test_arrays_are_writable_views_of_the_bits(dtype, width):
    cache = SessionCache(KVShape(3, 2, 5, dtype), 100)
    cache.write(2, 10, rows(4), rows(4, first=100))
    arrays = cache.arrays(Span(9, 13))
    assert len(arrays) == 3
    keys, values = arrays[2]
    assert keys.shape == (2, 4, 5)
    assert keys.dtype == width
    np.testing.assert_array_equal(keys, cache.keys[2][:, 9:13].contiguous().view(getattr(torch, keys.dtype.name)))
    np.testing.assert_array_equal(values, cache.array(2, 1, Span(9, 13)))
    assert not np.shares_memory(keys, values)
    values[...] = 0
    assert not cache.values[2][:, 9:13].any()
    assert cache.values[2][:, 13].any()
    assert cache.keys[2].any()


def test_copies_do_not_follow_later_steps():
    cache = SessionCache(SHAPE, 100)
    cache.write(0, 0, rows(4), rows(4))
    copies = cache.copies(1, 3)
    before = [(keys.copy(), values.copy()) for keys, values in copies]
    assert before[0][0].any()
    cache.write(0, 0, rows(4, first=200), rows(4, first=200))
    for (keys, values), (old_keys, old_values) in zip(copies, before, strict=True):
        np.testing.assert_array_equal(keys, old_keys)
        np.testing.assert_array_equal(values, old_values)
    assert cache.copies(3, 3)[0][0].shape == (2, 0, 5)


def test_packed_cache_hands_each_session_its_rows():
    caches = [SessionCache(SHAPE, 100) for _ in range(2)]
    packed = PackedCache(SHAPE.n_layers, [PackedSpan(caches[0], 0, 1, 70), PackedSpan(caches[1], 2, 4, 5)])
    keys, values = rows(4)[None], rows(4, first=100)[None]
    assert packed.update(keys, values, 1)[0] is keys
    assert torch.equal(caches[0].keys[1][:, 70:71].float(), keys[0, :, :1])
    assert torch.equal(caches[1].keys[1][:, 5:7].float(), keys[0, :, 2:4])
    assert torch.equal(caches[1].values[1][:, 5:7].float(), values[0, :, 2:4])
    assert caches[0].keys[1][:, 70:].any(2).sum() == 2, "one row for each of two heads"
    assert not caches[0].keys[0].any()


def test_the_mask_is_causal_and_windowed():
    span = PackedSpan(SessionCache(SHAPE, 100), 10, 13, 5)
    hidden = span.mask(3, 6, None)
    assert hidden.tolist() == [[key > query for key in range(3, 9)] for query in (5, 6, 7)]
    hidden = span.mask(3, 6, 2)
    assert hidden.tolist() == [[key > query or key <= query - 2 for key in range(3, 9)] for query in (5, 6, 7)]
    assert span.mask(3, 6, 2) is hidden


# --- memory --------------------------------------------------------------------------------------------------------

# The default model's: 22.5 KiB a token, 180 MiB for its whole context.
LARGE = KVShape(n_layers=30, n_kv_heads=3, head_dim=64)
CONTEXT = 8192


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@linux
def test_reserved_memory_costs_nothing():
    SessionCache(LARGE, CONTEXT)
    before = resident_bytes()
    caches = [SessionCache(LARGE, CONTEXT) for _ in range(64)]
    grown = resident_bytes() - before
    assert sum(cache.capacity for cache in caches) * LARGE.bytes_per_token == 11.25 * 2**30
    assert grown < 16 << 20, f"{grown} bytes for caches that hold nothing"


@linux
def test_a_token_costs_a_page_a_run():
    cache = SessionCache(LARGE, CONTEXT)
    before = resident_bytes()
    one = torch.ones(3, 1, 64)
    for layer in range(LARGE.n_layers):
        cache.write(layer, 0, one, one)
    grown = resident_bytes() - before
    runs = 2 * LARGE.n_layers * LARGE.n_kv_heads
    assert runs * mmap.PAGESIZE // 2 < grown < 2 * runs * mmap.PAGESIZE + (1 << 20)


@linux
def test_memory_is_given_back():
    cache = SessionCache(LARGE, 1024)
    one = torch.ones(3, 1024, 64)
    before = resident_bytes()
    for layer in range(LARGE.n_layers):
        cache.write(layer, 0, one, one)
    assert resident_bytes() - before > 20 << 20
    del cache
    assert resident_bytes() - before < 4 << 20


@linux
def test_huge_pages_only_where_they_are_asked_for():
    """Kernels set to "always" would otherwise give a session of one token its whole capacity."""
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no transparent huge pages")
    cache = SessionCache(LARGE, CONTEXT)
    assert "nh" in vm_flags(cache)
    assert cache.nbytes == 0
    cache.backing.use_huge_pages()
    assert {"hg"} <= vm_flags(cache)
    assert cache.nbytes == CONTEXT * LARGE.bytes_per_token


def vm_flags(cache: SessionCache) -> set[str]:
    """The kernel's flags of the mapping that holds the cache."""
    address = cache.array(0, 0, Span(0, 1)).ctypes.data
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("the cache lies in no mapping")


@linux
def test_populate_is_only_a_hint():
    cache = SessionCache(LARGE, CONTEXT)
    cache.write(0, 0, torch.ones(3, 1, 64), torch.ones(3, 1, 64))
    before = resident_bytes()
    cache.populate(range(1), 1024)
    cache.populate(range(LARGE.n_layers - 1, LARGE.n_layers), CONTEXT)
    assert resident_bytes() - before < 16 << 20
    assert cache.keys[0][:, 0].all()
    assert not cache.keys[0][:, 1:].any()
    assert not cache.values[LARGE.n_layers - 1].any()


def test_what_is_forgotten_is_cleared():
    """Else what a failed step left - it may be NaN - spoils sums in which it has no weight."""
    cache = SessionCache(KVShape(2, 2, 8, "bfloat16"), 256)
    dims = (cache.shape.n_kv_heads, 100, cache.shape.head_dim)
    cache.write(1, 0, torch.ones(dims), torch.full(dims, torch.nan))
    cache.length = 40  # the last step never came to its end
    cache.truncate(30, 128)
    assert cache.values[1][:, :30].isnan().all()
    assert not cache.values[1][:, 30:].any()
    assert not cache.keys[1][:, 30:].any()
