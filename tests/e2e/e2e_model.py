"""A chat model small enough to make in a second: random weights, bytes as tokens, answers in ASCII letters."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_models import byte_alphabet
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END, START, STOP = range(3)
CONTEXT = 1024
DEFAULT_SYSTEM = "You are tiny."
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = {END: -100.0, START: -100.0, STOP: -100.0}  # a bias under which no answer ends by itself
LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def write_chat_model(path: Path, *, seed: int = 0, context: int = CONTEXT, for_kernels: bool = False) -> Path:
    """A transformers directory: Llama of 2 layers, 4 query and 2 KV heads of 8, float32; seed chooses the weights.

    `for_kernels`: heads of 32 and bfloat16, which the compiled kernels take.
    Only LETTERS have logits of their own, so greedy answers are plain text that no end token cuts short.
    """
    vocab = {token: i for i, token in enumerate([*SPECIAL, *byte_alphabet(), "Ġt", "he"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=SPECIAL[START], eos_token=SPECIAL[STOP])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32 if for_kernels else 8,
        max_position_embeddings=context,
        initializer_range=0.4,
        bos_token_id=START,
        eos_token_id=STOP,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if for_kernels else torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=STOP, bos_token_id=START, pad_token_id=END)
    spoken = torch.zeros(len(vocab), 1)
    spoken[[tokenizer.encode(letter, add_special_tokens=False)[0] for letter in LETTERS]] = 1.0
    with torch.no_grad():
        model.lm_head.weight.mul_(spoken)
    model.save_pretrained(path)
    return path


if __name__ == "__main__":
    write_chat_model(Path(sys.argv[1]))
