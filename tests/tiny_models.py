"""Model files small enough to write in a test: a GGUF Llama, and directories that only look like models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def write_gguf(
    path: Path, *, architecture: str = "llama", seed: int = 0, types: Mapping[str, str] | None = None
) -> Path:
    """A GGUF Llama with random weights: 2 layers, hidden size 32, 4 query and 2 KV heads, bytes as tokens.

    `types`: end of a tensor's name -> its GGUF type; the others are F32.
    """
    rng = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "Ġt", "he"]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (32,),
            f"blk.{layer}.ffn_norm.weight": (32,),
            f"blk.{layer}.attn_q.weight": (32, 32),
            f"blk.{layer}.attn_k.weight": (16, 32),
            f"blk.{layer}.attn_v.weight": (16, 32),
            f"blk.{layer}.attn_output.weight": (32, 32),
            f"blk.{layer}.ffn_gate.weight": (64, 32),
            f"blk.{layer}.ffn_up.weight": (64, 32),
            f"blk.{layer}.ffn_down.weight": (32, 64),
        }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        (kind,) = [kind for end, kind in (types or {}).items() if name.endswith(end)] or ["F32"]
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(path: Path, model_type: str = "llama", *, shards: int = 1, **config: object) -> Path:
    """A transformers directory whose headers are right; its two tensors make no working model."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 8} | config))
    (path / "tokenizer.json").write_text("{}")
    tensors = {"a.weight": np.arange(8, dtype=np.float32), "b.weight": np.arange(6, dtype=np.float32)}
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return path
    names = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, file in names.items():
        write_safetensors(path / file, {name: tensors[name]})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return path


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata=metadata or None)
