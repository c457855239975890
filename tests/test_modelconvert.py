"""The converted default model is the original: same tokenizer, same chat template, same numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sessiond import modelstore

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading, two trailing  ",
    "\n\n\t\ttabs\r\nand lines\n",
    "naïve café — “quotes” … ½ ﬁ",
    "日本語のテキスト、中文，한국어",
    "مرحبا بالعالم שלום",
    "👩‍👩‍👧‍👦 🇨🇭 e\u0301 \u200b\ufeff\x00\x7f",
    "def f(x: int) -> int:\n    return x ** 2  # 3.14159\n",
    "<|im_start|>user\nnested<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_end|> <|im_end|>x<repo_name><file_sep>",
    "1234567890 0x1F 1e-9 $1,000.00",
    "a" * 3000,
    "".join(map(chr, range(32, 1024))),
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "2+2?"}],
    [
        {"role": "user", "content": " padded \n"},
        {"role": "assistant", "content": "<|im_end|>"},
        {"role": "user", "content": "日本"},
    ],
]

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def original() -> Path:
    return modelstore.fetch("smollm2")


@pytest.fixture(scope="module")
def converted() -> Path:
    return modelstore.resolve("smollm2").path


@pytest.fixture(scope="module")
def tokenizers(original: Path, converted: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    before = AutoTokenizer.from_pretrained(str(original.parent), gguf_file=original.name, local_files_only=True)
    return before, AutoTokenizer.from_pretrained(str(converted), local_files_only=True)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
def test_tokenizer_survives(tokenizers: tuple[Any, Any], text: str) -> None:
    before, after = tokenizers
    for special in (True, False):
        ids = before(text, add_special_tokens=special)["input_ids"]
        assert after(text, add_special_tokens=special)["input_ids"] == ids
    assert after.decode(ids) == before.decode(ids)
    assert after.convert_ids_to_tokens(ids) == before.convert_ids_to_tokens(ids)


def test_vocabulary_and_special_tokens_survive(tokenizers: tuple[Any, Any]) -> None:
    before, after = tokenizers
    assert after.get_vocab() == before.get_vocab()
    assert after.special_tokens_map == before.special_tokens_map
    assert set(after.all_special_ids) == set(before.all_special_ids)


@pytest.mark.parametrize("number", range(len(CHATS)))
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_survives(tokenizers: tuple[Any, Any], number: int, prompt: bool) -> None:
    before, after = tokenizers
    rendered = before.apply_chat_template(CHATS[number], tokenize=False, add_generation_prompt=prompt)
    assert after.apply_chat_template(CHATS[number], tokenize=False, add_generation_prompt=prompt) == rendered
    assert "<|im_start|>" in rendered


def test_logits_survive(original: Path, converted: Path, tokenizers: tuple[Any, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    before = AutoModelForCausalLM.from_pretrained(
        str(original.parent),
        gguf_file=original.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    after = AutoModelForCausalLM.from_pretrained(str(converted), dtype=torch.bfloat16, local_files_only=True)
    ids = tokenizers[0]("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found = before(ids).logits, after(ids).logits
    assert torch.equal(expected, found)
    assert tokenizers[1].decode(found[0, -1].argmax()).strip() == "Paris"
    for field in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(after.generation_config, field) == getattr(before.generation_config, field)


def test_second_resolve_is_fast(converted: Path) -> None:
    start = time.perf_counter()
    modelstore.identity_fields(modelstore.resolve("smollm2").path)
    assert time.perf_counter() - start < 0.3


def test_every_matrix_keeps_the_files_own_codes(original: Path, converted: Path) -> None:
    import gguf
    import numpy as np

    from sessiond.blockfile import read_blocks

    kept = read_blocks(converted / "blocks.safetensors")
    assert len(kept) == 30 * 7 + 1
    assert {name for name, weights in kept.items() if weights.bits == 8} == {"model.embed_tokens.weight"}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(original)).tensors}
    for ours, theirs in (("mlp.up_proj", "ffn_up"), ("self_attn.o_proj", "attn_output")):
        tensor = tensors[f"blk.17.{theirs}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(kept[f"model.layers.17.{ours}.weight"].dequantize(), expected)
