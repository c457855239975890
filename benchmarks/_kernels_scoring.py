"""Cases of the kernels that choose tokens: 8,192 tokens of SmolLM2's shape, in more layers than any cache holds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from _kernelcase import KernelCase, n_cold
from torch import Tensor

from sessiond.kernels import heaviest, key_codes, page_bounds, quantize, rocket, top

G, R, D = 3, 3, 64
N = 8192
ENOUGH = heaviest.Enough(0.99, 64, 512)
SET, PAGE, CHANNELS, CHOSEN = 2186, 3, 40, 256  # RocketKV's stage 2 with a budget of 512


def cases() -> list[KernelCase]:
    torch.manual_seed(0)
    keys, query = torch.randn(G, N, D).bfloat16(), torch.randn(G, R, D).bfloat16()
    scored = [_scores(keys, query, bits) for bits in (4, 2, 8)]
    return [*scored, _sieve(keys, query), *_pages(keys, query), _rocket(keys, query), _top(), *_made(keys)]


def _in_turn(fn: Callable[[Tensor], object], layers: list[Tensor]) -> Callable[[], object]:
    """Each call takes the next layer's memory."""
    turn = count()
    return lambda: fn(layers[next(turn) % len(layers)])


def _tiles(keys: Tensor, bits: int) -> list[Tensor]:
    tiles = torch.zeros(G, N // key_codes.TILE, key_codes.tile_bytes(D, bits), dtype=torch.uint8)
    key_codes.pack(keys, tiles, 0, bits)
    return [tiles.clone() for _ in range(n_cold(tiles.nbytes))]


def _scores(keys: Tensor, query: Tensor, bits: int) -> KernelCase:
    layers = _tiles(keys, bits)
    return KernelCase(
        f"scores of {N} keys, {bits} bits",
        _in_turn(lambda tiles: key_codes.scores(query, tiles, N, bits), layers),
        _in_turn(lambda tiles: key_codes.scores_reference(query, tiles, N, bits), layers),
        layers[0].nbytes,
        G * R * N * D * (2 if bits == 8 else 1),
        figure="score_bandwidth_share" if bits == 4 else "",
    )


def _sieve(keys: Tensor, query: Tensor) -> KernelCase:
    layers, args = _tiles(keys, 4), (N, N - 64, 4, D**-0.5, ENOUGH, None)
    return KernelCase(
        f"sieve's choice among {N} keys",
        _in_turn(lambda tiles: heaviest.heaviest(query, tiles, *args), layers),
        _in_turn(lambda tiles: heaviest.heaviest_reference(query, tiles, *args), layers),
        layers[0].nbytes,
        G * R * N * D,
    )


def _bounds(keys: Tensor, size: int) -> list[Tensor]:
    bounds = torch.empty(2, G, -(-keys.shape[1] // size), D, dtype=keys.dtype)
    page_bounds.extend(keys, bounds, 0, size)
    return [bounds.clone() for _ in range(n_cold(bounds.nbytes))]


def _pages(keys: Tensor, query: Tensor) -> list[KernelCase]:
    layers = _bounds(keys, 4)
    n_pages = N // 4
    scored = KernelCase(
        f"quest's bounds of {n_pages} pages",
        _in_turn(lambda bounds: page_bounds.best_scores(query, bounds, n_pages), layers),
        _in_turn(lambda bounds: page_bounds.scores_reference(query, bounds, n_pages).amax(1), layers),
        layers[0].nbytes,
        2 * G * R * n_pages * D,
    )
    return [scored]


def _rocket(keys: Tensor, query: Tensor) -> KernelCase:
    layers = _bounds(keys[:, :SET], PAGE)
    args = (CHANNELS, CHOSEN, D**-0.5)
    return KernelCase(
        f"RocketKV's choice in a turn set of {SET}",
        _in_turn(lambda bounds: rocket.choose(query, rocket.PagedSet(bounds, PAGE, SET, SET), *args), layers),
        _in_turn(lambda bounds: rocket.choose_reference(query, rocket.PagedSet(bounds, PAGE, SET, SET), *args), layers),
        layers[0].nbytes,
        2 * G * R * -(-SET // PAGE) * D,
    )


def _top() -> KernelCase:
    scores = torch.randn(G, N).softmax(-1)
    return KernelCase(
        f"the best 512 of {N}", lambda: top.top(scores, 512), lambda: top.top_reference(scores, 512), scores.nbytes
    )


def _made(keys: Tensor) -> list[KernelCase]:
    """What a piece of a prompt and what a step adds to an index and to a view."""
    tiles = _tiles(keys, 4)[0]
    codes, scales = torch.empty(G, N, D // 2, dtype=torch.uint8), torch.empty(G, N, 4).bfloat16()
    found = []
    for n in (128, 1):
        at = slice(256, 256 + n)
        found.append(
            KernelCase(
                f"{n} rows into an index, 4 bits",
                lambda at=at: key_codes.pack(keys[:, at], tiles, 256, 4),  # type: ignore[misc]
                lambda at=at: key_codes.pack_reference(keys[:, at], tiles, 256, 4),  # type: ignore[misc]
                G * n * (D * 2 + D // 2 + 4),
            )
        )
        found.append(
            KernelCase(
                f"{n} rows into a view, 4 bits",
                lambda at=at: quantize.quantize(keys[:, at], codes[:, at], scales[:, at], 4, 32),  # type: ignore[misc]
                lambda at=at: quantize.quantize_reference(  # type: ignore[misc]
                    keys[:, at], codes[:, at], scales[:, at], 4, 32
                ),
                G * n * (D * 2 + D // 2 + 8),
            )
        )
    return found
