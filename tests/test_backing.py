"""Exact KV one tier down: in a file whose pages are in memory only while a step reads them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from engine_harness import Session, digest, make_pair, random_ids, torch_threads
from small_policies import SMALL

from sessiond.backing import Backing, files_supported
from sessiond.cache import SessionCache, reserved_bytes
from sessiond.errors import DiskFull
from sessiond.policies.registry import parse
from sessiond.types import KVShape, Span

pytestmark = pytest.mark.skipif(not files_supported(), reason="this system cannot set a file's space aside")

SHAPE = KVShape(n_layers=10, n_kv_heads=3, head_dim=64)
CONTEXT = 2048


def offloaded(folder: Path, shape: KVShape = SHAPE, capacity: int = CONTEXT) -> SessionCache:
    return SessionCache(shape, capacity, Backing(reserved_bytes(shape, capacity), folder))


def mapped_bytes(cache: SessionCache) -> int:
    """Bytes of the cache's pages that are in this process's memory, by the kernel's word."""
    address = cache.array(0, 0, Span(0, 1)).ctypes.data
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(bounds[1], 16), int(bounds[2], 16)
            inside = address <= start < address + len(cache.backing.memory) or start <= address < end
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def fill(cache: SessionCache, n: int) -> None:
    draw = torch.Generator().manual_seed(3)
    for layer in range(cache.shape.n_layers):
        rows = [torch.randn(cache.shape.n_kv_heads, n, cache.shape.head_dim, generator=draw) for _ in range(2)]
        cache.write(layer, 0, *rows)
    cache.length = n


def test_a_file_has_no_name_and_its_memory_is_zero(tmp_path: Path):
    cache = offloaded(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not cache.keys[0].any()
    assert not cache.values[SHAPE.n_layers - 1].any()


def test_what_is_released_leaves_memory_and_is_still_there(tmp_path: Path):
    cache, plain = offloaded(tmp_path), SessionCache(SHAPE, CONTEXT)
    for one in (cache, plain):
        fill(one, 2000)
    assert mapped_bytes(cache) > 0.9 * 2000 * SHAPE.bytes_per_token
    cache.release(3)
    assert mapped_bytes(cache) < 0.95 * 2000 * SHAPE.bytes_per_token
    cache.release_all()
    assert mapped_bytes(cache) < 64 << 10
    assert digest(cache, 0, 2000) == digest(plain, 0, 2000)


def test_memory_of_its_own_is_never_released():
    """Its bytes are nowhere else."""
    cache = SessionCache(SHAPE, CONTEXT)
    fill(cache, 100)
    before = digest(cache, 0, 100)
    cache.release(0)
    cache.release_all()
    assert digest(cache, 0, 100) == before


def test_a_session_moves_there_and_back_with_every_byte(tmp_path: Path):
    cache = SessionCache(SHAPE, CONTEXT)
    fill(cache, 777)
    before, seen = digest(cache, 0, 777), cache.keys[2]
    cache.move(Backing(reserved_bytes(SHAPE, CONTEXT), tmp_path))
    assert cache.is_offloaded
    assert cache.nbytes == 777 * SHAPE.bytes_per_token // SHAPE.n_layers
    assert mapped_bytes(cache) < 64 << 10
    assert torch.equal(seen[:, :777], cache.keys[2][:, :777])  # who read the old memory may go on
    cache.move(Backing(reserved_bytes(SHAPE, CONTEXT)))
    assert not cache.is_offloaded
    assert cache.nbytes == 777 * SHAPE.bytes_per_token
    assert digest(cache, 0, 777) == before


def test_copying_from_one_to_another_leaves_nothing_of_either_mapped(tmp_path: Path):
    source, target = offloaded(tmp_path), offloaded(tmp_path)
    fill(source, 1000)
    source.release_all()
    for layer in range(SHAPE.n_layers):
        target.copy_from(source, layer, Span(0, 1000))
    assert mapped_bytes(source) + mapped_bytes(target) < 64 << 10
    assert digest(target, 0, 1000) == digest(source, 0, 1000)


def test_more_than_the_disk_has_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises((DiskFull, OSError)) as caught:
        Backing(1 << 60, tmp_path)
    assert isinstance(caught.value, DiskFull) or caught.value.errno in (errno.EFBIG, errno.EINVAL)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(fd: int, start: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFull):
        Backing(4096, tmp_path)


@pytest.mark.parametrize("name", ["full", "sieve", "window"])
def test_turns_compute_the_same_bytes_there(tmp_path: Path, name: str):
    model = make_pair("llama").ours
    sessions = [Session(model), Session(model, cache=offloaded(tmp_path, model.shape, model.max_context))]
    with torch_threads(1):
        for session in sessions:
            for i, n in enumerate((150, 40, 70)):
                session.run(random_ids(n, i), 4, policy=parse(name, SMALL[name]), turn_start=len(session.log))
            session.seal()
    plain, other = sessions
    assert other.log == plain.log
    assert other.cache.length == plain.cache.length
    assert digest(other.cache, 0, other.cache.length) == digest(plain.cache, 0, plain.cache.length)


def test_a_step_leaves_nothing_of_it_mapped(tmp_path: Path):
    model = make_pair("llama", torch.bfloat16).ours
    session = Session(model, cache=offloaded(tmp_path, model.shape, model.max_context))
    session.run(random_ids(1500, 1), 3)
    assert session.cache.length > 1500
    layer_bytes = len(session.cache.backing.memory) // model.shape.n_layers
    assert mapped_bytes(session.cache) < layer_bytes / 4


@pytest.mark.parametrize("in_file", [False, True])
def test_memory_behind_what_is_held_is_given_back_and_stays_zero(tmp_path: Path, in_file: bool):
    cache = offloaded(tmp_path) if in_file else SessionCache(SHAPE, CONTEXT)
    fill(cache, 2000)
    before, held = digest(cache, 0, 500), mapped_bytes(cache)
    cache.truncate(500, 128)
    cache.trim()
    assert mapped_bytes(cache) < held / 2
    assert digest(cache, 0, 500) == before
    assert not any(part[layer][:, 500:].any() for part in (cache.keys, cache.values) for layer in range(10))
