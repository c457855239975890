"""The matrix products of a step: few rows against weights that come from memory, many rows against the same."""

from __future__ import annotations

import itertools

import torch
from _kernelcase import KernelCase

from sessiond.kernels.linear import linear, linear_reference

# Outputs and inputs of the default model's layers, and of its vocabulary.
SHAPES = ((1536, 576), (576, 1536), (576, 576), (49152, 576))
ROWS = (1, 16, 128)
COLD_BYTES = 1 << 27  # of weights that take turns, so that none is found in a cache


def cases() -> list[KernelCase]:
    return [case for n_out, n_in in SHAPES for case in _cases(n_out, n_in)]


def _cases(n_out: int, n_in: int) -> list[KernelCase]:
    n_copies = max(1, COLD_BYTES // (2 * n_out * n_in))
    weights = torch.randn(n_out, n_in).bfloat16().repeat(n_copies, 1, 1)
    turn = itertools.cycle(weights)
    weight = weights[0]

    def fresh() -> None:
        nonlocal weight
        weight = next(turn)

    def case(rows: int) -> KernelCase:
        x = torch.randn(rows, n_in).bfloat16()
        return KernelCase(
            name=f"linear bf16 {rows}x{n_in}x{n_out}",
            run=lambda: linear(x, weight),
            reference=lambda: linear_reference(x, weight),
            nbytes=2 * (n_out * n_in + rows * n_in + rows * n_out),
            multiply_adds=rows * n_in * n_out,
            kind="bf16",
            fresh=fresh,
        )

    return [case(rows) for rows in ROWS]
