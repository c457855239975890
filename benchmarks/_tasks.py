"""The tasks T1 to T6: each makes one conversation by a draw. T0, a trained recall model, is recall.py's."""

from __future__ import annotations

from collections.abc import Callable

from _dialogue import Chat, Conversation, Turn
from _facts import ADJECTIVES, NOUNS, Fact, asked, chatter, document, facts, plain

LABELS = ("north", "south", "east", "west")
N_FACTS = 8
EDGES = (16, 32, 64, 128)


def late_need(chat: Chat, n_facts: int = N_FACTS, n_telling: int = 4) -> Conversation:
    """T1: facts in a document, in user turns and in replies of the first `n_telling` exchanges; then each is asked for
    first in a turn of its own, with filler between. After every third one is asked for again.
    """
    known = facts(chat, n_facts)
    told_at = [chat.draw.randrange(n_telling) for _ in known]
    filler = chat.head
    for exchange in range(n_telling):
        new = [fact for fact, at in zip(known, told_at, strict=True) if at == exchange]
        if exchange == 0:
            filler += document(chat, new) + chat.reply + "I will keep them." + chat.next
        else:
            filler += chatter(chat, new)
    turns: list[Turn] = []
    for number, fact in enumerate(known):
        age = n_telling + number - told_at[number]
        turns.append(asked(chat, chat.ids(filler + chatter(chat, [])), fact, known, "first", age))
        filler = ""
        if number % 3 == 2:
            again = chat.draw.randrange(number)
            turns.append(asked(chat, [], known[again], known, "again", number - again))
    return Conversation("T1", turns)


def copy_back(chat: Chat, n_turns: int = 6, n_cue: int = 6, n_answer: int = 12) -> Conversation:
    """T2: repeat a sentence of an earlier turn, given its first words."""
    turns, said = [], []
    filler = chat.head
    for number in range(n_turns + 2):
        user, reply = chat.exchange(200, 480)
        filler += user + chat.reply + reply + chat.next
        said.append(reply)
        if number < 2:
            continue
        back = chat.draw.randrange(number)
        words = said[back].split(" ")
        start = chat.draw.randrange(max(1, len(words) - n_cue - n_answer))
        cue, rest = " ".join(words[start : start + n_cue]), " ".join(words[start + n_cue :])
        prompt = chat.ids(f'Repeat the passage from above that begins with "{cue}".' + chat.reply)
        answer = chat.ids(" " + rest)[:n_answer]
        closing = chat.ids(chat.next)
        turns.append(Turn(chat.ids(filler), prompt, answer, closing, "copy", number - back, stem=chat.ids(cue)))
        filler = ""
    return Conversation("T2", [turn for turn in turns if turn.answer])


def overwrite(chat: Chat, n_facts: int = 4) -> Conversation:
    """T3: numbers that are told, changed turns later, and asked for: the current one, and then the old one."""
    known = facts(chat, 2 * n_facts)
    pairs = [(old, Fact(old.name, new.number)) for old, new in zip(known[:n_facts], known[n_facts:], strict=True)]
    filler = chat.head + document(chat, [old for old, _ in pairs]) + chat.reply + "I will keep them." + chat.next
    for _, new in pairs:
        user, reply = chat.exchange()
        changed = f"{user}\n\nCorrection: the registry number of the {new.name} is now {new.number}."
        filler += changed + chat.reply + reply + chat.next
    turns, before = [], chat.ids(filler)
    for number, (old, new) in enumerate(pairs):
        ages = n_facts, n_facts + number
        for fact, other, when, age in ((new, old, "now", ages[0]), (old, new, "before the correction", ages[1])):
            question = f"What is the registry number of the {fact.name} {when}?"
            begun = f"The registry number of the {fact.name} {'is now' if when == 'now' else 'was first'} "
            prompt, stem, answers = chat.ask(question, begun, [fact.number, other.number])
            kind, closing = "current" if when == "now" else "old", chat.ids("." + chat.next)
            turns.append(Turn(before, prompt, answers[0], closing, kind, age, [ids[0] for ids in answers], stem))
            before = chat.ids(plain(chat))
    return Conversation("T3", turns)


def many_shot(chat: Chat, n_shots: int = 80, n_turns: int = 8) -> Conversation:
    """T4: labels for names, by no rule; asked for names that were seen and for some that were not."""
    names = chat.draw.sample([f"{a} {b}" for a in ADJECTIVES for b in NOUNS], n_shots + n_turns // 4)
    labels = {name: chat.draw.choice(LABELS) for name in names}
    shots = "\n".join(f"{name} -> {labels[name]}" for name in names[:n_shots])
    filler = chat.head + f"Learn which side each belongs to.\n{shots}" + chat.reply + "I have learned them." + chat.next
    asks = [*chat.draw.sample(names[:n_shots], n_turns - n_turns // 4), *names[n_shots:]]
    chat.draw.shuffle(asks)
    turns = []
    for number, name in enumerate(asks):
        values = [labels[name], *(label for label in LABELS if label != labels[name])]
        prompt, stem, answers = chat.ask(
            f"Which side does the {name} belong to?", f"{name} ->", [f" {v}" for v in values]
        )
        kind = "seen" if name in names[:n_shots] else "new"
        choices = [ids[0] for ids in answers]
        turns.append(Turn(chat.ids(filler), prompt, answers[0], chat.ids(chat.next), kind, number, choices, stem))
        filler = plain(chat)
    return Conversation("T4", turns)


def replayed_chat(chat: Chat, n_turns: int = 10, n_answer: int = 24) -> Conversation:
    """T5: real exchanges, teacher-forced; `n_answer` tokens of each reply are scored, from its second on: the first
    one's logits come from the prompt, which most policies let attend to everything.
    """
    filler = chat.ids(chat.head + plain(chat))
    turns = []
    for number in range(n_turns):
        user, reply = chat.exchange(400, 600)
        ids = chat.ids(reply)
        while len(ids) < 2:  # nothing is left to score
            user, reply = chat.exchange(400, 600)
            ids = chat.ids(reply)
        stem, answer, rest = ids[:1], ids[1 : 1 + n_answer], ids[1 + n_answer :]
        closing = rest + chat.ids(chat.next)
        turns.append(Turn(filler, chat.ids(user + chat.reply), answer, closing, "reply", number, stem=stem))
        filler = []
    return Conversation("T5", turns)


def boundary(chat: Chat, n_tokens: int = 1152, n_facts: int = N_FACTS) -> Conversation:
    """T6: numbers across multiples of 16, 32, 64 and 128, in the first and the last 2%, under names nearly alike."""
    known = [Fact(_alike(i, f.name), f.number) for i, f in enumerate(facts(chat, n_facts))]
    chat.draw.shuffle(known)
    ids = chat.ids(chat.head)
    # Where digits begin: the first at once, then about edges, the last just before the end.
    edges = sorted(chat.draw.sample(range(1, n_tokens // 128 - 1), n_facts - 2))
    for number, fact in enumerate(known):
        lead, digits = chat.ids("\n" + fact.stem), chat.ids(fact.number + ".\n")
        soonest = at = len(ids) + len(lead)
        if number == n_facts - 1:
            at = max(soonest, n_tokens - len(digits))
        elif number > 0:
            size = EDGES[number % len(EDGES)]
            at = edges[number - 1] * 128 + chat.draw.randrange(0, 128, size) + chat.draw.randint(-2, 2)
            at += max(0, -(-(soonest - at) // size)) * size
        ids += _filler(chat, at - soonest) + lead + digits
    ids += chat.ids(chat.reply + "I will keep that." + chat.next)
    order = chat.draw.sample(range(n_facts), n_facts)
    turns = [asked(chat, ids if i == 0 else [], known[f], known, "first", i) for i, f in enumerate(order)]
    return Conversation("T6", turns)


def _alike(i: int, name: str) -> str:
    """Names in pairs that share their adjective and nearly their noun."""
    adjective, noun = ADJECTIVES[i // 2], NOUNS[i // 2]
    return f"{adjective} {noun}" if i % 2 else f"{adjective} {noun}s"


def _filler(chat: Chat, n: int) -> list[int]:
    """Exactly `n` tokens of text."""
    ids: list[int] = []
    while len(ids) < n:
        ids += chat.ids(chat.exchange()[1] + "\n")
    return ids[:n]


TASKS: dict[str, Callable[[Chat], Conversation]] = {
    "T1": late_need,
    "T2": copy_back,
    "T3": overwrite,
    "T4": many_shot,
    "T5": replayed_chat,
    "T6": boundary,
}
