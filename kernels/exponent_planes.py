"""Lossless coding of bf16 keys and values as exponent planes (docs/format.md, "exponent-planes").

Sign and mantissa, 8 bits that nothing compresses, are kept as they are. The exponent becomes a distance below a base of
its channel, in as few bits as pay; what does not fit is escaped. Of real keys and values 0.70 remain, against 0.69 for
a general entropy coder, and decoding is a few instructions for 64 values instead of a table walk for each.

Bytes of a frame of N = G * n * D values in the order [G, n, D]:

    u8 width 1..5 | u8 base[G, D] | u8 sign and mantissa[N] | width bit planes of ceil(N / 8) | escaped exponents
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessiond.kernels.native_library import BUILT, lib

MAX_WIDTH = 5
MAX_STEPS = 8  # candidates for a base: the channel's largest exponent and the seven below
MAX_TOKENS = 65535

Frame = NDArray[np.uint16]


def pack_reference(values: Frame) -> bytes:
    """Code a frame [G, n, D] of bf16 bit patterns, n <= 65535."""
    n_groups, n_tokens, dim = values.shape
    exponents = (values >> 7 & 0xFF).astype(np.int16)
    counts = np.zeros((n_groups, dim, 256 + 32), np.int64)  # exponent e at e + 32, nothing below
    groups, channels = np.meshgrid(np.arange(n_groups), np.arange(dim), indexing="ij")
    for token in range(n_tokens):
        counts[groups, channels, exponents[:, token] + 32] += 1
    upto = counts.cumsum(-1)
    top = exponents.max(1)
    sizes: list[tuple[int, int]] = []
    chosen: dict[int, NDArray[np.int16]] = {}
    plane = -(-values.size // 8)
    for width in range(1, MAX_WIDTH + 1):
        best, base = np.full(top.shape, -1), top
        for step in range(MAX_STEPS):
            start = top - step
            high, low = np.maximum(start, 0) + 32, np.maximum(start, 0) + 32 - (2**width - 1)
            covered = upto[groups, channels, high] - upto[groups, channels, low]
            better = (covered > best) & (start >= 0)
            best, base = np.where(better, covered, best), np.where(better, start, base)
        chosen[width] = base
        sizes.append((width * plane + int((n_tokens - best).sum()), width))
    width = min(sizes)[1]
    distance = chosen[width][:, None, :] - exponents
    escape = 2**width - 1
    escaped = (distance < 0) | (distance >= escape)
    codes = np.where(escaped, escape, distance).astype(np.uint8).reshape(-1)
    planes = [np.packbits(codes >> bit & 1, bitorder="little").tobytes() for bit in range(width)]
    low_bits = (values >> 8 & 0x80 | values & 0x7F).astype(np.uint8)
    return b"".join(
        [
            bytes([width]),
            chosen[width].astype(np.uint8).tobytes(),
            low_bits.tobytes(),
            *planes,
            exponents[escaped].astype(np.uint8).tobytes(),
        ]
    )


def unpack_reference(coded: memoryview, out: Frame) -> None:
    """Fill `out` [G, n, D], any strides. Raises ValueError unless `coded` is exactly one frame of this shape."""
    n_groups, _, dim = out.shape
    n, channels = out.size, n_groups * dim
    plane = -(-n // 8)
    data = np.frombuffer(coded, np.uint8)
    width = int(data[0]) if len(data) else 0
    at = 1 + channels + n + width * plane
    if not 1 <= width <= MAX_WIDTH or len(data) < at:
        raise ValueError(f"{len(data)} bytes are no frame of shape {out.shape}")
    base = data[1 : 1 + channels].reshape(n_groups, 1, dim)
    low = data[1 + channels : 1 + channels + n].astype(np.uint16).reshape(out.shape)
    planes = data[1 + channels + n : at].reshape(width, plane)
    codes = np.zeros(n, np.uint8)
    for bit in range(width):
        codes |= np.unpackbits(planes[bit], count=n, bitorder="little") << bit
    distance = codes.reshape(out.shape)
    escaped = distance == 2**width - 1
    if np.count_nonzero(escaped) != len(data) - at:
        raise ValueError(f"{len(data) - at} escaped exponents, expected {np.count_nonzero(escaped)}")
    exponents = base - distance  # modulo 256, as the frame was made
    exponents[escaped] = data[at:]
    out[:] = (low & 0x80) << 8 | exponents.astype(np.uint16) << 7 | low & 0x7F


def pack(values: Frame) -> bytes:
    """`pack_reference`, compiled where it can be: the same bytes."""
    if not BUILT or not values.size:
        return pack_reference(values)
    n_groups, n_tokens, dim = values.shape
    if n_tokens > MAX_TOKENS:
        raise ValueError(f"a frame of {n_tokens} tokens: at most {MAX_TOKENS}")
    values = np.ascontiguousarray(values)
    plane = -(-values.size // 8)
    room = np.empty(1 + n_groups * dim + 2 * values.size + MAX_WIDTH * plane, np.uint8)
    work = np.empty(8 * plane + (MAX_WIDTH + 1) * n_groups * dim, np.uint8)
    n = lib.pack_exponents(_address(values), n_groups, n_tokens, dim, _address(room), _address(work))
    return room[:n].tobytes()


def unpack(coded: memoryview, out: Frame) -> None:
    """`unpack_reference`, compiled where it can be. The last two axes of `out` should be contiguous."""
    n_groups, n_tokens, dim = out.shape
    stride, row, item = out.strides
    if not BUILT or not out.size or row != 2 * dim or item != 2:
        unpack_reference(coded, out)
        return
    data = np.frombuffer(coded, np.uint8)
    if lib.unpack_exponents(_address(data), len(data), _address(out), stride // 2, n_groups, n_tokens, dim, 0):
        raise ValueError(f"{len(data)} bytes are no frame of shape {out.shape}")


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
