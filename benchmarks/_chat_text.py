"""Long conversations to replay: dialogues of mt-bench-101 one after the other, rendered by the model's template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_WORDS = (
    "river",
    "lantern",
    "harbour",
    "copper",
    "meadow",
    "winter",
    "signal",
    "garden",
    "letter",
    "market",
    "bridge",
    "engine",
)


def conversations(tokenizer: Any, data: Path | None, n: int, n_tokens: int, seed: int) -> list[list[int]]:
    """`n` conversations of `n_tokens` token ids each; without `data` of made-up sentences."""
    draw = random.Random(seed)
    dialogues = _dialogues(data) if data else [_made_up(draw) for _ in range(400)]
    draw.shuffle(dialogues)
    out: list[list[int]] = []
    while len(out) < n:
        messages: list[dict[str, str]] = [{"role": "system", "content": "You are a helpful assistant."}]
        ids: list[int] = []
        while len(ids) < n_tokens:
            if not dialogues:
                raise ValueError("the data holds too little text")
            messages += dialogues.pop()
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        out.append(list(ids[:n_tokens]))
    return out


def exchanges(data: Path | None, seed: int) -> list[tuple[str, str]]:
    """Users' messages with their replies, as they stand in the data; without it, made-up sentences."""
    draw = random.Random(seed)
    dialogues = _dialogues(data) if data else [_made_up(draw) for _ in range(400)]
    return [(d[i]["content"], d[i + 1]["content"]) for d in dialogues for i in range(0, len(d), 2)]


def _dialogues(data: Path) -> list[list[dict[str, str]]]:
    found = []
    for line in (data / "mtbench101.jsonl").read_text().splitlines():
        turns = json.loads(line)["history"]
        found.append([m for t in turns for m in _turn(t["user"], t["bot"])])
    return found


def _made_up(draw: random.Random) -> list[dict[str, str]]:
    def sentence() -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(12)).capitalize() + "."

    return _turn(sentence(), " ".join(sentence() for _ in range(6)))


def _turn(user: str, bot: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": bot}]
