"""What this machine can do at most, measured beside what is held against it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from _bench import median, rounded
from torch import Tensor
from transformers import AutoConfig

from sessiond import modelstore
from sessiond.kernels.probe import KINDS, multiply_rate, read_rate

N_BYTES = 1 << 28  # several times any cache


@dataclass(slots=True)
class Floors:
    """Rates of all threads together, taken again at every call of `sample`."""

    read: list[float] = field(default_factory=list)  # bytes a second
    multiply: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    # Written to: pages that never were are all one page, which a cache holds.
    _data: Tensor = field(default_factory=lambda: torch.arange(N_BYTES // 8, dtype=torch.int64))

    def sample(self, times: int = 1) -> None:
        """Measure each, about 20 ms at a time."""
        for _ in range(times):
            self.read.append(read_rate(self._data))
            for kind, rates in self.multiply.items():
                rates.append(multiply_rate(kind))

    def seconds(self, nbytes: int, multiply_adds: int = 0, kind: str = "bf16") -> float:
        """The least time a call can take that reads `nbytes` and computes so much, by the last sample."""
        return max(nbytes / self.read[-1], multiply_adds / self.multiply[kind][-1])

    def told(self) -> dict[str, float]:
        """Medians: gigabytes a second, and thousands of millions of multiply-adds a second."""
        rates = {f"multiply_adds_{kind}_g_per_s": rounded(median(r) / 1e9) for kind, r in self.multiply.items()}
        return {"read_gb_per_s": rounded(median(self.read) / 1e9), **rates}


# Bytes of a stored weight, against bf16's two. Of int4: with a scale and an offset for every 32, as in GGUF's Q4_1.
WEIGHT_SHARE = {"bf16": 1.0, "int8": 0.5, "int4": 5 / 16}


def weight_bytes(model: str, path: Path, weights: str) -> int:
    """What all weights of a model take, a transformers directory in bf16 at `path`; "" as weights: as stored there.

    The output matrix is the embedding. A known model's int4 is its GGUF file's own.
    """
    known = modelstore.KNOWN_MODELS.get(model)
    if known and weights == "int4":
        return known.file_bytes
    return int(sum(file.stat().st_size for file in path.glob("*.safetensors")) * WEIGHT_SHARE[weights or "bf16"])


def kv_bytes(path: Path, n_tokens: int) -> int:
    """Keys and values of `n_tokens`, in bf16."""
    config = AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2 * n_tokens
