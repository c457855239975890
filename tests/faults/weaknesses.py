"""The defences of the daemon, each with a way to switch it off: a fault run must then fail."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

from numpy.typing import NDArray

from sessiond.cache import SessionCache
from sessiond.cachememory import CacheMemory
from sessiond.stepevents import TokenOut
from sessiond.storage import envelope, kv
from sessiond.storage.kv import KVRecord
from sessiond.storage.log import LogStore
from sessiond.turn import Turn
from sessiond.turnevents import Tokens


def _no_request_lookup() -> AbstractContextManager[Any]:
    """A request_id that came before is not looked for."""
    return mock.patch.object(LogStore, "request", return_value=None)


@contextlib.contextmanager
def _no_checksum() -> Iterator[None]:
    """Bytes are believed as they are."""
    with ExitStack() as stack:
        for module in (envelope, kv):
            stack.enter_context(mock.patch.object(module, "_authentic", return_value=True))
        yield


def _no_truncation() -> AbstractContextManager[Any]:
    """KV of a turn that was given up stays where it is."""
    return mock.patch.object(SessionCache, "truncate")


@contextlib.contextmanager
def _careless_restore() -> Iterator[None]:
    """What is read from disk lands one bit beside what was written."""
    decode = KVRecord.decode

    def careless(self: KVRecord, layer: int, out: NDArray[Any], scratch: NDArray[Any]) -> None:
        decode(self, layer, out, scratch)
        out[0, 0, 0] ^= 1

    with mock.patch.object(KVRecord, "decode", careless):
        yield


@contextlib.contextmanager
def _restore_over_live() -> Iterator[None]:
    """All sessions are restored into the memory of the first."""
    take, first = CacheMemory.take, []

    def same(self: CacheMemory, length: int) -> SessionCache:
        first.append(take(self, length))
        return first[0]

    with mock.patch.object(CacheMemory, "take", same):
        yield


def _log_late() -> AbstractContextManager[Any]:
    """Tokens are streamed as they come, and logged with the revision."""

    def publish(self: Turn, event: TokenOut) -> None:
        self.generated.append(event.sampled.token_id)
        tokens = Tokens.of(event)
        self.desk.handover.call(lambda: self._publish(tokens))

    return mock.patch.object(Turn, "log_token", publish)


# Variant of a run -> the defence that is off in it.
WEAKNESSES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": contextlib.nullcontext,
    "no_request_lookup": _no_request_lookup,
    "no_checksum": _no_checksum,
    "no_truncation": _no_truncation,
    "careless_restore": _careless_restore,
    "log_late": _log_late,
    "restore_over_live": _restore_over_live,
}
