"""What quantized weights cost in quality: next-token distributions against an fp32 computation of the GGUF file.

The reference is transformers in fp32 on the file's weights as they dequantize, so that its own quantization costs
nothing here: what is measured is the arithmetic, and for codes that are not the file's another quantization on top.
Texts are teacher-forced; every contender computes all positions, and sees the same tokens. `int4_rounded`: codes made
from bf16, as for a model that is no GGUF file. `_fp32`: activations and KV in fp32. Grades take bf16 for the floor.

llama-server tells its likeliest tokens' probabilities. Beside it, the reference and every contender are lumped alike:
KL is over those tokens, and all others as one. That can only lower a KL.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, console, machine, print_json, spin_as_the_daemon, today
from _chat_text import conversations
from _grades import grade
from _llama_logits import LlamaServer
from _replay import Distance
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig
from transformers.utils import logging as transformers_logging

from sessiond import modelstore
from sessiond.model import Feed, Model, load_tokenizer
from sessiond.modelweights import load_blocks, with_blocks

COLUMNS = ("kl_mean", "kl_median", "kl_p99", "kl_max", "top1", "top1_decided", "delta_nll", "grade")
CONTENDERS = ("bf16", "int8", "int4", "int4_rounded", "bf16_fp32", "int4_fp32")
FIRST = 32  # positions before are not scored: hardly any text determines them
Forward = Callable[[list[int]], Tensor]  # token ids -> logits [len(ids) - FIRST, V]
Llama = Callable[[list[int]], tuple[Tensor, Tensor]]  # token ids -> tokens and logarithms [len(ids) - FIRST, k]
out = console()


def reference(gguf: Path) -> Forward:
    """transformers in fp32 on the weights of a GGUF file."""
    module: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
    )
    module.eval()
    return lambda ids: module(torch.tensor([ids])).logits[0, FIRST:]


def contender(path: Path, name: str, chunk: int) -> Forward:
    """Ours, as the daemon loads it."""
    kind, _, how = name.partition("_")
    dtype = torch.float32 if how == "fp32" else torch.bfloat16
    if how == "rounded":
        module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        model = Model(with_blocks(module, load_blocks(path, module, kind, kept=False)))  # type: ignore[arg-type]
    else:
        model = Model.load(path, dtype, kind)  # type: ignore[arg-type]
    return lambda ids: computed(model, ids, chunk)


def computed(model: Model, ids: list[int], chunk: int) -> Tensor:
    """Logits of every position from FIRST on, `chunk` tokens a step."""
    cache, rows = model.new_cache(), []
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        rows.append(model.step([Feed(cache, piece, start, decoding=chunk == 1)], list(range(len(piece)))))
        cache.length += len(piece)
    return torch.cat(rows)[FIRST:]


def gguf_of(name: str) -> Path:
    """The file behind --model. Raises SystemExit if it is no GGUF file: nothing else has a reference here."""
    if name in modelstore.KNOWN_MODELS:
        return modelstore.fetch(name)
    if Path(name).suffix != ".gguf":
        raise SystemExit(f"{name} is no GGUF file")
    return Path(name)


def table(told: dict[str, dict[str, Any]]) -> str:
    rows = ["| weights | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in told.items():
        cells = (found[c] if isinstance(found[c], str) else f"{found[c]:.5f}" for c in COLUMNS)
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def summary(told: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that have names of their own."""
    found: dict[str, Any] = {}
    for name, row in told.items():
        own = "llama_q4_1" if name == "llama" else name
        found |= {f"kl_{own}": row["kl_mean"], f"kl_p99_{own}": row["kl_p99"], f"grade_{own}": row["grade"]}
    return found


def measure(
    texts: list[list[int]], expected: Forward, forwards: dict[str, Forward], llama: Llama | None = None
) -> dict[str, dict[str, Any]]:
    """Distances of all texts, by contender; `llama` gives the tokens and the logarithms of one."""
    distances = {name: Distance() for name in (*forwards, *(["llama"] if llama else []))}
    for number, ids in enumerate(texts):
        # The last position's next token is not known.
        told = {name: forward(ids)[:-1] for name, forward in {"": expected, **forwards}.items()}
        answer = torch.tensor(ids[FIRST + 1 :])
        if llama:
            tokens, logarithms = llama(ids[:-1])
            told = {name: lumped(logits, tokens) for name, logits in told.items()}
            told["llama"] = with_rest(logarithms)
            answer = place(answer, tokens)
        for name, distance in distances.items():
            distance.add(told[""], told[name], answer.tolist())
        out.print(f"text {number + 1} of {len(texts)}")
    found = {name: distance.told() for name, distance in distances.items()}
    for one in found.values():
        one["grade"] = grade(one, found["bf16"])
    return found


def lumped(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logarithms of probabilities [n, k + 1] of `tokens` [n, k] among logits [n, V], and of all others together."""
    return with_rest(logits.double().log_softmax(-1).gather(1, tokens))


def with_rest(logarithms: Tensor) -> Tensor:
    """[n, k + 1]: what is left of 1 stands last."""
    rest = 1 - logarithms.double().exp().sum(1, keepdim=True)
    return torch.cat((logarithms.double(), rest.clamp(min=1e-12).log()), 1)


def place(answer: Tensor, tokens: Tensor) -> Tensor:
    """Where each of answer [n] stands in tokens [n, k]; k if it is none of them."""
    same = tokens == answer[:, None]
    return torch.where(same.any(1), same.int().argmax(1), tokens.shape[1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="folder with mtbench101.jsonl; without it, made-up sentences")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=640, help="of each text")
    parser.add_argument("--chunk", type=int, default=1, help="tokens a step; 1: as an answer is computed")
    parser.add_argument("--only", help="contenders with commas between, bf16 among them; all without it")
    parser.add_argument("--llama", type=Path, help="llama-server's program; without it, it has no row")
    parser.add_argument("--n-probs", type=int, default=4096, help="tokens that llama-server tells of")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    spin_as_the_daemon()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    gguf, path = gguf_of(options.model), modelstore.resolve(options.model).path
    texts = conversations(load_tokenizer(path), options.data, options.texts, options.tokens, options.seed)
    names = options.only.split(",") if options.only else list(CONTENDERS)
    forwards = {name: contender(path, name, options.chunk) for name in names}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        expected = reference(gguf)
        if options.llama is None:
            told = measure(texts, expected, forwards)
        else:
            log, threads = Path(folder) / "llama.log", os.cpu_count() or 1
            with LlamaServer(options.llama, gguf, log, threads, options.tokens + 64) as server:
                told = measure(texts, expected, forwards, lambda ids: server.probabilities(ids, FIRST, options.n_probs))
    out.print(table(told), markup=False, soft_wrap=True)
    conditions = {name: getattr(options, name) for name in ("texts", "tokens", "chunk", "seed")}
    conditions["n_probs"] = options.n_probs if options.llama else None
    data = "mtbench101" if options.data else "made up"
    told_of = {"contenders": told, **conditions, "data": data, "date": today(), "machine": machine()}
    print_json({"benchmark": "weights", **summary(told), **told_of})


if __name__ == "__main__":
    main()
