"""The process that converts a GGUF file: `python -m sessiond.ggufconvert file.gguf directory`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from sessiond.blockfile import write_blocks
from sessiond.ggufblocks import kept_blocks
from sessiond.modelcheck import BLOCKS


def convert(source: Path, directory: Path) -> None:
    """Write bf16 safetensors, tokenizer, chat template, generation settings and the file's own codes to `directory`."""
    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if kept := kept_blocks(source, model):
        write_blocks(directory / BLOCKS, kept)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
