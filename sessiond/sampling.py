"""How the next token is chosen from one row of logits.

The order is that of transformers' `generate`: logit bias, repetition penalty, temperature, top_k, top_p, min_p.
The arithmetic is numpy's on one thread, so a draw depends neither on the batch nor on the number of threads.
Randomness is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): token `i` of a
turn uses a pure function of (seed, i), so a resumed turn goes on with the same numbers without any generator state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sessiond.errors import BadSampling

MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 20
_MAX_ID = 2**31 - 1

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def _refuse(field: str, value: object, allowed: str) -> BadSampling:
    # Error metadata travels in HTTP/2 headers: a long value is cut.
    shown = ascii(value)[:200]
    return BadSampling(f"{field} = {shown} is not allowed: {allowed}", field=field, value=shown, range=allowed)


def _check_real(field: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    allowed = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(field, value, allowed)
    # Written so that NaN fails.
    if not (low < value <= high if open_low else low <= value <= high):
        raise _refuse(field, value, allowed)


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _refuse(field, value, f"an integer in [{low}, {high}]")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One turn's sampling request. Values outside their range raise BadSampling (metadata: field, value, allowed).

    `temperature` 0 is greedy; the filters then do nothing, bias and penalty still count. `logprobs` None: none;
    0: the chosen token's only; n: also the n likeliest. Round-trips through `to_json`, which goes in the request log.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, 0, 100)
        _check_real("top_p", self.top_p, 0, 1, open_low=True)
        _check_int("top_k", self.top_k, 0, _MAX_ID)
        _check_real("min_p", self.min_p, 0, 1)
        _check_real("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, _MAX_ID)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        self._check_ids()
        self._check_stop()

    def _check_ids(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise _refuse("logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS} entries")
        for token_id, bias in self.logit_bias:
            _check_int("logit_bias", token_id, 0, _MAX_ID)
            _check_real("logit_bias", bias, -100, 100)
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise _refuse("logit_bias", "a repeated token id", "each token id once")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            allowed = f"at most {MAX_STOP_TOKEN_IDS} ids"
            raise _refuse("stop_token_ids", f"{len(self.stop_token_ids)} ids", allowed)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, _MAX_ID)

    def _check_stop(self) -> None:
        if isinstance(self.stop, str) or len(self.stop) > MAX_STOP_STRINGS:
            raise _refuse("stop", self.stop, f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            allowed = f"valid text of 1 to {MAX_STOP_BYTES} bytes of UTF-8"
            # A lone surrogate has no UTF-8 form.
            if not isinstance(text, str) or any("\ud800" <= char <= "\udfff" for char in text):
                raise _refuse("stop", text, allowed)
            if not 1 <= len(text.encode()) <= MAX_STOP_BYTES:
                raise _refuse("stop", text, allowed)

    def check_vocab(self, vocab_size: int) -> None:
        """Raise BadSampling where a token id or top_k does not fit a vocabulary of `vocab_size`."""
        _check_int("top_k", self.top_k, 0, vocab_size)
        for token_id, _ in self.logit_bias:
            _check_int("logit_bias", token_id, 0, vocab_size - 1)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, vocab_size - 1)

    def with_seed(self, seed: int) -> SamplingParams:
        return replace(self, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, one key a field."""
        record = asdict(self)
        record["logit_bias"] = [list(entry) for entry in self.logit_bias]
        record["stop"] = list(self.stop)
        record["stop_token_ids"] = list(self.stop_token_ids)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SamplingParams:
        """The inverse of `to_json`; a missing key has its default. BadSampling for an unknown or ill-typed one."""
        values = dict(record)
        for key in values.keys() - {field.name for field in fields(cls)}:
            raise _refuse(str(key), values[key], "a field of SamplingParams")
        for key in values.keys() & {"logit_bias", "stop", "stop_token_ids"}:
            if not isinstance(values[key], (list, tuple)):
                raise _refuse(key, values[key], "a list")
            values[key] = tuple(values[key])
        entries = values.get("logit_bias", ())
        if not all(isinstance(entry, (list, tuple)) and len(entry) == 2 for entry in entries):
            raise _refuse("logit_bias", entries, "a list of [token id, bias]")
        values["logit_bias"] = tuple((entry[0], entry[1]) for entry in entries)
        return cls(**values)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011) over 32-bit words; checked against Random123's known answers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = 0xD2511F53 * c0
        p1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, token_index: int) -> float:
    """A number in [0, 1) with 53 random bits: a pure function of a 64-bit seed and a token index."""
    counter = (token_index & 0xFFFFFFFF, token_index >> 32, 0, 0)
    high, low, _, _ = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return float(((high << 32 | low) >> 11) * 2.0**-53)


def support(logits: Floats, params: SamplingParams) -> tuple[Ints | None, NDArray[np.float64]]:
    """What temperature, top_k, top_p and min_p leave: token ids, ascending (None: all of them), and their weights.

    logits [V], after bias and penalty; temperature above 0. Weights are not normalized: the likeliest has 1.
    Ties: top_k keeps all that equal the k-th; top_p keeps the lowest ids that suffice.
    """
    ids: Ints | None = None
    if 0 < params.top_k < len(logits):
        rank = len(logits) - params.top_k
        ids = np.flatnonzero(logits >= np.partition(logits, rank)[rank])
        logits = logits[ids]
    with np.errstate(over="ignore", under="ignore"):
        scaled = logits - logits.max()
        scaled /= np.float32(max(params.temperature, 1e-30))
        likely = np.exp(scaled, out=scaled)
    where: Ints | None = None
    if params.top_p < 1.0:
        where = _nucleus(likely, params.top_p)
    if params.min_p > 0.0:
        enough = np.flatnonzero(likely >= _at_least(params.min_p))
        where = enough if where is None else np.intersect1d(where, enough, assume_unique=True)
    if where is None:
        return ids, likely.astype(np.float64)
    return (where if ids is None else ids[where]), likely[where].astype(np.float64)


def _at_least(bound: float) -> np.float32:
    """The least float32 that is not below `bound`: comparing with it is comparing with `bound`, in half the memory."""
    rounded = np.float32(bound)
    return rounded if float(rounded) >= bound else np.nextafter(rounded, np.float32(np.inf))


def _nucleus(weights: Floats, top_p: float) -> Ints:
    """The smallest set of likeliest tokens with at least `top_p` of the mass (Holtzman et al., arXiv 1904.09751).

    Returns their ids, ascending. Sums in float64.
    """
    mass = float(weights.astype(np.float64).sum())
    # All tokens below this floor together hold less than (1 - top_p) of the mass, so none of them belongs to the
    # set: only the others, usually a few hundred, need sorting.
    ids = np.flatnonzero(weights >= _at_least((1.0 - top_p) * mass / len(weights)))
    few = weights[ids].astype(np.float64)
    ordered = np.sort(few)[::-1]
    n_kept = min(int(np.searchsorted(np.cumsum(ordered), top_p * mass)) + 1, len(ordered))
    least = ordered[n_kept - 1]
    kept = few > least
    n_ties = n_kept - int(np.count_nonzero(kept))
    kept[np.flatnonzero(few == least)[:n_ties]] = True
    nucleus: Ints = ids[kept]
    return nucleus


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Natural log-probabilities of logits [V]: fp32 exponentials, summed in fp64."""
    with np.errstate(over="ignore", under="ignore"):
        shifted = logits - logits.max()
        mass = float(np.exp(shifted).sum(dtype=np.float64))
    logprobs: NDArray[np.float64] = shifted.astype(np.float64) - math.log(mass)
    return logprobs


def _row(logits: Tensor) -> Floats:
    """Logits [V] as float32 in host memory, possibly sharing the tensor's; widened without torch's thread pool,
    whose barrier costs milliseconds when other work holds the cores."""
    host = logits.detach().cpu()
    if host.dtype == torch.bfloat16:
        bits = host.view(torch.int16).numpy().view(np.uint16)
        widened: Floats = (bits.astype(np.uint32) << 16).view(np.float32)
        return widened
    row: Floats = host.numpy().astype(np.float32, copy=False)
    return row


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token. `logprob` and `top` (likeliest first; ties: lowest id first) are of the model's own
    distribution, before bias, penalty and temperature; None and empty unless asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses one turn's tokens.

    `context_ids`: all tokens before the next one (history, input and, after a crash, those already generated),
    for the repetition penalty; ids outside the vocabulary are ignored. BadSampling if `params` do not fit it.
    `sample` mutates only the set of seen tokens, to which it adds what it returns.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, context_ids: Iterable[int] = ()) -> None:
        params.check_vocab(vocab_size)
        assert params.temperature == 0 or params.seed is not None, "the turn draws and logs a missing seed"
        self.params = params
        self.vocab_size = vocab_size
        self._bias_ids = np.array([token_id for token_id, _ in params.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._penalized = params.repetition_penalty != 1.0
        self._edited = self._penalized or len(self._bias_ids) > 0
        if self._penalized:
            # seen[:n_seen] lists the distinct ids for which is_seen holds.
            self._is_seen = np.zeros(vocab_size, np.bool_)
            ids = np.fromiter(context_ids, np.int64)
            self._is_seen[ids[(ids >= 0) & (ids < vocab_size)]] = True
            distinct = np.flatnonzero(self._is_seen)
            self._n_seen = len(distinct)
            self._seen = np.zeros(vocab_size, np.int64)
            self._seen[: self._n_seen] = distinct

    def observe(self, token_id: int) -> None:
        """Count a token for the repetition penalty. For forced tokens; counting one twice changes nothing."""
        if self._penalized and 0 <= token_id < self.vocab_size and not self._is_seen[token_id]:
            self._is_seen[token_id] = True
            self._seen[self._n_seen] = token_id
            self._n_seen += 1

    def sample(self, logits: Tensor, token_index: int) -> Sampled:
        """Choose from logits [V] (any float dtype and device; left as they are).

        `token_index` counts the turn's generated tokens from 0. Greedy ties go to the lowest id.
        """
        assert logits.shape == (self.vocab_size,), (tuple(logits.shape), self.vocab_size)
        greedy = self.params.temperature == 0
        if greedy and not self._edited and self.params.logprobs is None and logits.device.type != "cpu":
            # One id crosses from the accelerator instead of a row. torch.argmax returns the first maximum.
            token_id = int(logits.argmax())
            assert math.isfinite(float(logits[token_id])), "logits hold NaN or no finite value"
            return Sampled(token_id)
        raw = _row(logits)
        edited = self._edit(raw) if self._edited else raw
        best = int(edited.argmax())
        # argmax stops at NaN, so this one look finds any.
        assert math.isfinite(edited[best]), "logits hold NaN or no finite value"
        token_id = best if greedy else self._draw(edited, token_index)
        self.observe(token_id)
        if self.params.logprobs is None:
            return Sampled(token_id)
        return self._with_logprobs(raw, token_id, self.params.logprobs)

    def _edit(self, raw: Floats) -> Floats:
        """Logits [V] after bias and repetition penalty (Keskar et al., arXiv 1909.05858), in a new array."""
        edited = raw.copy()
        edited[self._bias_ids] += self._bias
        if self._penalized:
            penalty = np.float32(self.params.repetition_penalty)
            seen = self._seen[: self._n_seen]
            values = edited[seen]
            with np.errstate(over="ignore"):
                edited[seen] = np.where(values < 0, values * penalty, values / penalty)
        return edited

    def _draw(self, edited: Floats, token_index: int) -> int:
        assert self.params.seed is not None
        ids, weights = support(edited, self.params)
        # Inverse CDF in the order of token ids: near-ties in the logits cannot reorder it.
        cumulative = np.cumsum(weights)
        # Below the total even if the product rounds up to it, so the found token has weight.
        target = min(uniform(self.params.seed, token_index) * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
        place = int(np.searchsorted(cumulative, target, side="right"))
        return place if ids is None else int(ids[place])

    @staticmethod
    def _with_logprobs(raw: Floats, token_id: int, n_top: int) -> Sampled:
        logprobs = log_softmax(raw)
        if n_top == 0:
            return Sampled(token_id, float(logprobs[token_id]))
        rank = max(len(raw) - n_top, 0)
        ids = np.flatnonzero(raw >= np.partition(raw, rank)[rank])
        ids = ids[np.lexsort((ids, -raw[ids]))][:n_top]
        top = tuple((int(other), float(logprobs[other])) for other in ids)
        return Sampled(token_id, float(logprobs[token_id]), top)
