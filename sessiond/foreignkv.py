"""KV that came with an archive: checked whole before any of it is written, then stored as tails of the new revisions.

It never becomes a cell here: cells are shared, and only computing binds KV to tokens (docs/decisions/0010).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import DecodeError
from xxhash import xxh3_128

from sessiond.history import History
from sessiond.references import cell_refs
from sessiond.segments import walk
from sessiond.storage.archive import ArchiveReader, Block, corrupt, malformed
from sessiond.storage.codec import codec_for
from sessiond.storage.kv import SPAN_TOKENS, KVOwner, LayerArrays, encode_kv, kv_digest
from sessiond.storage.records import RevisionRecord, TailRef
from sessiond.storage.tensors import decode_tensors, tensor_bytes
from sessiond.tiers import Tiers
from sessiond.types import KVShape, Part
from sessiond.v1 import archive_pb2


@dataclass(frozen=True, slots=True)
class Piece:
    """A block that was checked: positions [start, start + n) on the branch of revision `revision`."""

    revision: int
    start: int
    n: int
    sealed: bool
    profile: int
    block: Block

    @property
    def end(self) -> int:
        return self.start + self.n


@dataclass(slots=True)
class ForeignKV:
    """The blocks of an archive, by the segment they belong to."""

    pieces: dict[int, list[Piece]] = field(default_factory=dict)

    def covered(self, history: History, index: int) -> int:
        """Leading positions of a branch that have KV."""
        on_branch = set(history.chain(index))
        return max((pieces[-1].end for at, pieces in self.pieces.items() if at in on_branch), default=0)


def check_blocks(reader: ArchiveReader, history: History, n_profiles: int, shape: KVShape | None) -> ForeignKV:
    """All blocks, checked; their tensors too if `shape` says what they must be, else they are only counted.

    Raises BadRequest for what no export writes, RecordCorrupt where bytes do not match their digest.
    """
    after = {own[-1]: history.revisions[own[0]].parent for own in history.segments()}
    waiting = list(after)[::-1]
    upto: dict[int | None, int] = {None: 0}  # positions with KV at the end of each segment that is over
    found, last = ForeignKV(), 0
    for block in reader.blocks():
        try:
            header = archive_pb2.ArchiveBlock.FromString(block.header)
        except DecodeError as error:
            raise malformed("a block's header is not valid protobuf") from error
        at = header.revision
        if at not in after or not 1 <= header.n_tokens <= SPAN_TOKENS or header.profile >= n_profiles:
            raise malformed(f"a block of {header.n_tokens} positions for revision {at}, profile {header.profile}")
        piece = Piece(at, header.start, header.n_tokens, header.sealed, header.profile, block)
        if at < last:
            raise malformed("its blocks are not in the order of revisions")
        last = at
        while waiting and waiting[-1] < at:
            over = waiting.pop()
            own = found.pieces.get(over)
            upto[over] = max(upto[after[over]], own[-1].end if own else 0)
        _check_place(found.pieces.get(at), upto[after[at]], history.ends[at], piece)
        if shape is not None:
            _check_bytes(reader, piece, header.kv_digest, shape)
        found.pieces.setdefault(at, []).append(piece)
    return found


def _check_place(before: list[Piece] | None, parent_upto: int, end: int, piece: Piece) -> None:
    """`before`: the segment's blocks so far. `parent_upto`: where KV of the segments before it stops."""
    joins = piece.start == before[-1].end if before else piece.start <= parent_upto
    if not joins or piece.end > end:
        raise malformed(f"a block at {piece.start} of revision {piece.revision} leaves a gap or lies outside")


def _check_bytes(reader: ArchiveReader, piece: Piece, digest: str, shape: KVShape) -> None:
    if piece.block.length > 2 * piece.n * shape.bytes_per_token + (8 << 20):
        raise malformed(f"a block of {piece.block.length} bytes for {piece.n} positions")
    blob = reader.file.read_at(piece.block.offset, piece.block.length)
    try:
        arrays = decode_tensors(blob, shape, piece.n)
    except ValueError as error:
        raise malformed(f"the block at {piece.start} of revision {piece.revision}: {error}") from error
    if kv_digest(arrays) != digest:
        raise corrupt(f"the block at {piece.start} of revision {piece.revision} does not match its digest")


class TailWriter:
    """Writes checked KV as tails. `written` names what is there to be removed if the import does not end well."""

    def __init__(self, tiers: Tiers, tenant: str, reader: ArchiveReader, profiles: list[str], *, cells_fit: bool):
        self.tiers = tiers
        self.tenant = tenant
        self.reader = reader
        self.profiles = profiles
        self.cells_fit = cells_fit  # the archive's cells are as long as ours: a long input may build on them
        self.codec = codec_for(tiers.shape.dtype)
        self.written: list[KVOwner] = []

    def write(self, found: ForeignKV, history: History, revisions: list[RevisionRecord]) -> list[TailRef]:
        """Make the blocks durable under the new revisions' ids; returns the references, for the batch."""
        refs, borrowed = [], {-1: 0}
        for segment in walk(self.tenant, self.tiers.identity_id, history, self.tiers.cell_tokens):
            index = segment.end
            borrowed[index] = borrowed[segment.after]
            pieces = found.pieces.get(index, [])
            for piece in pieces:
                if piece.sealed and self.cells_fit and piece.start <= borrowed[index]:
                    borrowed[index] = max(borrowed[index], piece.end)
            ours = self._own_cells(segment.hashes)
            kept = [piece for piece in pieces if piece.end > ours]
            if kept:
                refs.append(self._tail(revisions[index].revision_id, kept, borrowed[index]))
        return refs

    def remove(self) -> None:
        """Take back what was written."""
        for owner in self.written:
            self.tiers.store.blocks.delete(owner).result()
        self.written.clear()

    def _own_cells(self, hashes: list[bytes]) -> int:
        """Leading positions that the tenant has sealed cells for: those are used instead."""
        tiers = self.tiers
        refs, _ = cell_refs(tiers.store, self.tenant, hashes, forget=False)
        return next((i for i, ref in enumerate(refs) if ref is None), len(refs)) * tiers.cell_tokens

    def _tail(self, revision_id: str, pieces: list[Piece], borrowed: int) -> TailRef:
        tiers, cell = self.tiers, self.tiers.cell_tokens
        owner = KVOwner(self.tenant, "tail", revision_id.encode(), 1)
        self.written.append(owner)
        raw = coded = 0
        durable: Future[None] | None = None
        for start, arrays in self._runs(pieces):
            encoded = encode_kv(owner, start, arrays, codec=self.codec, part_of_more=True)
            if durable is not None:  # one block is coded while another is written, no more
                durable.result()
            durable = tiers.store.blocks.write(encoded.records)
            raw, coded = raw + encoded.raw_bytes, coded + encoded.coded_bytes
        assert durable is not None
        durable.result()
        borrowed = min(borrowed, pieces[-1].end) // cell * cell
        profiles = list(dict.fromkeys(self.profiles[piece.profile] for piece in pieces))
        extra: dict[str, object] = {"borrowed": borrowed} if borrowed > pieces[0].start else {}
        if len(profiles) > 1:
            extra["profiles"] = profiles
        return TailRef(
            tenant=self.tenant,
            revision_id=revision_id,
            start=pieces[0].start,
            length=pieces[-1].end - pieces[0].start,
            raw_bytes=raw,
            coded_bytes=coded,
            kv_digest=self._digest(pieces),
            profile_id=profiles[-1],
            generation=1,
            extra=extra,
        )

    def _runs(self, pieces: list[Piece]) -> Iterator[tuple[int, LayerArrays]]:
        """The pieces as a tail is cut: runs of SPAN_TOKENS from its start, the last one shorter."""
        start = pieces[0].start
        held: LayerArrays = []
        for piece in pieces:
            blob = self.reader.file.read_at(piece.block.offset, piece.block.length)
            arrays: LayerArrays = decode_tensors(blob, self.tiers.shape, piece.n)
            if held:
                arrays = [
                    (np.concatenate([k0, k1], 1), np.concatenate([v0, v1], 1))
                    for (k0, v0), (k1, v1) in zip(held, arrays, strict=True)
                ]
            if arrays[0][0].shape[1] >= SPAN_TOKENS:
                yield start, [(k[:, :SPAN_TOKENS], v[:, :SPAN_TOKENS]) for k, v in arrays]
                start += SPAN_TOKENS
                arrays = [(k[:, SPAN_TOKENS:], v[:, SPAN_TOKENS:]) for k, v in arrays]
            held = arrays if arrays[0][0].shape[1] else []
        if held:
            yield start, held

    def _digest(self, pieces: Iterable[Piece]) -> str:
        """`kv_digest` of all pieces as one span, without holding it: heads are contiguous in each block."""
        shape, file = self.tiers.shape, self.reader.file
        heads = [(piece, file.read_at(piece.block.offset, 8)) for piece in pieces]
        state = xxh3_128()
        for layer in range(shape.n_layers):
            for part in (Part.K, Part.V):
                for head in range(shape.n_kv_heads):
                    for piece, prefix in heads:
                        offset, length = tensor_bytes(prefix, shape, piece.n, layer, part, head)
                        state.update(file.read_at(piece.block.offset + offset, length))
        return str(state.hexdigest())
