"""SnapKV, KVzip and StreamingLLM of kvpress on given tokens, each against kvpress's own full attention. JSON last.

Runs in an environment of its own (kvpress_env.py): kvpress needs an older transformers, and nothing here imports
sessiond. As its authors use it: the press is a context manager around the prefill, which removes a share of the keys
and values for good; what follows attends to what is left, at the positions it had. A text is
{"ids": [...], "n_context": where the answer begins, "prompt": tokens of the question before that}, and maybe "choices",
first tokens that an answer may begin with. Every method is query-agnostic: the prompt, one token at least, comes after
the compression, as a prefill's own logits come from before it.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kvpress import KVzipPress, SnapKVPress, StreamingLLMPress
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

METHODS = {
    "kvpress_snapkv": SnapKVPress,
    "kvpress_kvzip": KVzipPress,
    "kvpress_streamingllm": StreamingLLMPress,
}


def answered(model: Any, press: Any, context: list[int], prompt: list[int], answer: list[int]) -> Tensor:
    """Logits [len(answer), V]: `context` under `press`, if any; then `prompt` and the answer's tokens by themselves.

    Positions are those of the whole text; what the causal mask counts is what the cache holds, so it is not told them.
    """
    assert prompt, "the first logits would come from before the compression"
    cache = DynamicCache()
    ids = torch.tensor([context])
    if press is None:
        model.model(input_ids=ids, past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=ids, past_key_values=cache)
    rows, position = [], len(context)
    for piece in [prompt, *([token] for token in answer[:-1])]:
        at = torch.arange(position, position + len(piece))
        out = model(
            input_ids=torch.tensor([piece]),
            position_ids=at[None],
            past_key_values=cache,
            logits_to_keep=1,
        )
        rows.append(out.logits[0, -1])
        position += len(piece)
    return torch.stack(rows).float()


def removed(n_context: int, budget: int) -> float:
    """The share of the keys and values to remove so that `budget` tokens of them stay."""
    return 1 - min(budget, n_context) / n_context


def scored(text: dict[str, Any], reference: Tensor, logits: Tensor) -> dict[str, Any]:
    """Of one answer: nats a token of the gold tokens and from full attention, hits, the choice made if there is one."""
    gold = torch.tensor(text["ids"][text["n_context"] :])
    hits = logits.argmax(-1) == gold
    choices = text.get("choices")
    return {
        "nll": float(-logits.double().log_softmax(-1).gather(1, gold[:, None]).mean()),
        "kl": sum(distances(reference, logits)["kl"]) / len(gold),
        "exact": bool(hits.all()),
        "match": float(hits.double().mean()),
        "choice": choices[int(logits[0, choices].argmax())] if choices else None,
    }


def distances(reference: Tensor, logits: Tensor) -> dict[str, list[float]]:
    """KL in nats, fp64; whether the first tokens agree; whether full attention's leads by 0.1. Of each position."""
    p, q = (x.double().log_softmax(-1) for x in (reference, logits))
    first, second = p.exp().topk(2, -1).values.unbind(-1)
    return {
        "kl": (p.exp() * (p - q)).sum(-1).clamp(min=0).tolist(),
        "top": (reference.argmax(-1) == logits.argmax(-1)).double().tolist(),
        "decided": (first - second >= 0.1).double().tolist(),
    }


def told(found: Sequence[dict[str, list[float]]], seconds: float, kept: float) -> dict[str, Any]:
    kl = torch.tensor([x for one in found for x in one["kl"]], dtype=torch.float64)
    top = torch.tensor([x for one in found for x in one["top"]], dtype=torch.float64)
    decided = torch.tensor([x for one in found for x in one["decided"]]) > 0
    return {
        "kl_mean": float(kl.mean()),
        "kl_median": float(kl.median()),
        "kl_p95": float(kl.quantile(0.95)),
        "kl_p99": float(kl.quantile(0.99)),
        "kl_max": float(kl.max()),
        "top1": float(top.mean()),
        "top1_decided": float(top[decided].mean()) if decided.any() else None,
        "n": len(kl),
        "attended": kept,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--path", type=Path, required=True, help="a transformers directory")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--budget", type=int, required=True, help="tokens of history that stay")
    parser.add_argument("--answers", action="store_true", help="tell each answer's scores too")
    options = parser.parse_args()
    disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        options.path, dtype="auto", local_files_only=True, attn_implementation="sdpa"
    )
    model = loaded.eval()
    texts = json.loads(options.texts.read_text())
    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in METHODS}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ("kvpress_full", *METHODS)}
    seconds = dict.fromkeys(METHODS, 0.0)
    with torch.inference_mode():
        for text in texts:
            ids, n, n_prompt = text["ids"], text["n_context"], text["prompt"]
            history, prompt, answer = ids[: n - n_prompt], ids[n - n_prompt : n], ids[n:]
            reference = answered(model, None, history, prompt, answer)
            answers["kvpress_full"].append(scored(text, reference, reference))
            for name, press in METHODS.items():
                began = time.perf_counter()
                made = press(compression_ratio=removed(len(history), options.budget))
                logits = answered(model, made, history, prompt, answer)
                seconds[name] += time.perf_counter() - began
                found[name].append(distances(reference, logits))
                answers[name].append(scored(text, reference, logits))
    kept = sum(1 - removed(text["n_context"] - text["prompt"], options.budget) for text in texts) / len(texts)
    rows = {name: told(found[name], seconds[name], kept) for name in METHODS}
    told_last = {"benchmark": "kvpress", "budget": options.budget, "texts": len(texts), "policies": rows}
    print(json.dumps({**told_last, "answers": answers} if options.answers else told_last))


if __name__ == "__main__":
    main()
