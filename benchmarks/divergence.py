"""How far answers differ when they are decoded beside others instead of alone. One JSON line last.

Sealed KV does not depend on what else runs; KV of decoded tokens may, in its last bits, because a step of several rows
may sum in another order than a step of one. Each question is answered greedily in a session of its own, first alone,
then all at once, then all at once with a SIGKILL in the middle, after which the clients come back with their ids.
Before that one decode step of 32 and of 96 sessions is computed freely, as --batch-invariant has it, and one by one.
"""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _bench import Conditions, agreeing_prefix, arguments, console, data_folder, print_json
from _daemon import DaemonProcess
from _divergence_steps import measure

from sessiond.clients import Client
from sessiond.clients.errors import SessiondClientError
from sessiond.model import Model
from sessiond.modelstore import resolve

QUESTIONS = (
    "Name three rivers of Europe and say where they end.",
    "What is the difference between a list and a tuple in Python?",
    "Write a short poem about the sea in winter.",
    "Explain why the sky is blue to a child.",
    "Give me a recipe for a simple soup.",
    "What happened in the year 1969?",
    "How does a bicycle stay upright?",
    "Describe a market in the early morning.",
)
SESSIONS, CONTEXT = (32, 96), 200  # of the steps
NO_END = {0: -100.0, 2: -100.0}  # no answer ends by itself
out = console()


def answer(
    client: Client, session_id: str, question: str, request_id: str, n_tokens: int, seen: Any = None
) -> list[int]:
    ids: list[int] = []
    options: dict[str, Any] = {"max_tokens": n_tokens, "request_id": request_id, "logit_bias": NO_END}
    for event in client.session(session_id).generate(question, **options):
        ids += event.token_ids
        if seen is not None:
            seen(len(ids))
    return ids


def alone(client: Client, n_tokens: int) -> list[list[int]]:
    return [answer(client, _session(client), question, uuid.uuid4().hex, n_tokens) for question in QUESTIONS]


def together(client: Client, n_tokens: int) -> list[list[int]]:
    sessions = [_session(client) for _ in QUESTIONS]
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        return list(pool.map(lambda s, q: answer(client, s, q, uuid.uuid4().hex, n_tokens), sessions, QUESTIONS))


def killed(data: Path, model: str, n_tokens: int) -> list[list[int]]:
    """All at once, killed when the slowest has a third of its answer; what the clients get in the end."""
    requests = [uuid.uuid4().hex for _ in QUESTIONS]
    progress, enough = [0] * len(QUESTIONS), threading.Event()

    def seen(index: int, count: int) -> None:
        progress[index] = count
        if min(progress) >= n_tokens // 3:
            enough.set()

    with DaemonProcess(data, model=model) as daemon:
        client = daemon.client()
        sessions = [_session(client) for _ in QUESTIONS]

        def cut_off(index: int) -> None:
            try:
                answer(client, sessions[index], QUESTIONS[index], requests[index], n_tokens, lambda n: seen(index, n))
            except SessiondClientError:
                return
            raise RuntimeError("a turn ended before the daemon was killed")

        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            futures = [pool.submit(cut_off, index) for index in range(len(QUESTIONS))]
            in_time = enough.wait(300)
            daemon.kill()
            for future in futures:
                future.result()
    if not in_time:
        raise RuntimeError(f"after 300 s only {min(progress)} tokens of the slowest answer had come")
    with DaemonProcess(data, model=model) as daemon:
        client = daemon.client()
        with ThreadPoolExecutor(len(QUESTIONS)) as pool:
            return list(pool.map(lambda s, q, r: answer(client, s, q, r, n_tokens), sessions, QUESTIONS, requests))


def _session(client: Client) -> str:
    return client.create_session(system="You answer briefly.").id


def compared(reference: list[list[int]], others: list[list[int]]) -> dict[str, Any]:
    """How many answers are the same, and where the others part from the reference, in tokens."""
    parted = [agreeing_prefix(a, b) for a, b in zip(reference, others, strict=True) if a != b]
    return {"same": len(reference) - len(parted), "of": len(reference), "parted_at": sorted(parted)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=120)
    options = parser.parse_args()
    model = Model.load(resolve(options.model).path)
    steps = [measure(model, n, CONTEXT) for n in SESSIONS]
    del model
    with data_folder("divergence", out) as folder:
        conditions = Conditions(folder)
        with DaemonProcess(folder / "running", model=options.model) as daemon:
            client = daemon.client()
            reference = alone(client, options.tokens)
            again = compared(reference, alone(client, options.tokens))
            beside = compared(reference, together(client, options.tokens))
        recovered = compared(reference, killed(folder / "killed", options.model, options.tokens))
    if again["same"] != again["of"]:
        raise RuntimeError(f"alone, the same question was answered differently the second time: {again}")
    for step in steps:
        out.print(f"a decode step: {step}")
    out.print(f"beside others {beside}; beside others and killed in the middle {recovered}")
    print_json(
        {
            "benchmark": "divergence",
            "same_answers_beside_others": beside["same"] / beside["of"],
            "same_answers_killed_beside_others": recovered["same"] / recovered["of"],
            "alone_again": again,
            "beside_others": beside,
            "killed_beside_others": recovered,
            "steps": steps,
            "tokens": options.tokens,
            **conditions.told(),
        }
    )


if __name__ == "__main__":
    main()
