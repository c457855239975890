"""What a policy is: a frozen value that decides which earlier tokens take part in attention, and in which form.

A policy makes one Selector for each layer of a session. It is given tensors and answers with positions; it never sees
tiers, storage or the model. What it keeps is derived from keys, values and queries, so it may be dropped at any time:
no policy decides what exists, and no token is ever lost.

Shapes: H query heads, G key/value heads, D head dimension, Q new tokens, T tokens in all (the new ones included).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from sessiond.errors import InvalidConfig
from sessiond.kernels.coded import CodedRows
from sessiond.kernels.rope import Rope
from sessiond.kernels.sieved import SieveIndex
from sessiond.policies.prior import Prior
from sessiond.policies.probing import CHUNK


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of one session, as a policy sees it when new tokens are about to attend.

    `query` [H, Q, D] stand at [start, T); `keys` and `values` [G, T, D] are exact, keys after their rotary embedding,
    which `rope` undoes (None: this layer has another kind). `prior`: what is known of the tokens whatever is asked.
    The turn's own tokens begin at `turn_start`: those always take part, and need not be chosen.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    start: int
    turn_start: int
    scaling: float
    rope: Rope | None = None
    prior: Prior | None = None

    @property
    def grouped(self) -> Tensor:
        """The queries by key/value head: [G, H // G, Q, D]."""
        n_groups = self.keys.shape[0]
        return self.query.view(n_groups, self.query.shape[0] // n_groups, *self.query.shape[1:])


@dataclass(frozen=True, slots=True)
class Taken:
    """Positions that take part in a form of their own.

    `positions` [G, K] as a Selector answers them; `whole`: those are [0, K) in every row. `keys`, `values` [G, K, D]
    stand in for the exact ones there, in their dtype; or coded rows, by position; None: the exact ones. `form` names
    what stands in, of which `nbytes` are kept. So many positions of each row, about, are `exact` though a form stands
    in.
    """

    positions: Tensor
    keys: Tensor | CodedRows | None
    values: Tensor | CodedRows | None
    form: str
    nbytes: int
    exact: int = 0
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """What one answer of a selector read of its own index: `n_tokens` are summarised in `nbytes`, named `form`."""

    form: str
    n_tokens: int
    nbytes: int


class Selector:
    """What a policy knows of one layer of one session. This one lets everything take part."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that its index takes; 0 where it keeps a few numbers at most."""
        return 0

    @property
    def scan(self) -> Scan | None:
        """What its last answer read of its index; None if it needed none."""
        return None

    def keep(self, n: int) -> None:
        """Forget what was derived from positions from `n` on: they are gone."""

    def renew(self, n: int) -> None:
        """Keys and values from `n` on are computed again, for the same tokens: copies of them are stale.

        What was learned from queries may stay.
        """
        self.keep(n)

    def prompt(self, view: LayerView) -> Tensor | Taken | None:
        """Earlier positions, all below `turn_start`, for a piece of the turn's prompt, before it attends.

        Returns [G, K] int64, ascending in each row, -1 at the end of shorter rows; None: all of them.
        """
        return None

    def step(self, view: LayerView) -> Tensor | Taken | None:
        """The same for one decoded token (Q = 1)."""
        return None

    def compiled(self, end: int) -> SieveIndex | None:
        """What chooses as `step` would for the token before `end`, inside of the compiled layers; None: ask `step`."""
        return None

    def compiled_done(self, end: int) -> None:
        """The layers are computed: what `compiled` gave knows the keys before `end`."""

    def rest(self, view: LayerView) -> None:
        """The turn is over, and nobody waits (Q = 0): bring the index up to date with all that is there."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a policy must fit. `attending`: layers that see all of history; the others have a sliding window."""

    n_layers: int
    n_kv_heads: int
    head_dim: int
    attending: tuple[int, ...]
    max_context: int
    itemsize: int = 2  # bytes of one number of a key


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known as a turn is planned: its tokens with all before, the share of the memory budget in use, and the
    share of attention that the last turn's choice held, if that was measured."""

    n_tokens: int
    memory_used: float
    attention_mass: float | None = None


class Policy:
    """A frozen dataclass whose fields are its knobs."""

    __slots__ = ()

    name: ClassVar[str]

    # Steps read few of the exact keys and values: these may lie one tier down, and what is chosen comes from there.
    offloads: ClassVar[bool] = False

    # Between turns the history is to be scored (Prior), `prior_chunk` tokens at a time.
    wants_prior: ClassVar[bool] = False

    @property
    def prior_chunk(self) -> int:
        return CHUNK

    @property
    def dense_prompt(self) -> bool:
        """Whether prompts attend to all of history. Their whole cells are then canonical, and sealed at once."""
        return True

    def knobs(self) -> dict[str, Any]:
        """The knobs as JSON values; `registry.parse(name, knobs)` gives an equal policy."""
        return {field.name: _told(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]

    def fits(self, model: ModelFacts) -> None:
        """Raises InvalidConfig if the policy cannot work in such a model, with the knob and its range."""
        if not model.attending:
            told = f"policy {self.name!r} has nothing to choose: every layer of this model has a sliding window"
            raise InvalidConfig(told, policy=self.name, knob="name", range="full")

    def settle_on(self, situation: Situation) -> tuple[Policy, str]:
        """The policy that a turn runs under, and why if that is another one."""
        return self, ""

    def index_bytes(self, model: ModelFacts) -> int:
        """Bytes that its index takes for each token, about: memory is set aside for them before a turn."""
        return 0

    def selector(self, layer: int, n_layers: int) -> Selector | None:
        """What chooses in one layer; None where all tokens take part at every step."""
        raise NotImplementedError


def named(policy: Policy) -> dict[str, Any]:
    """A policy as a knob of another: a JSON object with its name and its knobs."""
    return {"name": policy.name, **policy.knobs()}


def _told(value: Any) -> Any:
    """A knob as a JSON value."""
    if isinstance(value, Policy):
        return named(value)
    if isinstance(value, tuple):
        return [_told(part) for part in value]
    return value
