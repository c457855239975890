"""Archives over the wire: exports and imports to protobuf and back. No behaviour."""

from __future__ import annotations

from collections.abc import AsyncIterator

from sessiond import wireout
from sessiond.errors import BadRequest
from sessiond.exporting import Export
from sessiond.importing import Imported
from sessiond.modelidentity import identity_id
from sessiond.storage.archive import VERSION
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2 as types

VERDICTS = {
    "exact": pb.IMPORT_VERDICT_EXACT,
    "recompute": pb.IMPORT_VERDICT_RECOMPUTE,
    "refused": pb.IMPORT_VERDICT_REFUSED,
}


def archive_header(export: Export) -> pb.ArchiveHeader:
    return pb.ArchiveHeader(
        format=VERSION,
        session_id=export.session.session_id,
        head_revision_id=export.history.revisions[export.history.head].name,
        n_revisions=len(export.history.revisions),
        n_tokens=export.history.n_tokens,
        estimated_bytes=export.estimated_bytes,
        identity=types.ModelIdentity(identity_id=identity_id(export.identity), fields=export.identity),
        tokens_with_kv=export.tokens_with_kv,
    )


async def import_parts(
    messages: AsyncIterator[pb.ImportSessionRequest],
) -> AsyncIterator[bytes | tuple[bytes, int]]:
    """Chunks, and the trailer as (hash, length). Raises BadRequest for a second header or an empty part."""
    async for message in messages:
        part = message.WhichOneof("part")
        if part == "chunk":
            yield message.chunk
        elif part == "trailer":
            yield message.trailer.sha256, message.trailer.total_bytes
        else:
            raise BadRequest(f"the parts of an import are out of order at {part}", field="part")


def import_response(done: Imported) -> pb.ImportSessionResponse:
    return pb.ImportSessionResponse(
        session=wireout.session(done.session) if done.session else None,
        verdict=VERDICTS[done.verdict],
        differing_fields=done.fields,
        tokens=done.tokens,
        tokens_with_kv=done.with_kv,
    )
