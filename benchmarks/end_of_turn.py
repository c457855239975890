"""What the work at the end of a turn costs the next one: sealing, indexes, writing. One JSON line last.

Two daemons answer the same turns of a long session, one of them with nothing to do in between (`--settle-seconds` of a
day). The next turn comes at once, after a pause in which the work is done, or in its middle. Pairs run alternately, and
one daemon rests while the other is timed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _bench import Conditions, alternating, arguments, console, data_folder, print_json, ratios, rounded, spread
from _daemon import DaemonProcess
from _turns import SYSTEM, document, run_turn

from sessiond.clients import Session

PAUSES = {"at once": 0.0, "in its middle": 0.3, "after a pause": 3.0}  # the daemon's work begins after 0.2 s
NEVER = "86400"
QUESTIONS = (
    "Which of these is said first?",
    "Say more about the second part.",
    "What would a beginner get wrong here?",
    "Name one thing that the text leaves open.",
)
out = console()


@dataclass
class Times:
    """Milliseconds to the first token, by pause and pair, of the daemon that works and of the one that does not."""

    working: dict[str, list[float]] = field(default_factory=lambda: {pause: [] for pause in PAUSES})
    resting: dict[str, list[float]] = field(default_factory=lambda: {pause: [] for pause in PAUSES})


def begin(daemon: DaemonProcess, policy: dict[str, Any], n_tokens: int) -> Session:
    """A session with a long document in its past, under the policy."""
    session = daemon.client().create_session(system=SYSTEM, policy=policy)
    text, _ = document(session, n_tokens)
    run_turn(session, f"{text}\n\nWhat is this about?", max_tokens=16)
    time.sleep(max(PAUSES.values()))
    return session


def next_turn(session: Session, number: int, pause: float, max_tokens: int) -> float:
    """Milliseconds to the first token of a turn that comes `pause` seconds after another."""
    run_turn(session, QUESTIONS[number % len(QUESTIONS)], max_tokens=max_tokens)
    time.sleep(pause)
    turn = run_turn(session, QUESTIONS[(number + 1) % len(QUESTIONS)], max_tokens=4)
    time.sleep(max(PAUSES.values()) if pause < max(PAUSES.values()) else 1.0)  # its own work is not the other's
    return turn.ttft_ms


def measure(sessions: dict[str, Session], repeats: int, max_tokens: int) -> Times:
    times = Times()
    for repeat in range(repeats):
        for name, pause in PAUSES.items():
            order = ["working", "resting"] if alternating(repeat) else ["resting", "working"]
            for which in order:
                found = next_turn(sessions[which], repeat, pause, max_tokens)
                getattr(times, which)[name].append(found)
    return times


def run(options: Any, folder: Path) -> Times:
    policy = {"name": options.policy}
    with (
        DaemonProcess(folder / "working", model=options.model) as working,
        DaemonProcess(folder / "resting", "--settle-seconds", NEVER, model=options.model) as resting,
    ):
        daemons = {"working": working, "resting": resting}
        sessions = {name: begin(daemon, policy, options.tokens) for name, daemon in daemons.items()}
        return measure(sessions, options.repeats, options.max_tokens)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policy", default="sieve")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=2000, help="of the document in the session's past")
    parser.add_argument("--max-tokens", type=int, default=48, help="of the turn before the one that is timed")
    options = parser.parse_args()
    with data_folder("end-of-turn", out) as folder:
        conditions = Conditions(folder)
        times = run(options, folder)
        told = {}
        for pause in PAUSES:
            found = spread(ratios(times.working[pause], times.resting[pause]))
            told[pause] = found | {
                "working_ms": spread(times.working[pause]),
                "resting_ms": spread(times.resting[pause]),
            }
            out.print(f"{pause}: {found['median']} of the time of a daemon that rests ({found['q1']} to {found['q3']})")
        print_json(
            {
                "benchmark": "end_of_turn",
                "next_ttft_change": rounded(told["after a pause"]["median"] - 1),
                "next_ttft_change_at_once": rounded(told["at once"]["median"] - 1),
                "next_ttft_change_in_its_middle": rounded(told["in its middle"]["median"] - 1),
                "pauses": told,
                "policy": options.policy,
                **conditions.told(),
            }
        )


if __name__ == "__main__":
    main()
