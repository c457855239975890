"""What this machine can do at most, measured: reading memory and multiply-adds. The floors of `make bench-kernels`."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from sessiond.kernels.native_library import BUILT, lib

KINDS = {"fp32": 0, "bf16": 1, "int8": 2}
STEP = 256  # bytes: what is read must be a multiple
LANES = 16
ROUNDS = 1 << 20 if BUILT else 8  # about 2 ms: beside it, waking threads is nothing


def read_sum_reference(data: Tensor) -> int:
    """Sum of data [n], int64, modulo 2^64: every byte is read."""
    return int(data.sum()) % 2**64


def read_sum(data: Tensor) -> int:
    """`read_sum_reference` by all threads, as fast as memory goes. Raises ValueError unless whole steps of int64."""
    if data.dtype is not torch.int64 or data.ndim != 1 or not data.is_contiguous() or data.nbytes % STEP:
        raise ValueError(f"what is read must be int64 [n], contiguous, a multiple of {STEP} bytes")
    if not BUILT:
        return read_sum_reference(data)
    return int(lib.probe_read(data.data_ptr(), data.nbytes, torch.get_num_threads()))


def multiply_adds(kind: str, rounds: int) -> tuple[int, Tensor]:
    """Multiply-adds of ones in registers, by all threads: how many, and their sums [threads, 16], fp32.

    `kind`: fp32, bf16 or int8. Without compiled kernels a product of matrices does them, in fp32.
    """
    if kind not in KINDS or rounds < 0:
        raise ValueError(f"kind must be one of {', '.join(KINDS)} and rounds not negative: {kind!r}, {rounds}")
    threads = torch.get_num_threads()
    if not BUILT:
        ones = torch.ones(256, 256)
        for _ in range(rounds):
            out = ones @ ones
        return rounds * 256**3, out[:threads, :LANES] if rounds else torch.zeros(threads, LANES)
    sums = torch.zeros(threads, LANES)
    return int(lib.probe_multiply_adds(KINDS[kind], rounds, sums.data_ptr(), threads)), sums


def read_rate(data: Tensor) -> float:
    """Bytes a second of reading `data` once. Only data that no cache holds tell of memory."""
    began = time.perf_counter()
    read_sum(data)
    return data.nbytes / (time.perf_counter() - began)


def multiply_rate(kind: str, rounds: int = ROUNDS) -> float:
    """Multiply-adds of `kind` a second."""
    began = time.perf_counter()
    n, _ = multiply_adds(kind, rounds)
    return n / (time.perf_counter() - began)
