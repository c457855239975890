"""Which model is this? The fields KV is bound to, computed from the files alone.

Only what changes a computed number or a token id takes part, and tensors are hashed by name and bytes, so
that another sharding, another safetensors header or a newer transformers leaves the identity as it was.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from sessiond.modelcheck import BLOCKS, read_json, read_safetensors_header, text_config, weight_files
from sessiond.types import WeightsKind

_ROPE_KEYS = (
    "max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor",
    "rope_local_base_freq", "rope_parameters", "rope_scaling", "rope_theta",
)  # fmt: skip
_SHAPE_KEYS = (
    "attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "head_dim", "hidden_act",
    "hidden_activation", "hidden_size", "intermediate_size", "layer_types",
    "max_window_layers", "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "query_pre_attn_scalar", "rms_norm_eps",
    "sliding_window", "sliding_window_pattern", "tie_word_embeddings",
    "use_sliding_window", "vocab_size",
)  # fmt: skip
_TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "vocab.json",
)  # fmt: skip
_TOKENIZER_KEYS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "bos_token",
    "chat_template", "eos_token", "legacy", "pad_token", "unk_token",
)  # fmt: skip


#: Raise it when other codes are made of the same weights: kernels/blockweights.py, modelweights.py.
_QUANTIZATION_RULE = 2


def identity_fields(
    path: Path, *, kv_dtype: str = "bfloat16", weights: WeightsKind = "bf16", cache: Path | None = None
) -> dict[str, str]:
    """Identity of the transformers directory `path`, each field a string to compare and to show.

    `weights`: the kind that is computed with. Any but bf16 has a field more, "quantization": the kind, the rule by
    which codes are made, and the digest of those that are kept (empty if there are none).

    `cache`: directory for the digest of the weights, keyed by the files' names, sizes and modification times;
    without it they are hashed on every call (0.2 s a GB on two cores). Raises ModelMissing, ModelCorrupt.
    """
    config = read_json(path / "config.json")
    text = text_config(config)
    fields = {
        "weights": _tensors_digest(path, weight_files(path), cache),
        "tokenizer": _tokenizer_digest(path),
        "architecture": str(config.get("model_type", "")),
        "rope": canonical_json({key: text[key] for key in _ROPE_KEYS if text.get(key) is not None}),
        "kv_dtype": kv_dtype,
        "shape": canonical_json({key: text[key] for key in _SHAPE_KEYS if text.get(key) is not None}),
    }
    if weights != "bf16":
        kept = _tensors_digest(path, [path / BLOCKS], cache) if (path / BLOCKS).is_file() else ""
        fields["quantization"] = canonical_json({"kept": kept, "kind": weights, "rule": _QUANTIZATION_RULE})
    return fields


def identity_id(fields: Mapping[str, str]) -> str:
    """32 hex digits naming an identity: the first 16 bytes of the blake3 of the fields' canonical JSON."""
    return blake3(canonical_json(dict(fields)).encode()).hexdigest(length=16)


def differing_fields(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Names of the identity's fields that differ, or that only one side has."""
    return sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))


def profile_id(fields: Mapping[str, str]) -> str:
    """32 hex digits naming a numerics profile."""
    return blake3(repr(sorted(fields.items())).encode()).hexdigest(length=16)


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _tensors_digest(path: Path, files: list[Path], cache: Path | None) -> str:
    if cache is None:
        return _hash_tensors(files)
    stats = [(file.name, file.stat()) for file in files]
    key = [str(path.resolve()), [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]]
    slot = cache / f"{blake3(canonical_json(key).encode()).hexdigest(length=16)}.weights"
    with suppress(OSError, ValueError):
        digest = slot.read_text("ascii")
        if len(digest) == 64 and int(digest, 16) >= 0:
            return digest
    digest = _hash_tensors(files)
    # The cache saves time only: without it the next start hashes again.
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        partial = slot.with_suffix(".partial")
        partial.write_text(digest, "ascii")
        partial.replace(slot)
    return digest


def _hash_tensors(files: list[Path]) -> str:
    """blake3 over (name, dtype, shape, bytes) of every tensor in the order of names, in whichever file."""
    where: list[tuple[str, int, int, dict[str, Any]]] = []
    maps: list[memoryview] = []
    for number, file in enumerate(files):
        base, header = read_safetensors_header(file)
        where += [(name, number, base, entry) for name, entry in header.items()]
        with file.open("rb") as handle:
            maps.append(memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)))
    digest = blake3(max_threads=blake3.AUTO)
    for name, number, base, entry in sorted(where, key=lambda item: item[0]):
        start, end = entry["data_offsets"]
        digest.update(canonical_json([name, entry["dtype"], entry["shape"]]).encode())
        digest.update(maps[number][base + start : base + end])
    return digest.hexdigest()


def _tokenizer_digest(path: Path) -> str:
    """blake3 of the tokenizer's files and of those settings that change ids or rendered chats."""
    digest = blake3()
    for name in _TOKENIZER_FILES:
        file = path / name
        if file.is_file():
            data = file.read_bytes()
            digest.update(f"{name} {len(data)}\n".encode())
            digest.update(data)
    if (path / "tokenizer_config.json").is_file():
        config = read_json(path / "tokenizer_config.json")
        kept = {key: config[key] for key in _TOKENIZER_KEYS if config.get(key) is not None}
        digest.update(canonical_json(kept).encode())
    return digest.hexdigest()
