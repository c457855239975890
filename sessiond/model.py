"""Load a transformers model and run one packed forward step over any number of sessions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from sessiond import attention
from sessiond.cache import PackedSpan, SessionCache
from sessiond.errors import ModelCorrupt, ModelMissing, ModelUnsupported
from sessiond.forward import ForwardStep, FusedStep, ModuleStep
from sessiond.fused import fuse, let_go, ropes_of
from sessiond.kernels.attention import Scratch, native_attention_supported
from sessiond.kernels.native_library import ISA, LEVELS, SOURCES
from sessiond.kernels.rope import Rope
from sessiond.modelweights import load_blocks, with_blocks
from sessiond.policies.base import ModelFacts
from sessiond.policies.probing import Capture
from sessiond.selection import Selection
from sessiond.types import KVShape, WeightsKind

# Architectures proven against transformers' own generate (tests/test_architectures.py).
SUPPORTED = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")

# transformers picks these frequencies by the longest position in a step: KV would depend on other sessions in it.
_UNSTABLE_ROPE = ("dynamic", "longrope")

_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, slots=True)
class Feed:
    """Token ids of one session to compute at [position, position + len(ids)).

    `selection`: what chooses the tokens that they attend to; None: all. `decoding`: they are no part of a prompt.
    `capture`: is shown the queries of every layer that sees all of history.
    """

    cache: SessionCache
    ids: Sequence[int]
    position: int
    selection: Selection | None = None
    decoding: bool = False
    capture: Capture | None = None


class Model:
    """A causal language model whose attention and cache are ours. Not thread-safe: the engine thread owns it."""

    def __init__(self, module: Any) -> None:
        config = module.config.get_text_config()
        if config.model_type not in SUPPORTED:
            raise ModelUnsupported(
                f"architecture {config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}",
                architecture=config.model_type,
            )
        for rope_type in _rope_types(config):
            if rope_type in _UNSTABLE_ROPE:
                raise ModelUnsupported(
                    f"rope type {rope_type!r} is not supported: it makes a token's keys depend on later tokens",
                    architecture=config.model_type,
                )
        attention.register()
        module.set_attn_implementation(attention.NAME)
        self.module = module.eval()
        self.config: PreTrainedConfig = config
        self.vocab_size: int = config.vocab_size
        self.max_context: int = config.max_position_embeddings
        self.shape = KVShape(
            n_layers=config.num_hidden_layers,
            n_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=_DTYPE_NAMES[module.dtype],
        )
        self._scratch = Scratch()
        ropes = ropes_of(getattr(getattr(module, "model", None), "rotary_emb", None))
        self._rope = ropes.get("full_attention", ropes.get(""))
        windows = [
            0 if layer in self.facts.attending else self.sliding_window or 0 for layer in range(self.shape.n_layers)
        ]
        self._fused = fuse(module, windows)
        if self._fused is not None:
            let_go(module)

    @property
    def rope(self) -> Rope | None:
        """Of the layers that see all of history; None if their keys are rotated in another way."""
        return self._rope

    @property
    def facts(self) -> ModelFacts:
        """What a policy must fit."""
        kinds = getattr(self.config, "layer_types", None) or self._all_alike()
        return ModelFacts(
            self.shape.n_layers,
            self.shape.n_kv_heads,
            self.shape.head_dim,
            tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention"),
            self.max_context,
            self.shape.itemsize,
        )

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a layer sees which does not see all of history; None: there is no such layer."""
        return None if len(self.facts.attending) == self.shape.n_layers else int(self.config.sliding_window)

    def _all_alike(self) -> list[str]:
        """Kinds of the layers of a config that does not list them."""
        # A config keeps what it does not know: a Llama made of another model may tell of a window that it has not.
        window = None if self.config.model_type == "llama" else getattr(self.config, "sliding_window", None)
        return ["sliding_attention" if window else "full_attention"] * self.shape.n_layers

    @property
    def invariant_rows(self) -> int | None:
        """So many sessions at most may decode in one step and each get the same bits as alone; None: any number.

        The compiled layers compute a row in the same order whatever stands beside it, torch does not.
        """
        return 1 if self._fused is None else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of the model's generation config."""
        ids = self.module.generation_config.eos_token_id if self.module.generation_config else None
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype | None = None, weights: WeightsKind = "bf16") -> Model:
        """Read a transformers directory (safetensors); `weights` other than bf16 quantizes its matrices.

        Raises ModelMissing, ModelCorrupt or ModelUnsupported.
        """
        if not (path / "config.json").is_file():
            raise ModelMissing(f"{path} holds no config.json", path=path)
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelCorrupt(f"{path}/config.json cannot be read: {error}", path=path) from error
        if config.get_text_config().model_type not in SUPPORTED:
            raise ModelUnsupported(
                f"architecture {config.model_type!r} is not supported; supported are {', '.join(SUPPORTED)}",
                architecture=config.model_type,
            )
        disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise ModelCorrupt(f"{path} cannot be loaded: {error}", path=path) from error
        module, found = loaded
        wrong = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
        if wrong:  # transformers would make them up
            raise ModelCorrupt(f"{path} lacks weights, or has them in another shape: {', '.join(wrong[:5])}", path=path)
        if weights != "bf16":
            module = with_blocks(module, load_blocks(path, module, weights))
        return cls(module)

    def numerics_profile(self, threads: int) -> dict[str, str]:
        """What bit-equality depends on beside identity: recorded with every cell."""
        heads = native_attention_supported(self.module.dtype, self.shape.head_dim, torch.device("cpu"))
        return {
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "device": "cpu",
            "threads": str(threads),
            "layers": "torch" if self._fused is None else LEVELS[ISA],
            "attention": LEVELS[ISA] if heads else "torch",
            "kernels": SOURCES,
            "mkldnn": str(torch.backends.mkldnn.is_available()),  # type: ignore[no-untyped-call]
            "fpmath": os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "strict"),
        }

    def new_cache(self) -> SessionCache:
        return SessionCache(self.shape, self.max_context)

    def warm_up(self, cell_tokens: int) -> None:
        """Run a cell, a short input and a token once: first forwards page weights in and choose kernels."""
        cache = self.new_cache()
        for n_tokens in (cell_tokens, 16, 1):
            self.step([Feed(cache, [0] * n_tokens, 0)], [n_tokens - 1])

    @torch.inference_mode()
    def begin(self, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> ForwardStep:
        """`step` in pieces: nothing is computed before the first `advance`."""
        ids: list[int] = []
        spans: list[PackedSpan] = []
        for feed in feeds:
            feed.cache.about_to_change(feed.position)
            rows = len(ids), len(ids) + len(feed.ids)
            span = PackedSpan(feed.cache, *rows, feed.position, feed.selection, decoding=feed.decoding)
            span.capture = feed.capture
            spans.append(span)
            ids.extend(feed.ids)
        packed = attention.PackedStep(spans, self._scratch, self._rope)
        if self._fused is not None:
            return FusedStep(self._fused, packed, ids, logit_rows)
        return ModuleStep(self.module, self.shape.n_layers, packed, ids, logit_rows)

    def step(self, feeds: Sequence[Feed], logit_rows: Sequence[int]) -> Tensor:
        """Compute all feeds in one packed forward and write their KV into their caches (whose `length` stays).

        Returns logits [len(logit_rows), V] in fp32 of the given rows of the packed sequence.
        """
        logits = self.begin(feeds, logit_rows).advance()
        assert logits is not None
        return logits


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a transformers directory. Raises ModelCorrupt."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelCorrupt(f"the tokenizer in {path} cannot be read: {error}", path=path) from error


def _rope_types(config: PreTrainedConfig) -> list[str]:
    """Rope types of a config: one, or one for each kind of layer."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [kind["rope_type"] for kind in kinds if "rope_type" in kind]
