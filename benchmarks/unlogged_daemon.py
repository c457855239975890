"""`sessiond serve` that writes no token before its turn ends: log_cost.py compares with it. Not for data one wants."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from sessiond import turn
from sessiond.cli import main
from sessiond.storage.batch import LogBatch
from sessiond.storage.log import LogStore

write = LogStore.write


class Unlogged(LogBatch):
    """The batch of one token, empty."""

    def append_tokens(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""


def write_or_not(self: LogStore, batch: LogBatch) -> Future[None]:
    if not isinstance(batch, Unlogged):
        return write(self, batch)
    done: Future[None] = Future()
    done.set_result(None)
    return done


if __name__ == "__main__":
    turn.LogBatch = Unlogged  # type: ignore[misc]
    LogStore.write = write_or_not  # type: ignore[method-assign]
    main()
