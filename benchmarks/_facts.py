"""Facts that conversations tell and ask for, and the filler they are told in.

A fact is "The registry number of the ADJECTIVE NOUN is N". Numbers begin with different digits, so that the first token
of the answer is a choice among all that were told.
"""

from __future__ import annotations

from dataclasses import dataclass

from _dialogue import Chat, Turn

ADJECTIVES = [
    "amber",
    "brisk",
    "copper",
    "dusty",
    "early",
    "frozen",
    "gentle",
    "hollow",
    "iron",
    "jolly",
    "keen",
    "lonely",
    "marble",
    "narrow",
    "olive",
    "purple",
]
NOUNS = [
    "anchor",
    "basket",
    "candle",
    "dagger",
    "engine",
    "feather",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "orchard",
]


@dataclass(frozen=True)
class Fact:
    name: str
    number: str

    @property
    def told(self) -> str:
        return f"The registry number of the {self.name} is {self.number}."

    @property
    def stem(self) -> str:
        return f"The registry number of the {self.name} is "


def facts(chat: Chat, n: int) -> list[Fact]:
    """`n` facts, at most 9: names without a word in common, numbers of four digits that begin differently."""
    adjectives, nouns = chat.draw.sample(ADJECTIVES, n), chat.draw.sample(NOUNS, n)
    firsts = chat.draw.sample("123456789", n)
    numbers = [first + "".join(chat.draw.choices("0123456789", k=3)) for first in firsts]
    return [Fact(f"{a} {b}", number) for a, b, number in zip(adjectives, nouns, numbers, strict=True)]


def asked(chat: Chat, filler: list[int], fact: Fact, told: list[Fact], kind: str, age: int) -> Turn:
    """A turn that asks for a fact; the choices are the numbers of all that were `told`."""
    values = [fact.number, *(other.number for other in told if other != fact)]
    prompt, stem, answers = chat.ask(f"What is the registry number of the {fact.name}?", fact.stem, values)
    closing = chat.ids("." + chat.next)
    return Turn(filler, prompt, answers[0], closing, kind, age, [ids[0] for ids in answers], stem)


def document(chat: Chat, told: list[Fact], n_sentences: int = 4) -> str:
    """Filler paragraphs with facts spread over them."""
    parts = [chat.exchange()[1] for _ in range(n_sentences)]
    for fact in told:
        parts.insert(chat.draw.randrange(len(parts) + 1), fact.told)
    return "Please keep these notes for later.\n\n" + "\n\n".join(parts)


def chatter(chat: Chat, new: list[Fact]) -> str:
    """An exchange of filler, in which either side mentions facts."""
    user, reply = chat.exchange(120, 240)
    for fact in new:
        if chat.draw.random() < 0.5:
            user = f"{user}\n\nBy the way: {fact.told}"
        else:
            reply = f"{reply}\n\nNote: {fact.told}"
    return user + chat.reply + reply + chat.next


def plain(chat: Chat) -> str:
    """An exchange of filler."""
    user, reply = chat.exchange()
    return user + chat.reply + reply + chat.next
