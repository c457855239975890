"""Plain Python values to the nouns of the contract: messages, tools, policies, times."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias

from google.protobuf import duration_pb2, timestamp_pb2

from sessiond.v1 import types_pb2

# {"role": …, "content": …}, and where they apply "tool_calls", "tool_call_id" and "name".
MessageLike: TypeAlias = types_pb2.Message | Mapping[str, Any]
# A text is one message of the user.
Input: TypeAlias = str | MessageLike | Sequence[MessageLike]
# {"name": …, "description": …, "parameters": {JSON Schema}}, also inside {"type": "function", "function": …}.
ToolLike: TypeAlias = types_pb2.Tool | Mapping[str, Any]
# A name, or {"name": …} with the knobs beside it.
PolicyLike: TypeAlias = str | types_pb2.Policy | Mapping[str, Any]


def to_messages(value: Input | None) -> list[types_pb2.Message]:
    if value is None:
        return []
    if isinstance(value, str):
        return [types_pb2.Message(role="user", content=_to_content(value))]
    if isinstance(value, types_pb2.Message | Mapping):
        return [to_message(value)]
    return [to_message(item) for item in value]


def to_message(value: MessageLike) -> types_pb2.Message:
    """Raises ValueError for a key that a message does not have."""
    if isinstance(value, types_pb2.Message):
        return value
    unknown = value.keys() - {"role", "content", "tool_calls", "tool_call_id", "name"}
    if unknown:
        raise ValueError(f"a message has no {', '.join(sorted(unknown))}")
    return types_pb2.Message(
        role=value["role"],
        content=_to_content(value.get("content")),
        tool_calls=[_to_tool_call(call) for call in value.get("tool_calls") or ()],
        tool_call_id=value.get("tool_call_id") or "",
        name=value.get("name") or "",
    )


def to_tool(value: ToolLike) -> types_pb2.Tool:
    if isinstance(value, types_pb2.Tool):
        return value
    tool = value.get("function", value)
    parameters = tool.get("parameters")
    schema = "" if parameters is None else json.dumps(parameters, ensure_ascii=False, sort_keys=True)
    return types_pb2.Tool(name=tool["name"], description=tool.get("description") or "", parameters_json_schema=schema)


def to_policy(value: PolicyLike | None) -> types_pb2.Policy | None:
    if value is None or isinstance(value, types_pb2.Policy):
        return value
    if isinstance(value, str):
        return types_pb2.Policy(name=value)
    policy = types_pb2.Policy(name=value["name"])
    policy.knobs.update({key: knob for key, knob in value.items() if key != "name"})
    return policy


def to_token_ids(value: Iterable[int] | None) -> types_pb2.TokenIds | None:
    return None if value is None else types_pb2.TokenIds(ids=value)


def to_duration(value: float | timedelta | None) -> duration_pb2.Duration | None:
    """A number is in seconds."""
    if value is None:
        return None
    duration = duration_pb2.Duration()
    duration.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    return duration


def to_timestamp(value: datetime | None) -> timestamp_pb2.Timestamp | None:
    """Raises ValueError for a time without a zone: it would mean another moment on another machine."""
    if value is None:
        return None
    if value.tzinfo is None:
        raise ValueError("expire_time needs a time zone")
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromDatetime(value)
    return timestamp


def _to_content(value: str | Iterable[str | Mapping[str, Any]] | None) -> list[types_pb2.ContentPart]:
    if value is None:
        return []
    parts = [value] if isinstance(value, str) else value
    return [types_pb2.ContentPart(text=part if isinstance(part, str) else _part_text(part)) for part in parts]


def _part_text(part: Mapping[str, Any]) -> str:
    if part.get("type", "text") != "text":
        raise ValueError(f"a content part of type {part['type']!r} is not supported")
    text: str = part["text"]
    return text


def _to_tool_call(value: types_pb2.ToolCall | Mapping[str, Any]) -> types_pb2.ToolCall:
    if isinstance(value, types_pb2.ToolCall):
        return value
    call = value.get("function", value)
    arguments = call.get("arguments", call.get("arguments_json", "{}"))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return types_pb2.ToolCall(id=value.get("id") or "", name=call["name"], arguments_json=arguments)
