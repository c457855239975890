"""What a chat template does, found by rendering dialogues of marks when the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from sessiond.errors import BadMessage

Chat = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    @property
    def is_fast(self) -> bool: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...
    def apply_chat_template(self, conversation: Chat, **kwargs: Any) -> Any: ...
    def __call__(self, text: str, **kwargs: Any) -> Any: ...


def mark(name: object) -> str:
    """A stand-in for content: one word that no template trims, splits or contains."""
    return f"zqSentinel{name}qz"


QUESTION, ANSWER = mark("Question"), mark("Answer")


def say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What was found. With a `problem` (no template, or one that fails) everything else is at its default.

    `prefix_stable`: the log's text of a dialogue without tools is the template's own rendering of it, and a delta
    depends on no earlier message; `prefix_stable_system`: the same behind a system message.
    `drops_reasoning`: `<think>` parts of earlier answers vanish from the rendering.
    `trailer`: what the template adds at the end only when asked for no generation prompt (Phi-3).
    `answer_lead`: whitespace before an answer, which the model generates itself (Mistral).
    """

    problem: str = ""
    default_system: bool = False
    supports_system: bool = False
    trims_content: bool = False
    drops_reasoning: bool = False
    prefix_stable: bool = False
    prefix_stable_system: bool = False
    end_of_turn: str = ""
    end_of_turn_ids: tuple[int, ...] = ()
    trailer: str = ""
    answer_lead: str = ""

    @property
    def drifts(self) -> bool:
        """Whether some dialogue without tools is rewritten as it grows."""
        system_drifts = self.supports_system and not self.prefix_stable_system
        return self.drops_reasoning or not self.prefix_stable or system_drifts


class Renderer:
    """A tokenizer seen as two functions: a chat to text, text to tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}

    def render(self, chat: Chat, generate: bool = False, tools: Tools = ()) -> str:
        """The template's text, with the generation prompt if `generate`. BadMessage if the template refuses."""
        try:
            # transformers compiles a template once and keeps it.
            text = self._tokenizer.apply_chat_template(
                chat, tools=list(tools) or None, add_generation_prompt=generate, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            detail = str(error)[:200]
            raise BadMessage(f"the chat template refuses these messages: {detail}", field="messages") from error
        return str(text)

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, each one's character range); slow tokenizers know no ranges and give empty ones."""
        if not self._tokenizer.is_fast:
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            return ids, [(0, 0)] * len(ids)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]


def cut_behind_dummy(text: str, end_of_turn: str) -> str:
    """What a rendering that begins with the dummy exchange holds after that exchange. BadMessage if it is lost."""
    _, found, rest = text.partition(ANSWER)
    if not found or not rest.startswith(end_of_turn):
        raise BadMessage("the chat template does not keep earlier messages in their place", field="messages")
    return rest[len(end_of_turn) :]


def probe(renderer: Renderer) -> TemplateTraits:
    """Render dialogues of marks and compare. Never raises: what fails is a `problem` or an absent trait."""
    user = say("user", QUESTION)
    exchange = [user, say("assistant", ANSWER)]
    try:
        trailer = _trailer(renderer, [user])
        one = renderer.render([user]).removesuffix(trailer)
        prompted = renderer.render([user], generate=True)
        two = renderer.render(exchange).removesuffix(trailer)
        three = renderer.render([*exchange, say("user", mark("Next"))]).removesuffix(trailer)
        end_of_turn = two.partition(ANSWER)[2]
        header = cut_behind_dummy(three, end_of_turn).partition(mark("Next"))[0]
        if QUESTION not in one or ANSWER not in two or mark("Next") not in three:
            raise BadMessage("the chat template leaves messages out")
    except BadMessage as error:
        return TemplateTraits(problem=error.message)
    preamble = one.partition(QUESTION)[0].removesuffix(header)
    lead = two[len(prompted) :].partition(ANSWER)[0] if two.startswith(prompted) else ""
    lead = lead if lead.isspace() else ""
    system = say("system", mark("System"))
    return TemplateTraits(
        default_system=any(i not in renderer.added for i in renderer.tokenize(preamble.strip())[0]),
        supports_system=_keeps(renderer, [system, user], mark("System")),
        trims_content=not _keeps(renderer, [say("user", f" \n{QUESTION}\n ")], f" \n{QUESTION}\n "),
        drops_reasoning=_drops_reasoning(renderer),
        prefix_stable=_is_stable(renderer, [], end_of_turn, trailer, lead),
        prefix_stable_system=_is_stable(renderer, [system], end_of_turn, trailer, lead),
        end_of_turn=end_of_turn,
        end_of_turn_ids=tuple(renderer.tokenize(end_of_turn)[0]),
        trailer=trailer,
        answer_lead=lead,
    )


def _trailer(renderer: Renderer, chat: Chat) -> str:
    """What the rendering without generation prompt ends with beyond what it shares with the one that has it.

    Shared is counted in tokens, so that "<|assistant|>" and "<|endoftext|>" do not share their "<|".
    """
    with_prompt, without = renderer.render(chat, generate=True), renderer.render(chat)
    if with_prompt.startswith(without):
        return ""
    (ids, _), (other_ids, other_offsets) = renderer.tokenize(with_prompt), renderer.tokenize(without)
    n_shared = next(
        (i for i, (a, b) in enumerate(zip(ids, other_ids, strict=False)) if a != b), min(len(ids), len(other_ids))
    )
    start = other_offsets[n_shared][0] if n_shared < len(other_ids) else len(without)
    return without[start:]


def _keeps(renderer: Renderer, chat: Chat, text: str) -> bool:
    try:
        return text in renderer.render(chat)
    except BadMessage:
        return False


def _drops_reasoning(renderer: Renderer) -> bool:
    thought = mark("Thought")
    answer = say("assistant", f"<think>\n{thought}\n</think>\n\n{ANSWER}")
    chat = [say("user", QUESTION), answer, say("user", mark("Next"))]
    return not _keeps(renderer, chat, thought)


def _is_stable(renderer: Renderer, opening: Chat, end_of_turn: str, trailer: str, lead: str) -> bool:
    """Whether deltas behind the dummy exchange add up to the whole rendering, at every step of five messages."""
    chat = list(opening)
    log = ""
    try:
        for i in range(3):
            question, answer = say("user", mark(f"User{i}")), say("assistant", mark(f"Reply{i}"))
            if i == 0:
                log = renderer.render([*chat, question], generate=True)
            else:
                dummy = [say("user", QUESTION), say("assistant", ANSWER)]
                log += cut_behind_dummy(renderer.render([*dummy, question], generate=True), end_of_turn)
            chat.append(question)
            if log != renderer.render(chat, generate=True):
                return False
            log += lead + str(answer["content"]) + end_of_turn
            chat.append(answer)
            if log != renderer.render(chat).removesuffix(trailer):
                return False
    except BadMessage:
        return False
    return True
