"""What the fake engine says: ids, tokens and KV all follow from a seed and a place, so a checker needs no copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessiond.storage.prefix import prefix_hashes

TENANT = "tenant"
IDENTITY = "identity"
CELL_TOKENS = 16
N_LAYERS, N_GROUPS, DIM = 3, 2, 8
TURNS = 4  # of a session, before the next one begins
KEPT_SESSIONS = 3  # older ones are purged


def session_id(session: int) -> str:
    return f"s{session}"


def revision_id(session: int, turn: int) -> str:
    """Turn -1 is the root."""
    return f"s{session}.r{turn}"


def request_id(session: int, turn: int) -> str:
    return f"q{session}.{turn}"


@dataclass(frozen=True)
class Said:
    """A turn's tokens and messages."""

    prompt: NDArray[np.uint32]
    generated: NDArray[np.uint32]
    messages: bytes

    @property
    def ids(self) -> NDArray[np.uint32]:
        return np.concatenate([self.prompt, self.generated])

    @property
    def flags(self) -> NDArray[np.uint8]:
        return np.concatenate([np.ones(len(self.prompt), np.uint8), np.zeros(len(self.generated), np.uint8)])


@dataclass(frozen=True)
class Script:
    seed: int

    def said(self, session: int, turn: int) -> Said:
        rng = np.random.default_rng((self.seed, session, turn + 1, 0))
        prompt = rng.integers(0, 1 << 32, rng.integers(1, 24), np.uint32)
        generated = rng.integers(0, 1 << 32, rng.integers(1, 12), np.uint32)
        return Said(prompt, generated, rng.bytes(int(rng.integers(0, 6000))))

    def is_discarded(self, session: int, turn: int) -> bool:
        """Every fifth turn or so is aborted by its client."""
        return int(np.random.default_rng((self.seed, session, turn + 1, 1)).integers(5)) == 0

    def history(self, session: int, turn: int) -> NDArray[np.uint32]:
        """All tokens up to the end of `turn`, without those of discarded turns."""
        kept = [self.said(session, t).ids for t in range(turn + 1) if not self.is_discarded(session, t)]
        return np.concatenate([np.empty(0, np.uint32), *kept])

    def cells(self, ids: NDArray[Any]) -> list[bytes]:
        return prefix_hashes(TENANT, IDENTITY, ids, CELL_TOKENS)

    def kv(self, session: int, start: int, n: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """KV of n positions from `start`; each position by itself, as a model's would follow from its history."""
        position = np.arange(start, start + n, dtype=np.uint64)[:, None] + np.uint64(self.seed * 1000 + session)
        out = []
        for layer in range(N_LAYERS):
            pair = []
            for part in range(2):
                lane = np.arange(N_GROUPS * DIM, dtype=np.uint64)[None] + np.uint64(97 * (2 * layer + part))
                bits = (position * np.uint64(2654435761) ^ lane * np.uint64(40503)) * np.uint64(0x9E3779B97F4A7C15)
                values = ((bits >> np.uint64(48)).astype(np.uint16) & 0x80FF) | 0x3E00  # exponents that repeat
                pair.append(np.ascontiguousarray(values.reshape(n, N_GROUPS, DIM).transpose(1, 0, 2)))
            out.append((pair[0], pair[1]))
        return out
