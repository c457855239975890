"""The matrix products of a step: few rows against weights that come from memory, many rows against the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from _kernelcase import KernelCase
from torch import Tensor

from sessiond.kernels.blockweights import BlockWeights, linear_blocks_reference, quantize
from sessiond.kernels.matrix import Matrix

# Outputs and inputs of the default model's layers as they are computed together, and of its vocabulary.
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))
ROWS = (1, 16, 128)
COLD_BYTES = 1 << 27  # of weights that take turns, so that none is found in a cache
KINDS = {16: "bf16", 8: "int8", 4: "int8"}  # bits of a weight, and what is multiplied


def cases() -> list[KernelCase]:
    return [case for n_out, n_in in SHAPES for bits in KINDS for case in _cases(n_out, n_in, bits)]


def _cases(n_out: int, n_in: int, bits: int) -> Iterator[KernelCase]:
    dense = torch.randn(n_out, n_in).bfloat16()
    weight: Tensor | BlockWeights = dense if bits == 16 else quantize(dense, bits)
    nbytes = Matrix(weight).nbytes
    turn = itertools.cycle([Matrix(weight) for _ in range(max(1, COLD_BYTES // nbytes))])
    matrix = next(turn)

    def fresh() -> None:
        nonlocal matrix
        matrix = next(turn)

    def reference(x: Tensor) -> Tensor:
        return F.linear(x, weight) if isinstance(weight, Tensor) else linear_blocks_reference(x, weight)

    def case(rows: int) -> KernelCase:
        x = torch.randn(rows, n_in).bfloat16()
        return KernelCase(
            name=f"product of {rows} rows, {bits} bits, {n_in} to {n_out}",
            run=lambda: matrix.product(x),
            reference=lambda: reference(x),
            nbytes=nbytes + 2 * rows * n_in + 4 * rows * n_out,
            multiply_adds=rows * n_in * n_out,
            kind=KINDS[bits],
            fresh=fresh,
        )

    yield from (case(rows) for rows in ROWS)
