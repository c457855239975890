"""All of a daemon but its port, on the fake model: the real desk, engine, sessions, conversations and store.

`crash` is SIGKILL as the disk sees it: from that moment on nothing more reaches it.
"""

from __future__ import annotations

import asyncio
import atexit
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from e2e_model import write_chat_model
from fake_model import FakeModel

from sessiond.care import Care
from sessiond.config import Settings
from sessiond.conversation import Conversations
from sessiond.desk import Desk
from sessiond.engine import Engine
from sessiond.errors import StoreReadOnly
from sessiond.exporting import Exports
from sessiond.importing import Imports
from sessiond.keeper import Keeper
from sessiond.model import load_tokenizer
from sessiond.places import ArchivePlaces
from sessiond.sessions import Sessions
from sessiond.stepevents import Event
from sessiond.storage.batch import LogBatch
from sessiond.storage.store import Store
from sessiond.template import ChatTemplate
from sessiond.tiers import Tiers

IDENTITY = "fake-identity"
PROFILE = "fake-profile"


@cache
def model_folder() -> Path:
    """The tiny chat model, made once a process: the fake model takes its tokenizer."""
    folder = mkdtemp(prefix="tiny-model-")
    atexit.register(shutil.rmtree, folder)
    return write_chat_model(Path(folder))


@cache
def tokenizer() -> Any:
    return load_tokenizer(model_folder())


class FakeDaemon:
    """Open it with `start`; end it with `stop` or `crash`."""

    def __init__(self, path: Path, *, cell_tokens: int = 8, **settings: Any) -> None:
        quick: dict[str, Any] = {"settle_seconds": 0.0, "sweep_seconds": 3600.0, "drain_seconds": 5.0}
        self.settings = Settings(model="fake", data_dir=path, threads=1, **(quick | settings))
        self.store = Store.open(path, cell_tokens=cell_tokens, log_map_bytes=64 << 20, block_map_bytes=64 << 20)

    async def start(self) -> FakeDaemon:
        store = self.store
        model = self.model = FakeModel()
        batch = LogBatch()
        batch.put_identity(IDENTITY, {"model": "fake", "kv_dtype": model.shape.dtype})
        batch.put_profile(PROFILE, {"model": "fake"})
        await asyncio.wrap_future(store.log.write(batch))
        posts: list[Callable[[list[Event]], None]] = []
        self.engine = Engine(model, store.cell_tokens, 1, lambda events: posts[0](events))  # type: ignore[arg-type]
        tiers = Tiers(store, model.shape, model.max_context, IDENTITY, PROFILE)
        template = ChatTemplate(tokenizer(), model.eos_ids)
        self.desk = Desk(self.settings, store, self.engine, tiers, tokenizer(), template, IDENTITY)
        posts.append(self.desk.post)
        await asyncio.wrap_future(self.engine.start())
        self.sessions = Sessions(self.desk, "fake", frozenset({"fake"}))
        self.conversations = Conversations(self.desk, self.sessions)
        self.keeper = Keeper(self.desk, self.sessions)
        self.care = Care(self.desk, self.sessions)
        places = ArchivePlaces(idle_seconds=60.0)
        self.exports = Exports(self.sessions, places)
        self.imports = Imports(self.sessions, places)
        return self

    async def stop(self) -> None:
        await self.keeper.drain(self.settings.drain_seconds)
        await self._close()

    async def left(self) -> None:
        """Return once the turn that the model holds has been told that nobody listens, and is over."""
        turns = list(self.desk.turns.values())
        while not all(turn._stopping or turn.over for turn in turns):  # noqa: ASYNC110 - a timer tells the turn
            await asyncio.sleep(0)
        self.model.release()
        for turn in turns:
            await turn.done()

    async def crash(self) -> None:
        """Nothing that is not durable now ever will be. What still runs here meets a store that takes nothing."""
        killed = StoreReadOnly("killed")
        for part in (self.store.log, self.store.blocks):
            part._env._failed = killed
        self.store.catalog._transaction = _refuse  # type: ignore[method-assign, assignment]
        self.model.release()
        turns = list(self.desk.turns.values())
        for turn in turns:
            turn._break_off(killed)
        for turn in turns:
            await turn.done()
        for live in list(self.desk.lives.values()):
            waiting: list[asyncio.Future[Any]] = [work for work in (live.settling, live.saving) if work]
            if live.settling:
                live.settling.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        await self._close()

    async def _close(self) -> None:
        await asyncio.to_thread(self.care.close)
        await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.desk.close)
        await asyncio.to_thread(self.store.close)


def _refuse(**_: Any) -> Any:
    raise StoreReadOnly("killed")
