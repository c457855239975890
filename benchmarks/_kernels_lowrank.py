"""Keys of chosen tokens from coordinates of low rank, as ShadowKV takes them in every layer of a step."""

from __future__ import annotations

import itertools

import torch
from _kernelcase import KernelCase

from sessiond.kernels.lowrank import Factors, bases_of, low_rank_keys, low_rank_keys_reference
from sessiond.kernels.rope import Rope

GROUPS, DIM, RANK, HISTORY, CHOSEN = 3, 64, 160, 8192, 1024
LAYERS = 30  # that take turns, as in a step


def cases() -> list[KernelCase]:
    rope = Rope(1.0 / 10000.0 ** (torch.arange(DIM // 2) / (DIM // 2)))
    width = GROUPS * DIM
    basis, mean = torch.randn(width, RANK).bfloat16(), torch.randn(width)
    layers = [Factors(torch.randn(HISTORY, RANK).bfloat16(), basis, mean) for _ in range(LAYERS)]
    bases = bases_of(layers[0], GROUPS)
    keys = torch.randn(GROUPS, HISTORY, DIM).bfloat16()
    positions = torch.stack([torch.randperm(HISTORY)[:CHOSEN].sort().values for _ in range(GROUPS)])
    exact = torch.zeros(GROUPS, CHOSEN, dtype=torch.bool)
    turn = itertools.cycle(layers)
    factors = next(turn)

    def fresh() -> None:
        nonlocal factors
        factors = next(turn)

    return [
        KernelCase(
            name=f"{CHOSEN} keys of rank {RANK}, rotated",
            run=lambda: low_rank_keys(factors, bases, positions, exact, keys, rope),
            reference=lambda: low_rank_keys_reference(factors, positions, exact, keys, rope),
            nbytes=2 * (GROUPS * CHOSEN * RANK + width * RANK + GROUPS * CHOSEN * DIM),
            multiply_adds=GROUPS * CHOSEN * DIM * RANK,
            fresh=fresh,
        )
    ]
