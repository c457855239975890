"""Conversations made of token ids: filler, what the methods observe, the gold answer, and what closes the turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Turn:
    """`filler` stands before the turn, for all methods the same; `prompt` ends where the reply begins.

    `stem`: how the reply begins, decoded token by token: many policies let a prompt attend to all of history, and what
    follows it at once would tell nothing of their choice. Then the gold `answer`.
    `choices`: first tokens of the candidates, the gold one's among them. `age`: turns since the answer was told.
    """

    filler: list[int]
    prompt: list[int]
    answer: list[int]
    closing: list[int]
    kind: str
    age: int = 0
    choices: list[int] = field(default_factory=list)
    stem: list[int] = field(default_factory=list)

    @property
    def reply(self) -> list[int]:
        """What is decoded: the stem and the answer."""
        return [*self.stem, *self.answer]

    @property
    def exchange(self) -> list[int]:
        """All tokens that the turn adds."""
        return [*self.prompt, *self.reply, *self.closing]


@dataclass(frozen=True)
class Conversation:
    task: str
    turns: list[Turn]

    @property
    def n_tokens(self) -> int:
        return sum(len(turn.filler) + len(turn.exchange) for turn in self.turns)


class Chat:
    """A model's chat template in three pieces, and filler exchanges to put between them.

    Raises ValueError if the template does not render messages one after the other.
    """

    def __init__(self, tokenizer: Any, exchanges: Sequence[tuple[str, str]], draw: random.Random) -> None:
        self._tokenizer, self._exchanges, self.draw = tokenizer, list(exchanges), draw
        names = ("(first)", "(second)", "(third)", "(fourth)")
        roles = ("user", "assistant") * 2
        messages = [{"role": "system", "content": SYSTEM}]
        messages += [{"role": role, "content": name} for role, name in zip(roles, names, strict=True)]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        pieces = []
        for name in names:
            before, found, text = text.partition(name)
            if not found:
                raise ValueError("the chat template does not render messages in their order")
            pieces.append(before)
        self.head, self.reply, self.next = pieces[:3]
        if pieces[3] != self.reply:
            raise ValueError("the chat template renders replies differently")

    def ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return found

    def text(self, ids: Sequence[int]) -> str:
        found: str = self._tokenizer.decode(ids)
        return found

    def exchange(self, n_user: int = 160, n_reply: int = 320) -> tuple[str, str]:
        """A user's message and a reply, cut at words to so many characters."""
        user, reply = self.draw.choice(self._exchanges)
        return cut(user, n_user), cut(reply, n_reply)

    def ask(self, question: str, stem: str, values: Sequence[str]) -> tuple[list[int], list[int], list[list[int]]]:
        """Ids of the question, of the beginning of its reply, and of each of `values` as the continuation.

        What all continuations, two at least, begin with belongs to the stem. Raises ValueError if then two begin alike.
        """
        if len(values) < 2:
            raise ValueError("a choice needs two candidates")
        prompt, whole = self.ids(question + self.reply), [self.ids(stem + value) for value in values]
        n = 0
        while len({tuple(ids[: n + 1]) for ids in whole}) == 1 and n < min(map(len, whole)) - 1:
            n += 1
        answers = [ids[n:] for ids in whole]
        if len({ids[0] for ids in answers}) != len(values):
            raise ValueError(f"the tokenizer begins two of {', '.join(values)} alike")
        return prompt, whole[0][:n], answers


def cut(text: str, n: int) -> str:
    """The first `n` characters, up to a space."""
    return text if len(text) <= n else text[:n].rpartition(" ")[0] or text[:n]
