"""Whether facts survive: late needs, copies, changes, mappings, long chats, edges. Markdown, then one JSON line last.

Every method is asked the same questions over the same KV, which full attention computed once; what a method chose is
chosen before the next question exists. So H2O and a SnapKV that compresses once, which choose while history is
prefilled, are not among them: recall.py has both. `--history own` lets each method live with its own answers instead.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, console, machine, print_json, spin_as_the_daemon, today
from _chat_text import exchanges
from _contenders import contenders, only
from _dialogue import Chat, Conversation
from _kvpress_rows import peer, questions
from _kvpress_rows import scores as answers_of
from _model import load_model
from _own_history import live
from _probe import Probe
from _replay import CELL, Contender, prefill
from _scores import Score, quotable, score, summary
from _scoring import score_history
from _tasks import TASKS

from sessiond import modelstore
from sessiond.model import Model, load_tokenizer
from sessiond.policies.base import Policy
from sessiond.policies.full import Full

DEFAULT_COUNTS = {"T1": 4, "T2": 2, "T3": 2, "T4": 1, "T5": 2, "T6": 2}
CHOICES = ("right", "retention", "retention_again", "reverse_flips")
COLUMNS = ("n", *CHOICES, "exact", "token_match", "delta_nll", "kl_mean", "kl_p99", "top1_decided")
MUST_FAIL = ("random", "window")
FAILED = 0.9  # retention below which a method has failed
out = console()

Scores = dict[str, list[Score]]


def run(
    model: Model, chat: Chat, conversation: Conversation, policies: dict[str, Policy], number: int, scores: Scores
) -> None:
    """One conversation with gold history: a turn of each method, then the turn by full attention for what follows."""
    cache = model.new_cache()
    full = Contender(Full())
    living = {name: Contender(policy, Probe()) for name, policy in policies.items()}
    ids: list[int] = []
    for index, turn in enumerate(conversation.turns):
        cache.selection = None
        prefill(model, cache, turn.filler)
        ids += turn.filler
        start = cache.length
        score_history(model, cache, ids, policies.values(), chat.ids, chat.reply)
        reference = full.turn(model, cache, start, turn.prompt, turn.reply)[len(turn.stem) :]
        scores["full"].append(score(turn, reference, reference, number, index))
        for name, contender in living.items():
            logits = contender.turn(model, cache, start, turn.prompt, turn.reply)
            scores[name].append(score(turn, logits[len(turn.stem) :], reference, number, index))
        cache.truncate(start, CELL)
        prefill(model, cache, turn.exchange)
        ids += turn.exchange


def run_own(
    model: Model, chat: Chat, conversation: Conversation, policies: dict[str, Policy], number: int, scores: Scores
) -> None:
    """The same, each method with a memory and answers of its own."""
    references = live(model, chat, conversation, Full())
    for name, policy in {"full": Full(), **policies}.items():
        found = references if name == "full" else live(model, chat, conversation, policy)
        for index, (turn, logits, reference) in enumerate(zip(conversation.turns, found, references, strict=True)):
            scores[name].append(score(turn, logits, reference, number, index))


def kvpress_rows(model: str, made: list[Conversation], budget: int) -> dict[str, dict[str, Any]]:
    """kvpress's methods on the same questions, paired with its own full history: another engine's is not ours."""
    found = {name: answers_of(made, told) for name, told in peer(model, questions(made), budget)["answers"].items()}
    return {name: summary(found["kvpress_full"], some) for name, some in found.items()}


def table(task: str, told: dict[str, dict[str, Any]], accuracy: bool) -> str:
    """Without shares of right answers where full history has too few of them."""
    columns = [c for c in COLUMNS if accuracy or c not in CHOICES]
    columns = [c for c in columns if any(found.get(c) is not None for found in told.values())]
    rows = [f"| {task} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    rows += [f"| {name} | " + " | ".join(_cell(found.get(c)) for c in columns) + " |" for name, found in told.items()]
    return "\n".join(rows)


def _cell(value: Any) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def remarks(task: str, told: dict[str, dict[str, Any]], accuracy: bool) -> list[str]:
    found = [] if accuracy or "right" not in told["full"] else [f"{task}: full history below 60%: likelihoods only"]
    for name in MUST_FAIL if task == "T1" else ():
        kept = told.get(name, {}).get("retention")
        if kept is not None:
            verdict = "fails, as it must" if kept < FAILED else "does not fail: the task is too easy"
            found.append(f"T1: {name} {verdict} (retention {kept:.2f})")
    return found


def counts(given: str | None, times: int) -> dict[str, int]:
    """How many conversations of each task: of a list as "T1,T5", times `times`. Raises ValueError for other names."""
    names = given.split(",") if given else list(DEFAULT_COUNTS)
    if missing := [name for name in names if name not in TASKS]:
        raise ValueError(f"no task {', '.join(missing)}; there are {', '.join(TASKS)}")
    return {name: DEFAULT_COUNTS[name] * times for name in names}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="folder with mtbench101.jsonl; without it, made-up sentences")
    parser.add_argument("--tasks", help="names with commas between; all without it")
    parser.add_argument("--times", type=int, default=1, help="so many times the default number of conversations")
    parser.add_argument("--budget", type=int, default=96, help="tokens of history that are attended to")
    parser.add_argument("--share", type=float, default=0.06, help="the same for methods that keep a share of history")
    parser.add_argument("--policies", help="names with commas between; all without it")
    parser.add_argument("--history", choices=("gold", "own"), default="gold")
    parser.add_argument("--kvpress", action="store_true", help="rows of kvpress's methods too")
    parser.add_argument("--plots", type=Path, help="folder for PNGs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    wanted = counts(options.tasks, options.times)
    spin_as_the_daemon()
    model = load_model(options.model)
    policies = only(contenders(options.budget, options.share, model.facts), options.policies)
    tokenizer = load_tokenizer(modelstore.resolve(options.model).path)
    text = exchanges(options.data, options.seed)
    run_one = run if options.history == "gold" else run_own
    told: dict[str, dict[str, dict[str, Any]]] = {}
    notes: list[str] = []
    for task, n in wanted.items():
        chat = Chat(tokenizer, text, random.Random(f"{options.seed} {task}"))
        scores: Scores = {name: [] for name in ("full", *policies)}
        made: list[Conversation] = []
        with torch.inference_mode():
            for number in range(n):
                made.append(conversation := TASKS[task](chat))
                run_one(model, chat, conversation, policies, number, scores)
                out.print(f"{task}: conversation {number + 1} of {n}, {conversation.n_tokens} tokens")
        told[task] = {name: summary(scores["full"], some) for name, some in scores.items()}
        if options.kvpress:
            told[task] |= kvpress_rows(options.model, made, options.budget)
        accuracy = quotable(scores["full"])
        out.print(table(task, told[task], accuracy) + "\n", markup=False, soft_wrap=True)
        notes += remarks(task, told[task], accuracy)
    out.print("\n".join(notes))
    if options.plots and "T5" in told:
        from _plots import quality_against_turn

        quality_against_turn(told["T5"], options.plots)
    names = ("budget", "history", "seed")
    conditions = {name: getattr(options, name) for name in names}
    conditions |= {"data": "mtbench101" if options.data else "made up", "date": today(), "machine": machine()}
    print_json({"benchmark": "tasks", "tasks": told, "notes": notes, **conditions})


if __name__ == "__main__":
    main()
