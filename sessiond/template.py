"""Messages to token deltas: what a turn appends to the log, and nothing that is there already.

    log   [root delta] then for each turn [closing of the last answer | new messages | generation prompt] [generated]

Each delta is tokenized by itself in one call; nothing logged is encoded again. Normally it is rendered behind a
two-message dummy, so its cost does not grow with the history. Templates that look further back are rendered whole;
when they rewrite history, the delta says `drift`. Text in a message that spells a special token becomes that token,
as with transformers' own `apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sessiond.errors import BadMessage, EmptyInput
from sessiond.templateprobe import (
    ANSWER,
    QUESTION,
    Chat,
    Renderer,
    TemplateTraits,
    Tokenizer,
    Tools,
    cut_behind_dummy,
    mark,
    probe,
    say,
)

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE, CONTENT = 1, 0
Ended = Literal["stop_token", "open"]


def _check_text(field: str, text: object) -> None:
    if not isinstance(text, str):
        raise BadMessage(f"{field} is not text", field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadMessage(f"{field} is not valid Unicode at character {error.start}", field=field) from error


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call in an assistant's message; `arguments_json` as the model wrote it, malformed perhaps."""

    name: str
    arguments_json: str = ""
    id: str = ""

    def as_dict(self) -> dict[str, Any]:
        try:
            arguments = json.loads(self.arguments_json or "{}")
        except (ValueError, RecursionError):
            arguments = None
        # Templates expect an object; malformed text is shown as it is.
        shown = arguments if isinstance(arguments, dict) else self.arguments_json
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": shown}}


@dataclass(frozen=True, slots=True)
class Message:
    """One message. BadMessage: unknown role, text that UTF-8 cannot hold, a tool field on the wrong role;
    EmptyInput: a user's message without content. An empty system message asks for none, not for the default."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise BadMessage(f"unknown role {ascii(self.role)[:60]}; known: {', '.join(ROLES)}", field="role")
        texts = [("content", self.content), ("tool_call_id", self.tool_call_id), ("name", self.name)]
        for call in self.tool_calls:
            texts += [("tool_calls", text) for text in (call.name, call.arguments_json, call.id)]
        for field, text in texts:
            _check_text(field, text)
        if self.tool_calls and self.role != "assistant":
            raise BadMessage("only an assistant's message has tool calls", field="tool_calls")
        if self.tool_call_id and self.role != "tool":
            raise BadMessage("only a tool's message has a tool_call_id", field="tool_call_id")
        if not self.content and self.role == "user":
            raise EmptyInput("a user's message without content", field="content")

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates expect; empty optional fields are left out."""
        shown = say(self.role, self.content)
        if self.tool_calls:
            shown["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.tool_call_id:
            shown["tool_call_id"] = self.tool_call_id
        if self.name:
            shown["name"] = self.name
        return shown


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """Tokens to append, and the text they encode. `flags[i]`: TEMPLATE, or CONTENT if any of token i's text is a
    message's content (always TEMPLATE with slow tokenizers, which do not tell). `drift`: the template, rendered
    over the whole conversation, would change what the log already holds."""

    ids: list[int]
    flags: list[int]
    drift: bool = False
    text: str = ""


class ChatTemplate:
    """A tokenizer's chat template. `eos_ids`: those of the generation config, for `stop_ids`.

    Immutable; construction probes the template and never fails on it. Without a working template everything that
    takes messages raises BadMessage; raw token ids need nothing from here.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Iterable[int] = ()) -> None:
        self._renderer = Renderer(tokenizer)
        self._traits = probe(self._renderer)
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        end_of_turn = [i for i in self._traits.end_of_turn_ids if i in self._renderer.added]
        self.stop_ids: frozenset[int] = frozenset([*own, *eos_ids, *end_of_turn[:1]])

    def probe(self) -> TemplateTraits:
        """What was found at load."""
        return self._traits

    def render_root(self, messages: Sequence[Message], tools: Tools = ()) -> TokenDelta:
        """The root revision's tokens. None for no messages: the first turn then brings the default system prompt,
        and the tools, which have to be passed to it too."""
        if not messages:
            return TokenDelta([], [])
        return self.render_turn((), messages, tools=tools, add_generation_prompt=False)

    def render_turn(
        self,
        history: Sequence[Message],
        new: Sequence[Message],
        *,
        tools: Tools = (),
        open_tail: str | None = None,
        at_start: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> TokenDelta:
        """What `new` adds behind `history`. BadMessage if the template refuses; EmptyInput if `new` is empty.

        `open_tail`: text still missing behind the last answer (from `open_tail()`), put in front of the delta.
        `at_start`: whether the log is empty, by default whether `history` is; False with an empty history is for
        a log that began with raw token ids.
        """
        self._require()
        if not new:
            raise EmptyInput("no messages", field="messages")
        added = [m.as_dict() for m in new]
        drift = False
        is_first = not history if at_start is None else at_start
        if is_first:
            body = self._base(added, add_generation_prompt, tools)
        elif not history or self._is_local(history, new, tools):
            body = self._behind_dummy(added, add_generation_prompt)
        else:
            body, drift = self._behind_history([m.as_dict() for m in history], added, add_generation_prompt, tools)
        tail = open_tail or ""
        spans = [(a + len(tail), b + len(tail)) for a, b in self._content_spans(body, added, is_first, tools)]
        return replace(self._encode(tail + body, spans), drift=drift)

    def open_tail(self, ended: Ended, last_id: int | None) -> str:
        """The end-of-turn text still missing behind an answer. `ended`: "stop_token" (`last_id`, sampled and
        logged, ended it) or "open" (length, stop string, abort)."""
        self._require()
        closing = self._traits.end_of_turn
        if ended == "open" or last_id is None or last_id not in self._traits.end_of_turn_ids:
            return closing
        token = self._renderer.added.get(last_id, "")
        # The sampled token is one of the closing's: what follows it is missing.
        return closing.partition(token)[2] if token and token in closing else closing

    def _require(self) -> None:
        problem = self._traits.problem
        if problem:
            raise BadMessage(f"this model takes token ids only, not messages: {problem}", field="messages")

    def _is_local(self, history: Sequence[Message], new: Sequence[Message], tools: Tools) -> bool:
        """Whether the delta is known to depend on nothing before it."""
        traits = self._traits
        stable = traits.prefix_stable_system if history[0].role == "system" else traits.prefix_stable
        after_answer = history[-1].role == "assistant" and not history[-1].tool_calls
        alternating = all(m.role == ("user", "assistant")[i % 2] and not m.tool_calls for i, m in enumerate(new))
        return stable and not tools and not traits.drops_reasoning and after_answer and alternating

    def _base(self, chat: Chat, generate: bool, tools: Tools = ()) -> str:
        """The template's rendering without its trailer."""
        text = self._renderer.render(chat, generate, tools)
        return text if generate else text.removesuffix(self._traits.trailer)

    def _behind_dummy(self, new: Chat, generate: bool) -> str:
        chat = [say("user", QUESTION), say("assistant", ANSWER), *new]
        return cut_behind_dummy(self._base(chat, generate), self._traits.end_of_turn)

    def _behind_history(self, old: Chat, new: Chat, generate: bool, tools: Tools) -> tuple[str, bool]:
        """(delta, drift) from rendering the conversation with and without `new`."""
        before, whole = self._base(old, False, tools), self._base([*old, *new], generate, tools)
        last_user = max((i for i, m in enumerate(old) if m["role"] == "user"), default=0)
        # What the log held when the last answer began: a template may have rewritten that since.
        answered = [m["role"] for m in old[last_user : last_user + 2]] == ["user", "assistant"]
        asked = self._base(old[: last_user + 1], True, tools) if answered else ""
        if whole.startswith(before) and before.startswith(asked):
            return whole[len(before) :], not _holds_answers(before, old)
        # Rewritten. A tool's result needs the call before it: try behind the last exchange, then behind a dummy.
        try:
            before = self._base(old[last_user:], False)
            whole = self._base([*old[last_user:], *new], generate)
        except BadMessage:
            return self._behind_dummy(new, generate), True
        return (whole[len(before) :] if whole.startswith(before) else self._behind_dummy(new, generate)), True

    def _content_spans(self, body: str, new: Chat, is_first: bool, tools: Tools) -> list[tuple[int, int]]:
        """Where content lies in the delta's text: [start, end) in characters, ascending.

        The same messages are rendered with marks for content. The text between marks is the template's, so content
        that looks like a header is not taken for one. If the template looks into content, by searching.
        """
        marked = [{**m, "content": mark(i) if m["content"] else ""} for i, m in enumerate(new)]
        try:
            text = self._base(marked, False, tools) if is_first else self._behind_dummy(marked, False)
        except BadMessage:
            return _search_spans(body, new)
        headers = []
        for i, message in enumerate(new):
            if message["content"]:
                header, found, text = text.partition(mark(i))
                if not found:
                    return _search_spans(body, new)
                headers.append(header)
        contents = [str(m["content"]) for m in new if m["content"]]
        for choice in (contents, [content.strip() for content in contents]):
            spans = _join_spans(body, headers, choice, text)
            if spans is not None:
                return spans
        return _search_spans(body, new)

    def _encode(self, text: str, spans: list[tuple[int, int]]) -> TokenDelta:
        ids, offsets = self._renderer.tokenize(text)
        flags, n_passed = [], 0
        for start, end in offsets:
            while n_passed < len(spans) and spans[n_passed][1] <= start:
                n_passed += 1
            overlaps = n_passed < len(spans) and spans[n_passed][0] < end
            flags.append(CONTENT if overlaps else TEMPLATE)
        return TokenDelta(ids, flags, text=text)


def _holds_answers(text: str, chat: Chat) -> bool:
    """Whether a rendering holds every answer word for word (but for whitespace around it), in order."""
    place = 0
    for message in chat:
        content = str(message["content"]).strip()
        found = text.find(content, place)
        if found >= 0:
            place = found + len(content)
        elif message["role"] == "assistant":
            return False
    return True


def _join_spans(body: str, headers: list[str], contents: list[str], rest: str) -> list[tuple[int, int]] | None:
    """Places of `contents` if `body` is header, content, header, content ..., `rest`, ...; else None."""
    spans, place = [], 0
    for header, content in zip(headers, contents, strict=True):
        start = place + len(header)
        if not body.startswith(header, place) or not body.startswith(content, start):
            return None
        place = start + len(content)
        spans.append((start, place))
    return spans if body.startswith(rest, place) else None


def _search_spans(body: str, new: Chat) -> list[tuple[int, int]]:
    spans, place = [], 0
    for message in new:
        content = str(message["content"]).strip()
        found = body.find(content, place) if content else -1
        if found >= 0:
            place = found + len(content)
            spans.append((found, place))
    return spans
