"""Messages to token deltas. The log is append-only: nothing is rendered or encoded a second time.

render(history)            what the log holds already, however it was produced
render(history + new)      starts with the same text, unless the template rewrites history (drift)
the delta                  the rest, encoded by itself; before it the end-of-turn tokens the last answer lacks
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from sessiond.errors import BadMessage, EmptyInput

ROLES = ("system", "user", "assistant", "tool")
_MARK = "sessiond-mark"


@dataclass(frozen=True, slots=True)
class Message:
    """One message. Raises BadMessage or EmptyInput when it is made from something no template could render."""

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise BadMessage(f"unknown role {self.role!r}; allowed: {', '.join(ROLES)}", role=self.role)
        if not self.content and not self.tool_calls:
            raise EmptyInput(f"the {self.role} message is empty", role=self.role)
        try:
            self.content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadMessage(f"the {self.role} message is not valid Unicode: {error.reason}") from error

    def to_template(self) -> dict[str, Any]:
        """The message as templates know it."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            out["tool_calls"] = [
                {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments_json"]}}
                for c in self.tool_calls
            ]
        if self.tool_call_id:
            out["tool_call_id"] = self.tool_call_id
        if self.name:
            out["name"] = self.name
        return out


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """Tokens to append: `flags` is 1 for the template's own tokens, 0 for content."""

    ids: list[int] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    drift: bool = False


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a probe at load found out about a template."""

    closing: str  # text after an assistant message's content
    generation_prompt: str
    default_system: bool  # inserts a system prompt of its own
    stable: bool  # never rewrites history, so a delta does not depend on what came before the last answer


class ChatTemplate:
    """The chat template of a tokenizer. Without one, only raw token ids can be used."""

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = set(eos_ids) | ({tokenizer.eos_token_id} - {None})

    @property
    def available(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @cached_property
    def traits(self) -> TemplateTraits:
        return self._probe()

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """End-of-sequence ids and the special token that ends an assistant's turn."""
        ids = set(self._eos_ids)
        closing = self._encode(self.traits.closing) if self.available else []
        special = set(self._tokenizer.all_special_ids)
        if closing and closing[0] in special:
            ids.add(closing[0])
        return frozenset(ids)

    def render_root(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> TokenDelta:
        """The start of a session: its first messages, without a generation prompt."""
        return self._delta(self._render(messages, tools=tools), messages)

    def render_turn(
        self, history: Sequence[Message], new: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> TokenDelta:
        """What `new` appends after `history` (whose own end-of-turn text is closed, see `close_tokens`)."""
        if history and history[-1].role == "assistant" and self.traits.stable:
            history = _dummies(history)
        before = self._render(history) if history else ""
        after = self._render([*history, *new], add_generation_prompt)
        if after.startswith(before):
            return self._delta(after[len(before) :], new)
        dummies = _dummies(history)
        before, after = self._render(dummies), self._render([*dummies, *new], add_generation_prompt)
        delta = self._delta(after[len(before) :] if after.startswith(before) else after, new)
        return TokenDelta(delta.ids, delta.flags, drift=True)

    def close_tokens(self, ended: str, last_id: int) -> list[int]:
        """End-of-turn tokens still missing after an answer that ended by its stop token, or is `open`."""
        if not self.available:
            return []
        closing = self._encode(self.traits.closing)
        if ended == "stop_token" and closing and closing[0] == last_id:
            return closing[1:]
        return closing

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        if not self.available:
            raise BadMessage("the model has no chat template: give token_ids")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [m.to_template() for m in messages],
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise BadMessage(f"the model's chat template refuses these messages: {error}") from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _delta(self, text: str, messages: Sequence[Message]) -> TokenDelta:
        """Encode in one call; a token is content if it overlaps the content of a message."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=self._tokenizer.is_fast)
        ids: list[int] = encoded["input_ids"]
        if not self._tokenizer.is_fast:
            return TokenDelta(ids, [0] * len(ids))
        spans, at = [], 0
        for message in messages:
            content = message.content.strip()
            found = text.find(content, at) if content else -1
            if found >= 0:
                at = found + len(content)
                spans.append((found, at))
        flags = [0 if any(a < end and start < b for a, b in spans) else 1 for start, end in encoded["offset_mapping"]]
        return TokenDelta(ids, flags)

    def _probe(self) -> TemplateTraits:
        user, answer = Message("user", "x"), Message("assistant", _MARK)
        pair = self._render([user, answer])
        closing = pair[pair.rindex(_MARK) + len(_MARK) :]
        prompted, plain = self._render([user], True), self._render([user])
        opening = prompted[len(plain) :] if prompted.startswith(plain) else ""
        thought = Message("assistant", f"<think>{_MARK}</think>y")
        dialog = [user, thought, Message("user", "z"), answer, Message("user", "w")]
        stable = True
        for n in (2, 4):
            stable &= self._render(dialog[: n + 1]).startswith(self._render(dialog[:n]))
        return TemplateTraits(closing, opening, "system" in plain and _MARK not in plain, stable)


def _dummies(history: Sequence[Message]) -> list[Message]:
    """A short history in whose place a delta renders the same, if the template does not look further back."""
    system = [m for m in history[:1] if m.role == "system"]
    return [*system, Message("user", "x"), Message("assistant", "y")]
