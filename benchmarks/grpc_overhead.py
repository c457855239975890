"""What gRPC adds to a short hot turn: the same turn through gRPC and in process, on one daemon. One JSON line last.

The daemon lives in this process. In process means: `Conversations.generate` called on its own event loop. Through
gRPC means: a client in a process of its own, as clients are, over loopback. Two sessions with the same tokens get the
same turns, one this way and one the other, alternately (ABBA), so that contexts stay equal pair by pair.

The floor is a bare call between the same two processes, made after the same pause: a stream of one message, no
messages parsed, nothing computed. What gRPC for Python takes by itself cannot be saved here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from _bench import (
    alternating,
    arguments,
    disk_folder,
    exit_on_sigterm,
    median,
    print_json,
    rounded,
    spin_as_the_daemon,
    spread,
)
from _turns import prose, run_turn, settled, token_ms
from transformers.utils import logging as transformers_logging

from sessiond import wirein
from sessiond.auth import DEFAULT_TENANT
from sessiond.clients import Client
from sessiond.config import Settings
from sessiond.server import Daemon
from sessiond.turnevents import Tokens
from sessiond.v1 import sessions_pb2, types_pb2

FIRST_TOKENS, NEW_TOKENS = 256, 4
Times = tuple[float, float]  # to the first token, and a token after that; in milliseconds


async def in_process(daemon: Daemon, session_id: str, ids: list[int], n_tokens: int) -> Times:
    """One turn without gRPC. The request is built before the clock starts."""
    request = wirein.turn_request(
        sessions_pb2.GenerateRequest(
            session_id=session_id,
            request_id=uuid.uuid4().hex,
            token_ids=types_pb2.TokenIds(ids=ids),
            sampling=types_pb2.Sampling(max_tokens=n_tokens),
        )
    )
    arrivals: list[tuple[float, int]] = []
    count = 0
    began = time.perf_counter()
    async for event in daemon.conversations.generate(DEFAULT_TENANT, request):
        if isinstance(event, Tokens) and event.sampled:
            count += len(event.sampled)
            arrivals.append((time.perf_counter() - began, count))
    return arrivals[0][0] * 1e3, token_ms(arrivals)


ECHO = "/bench.Echo/Stream"


async def serve_echo(server: grpc.aio.Server) -> int:
    """The floor's other end: answers each call with one message. Returns its port."""

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield request

    service, _, method = ECHO[1:].partition("/")
    handler = grpc.method_handlers_generic_handler(service, {method: grpc.unary_stream_rpc_method_handler(stream)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return int(port)


class Remote:
    """The client's process: one JSON line in for each turn or echo, one out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, port: int, echo_port: int) -> Remote:
        command = [sys.executable, __file__, "--client", str(port), str(echo_port)]
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=1 << 20))

    async def turn(self, session_id: str, ids: list[int], n_tokens: int) -> Times:
        answer = await self._ask({"session": session_id, "ids": ids, "max_tokens": n_tokens})
        return answer["ttft_ms"], answer["token_ms"]

    async def echo(self) -> float:
        """Milliseconds of a bare call."""
        return float((await self._ask({}))["echo_ms"])

    async def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended with status {await self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def serve_client(port: int, echo_port: int) -> None:
    """The other process: takes orders from its input until that ends."""
    echo = grpc.insecure_channel(f"127.0.0.1:{echo_port}").unary_stream(ECHO)
    with Client(f"127.0.0.1:{port}", retry_seconds=0.0) as client:
        for line in sys.stdin:
            order = json.loads(line)
            if not order:
                began = time.perf_counter()
                answers = echo(b"?")
                next(answers)
                print(json.dumps({"echo_ms": (time.perf_counter() - began) * 1e3}), flush=True)
                list(answers)
                continue
            session = client.session(order["session"])
            turn = run_turn(session, token_ids=order["ids"], max_tokens=order["max_tokens"])
            print(json.dumps({"ttft_ms": turn.ttft_ms, "token_ms": turn.token_ms}), flush=True)


async def wait_idle(daemon: Daemon, session_id: str) -> None:
    """Return once nothing goes on behind the last turn."""
    assert daemon.sessions is not None
    assert daemon.desk is not None
    for _ in range(3000):
        view = await daemon.sessions.get(DEFAULT_TENANT, session_id)
        cell = daemon.desk.store.cell_tokens
        if not view.running_request and settled(view.token_count, view.exact_upto, view.persisted_upto, cell):
            return
        await asyncio.sleep(0.02)
    raise RuntimeError("the session's KV was not on disk within a minute")


async def compare(daemon: Daemon, n_tokens: int, repeats: int) -> tuple[list[Times], list[Times], list[float]]:
    """(in process, through gRPC), paired, and the floor. Two turns of each come first, unmeasured."""
    assert daemon.sessions is not None
    assert daemon.desk is not None
    ids = daemon.desk.encode(prose())
    server = grpc.aio.server()
    remote = await Remote.start(daemon.port, await serve_echo(server))
    found: tuple[list[Times], list[Times]] = ([], [])
    echoes: list[float] = []
    try:
        start = sessions_pb2.CreateSessionRequest()
        start.token_ids.ids.extend(ids[:1])
        names = [
            (await daemon.sessions.create(DEFAULT_TENANT, wirein.new_session(start))).record.session_id
            for _ in range(2)
        ]
        at, end = 1, FIRST_TOKENS
        for repeat in range(-2, repeats):
            both = [0, 1] if alternating(repeat) else [1, 0]
            for which in both:
                if which:
                    times = await remote.turn(names[1], ids[at:end], n_tokens)
                else:
                    times = await in_process(daemon, names[0], ids[at:end], n_tokens)
                await wait_idle(daemon, names[which])
                if repeat >= 0:
                    found[which].append(times)
            echo_ms = await remote.echo()
            if repeat >= 0:
                echoes.append(echo_ms)
            at, end = end, end + NEW_TOKENS
    finally:
        await remote.stop()
        await server.stop(None)
    return (*found, echoes)


def report(local: list[Times], remote: list[Times], echoes: list[float]) -> dict[str, Any]:
    result: dict[str, Any] = {"grpc_floor_ms": rounded(median(echoes)), "grpc_floor_ms_spread": spread(echoes)}
    for index, name in enumerate(("ttft", "token")):
        here, there = [times[index] for times in local], [times[index] for times in remote]
        # Medians are near each other, and the figure is their difference: three decimals, not four digits.
        result[f"grpc_{name}_overhead_ms"] = round(median(there) - median(here), 3)
        result[f"{name}_in_process_ms"] = rounded(median(here))
        result[f"{name}_grpc_ms"] = rounded(median(there))
        differences = [b - a for a, b in zip(here, there, strict=True)]
        result[f"grpc_{name}_overhead_ms_spread"] = spread(differences)
    return result


async def run(model: str, n_tokens: int, repeats: int) -> dict[str, Any]:
    with disk_folder("sessiond-bench-") as name:
        daemon = Daemon(Settings(model=model, data_dir=Path(name) / "data", listen="127.0.0.1:0"))
        await daemon.start()
        try:
            found = await compare(daemon, n_tokens, repeats)
        finally:
            await daemon.stop()
    facts = {"repeats": repeats, "decoded_tokens": n_tokens, "client": "a process of its own, over loopback"}
    return {**report(*found), **facts}


def main() -> None:
    exit_on_sigterm()
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=12, help="tokens to decode in each turn")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--client", type=int, nargs=2, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        serve_client(*options.client)
        return
    spin_as_the_daemon()
    transformers_logging.disable_progress_bar()
    sys.setswitchinterval(0.0005)  # as `sessiond serve` sets it
    print_json(asyncio.run(run(options.model, options.tokens, options.repeats)))


if __name__ == "__main__":
    main()
