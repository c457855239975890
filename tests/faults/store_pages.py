"""A page comes back zeroed, torn, as another, as it was, or with a flipped bit in its header; or a whole record does.

After each the store is opened and all of it is read, in a process of its own, which must not end by a signal: LMDB
trusts its tree pages. Everything must be refused by a typed error or be read exactly as before. A store that opens is
then written to (`later_writes.py`), since damage that no read meets may give pages in use to the next transaction; and
all is read again, twice: by the same process, and after a reopen. Files: log and blocks.

Negative controls: `no_checksum`, `no_tally`, `no_structure`, `no_page_count`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import child
import lmdb
from later_writes import write_later
from lmdb_pages import PAGE, live_pages
from outcome import Outcome
from truth import Names, Stores, compare, make_store, names_of, open_stores, read_all

from sessiond import errors
from sessiond.storage import envelope, environment, kv, mapfile, structure, tally

HEADER_BYTES = 16
WAYS = ("zeroed", "torn", "swapped", "stale", "header", "free_list", "moved_record", "stale_record")


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    code = child.wait(child.fork(lambda: make_store(scratch, seed)))
    if code != 0:
        raise AssertionError(f"no store to damage: {code}")
    rng = random.Random(seed)
    trials = Trials(scratch / "data", seed, variant)
    for i in range(count):
        way = WAYS[i % len(WAYS)]
        damage = getattr(Damage, way)(trials, rng)
        trials.run(damage, f"seed {seed} page {i} ({way}, {damage.file} at {damage.at})")
    silent = sum("silently" in line for line in trials.failures)
    return Outcome("store_pages", count, len(trials.failures), silent_corruptions=silent,
                   details=trials.failures, counts=dict(trials.counts))  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """Bytes to put at places of a file."""

    file: str  # "log" or "blocks"
    at: list[int]
    data: list[bytes]

    @staticmethod
    def bit_flip(trials: Trials, rng: random.Random) -> Damage:
        file = trials.any_file(rng)
        at = trials.any_page_of(file, rng) * PAGE + rng.randrange(PAGE)
        return Damage(file, [at], [bytes([trials.now[file][at] ^ 1 << rng.randrange(8)])])

    @staticmethod
    def zeroed(trials: Trials, rng: random.Random) -> Damage:
        file, page = trials.any_page(rng)
        return Damage(file, [page * PAGE], [bytes(PAGE)])

    @staticmethod
    def torn(trials: Trials, rng: random.Random) -> Damage:
        """One part is another page's, or as it was, or zero."""
        file, page = trials.any_page(rng)
        other = rng.choice([bytes(PAGE), trials.page(file, trials.any_page_of(file, rng)), trials.old_page(file, page)])
        cut = rng.randrange(512, PAGE, 512)
        first, second = trials.page(file, page), other
        if rng.random() < 0.5:
            first, second = second, first
        return Damage(file, [page * PAGE], [first[:cut] + second[cut:]])

    @staticmethod
    def swapped(trials: Trials, rng: random.Random) -> Damage:
        file, page = trials.any_page(rng)
        other = trials.any_page_of(file, rng)
        return Damage(file, [page * PAGE, other * PAGE], [trials.page(file, other), trials.page(file, page)])

    @staticmethod
    def stale(trials: Trials, rng: random.Random) -> Damage:
        while True:
            file, page = trials.any_page(rng)
            if trials.old_page(file, page) != trials.page(file, page):
                return Damage(file, [page * PAGE], [trials.old_page(file, page)])

    @staticmethod
    def header(trials: Trials, rng: random.Random) -> Damage:
        """One bit flips in a page's header, which no checksum covers: number, kind, bounds, count of pages."""
        file, page = trials.any_page(rng)
        at = page * PAGE + rng.randrange(HEADER_BYTES)
        return Damage(file, [at], [bytes([trials.now[file][at] ^ 1 << rng.randrange(8)])])

    @staticmethod
    def free_list(trials: Trials, rng: random.Random) -> Damage:
        """One bit flips in the part of a page of the free list that is in use."""
        file = trials.any_file(rng)
        page = rng.choice(live_pages(trials.now[file], (0,))[2:])
        upper = int.from_bytes(trials.page(file, page)[14:16], "little")
        at = page * PAGE + rng.randrange(upper, PAGE)
        return Damage(file, [at], [bytes([trials.now[file][at] ^ 1 << rng.randrange(8)])])

    @staticmethod
    def moved_record(trials: Trials, rng: random.Random) -> Damage:
        """A record's bytes stand where another of the same length and file stood."""
        file = trials.any_file(rng)
        places = trials.places(file)
        length = rng.choice([n for n, found in places.items() if len(found) > 1])
        one, other = rng.sample(places[length], 2)
        return Damage(file, [one], [trials.now[file][other : other + length]])

    @staticmethod
    def stale_record(trials: Trials, rng: random.Random) -> Damage:
        """A record as it was under the same key: whole, valid, and of the same length."""
        key = rng.choice(sorted(trials.older))
        at = trials.now["log"].find(trials.newer[key])
        return Damage("log", [at], [trials.older[key]])


class Trials:
    """Damage put into the files of one store and taken out again, with the store read in between."""

    def __init__(self, data: Path, seed: int, variant: str = "") -> None:
        self.data = data
        self.variant = variant
        self.failures: list[str] = []
        self.counts: Counter[str] = Counter()
        self.now = {name: (data / name / "data.mdb").read_bytes() for name in ("log", "blocks")}
        self.old = {name: (data.parent / f"old-{name}").read_bytes() for name in ("log", "blocks")}
        self.live = {name: live_pages(data) for name, data in self.now.items()}
        self._places: dict[str, dict[int, list[int]]] = {}
        self.older, self.newer = self._stale_records()
        stores = open_stores(data)
        self.names = names_of(stores)
        self.truth = read_all(stores, self.names)
        stores.close()  # before anything is forked
        self.names_after, self.truth_after = self._write_undamaged()
        self._restore()

    def run(self, damage: Damage, name: str) -> None:
        self._put(damage.file, damage.at, damage.data)
        code, said = child.ask(self._read, 30)
        self._restore()
        if code != 0:
            self.counts["crashed"] += code < 0
            self.failures.append(f"{name}: no typed error, exit code {code}")
            return
        verdict, wrong = json.loads(said)
        self.counts[verdict] += 1
        if wrong:
            self.failures.append(f"{name}: silently wrong: {wrong[:4]}")

    def any_file(self, rng: random.Random) -> str:
        return rng.choice(("log", "log", "blocks"))

    def any_page_of(self, file: str, rng: random.Random) -> int:
        """Mostly a page in use; now and then any."""
        return rng.randrange(len(self.now[file]) // PAGE) if rng.random() < 0.05 else rng.choice(self.live[file])

    def any_page(self, rng: random.Random) -> tuple[str, int]:
        file = self.any_file(rng)
        return file, self.any_page_of(file, rng)

    def page(self, file: str, page: int) -> bytes:
        return self.now[file][page * PAGE : (page + 1) * PAGE]

    def old_page(self, file: str, page: int) -> bytes:
        """As it was; zeros where the file had not grown that far."""
        return self.old[file][page * PAGE : (page + 1) * PAGE].ljust(PAGE, b"\0")

    def places(self, file: str) -> dict[int, list[int]]:
        """Where each live record's bytes are in a file, by their length."""
        if file not in self._places:
            places: dict[int, list[int]] = {}
            for value in _records(self.data / file).values():
                if (at := self.now[file].find(value)) >= 0:
                    places.setdefault(len(value), []).append(at)
            self._places[file] = places
        return self._places[file]

    def _stale_records(self) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """Records of the log that stand under the same key in both states, differ, and have equal length."""
        folder = self.data.parent / "old"
        folder.mkdir(exist_ok=True)
        (folder / "data.mdb").write_bytes(self.old["log"])
        old, new = _records(folder), _records(self.data / "log")
        both = (old.keys() & new.keys()) - {tally.KEY}
        keys = [k for k in both if old[k] != new[k] and len(old[k]) == len(new[k])]
        return {k: old[k] for k in keys}, {k: new[k] for k in keys}

    def _put(self, file: str, at: list[int], data: list[bytes]) -> None:
        with (self.data / file / "data.mdb").open("r+b") as opened:
            for place, piece in zip(at, data, strict=True):
                opened.seek(place)
                opened.write(piece)

    def _restore(self) -> None:
        """What was written after the damage goes with it."""
        for file, data in self.now.items():
            with (self.data / file / "data.mdb").open("r+b") as opened:
                opened.write(data)
                opened.truncate()

    def _write_undamaged(self) -> tuple[Names, dict[str, Any]]:
        stores = open_stores(self.data)
        write_later(stores, self.names)
        stores.close()
        stores = open_stores(self.data)
        names = names_of(stores)
        truth = read_all(stores, names)
        stores.close()  # before anything is forked
        return names, truth

    def _read(self) -> str:
        """A verdict, and what was silently wrong, as JSON."""
        switch_off(self.variant)
        try:
            stores = open_stores(self.data)
        except errors.SessiondError:
            return json.dumps(("refused_at_open", []))
        refused, wrong = compare(stores, self.names, self.truth)
        if wrong:
            return json.dumps(("wrong", wrong))
        verdict = "refused_at_read" if refused else "harmless"
        names, truth = self.names_after, self.truth_after
        try:
            write_later(stores, self.names)
        except errors.SessiondError:
            verdict = "refused_at_write"  # so how far it came is not known: only what it does not touch is compared
            truth = {what: found for what, found in self.truth.items() if truth.get(what) == found}
            names = self.names
        wrong = self._wrong_after(stores, names, truth, "after writes")
        stores.close()
        if not wrong:
            try:
                stores = open_stores(self.data)
            except errors.SessiondError:
                return json.dumps(("refused_at_reopen", []))
            wrong = self._wrong_after(stores, names, truth, "after a reopen")
        return json.dumps((verdict, wrong))

    def _wrong_after(self, stores: Stores, names: Names, truth: dict[str, Any], when: str) -> list[str]:
        return [f"{what} {when}" for what in compare(stores, names, truth)[1]]


def switch_off(defence: str) -> None:
    if defence == "no_checksum":
        envelope._authentic = lambda *_: True
        kv._authentic = lambda *_: True
    if defence in ("no_tally", "no_checksum"):
        environment.read_tally = lambda *_, **__: None
        environment.build_tally = lambda *_: None
    elif defence == "no_structure":
        mapfile.check_structure = lambda *_, **__: None  # type: ignore[attr-defined]
    elif defence == "no_page_count":
        structure._Walk.check_large = lambda _: None  # type: ignore[method-assign]
    elif defence:
        raise ValueError(defence)


def _records(folder: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(folder), map_size=64 << 20, lib_version=0, readonly=True, lock=False) as env, env.begin() as txn:
        return {bytes(key): bytes(value) for key, value in txn.cursor()}
