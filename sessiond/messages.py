"""Structured messages as stored with a revision: what came in and what was answered, independent of any tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from sessiond.template import Message, ToolCall


def encode_messages(asked: Iterable[Message], said: Iterable[Message]) -> bytes:
    """JSON of the turn's input messages and of its answer."""
    value = {"asked": [asdict(m) for m in asked], "said": [asdict(m) for m in said]}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def decode_messages(stored: bytes | None) -> tuple[list[Message], list[Message]]:
    """The inverse of `encode_messages`; nothing stored is no messages."""
    if not stored:
        return [], []
    value = json.loads(stored)
    return [from_json(m) for m in value["asked"]], [from_json(m) for m in value["said"]]


def to_json(messages: Sequence[Message]) -> list[dict[str, object]]:
    return [asdict(m) for m in messages]


def from_json(value: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in value["tool_calls"])
    return Message(**{**value, "tool_calls": calls})
