"""One bit flips in a stored record, or in the key it is found under. It must be refused, or read exactly as before.

Most flips are made in memory, on the bytes of every kind of record, and go through the function that reads that kind.
One in a hundred is made in the files, under a store that is opened again. Negative control: `no_checksum`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child
import numpy as np
from outcome import Outcome
from store_pages import Damage, Trials
from truth import OPTIONS, make_store, raw_records

from sessiond import errors
from sessiond.storage import directory, envelope, keys, kv, tally
from sessiond.storage.batch import join_segments, parse
from sessiond.storage.environment import Environment
from sessiond.storage.kv import open_record
from sessiond.storage.records import CellRef, RequestRecord, RevisionRecord, SessionRecord, TailRef

IN_FILES = 100  # one flip of so many
FORMAT = b"FORMAT"  # stands as a key for the one file that is no record

Reader = Callable[[bytes, memoryview], Any]


def run(count: int, seed: int, scratch: Path, variant: str = "") -> Outcome:
    switch_off(variant)
    code, said = child.ask(lambda: collect(scratch, seed))
    if code != 0:
        raise AssertionError(f"no store to damage: {code}")
    records = {bytes.fromhex(key): bytes.fromhex(value) for key, value in json.loads(said).items()}
    rng = random.Random(seed)
    n_files = count // IN_FILES
    failures, kinds = in_memory(records, count - n_files, rng, seed)
    trials = Trials(scratch / "data", seed)
    for i in range(n_files):
        trials.run(Damage.bit_flip(trials, rng), f"seed {seed} flip {i} in files")
    failures += trials.failures
    silent = sum("unnoticed" in line or "silently" in line for line in failures)
    return Outcome("store_bit_flips", count, len(failures), silent_corruptions=silent, details=failures,
                   counts={**{f"of_{name}": n for name, n in kinds.items()}, **trials.counts})  # fmt: skip


def collect(scratch: Path, seed: int) -> str:
    data = make_store(scratch, seed)
    out = {FORMAT.hex(): (data / "FORMAT").read_bytes().hex()}
    for name, size in (("log", OPTIONS["log_map_bytes"]), ("blocks", OPTIONS["block_map_bytes"])):
        env = Environment(str(data / name), map_bytes=size)
        out |= {key.hex(): value.hex() for key, value in raw_records(env).items()}
        env.close()
    return json.dumps(out)


def in_memory(records: dict[bytes, bytes], count: int, rng: random.Random, seed: int) -> tuple[list[str], Counter[str]]:
    """Flips spread evenly over the kinds of record."""
    by_kind: dict[int, list[bytes]] = {}
    for key in records:
        by_kind.setdefault(0 if key == FORMAT else envelope.kind_of(key), []).append(key)
    missing = set(READERS) - set(by_kind)
    if missing:
        raise AssertionError(f"no record of kinds {missing} to damage")
    failures: list[str] = []
    tried: Counter[str] = Counter()
    kinds = sorted(by_kind)
    for i in range(count):
        kind = kinds[i % len(kinds)]
        key = rng.choice(by_kind[kind])
        value = records[key]
        at = rng.randrange(8 * (len(value) + (0 if kind == 0 else len(key))))
        tried[keys.KIND_NAMES.get(kind, "format")] += 1
        if wrong := misread(READERS[kind], key, value, at):
            failures.append(f"seed {seed} flip {i}: bit {at} of {keys.readable(key)} {wrong}")
    return failures, tried


def misread(read: Reader, key: bytes, value: bytes, bit: int) -> str:
    """What is wrong with how the flip is taken; empty if it is refused, or changes nothing of what is read.

    Bits behind the value are the key's.
    """
    changed, other = bytearray(value), bytearray(key)
    target, at = (changed, bit) if bit < 8 * len(value) else (other, bit - 8 * len(value))
    target[at // 8] ^= 1 << at % 8
    try:
        found = read(bytes(other), memoryview(changed))
    except errors.SessiondError:
        return ""
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is not typed
        return f"raises {exc!r}"
    return "" if found == read(key, memoryview(value)) else "goes unnoticed"


def of(cls: type[Any]) -> Reader:
    return lambda key, value: parse(cls, key, value)


def plain(key: bytes, value: memoryview) -> Any:
    record = envelope.unpack(key, value)
    return record.header, bytes(record.body)


def tokens(key: bytes, value: memoryview) -> Any:
    ids, flags = join_segments([(key, value)])
    return ids.tolist(), flags.tolist()


def kv_record(key: bytes, value: memoryview) -> Any:
    record = open_record(key, value)
    scratch = np.empty(1 << 16, np.uint8)
    layers = []
    for layer in range(record.first_layer, record.first_layer + record.n_layers):
        out = np.zeros(record.shape, np.uint16)
        record.decode(layer, out, scratch)
        layers.append(out.tobytes())
    return record.start, record.part, record.shape, layers


def format_file(_key: bytes, value: memoryview) -> Any:
    return directory._parse(Path("FORMAT"), bytes(value))


READERS: dict[int, Reader] = {
    0: format_file,
    keys.SESSION: of(SessionRecord),
    keys.REVISION: of(RevisionRecord),
    keys.REQUEST: of(RequestRecord),
    keys.CELL_REF: of(CellRef),
    keys.TAIL_REF: of(TailRef),
    keys.REVISION_INDEX: plain,
    keys.MESSAGES: plain,
    keys.IDENTITY: plain,
    keys.PROFILE: plain,
    keys.TALLY: plain,
    keys.TOKENS: tokens,
    keys.KV_CELL: kv_record,
    keys.KV_TAIL: kv_record,
}


def switch_off(defence: str) -> None:
    if defence == "no_checksum":
        envelope._authentic = lambda *_: True
        kv._authentic = lambda *_: True
        directory._check = lambda *_: ""
        tally.term = lambda *_: 0
    elif defence:
        raise ValueError(defence)
