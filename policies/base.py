"""What a policy is: a frozen value that decides which earlier tokens take part in attention.

A policy makes one Selector for each layer of a session. It is given tensors and answers with positions; it never sees
tiers, storage or the model. What it keeps is derived from keys, values and queries, so it may be dropped at any time:
no policy decides what exists, and no token is ever lost.

Shapes: H query heads, G key/value heads, D head dimension, Q new tokens, T tokens in all (the new ones included).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of one session, as a policy sees it when new tokens are about to attend.

    `query` [H, Q, D] stand at [start, T); `keys` and `values` [G, T, D] are exact, keys after their rotary embedding.
    The turn's own tokens begin at `turn_start`: those always take part, and need not be chosen.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    start: int
    turn_start: int
    scaling: float

    @property
    def grouped(self) -> Tensor:
        """The queries by key/value head: [G, H // G, Q, D]."""
        n_groups = self.keys.shape[0]
        return self.query.view(n_groups, self.query.shape[0] // n_groups, *self.query.shape[1:])


class Selector:
    """What a policy knows of one layer of one session. This one lets everything take part."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its index takes; 0 where it keeps a few numbers at most."""
        return 0

    def keep(self, n: int) -> None:
        """Forget what was derived from positions from `n` on: they are gone."""

    def renew(self, n: int) -> None:
        """Keys and values from `n` on are computed again, for the same tokens: copies of them are stale.

        What was learned from queries may stay.
        """
        self.keep(n)

    def prompt(self, view: LayerView) -> Tensor | None:
        """Earlier positions, all below `turn_start`, for a piece of the turn's prompt, before it attends.

        Returns [G, K] int64, ascending in each row, -1 at the end of shorter rows; None: all of them.
        """
        return None

    def step(self, view: LayerView) -> Tensor | None:
        """The same for one decoded token (Q = 1)."""
        return None


class Policy(Protocol):
    """A frozen dataclass whose fields are its knobs."""

    name: ClassVar[str]

    @property
    def dense_prompt(self) -> bool:
        """Whether prompts attend to all of history. Their whole cells are then canonical, and sealed at once."""
        ...

    def knobs(self) -> dict[str, Any]:
        """The knobs as JSON values; `registry.parse(name, knobs)` gives an equal policy."""
        ...

    def selector(self, layer: int, n_layers: int) -> Selector | None:
        """What chooses in one layer; None where all tokens take part at every step."""
        ...
