"""Tiny random models beside an independent copy of themselves in plain transformers; sessions driven by the Scheduler.

Weights are drawn so that a mistake shows: attention is peaked, so keys far away count; logits are spread, so two
tokens rarely tie; norms and biases are not at their neutral start values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sessiond.cache import SessionCache
from sessiond.forward import ForwardStep
from sessiond.idlework import SealWork
from sessiond.model import Feed, Model
from sessiond.sampling import Sampled, Sampler, SamplingParams
from sessiond.scheduler import Scheduler
from sessiond.stepevents import Ended, Event, TokenOut
from sessiond.storage.kv import kv_digest
from sessiond.textstream import Detokenizer, TextStream
from sessiond.turnwork import TurnWork
from sessiond.types import Span

CELL = 128
VOCAB = 211
GREEDY = SamplingParams()

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Head sizes are no multiples of 8; only Phi-3, which rotates a part of each head, allows an odd one.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "num_attention_heads": 6,
        "head_dim": 10,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2-sliding": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 45,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 6, "head_dim": 14},
    "mistral": {"model_type": "mistral", "head_dim": 22, "sliding_window": 70},
    "phi3": {
        "model_type": "phi3",
        "hidden_size": 60,
        "sliding_window": 37,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.8},
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 18,
        "query_pre_attn_scalar": 20,
        "sliding_window": 50,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "tie_word_embeddings": True,
        "final_logit_softcapping": 30.0,
    },
}
# Of the sizes that the compiled kernels take in bf16: widths and head sizes are multiples of 32.
KERNEL_SIZED: dict[str, dict[str, Any]] = {
    "llama-kernels": ARCHITECTURES["llama"]
    | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32},
    "mistral-kernels": ARCHITECTURES["mistral"] | {"hidden_size": 96, "intermediate_size": 160, "head_dim": 64},
    "gemma3-kernels": ARCHITECTURES["gemma3"] | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 64},
    "qwen2-kernels": ARCHITECTURES["qwen2-sliding"]
    | {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4},
    "qwen3-kernels": ARCHITECTURES["qwen3"] | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
    "phi3-kernels": ARCHITECTURES["phi3"] | {"hidden_size": 128, "intermediate_size": 96},
}
WINDOWED = tuple(name for name, config in ARCHITECTURES.items() if "sliding_window" in config)


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    values = _BASE | (ARCHITECTURES | KERNEL_SIZED)[name] | changes
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def draw_weights(module: Any, seed: int) -> None:
    """Replace every parameter by a seeded draw (see the module's docstring)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            embedding = "embed_tokens" in name
            sharp = any(part in name for part in ("q_proj", "k_proj", "qkv_proj"))
            gain = 1.6 if sharp else 3.0 if "lm_head" in name else 1.0
            noise *= 0.2 if embedding else gain / parameter.shape[-1] ** 0.5
        else:
            noise = parameter.data + 0.2 * noise + (0.6 if "q_norm" in name or "k_norm" in name else 0.0)
        parameter.data.copy_(noise)


def peer_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model in plain transformers with its own eager attention: the same weights for the same name and seed."""
    peer = AutoModelForCausalLM.from_config(config_of(name, **changes), attn_implementation="eager")
    draw_weights(peer, seed)
    peer.generation_config.pad_token_id = 0
    return peer.to(dtype).eval()


@dataclass(frozen=True)
class Pair:
    """Our model, read from the files of `peer`."""

    ours: Model
    peer: Any

    def new_peer_cache(self) -> DynamicCache:
        return DynamicCache(config=self.peer.config)

    def peer_generate(self, ids: Sequence[int], n_new: int, cache: DynamicCache) -> tuple[list[int], Tensor]:
        """transformers' greedy `generate` over all of `ids`, what `cache` holds excepted: tokens, logits [n_new, V]."""
        inputs = torch.tensor([list(ids)])
        out = self.peer.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=cache,
            max_new_tokens=n_new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).float()

    @torch.inference_mode()
    def peer_logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [n, V] of one forward over all of `ids`, without any cache."""
        return self.peer(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


@cache
def make_pair(name: str, dtype: torch.dtype = torch.float32) -> Pair:
    peer = peer_model(name, dtype=dtype)
    with TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        return Pair(Model.load(Path(folder)), peer)


@cache
def make_exact_pair(name: str) -> Pair:
    """Our model in bf16, and a peer that computes with the same bf16 weights in fp32."""
    pair, exact = make_pair(name, torch.bfloat16), peer_model(name)
    exact.load_state_dict({key: value.float() for key, value in pair.peer.state_dict().items()})
    return Pair(pair.ours, exact)


@contextmanager
def torch_threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_ids(n_tokens: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (n_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


class CharTokenizer:
    """One character a token; no special tokens."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def get_vocab(self) -> dict[str, int]:
        return {chr(0x100 + i): i for i in range(VOCAB)}

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return "".join(chr(0x100 + i) for i in token_ids)


DETOKENIZER = Detokenizer(CharTokenizer())


class RecordingSampler(Sampler):
    """Keeps the logits it chose from."""

    def __init__(self, params: SamplingParams = GREEDY, context_ids: Sequence[int] = ()) -> None:
        super().__init__(params, VOCAB, context_ids)
        self.rows: list[Tensor] = []

    def sample(self, logits: Tensor, token_index: int) -> Sampled:
        self.rows.append(logits.clone())
        return super().sample(logits, token_index)


@dataclass
class Session:
    """One conversation: its cache and the log of its tokens, to which finished turns add."""

    model: Model
    name: str = "s"
    log: list[int] = field(default_factory=list)
    cache: SessionCache = None  # type: ignore[assignment]
    sampler: RecordingSampler = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.cache = self.cache or self.model.new_cache()

    def turn(
        self,
        new_ids: Sequence[int],
        n_new: int,
        *,
        logged: Sequence[int] = (),
        params: SamplingParams = GREEDY,
        seal: bool = True,
        **changes: Any,
    ) -> TurnWork:
        """The turn that appends `new_ids` to the log and generates up to `n_new` tokens, `logged` included."""
        self.log.extend(new_ids)
        self.sampler = RecordingSampler(params, self.log)
        options: dict[str, Any] = {
            "cell_tokens": CELL,
            "seal": seal,
            "known": self.cache.length,
            "max_new": n_new,
            "max_context": self.model.max_context,
            "stop_ids": frozenset(),
            "sampler": self.sampler,
            "stream": TextStream(DETOKENIZER),
        }
        return TurnWork(self.name, self.cache, list(self.log), logged, **(options | changes))

    def run(
        self, new_ids: Sequence[int], n_new: int, *, scheduler: Scheduler | None = None, **options: Any
    ) -> list[int]:
        """A whole turn, alone or in a scheduler where others run; its generated tokens go into the log."""
        scheduler = scheduler or Scheduler(self.model, CELL)
        scheduler.add(self.turn(new_ids, n_new, **options))
        events = step_until(scheduler, lambda event: isinstance(event, Ended) and event.turn_id == self.name)
        assert ended(events)[self.name].error is None
        tokens = tokens_of(events, self.name)
        self.log.extend(tokens)
        return tokens

    def force(self, new_ids: Sequence[int], answer: Sequence[int], **options: Any) -> None:
        """A turn that feeds `answer` token by token, as if it had been sampled; the last one is not fed."""
        self.run(new_ids, len(answer) + 1, logged=answer, **options)
        self.log[-1:] = answer
        self.cache.truncate(len(self.log) - 1, CELL)

    def seal(self) -> None:
        """Seal all whole cells of the log."""
        scheduler = Scheduler(self.model, CELL)
        scheduler.sealing.append(self.seal_work())
        drain(scheduler)

    def seal_work(self) -> SealWork:
        return SealWork(self.name, self.cache, list(self.log), len(self.log) // CELL * CELL)

    def cell_digests(self) -> list[str]:
        assert self.cache.sealed % CELL == 0
        return [digest(self.cache, start, start + CELL) for start in range(0, self.cache.sealed, CELL)]


def digest(cache: SessionCache, start: int, end: int) -> str:
    return kv_digest(cache.arrays(Span(start, end)))


def drain(scheduler: Scheduler, limit: int = 10000) -> list[Event]:
    """Step until nothing is left to do."""
    events: list[Event] = []
    for _ in range(limit):
        if scheduler.idle:
            return events
        events += scheduler.step()
    raise AssertionError(f"the scheduler is still busy after {limit} steps")


def step_until(scheduler: Scheduler, wanted: Any) -> list[Event]:
    """Step until an event of a step satisfies `wanted`; all events up to the end of that step."""
    events: list[Event] = []
    for _ in range(10000):
        fresh = scheduler.step()
        events += fresh
        if any(wanted(event) for event in fresh):
            return events
    raise AssertionError("it did not happen within 10000 steps")


def tokens_of(events: Sequence[Event], turn_id: str) -> list[int]:
    return [e.sampled.token_id for e in events if isinstance(e, TokenOut) and e.turn_id == turn_id]


def ended(events: Sequence[Event]) -> dict[str, Ended]:
    return {e.turn_id: e for e in events if isinstance(e, Ended)}


class StepSpy:
    """Stands before `model.begin`: records each step's feeds and, if told, raises for the feeds of some caches."""

    def __init__(self, model: Model) -> None:
        self._begin = model.begin
        self.steps: list[list[Feed]] = []
        self.broken: list[SessionCache] = []

    def __call__(self, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> ForwardStep:
        self.steps.append(list(feeds))
        if any(feed.cache is cache for feed in feeds for cache in self.broken):
            raise RuntimeError("the step broke")
        return self._begin(feeds, logit_rows)
