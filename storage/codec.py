"""Lossless frame codecs. A codec is a frozen value that round-trips a JSON config stored with every record.

Both directions release the GIL while they work, so pools of threads scale.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import blosc2
import numpy as np
from numpy.typing import NDArray

from sessiond.kernels import exponent_planes

Layout = Literal["token", "channel"]

# Process-wide in blosc2. Without it two threads decode no faster than one.
blosc2.set_releasegil(True)


class Codec(Protocol):
    """Codes one frame: a C-contiguous array, already in `layout` order.

    `token` keeps [G, n, D]; `channel` stores [G, D, n].
    """

    name: ClassVar[str]

    @property
    def layout(self) -> Layout: ...

    strided: ClassVar[bool]  # whether `out` of decode may have any stride from group to group

    def encode(self, frame: NDArray[Any]) -> bytes: ...

    def decode(self, coded: memoryview, out: NDArray[Any]) -> None:
        """Fill the C-contiguous `out`. Raises ValueError unless `coded` decodes to exactly its bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Raw:
    """The bytes themselves."""

    name: ClassVar[str] = "raw"
    strided: ClassVar[bool] = False
    layout: Layout = "token"

    def encode(self, frame: NDArray[Any]) -> bytes:
        return frame.tobytes()

    def decode(self, coded: memoryview, out: NDArray[Any]) -> None:
        if len(coded) != out.nbytes:
            raise ValueError(f"{len(coded)} bytes, expected {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(coded, np.uint8)


@dataclass(frozen=True, slots=True)
class Blosc2ShuffleZstd:
    """Blosc2: byte shuffle, then ZSTD on each byte plane by itself (ALWAYS_SPLIT).

    On bf16 KV only the exponent plane shrinks; without the split ratio .75 instead of .68.
    """

    name: ClassVar[str] = "blosc2-shuffle-zstd"
    strided: ClassVar[bool] = False
    clevel: int = 1
    typesize: int = 2
    layout: Layout = "token"

    def encode(self, frame: NDArray[Any]) -> bytes:
        return blosc2.compress2(  # type: ignore[no-any-return]
            frame,
            codec=blosc2.Codec.ZSTD,
            clevel=self.clevel,
            typesize=self.typesize,
            filters=_FILTERS,
            filters_meta=_FILTERS_META,
            splitmode=blosc2.SplitMode.ALWAYS_SPLIT,
            blocksize=0,
            nthreads=1,
        )

    def decode(self, coded: memoryview, out: NDArray[Any]) -> None:
        # blosc2 writes as many bytes as the chunk's own header claims, whatever `out` holds: check first.
        if len(coded) < _CHUNK_SIZES.size or _CHUNK_SIZES.unpack_from(coded)[1] != out.nbytes:
            raise ValueError(f"chunk does not decode to {out.nbytes} bytes")
        try:
            blosc2.decompress2(coded, dst=out, nthreads=1)
        except RuntimeError as exc:
            raise ValueError(str(exc)) from exc


@dataclass(frozen=True, slots=True)
class ExponentPlanes:
    """bf16 only: exponents as small distances, everything else as it is (sessiond/kernels/exponent_planes.py).

    Decodes four times as fast as Blosc2ShuffleZstd, for 0.70 of the bytes against 0.69 (docs/decisions/0008).
    """

    name: ClassVar[str] = "exponent-planes"
    strided: ClassVar[bool] = True
    layout: Literal["token"] = "token"

    def encode(self, frame: NDArray[Any]) -> bytes:
        assert frame.dtype == np.uint16, frame.dtype
        return exponent_planes.pack(frame)

    def decode(self, coded: memoryview, out: NDArray[Any]) -> None:
        if out.dtype != np.uint16:
            raise ValueError(f"frames hold 2 bytes a value, expected {out.itemsize}")
        exponent_planes.unpack(coded, out)


_FILTERS = [blosc2.Filter.SHUFFLE]
_FILTERS_META = [0]
_CHUNK_SIZES = struct.Struct("<Iiii")  # flags; uncoded, block and coded sizes

AnyCodec = Raw | Blosc2ShuffleZstd | ExponentPlanes
CODECS: dict[str, type[Raw] | type[Blosc2ShuffleZstd] | type[ExponentPlanes]] = {
    "raw": Raw,
    "blosc2-shuffle-zstd": Blosc2ShuffleZstd,
    "exponent-planes": ExponentPlanes,
}


def codec_for(dtype: str) -> AnyCodec:
    """What KV of a model's dtype is written with."""
    return ExponentPlanes() if dtype == "bfloat16" else Blosc2ShuffleZstd(typesize=4 if dtype == "float32" else 2)


def codec_config(codec: AnyCodec) -> dict[str, Any]:
    """The JSON object that names this codec and its settings."""
    return {"name": codec.name, **asdict(codec)}


def codec_from_config(config: dict[str, Any]) -> AnyCodec:
    """The inverse of codec_config. Raises ValueError on an unknown name or wrong settings."""
    settings = dict(config)
    name = settings.pop("name", None)
    layouts = ("token",) if name == ExponentPlanes.name else ("token", "channel")
    if name not in CODECS or settings.get("layout") not in layouts:
        raise ValueError(f"unknown codec {config!r}")
    try:
        return CODECS[name](**settings)
    except TypeError as exc:
        raise ValueError(f"codec settings {config!r}") from exc
