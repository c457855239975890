"""Rows of kvpress's methods beside ours: the same tokens and budget, each against kvpress's own full attention."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _bench import run_script
from _dialogue import Conversation
from _scores import Score


def peer(model: str, texts: Sequence[dict[str, Any]], budget: int) -> dict[str, Any]:
    """What kvpress_peer.py tells of `texts`. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "texts.json")
        file.write_text(json.dumps(texts))
        return run_script(
            "kvpress_env.py", "--model", model, "--texts", str(file), "--budget", str(budget), "--answers"
        )


def questions(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    """Every turn as a text of its own, its history compressed anew before the question."""
    found = []
    for conversation in conversations:
        ids: list[int] = []
        for turn in conversation.turns:
            ids += turn.filler + turn.prompt + turn.stem
            text = {"ids": [*ids, *turn.answer], "n_context": len(ids), "prompt": len(turn.prompt) + len(turn.stem)}
            found.append({**text, "choices": turn.choices})
            ids += turn.answer + turn.closing
    return found


def scores(conversations: Sequence[Conversation], answers: Sequence[dict[str, Any]]) -> list[Score]:
    """`answers` of the peer to `questions(conversations)`."""
    asked = [(c, i, turn) for c, one in enumerate(conversations) for i, turn in enumerate(one.turns)]
    found = []
    for (c, i, turn), told in zip(asked, answers, strict=True):
        right = None if told["choice"] is None or turn.kind == "new" else told["choice"] == turn.answer[0]
        found.append(Score(c, i, turn.kind, turn.age, right=right, **told))
    return found
