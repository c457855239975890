"""Keys as codes of few bits that rank tokens: asymmetric, a scale and a low for each key (METHODS.md, first table).

Codes stand in tiles of 16 keys, channel by channel, so that one instruction scores 16 keys (keycodes_inline.h): uint8
[G, tiles, bytes], of which the first `n` keys mean something.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sessiond.kernels.native_library import BUILT, lib

TILE = 16
BITS = (2, 4, 8)
MOST_DIM = 256  # of the compiled kernels
KINDS = (torch.bfloat16, torch.float32)


def n_vectors(head_dim: int, bits: int) -> int:
    """Words of 32 bits that a key's codes fill."""
    return -(-head_dim * bits // 32)


def tile_bytes(head_dim: int, bits: int) -> int:
    """Of 16 keys with their scales and lows."""
    return n_vectors(head_dim, bits) * 64 + 64


def pack_reference(rows: Tensor, tiles: Tensor, first: int, bits: int) -> None:
    """Codes of rows [G, n, D], the keys at [first, first + n), into tiles [G, N / 16, bytes]."""
    n, head_dim = rows.shape[1], rows.shape[2]
    new = rows.float()
    low, high = new.amin(-1), new.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8).to(torch.bfloat16)
    low = low.to(torch.bfloat16)
    codes = ((new - low.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
    fields = _fields(codes.nan_to_num().long(), bits)
    fields = F.pad(fields, (0, n_vectors(head_dim, bits) * (32 // _width(bits)) - fields.shape[-1]))
    by_word = fields.view(*fields.shape[:2], n_vectors(head_dim, bits), -1, 2)  # [G, n, V, fields of a half, halves]
    shifts = torch.arange(by_word.shape[3])[:, None] * _width(bits) + torch.tensor([0, 16])
    words, scales = _parts(tiles, head_dim, bits)
    keys = torch.arange(first, first + n)
    words[:, keys // TILE, :, keys % TILE] = (by_word << shifts).sum((-1, -2)).to(torch.int32).transpose(0, 1)
    scales[:, keys // TILE, :, keys % TILE] = torch.stack([scale, low], -1).transpose(0, 1)


def scores_reference(query: Tensor, tiles: Tensor, n: int, bits: int) -> Tensor:
    """query [G, R, D] against the first `n` keys: [G, R, n], fp32, without the softmax's scaling."""
    head_dim, query = query.shape[2], query.float()
    words, scales = _parts(tiles[:, : -(-n // TILE)], head_dim, bits)
    width = _width(bits)
    by_key = words.movedim(-1, -2).flatten(1, 2)[:, :n, :, None, None].long()  # [G, n, V, 1, 1]
    shifts = torch.arange(16 // width)[:, None] * width + torch.tensor([0, 16])
    fields = (by_key >> shifts & 2**width - 1).flatten(2).float()
    scale, low = scales.movedim(2, -1).flatten(1, 2)[:, :n].float().unbind(-1)
    by_field = torch.stack([query, 16 * query], -1).flatten(-2) if bits == 8 else query
    products = by_field @ fields[..., : by_field.shape[-1]].transpose(-1, -2)
    found: Tensor = products * scale[:, None] + query.sum(-1, keepdim=True) * low[:, None]
    return found


def pack(rows: Tensor, tiles: Tensor, first: int, bits: int) -> None:
    """`pack_reference`, compiled where it can be: the same bytes."""
    n_groups, n, head_dim = rows.shape
    check_tiles(tiles, n_groups, first + n, head_dim, bits)
    if not BUILT or head_dim > MOST_DIM or rows.dtype not in KINDS or rows.device.type != "cpu":
        pack_reference(rows, tiles, first, bits)
        return
    if rows.stride(2) != 1:
        rows = rows.contiguous()
    lib.key_codes_pack(
        rows.data_ptr(),
        rows.dtype is torch.bfloat16,
        rows.stride(0),
        rows.stride(1),
        tiles.data_ptr(),
        tiles.stride(0),
        n_groups,
        first,
        n,
        head_dim,
        bits,
        1 if n < TILE else torch.get_num_threads(),
    )


def scores(query: Tensor, tiles: Tensor, n: int, bits: int) -> Tensor:
    """`scores_reference`, compiled where it can be: products with the codes are exact, sums in fp32."""
    n_groups, n_share, head_dim = query.shape
    check_tiles(tiles, n_groups, n, head_dim, bits)
    if not supported(query) or n == 0:
        return scores_reference(query, tiles, n, bits)
    query = query.contiguous()
    room = -(-n // TILE) * TILE
    out = torch.empty(n_groups, n_share, room, dtype=torch.float32)
    lib.key_codes_scores(
        tiles.data_ptr(),
        tiles.stride(0),
        query.data_ptr(),
        query.dtype is torch.bfloat16,
        out.data_ptr(),
        room,
        n_groups,
        n_share,
        n,
        head_dim,
        bits,
        torch.get_num_threads(),
    )
    return out[..., :n]


def supported(query: Tensor) -> bool:
    """Whether the compiled kernels score this query [G, R, D]."""
    return BUILT and query.shape[-1] <= MOST_DIM and query.dtype in KINDS and query.device.type == "cpu"


def check_tiles(tiles: Tensor, n_groups: int, n: int, head_dim: int, bits: int) -> None:
    """Raises ValueError where a kernel would leave these tiles."""
    there = tiles.shape
    if (
        bits not in BITS
        or tiles.dtype is not torch.uint8
        or len(there) != 3
        or there[0] != n_groups
        or there[1] * TILE < n
        or there[2] != tile_bytes(head_dim, bits)
        or tiles.stride(1) != there[2]
    ):
        raise ValueError(f"tiles of shape {tuple(there)} for {n} keys of {head_dim} channels in {bits} bits")


def _width(bits: int) -> int:
    """Bits of a field."""
    return 2 if bits == 2 else 4


def _fields(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., D] as fields: one each, of 8 bits the lower half and the upper."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2) if bits == 8 else codes


def _parts(tiles: Tensor, head_dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Views of tiles: the words [G, tiles, V, 16] int32, and scales and lows [G, tiles, 2, 16] bf16."""
    vectors = n_vectors(head_dim, bits)
    words = tiles.view(torch.int32)[..., : vectors * TILE].view(*tiles.shape[:2], vectors, TILE)
    return words, tiles.view(torch.bfloat16)[..., vectors * 32 :].view(*tiles.shape[:2], 2, TILE)
