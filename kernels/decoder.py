"""The layers of a decoder-only transformer in a few compiled calls a step (kernels/native/decoder.h).

A step of one token is a hundred small operations a layer; as many calls through a framework take longer than reading
the weights. Here a step whose sessions attend to everything, or to what sieve chooses, is one call, without the
interpreter's lock. The reference is the model's own forward in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sessiond.kernels.blockweights import BLOCK
from sessiond.kernels.matrix import Matrix
from sessiond.kernels.native_library import ffi, lib
from sessiond.kernels.sieved import Sieved

GATES = ("silu", "gelu_tanh")
MOST_HEAD_DIM = 256  # rows of a head stand on the kernel's stack
TILE = 16  # keys that attention reads together


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Numbers of a decoder: `inner` of its MLP; `rotary` channels of a head rotate; `gate` is one of GATES."""

    hidden: int
    n_heads: int
    n_groups: int
    head_dim: int
    inner: int
    rotary: int
    gate: str
    eps: float


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer: matrices, and norms fp32 [hidden] or [head_dim] (None: there is none).

    `qkv`: heads of queries, keys and values, stacked. `gate_up`: interleaved (kernels/matrix.py). `window`: keys that a
    query sees, 0: all. `rope`: which of a step's tables of angles it takes.
    """

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    before_attention: Tensor
    before_mlp: Tensor
    after_attention: Tensor | None = None
    after_mlp: Tensor | None = None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    window: int = 0
    rope: int = 0
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class SessionRows:
    """Rows [row, row + n_new) of a step, at `position` and on. `kv`: the address of the session's memory, bf16
    [L, 2, G, capacity, D]; `in_file`: of a file, whose pages leave memory after every layer. `sieve` chooses for its
    one row; None: rows attend to everything."""

    kv: int
    capacity: int
    position: int
    row: int
    n_new: int
    in_file: bool = False
    sieve: Sieved | None = None


class Decoder:
    """Compiled layers. One step at a time."""

    def __init__(self, shape: DecoderShape, layers: Sequence[DecoderLayer], norm: Tensor, head: Matrix) -> None:
        """`norm` fp32 [hidden] and `head` make logits of the last layer's rows. Raises ValueError for parts that do
        not fit together."""
        _check_parts(shape, layers, norm, head)
        self.shape, self.layers, self.head = shape, list(layers), head
        self._norm = norm
        gate = GATES.index(shape.gate)
        numbers = (shape.hidden, shape.n_heads, shape.n_groups, shape.head_dim, shape.inner, shape.rotary)
        self._struct: Any = ffi.new("struct decoder *", (*numbers, gate, shape.eps))
        self._layers: Any = ffi.new("struct layer[]", len(self.layers))
        for target, layer in zip(self._layers, self.layers, strict=True):
            _fill(target, layer)
        self._work = torch.empty(0, dtype=torch.uint8)
        self._scratch = torch.empty(0)

    def step(self, hidden: Tensor, angles: Tensor, sessions: Sequence[SessionRows]) -> DecoderStep:
        """Begin a step of rows `hidden` [N, hidden] fp32, which become the residual stream. `angles`
        [tables, 2, P, rotary / 2] fp32: cosines and sines of the first P positions. Sessions stand in the order of
        their rows, and cover them. Raises ValueError, also for positions beyond P or a session's memory."""
        _check_step(self, hidden, angles, sessions)
        return DecoderStep(self, hidden, angles, sessions)

    def work_for(self, rows: int) -> Tensor:
        """Memory to work in, the same for every step."""
        nbytes: int = lib.decoder_work(self._struct, rows)
        if self._work.numel() < nbytes:
            self._work = torch.empty(nbytes, dtype=torch.uint8)
        return self._work

    def scratch_for(self, step: Any) -> Tensor:
        """Memory for attention in any layer of a step."""
        layers, n_layers, threads = self._layers, len(self.layers), torch.get_num_threads()
        floats: int = lib.decoder_scratch(self._struct, layers, n_layers, step, threads)
        if self._scratch.numel() < floats:
            self._scratch = torch.empty(floats)
        return self._scratch


class DecoderStep:
    """A step under way over N rows; layers are computed in their order.

    `query`, `attended` [N, H, D] bf16: of the layer under way.
    """

    def __init__(self, decoder: Decoder, hidden: Tensor, angles: Tensor, sessions: Sequence[SessionRows]) -> None:
        shape, n = decoder.shape, len(hidden)
        self._decoder = decoder
        self._threads = torch.get_num_threads()
        self.hidden, self._angles = hidden, angles
        self.query = torch.empty(n, shape.n_heads, shape.head_dim, dtype=torch.bfloat16)
        self.attended = torch.empty_like(self.query)
        self._work = decoder.work_for(n)
        told = [
            (s.kv, 0 if s.sieve is None else s.sieve.address, s.capacity, s.position, s.row, s.n_new, s.in_file)
            for s in sessions
        ]
        self._sieves = [s.sieve for s in sessions]
        self._sessions = ffi.new("struct rows_of_session[]", told)
        self._struct: Any = ffi.new("struct packed_step *")
        self._struct.rows, self._struct.n_sessions = n, len(told)
        self._struct.sessions = int(ffi.cast("uintptr_t", self._sessions))
        self._struct.hidden = hidden.data_ptr()
        self._struct.angles, self._struct.n_angles = angles.data_ptr(), angles.shape[2]
        self._struct.query, self._struct.attended = self.query.data_ptr(), self.attended.data_ptr()
        self._struct.work = self._work.data_ptr()
        self._scratch = decoder.scratch_for(self._struct)

    def before(self, layer: int) -> None:
        """Queries of a layer, and its keys and values into the sessions' memory."""
        decoder = self._decoder
        lib.decoder_before(decoder._struct, decoder._layers + layer, self._struct, layer, self._threads)

    def after(self, layer: int) -> None:
        """The rest of a layer, once `attended` is whole."""
        decoder = self._decoder
        lib.decoder_after(decoder._struct, decoder._layers + layer, self._struct, self._threads)

    def run(self, first: int, last: int) -> None:
        """Layers [first, last) whole."""
        decoder, scratch = self._decoder, self._scratch.data_ptr()
        lib.decoder_run(decoder._struct, decoder._layers, self._struct, first, last, scratch, self._threads)

    def logits(self, rows: Sequence[int]) -> Tensor:
        """Of these rows: [len(rows), V] fp32. Raises ValueError."""
        n_rows = len(self.hidden)
        if len(rows) > n_rows or any(not 0 <= row < n_rows for row in rows):
            raise ValueError(f"logits of rows {list(rows)} of {n_rows}")
        decoder = self._decoder
        out = torch.empty(len(rows), decoder.head.n_out)
        if rows:
            norm, wanted = decoder._norm.data_ptr(), ffi.new("int64_t[]", list(rows))
            struct, head, n = decoder._struct, decoder.head.struct, len(rows)
            lib.decoder_logits(struct, norm, head, self._struct, wanted, n, out.data_ptr(), self._threads)
        return out


def _check_parts(shape: DecoderShape, layers: Sequence[DecoderLayer], norm: Tensor, head: Matrix) -> None:
    s = shape
    if s.head_dim % BLOCK or not 0 < s.head_dim <= MOST_HEAD_DIM or s.n_heads % s.n_groups:
        raise ValueError(f"{s.n_heads} heads of {s.head_dim} in {s.n_groups} groups")
    if s.hidden % BLOCK or s.inner % BLOCK or s.rotary % 2 or not 0 <= s.rotary <= s.head_dim:
        raise ValueError(f"widths of {s.hidden} and {s.inner}, {s.rotary} channels that rotate")
    width = s.n_heads * s.head_dim
    sizes = {
        "qkv": (width + 2 * s.n_groups * s.head_dim, s.hidden),
        "out": (s.hidden, width),
        "gate_up": (2 * s.inner, s.hidden),
        "down": (s.hidden, s.inner),
    }
    norms = dict.fromkeys(("before_attention", "after_attention", "before_mlp", "after_mlp"), s.hidden)
    norms |= {"query_norm": s.head_dim, "key_norm": s.head_dim}
    for layer in layers:
        for name, size in sizes.items():
            matrix: Matrix = getattr(layer, name)
            if (matrix.n_out, matrix.n_in) != size:
                raise ValueError(f"{name} is {matrix.n_out} by {matrix.n_in}, not {size[0]} by {size[1]}")
        for name, n in norms.items():
            _check_norm(name, getattr(layer, name), n)
    _check_norm("the last norm", norm, s.hidden)
    if head.n_in != s.hidden:
        raise ValueError(f"the head has {head.n_in} inputs, not {s.hidden}")


def _check_norm(name: str, norm: Tensor | None, n: int) -> None:
    if norm is not None and (norm.shape != (n,) or norm.dtype is not torch.float32 or not norm.is_contiguous()):
        raise ValueError(f"{name} of shape {tuple(norm.shape)} and type {norm.dtype}, not fp32 [{n}]")


def _check_step(decoder: Decoder, hidden: Tensor, angles: Tensor, sessions: Sequence[SessionRows]) -> None:
    n, n_tables = len(hidden), 1 + max((layer.rope for layer in decoder.layers), default=0)
    for name, part in (("hidden", hidden), ("angles", angles)):
        if part.dtype is not torch.float32 or not part.is_contiguous() or not part.is_cpu:
            raise ValueError(f"{name} of type {part.dtype} on {part.device}, or not in one run")
    if hidden.shape[1:] != (decoder.shape.hidden,):
        raise ValueError(f"hidden is {tuple(hidden.shape)}")
    if angles.shape[0] < n_tables or angles.shape[1] != 2 or angles.shape[3:] != (decoder.shape.rotary // 2,):
        raise ValueError(f"angles are {tuple(angles.shape)}, for {n_tables} tables")
    row = 0
    for s in sessions:
        if s.row != row or s.n_new < 1:
            raise ValueError(f"{s.n_new} rows of a session at {s.row}, where row {row} is next")
        if s.position + s.n_new > angles.shape[2]:
            raise ValueError(f"{s.n_new} positions from {s.position} on, of {angles.shape[2]} with angles")
        if s.position < 0 or -(-(s.position + s.n_new) // TILE) * TILE > s.capacity:
            raise ValueError(f"{s.n_new} positions from {s.position} on, of {s.capacity} in whole tiles of {TILE}")
        if s.sieve is not None and s.n_new != 1:
            raise ValueError(f"sieve chooses for one row, not for {s.n_new}")
        row += s.n_new
    if row != n:
        raise ValueError(f"sessions cover {row} rows of {n}")


def _fill(target: Any, layer: DecoderLayer) -> None:
    for name in ("qkv", "out", "gate_up", "down"):
        setattr(target, name, getattr(layer, name).struct[0])
    for name in ("before_attention", "after_attention", "before_mlp", "after_mlp", "query_norm", "key_norm"):
        norm = getattr(layer, name)
        setattr(target, name, 0 if norm is None else norm.data_ptr())
    target.window, target.rope, target.scaling = layer.window, layer.rope, layer.scaling
