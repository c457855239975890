"""Leaf value types shared by every layer. Imports nothing of the project."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

#: What a model's matrices are computed with: as they were loaded, or quantized in blocks of 32.
WeightsKind = Literal["bf16", "int8", "int4"]


class Tier(enum.StrEnum):
    """Where bytes are: the memory the model computes in, RAM, or LMDB."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class FinishReason(enum.StrEnum):
    """Why a turn produced no further token."""

    STOP = "stop"
    LENGTH = "length"
    CONTEXT_FULL = "context_full"
    TOOL_CALL = "tool_call"
    ABORTED = "aborted"


class Part(enum.IntEnum):
    """Which half of the state a KV frame holds. `STATE` and `MEDIA` are reserved kinds."""

    K = 0
    V = 1
    STATE = 2
    MEDIA = 3


@dataclass(frozen=True, slots=True)
class Span:
    """Half-open range of positions or log offsets."""

    start: int
    end: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.end, self

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of one token's keys and values: `n_layers` times 2 (K, V) times [G, D] elements of `dtype`."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def itemsize(self) -> int:
        return {"bfloat16": 2, "float16": 2, "float32": 4}[self.dtype]

    @property
    def layer_bytes_per_token(self) -> int:
        """Bytes of K (or of V) of one token in one layer."""
        return self.n_kv_heads * self.head_dim * self.itemsize

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.n_layers * self.layer_bytes_per_token
