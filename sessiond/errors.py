"""Every failure a caller can meet, in one tree. The gRPC boundary maps it once (server.py).

SessiondError
├── InvalidArgument     EmptyInput BadMessage BadTokens BadSampling ContextTooLong UnknownPolicy InvalidConfig
│                       RequestIdReused BadRequest InvalidPageToken
├── NotFound            SessionNotFound RevisionNotFound
├── AlreadyExists       SessionExists
├── FailedPrecondition  IdentityMismatch SessionDeleted NotDeleted ModelMissing ModelCorrupt ModelUnsupported
│                       DataDirectoryReadOnly DataDirectoryBusy FormatTooNew NothingToContinue
│                       StoreReadOnly DependencyMissing UnsafeAddress
├── Aborted             SessionBusy RevisionMismatch EtagMismatch TurnSuspended StreamStalled
├── ResourceExhausted   MemoryBudget DiskFull QueueFull Quota
├── DataLoss            RecordCorrupt
├── Unavailable         Draining Starting
├── Unauthenticated
└── Unimplemented       NotImplementedYet
"""

from __future__ import annotations

import enum
from typing import ClassVar


class Status(enum.Enum):
    """The canonical gRPC codes we use, by number (this module must not import grpc)."""

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class SessiondError(Exception):
    """Base. `metadata` travels in google.rpc.ErrorInfo; `retry_after` (seconds) in RetryInfo."""

    status: ClassVar[Status] = Status.INTERNAL
    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, retry_after: float | None = None, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.metadata = {key: str(value) for key, value in metadata.items()}


class InvalidArgument(SessiondError):
    """The request is wrong whatever the state; do not retry it unchanged."""

    status = Status.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"


class EmptyInput(InvalidArgument):
    """A turn or session without any message, token or text where some is needed."""

    reason = "EMPTY_INPUT"


class BadMessage(InvalidArgument):
    """Unknown role, unsupported content part, malformed UTF-8, or an order the template refuses."""

    reason = "BAD_MESSAGE"


class BadTokens(InvalidArgument):
    """A token id outside the model's vocabulary."""

    reason = "BAD_TOKENS"


class BadSampling(InvalidArgument):
    """A sampling field outside its range; metadata names field and range."""

    reason = "BAD_SAMPLING"


class ContextTooLong(InvalidArgument):
    """History plus input leaves no room for one generated token; metadata carries the numbers."""

    reason = "CONTEXT_TOO_LONG"


class UnknownPolicy(InvalidArgument):
    """No policy of that name, or its knobs do not parse."""

    reason = "UNKNOWN_POLICY"


class InvalidConfig(InvalidArgument):
    """A setting or knob outside its allowed range."""

    reason = "INVALID_CONFIG"


class RequestIdReused(InvalidArgument):
    """The same request_id came with a different request."""

    reason = "REQUEST_ID_REUSED"


class BadRequest(InvalidArgument):
    """A malformed field not covered by a more precise reason (missing request_id, bad mask, bad id)."""

    reason = "BAD_REQUEST"


class InvalidPageToken(InvalidArgument):
    """A page_token this server did not issue for this query."""

    reason = "INVALID_PAGE_TOKEN"


class NotFound(SessiondError):
    """No such thing for this tenant (another tenant's looks the same)."""

    status = Status.NOT_FOUND
    reason = "NOT_FOUND"


class SessionNotFound(NotFound):
    reason = "SESSION_NOT_FOUND"


class RevisionNotFound(NotFound):
    reason = "REVISION_NOT_FOUND"


class AlreadyExists(SessiondError):
    """The thing to be created is there already."""

    status = Status.ALREADY_EXISTS
    reason = "ALREADY_EXISTS"


class SessionExists(AlreadyExists):
    """A session with the chosen id exists and was made by another request."""

    reason = "SESSION_EXISTS"


class FailedPrecondition(SessiondError):
    """The system's state forbids it; retry only after changing that state."""

    status = Status.FAILED_PRECONDITION
    reason = "FAILED_PRECONDITION"


class IdentityMismatch(FailedPrecondition):
    """Session or data belongs to another model; metadata names the field that differs."""

    reason = "IDENTITY_MISMATCH"


class SessionDeleted(FailedPrecondition):
    """The session is soft-deleted; UndeleteSession brings it back until purge_time."""

    reason = "SESSION_DELETED"


class NotDeleted(FailedPrecondition):
    """UndeleteSession on a session that is not deleted."""

    reason = "NOT_DELETED"


class ModelMissing(FailedPrecondition):
    """No model at the given path or name."""

    reason = "MODEL_MISSING"


class ModelCorrupt(FailedPrecondition):
    """A model file is truncated, unreadable, or its digest is wrong."""

    reason = "MODEL_CORRUPT"


class ModelUnsupported(FailedPrecondition):
    """An architecture whose attention or cache this version cannot own."""

    reason = "MODEL_UNSUPPORTED"


class DataDirectoryReadOnly(FailedPrecondition):
    """The data directory cannot be written."""

    reason = "DATA_DIRECTORY_READ_ONLY"


class DataDirectoryBusy(FailedPrecondition):
    """Another daemon holds the data directory's lock."""

    reason = "DATA_DIRECTORY_BUSY"


class FormatTooNew(FailedPrecondition):
    """The data directory was written by a newer version."""

    reason = "FORMAT_TOO_NEW"


class NothingToContinue(FailedPrecondition):
    """Mode CONTINUE on a session whose history holds no tokens."""

    reason = "NOTHING_TO_CONTINUE"


class StoreReadOnly(FailedPrecondition):
    """A write or fsync failed earlier; the store takes no more writes until restarted."""

    reason = "STORE_READ_ONLY"


class DependencyMissing(FailedPrecondition):
    """A library is absent or too old; the message says what to install."""

    reason = "DEPENDENCY_MISSING"


class UnsafeAddress(FailedPrecondition):
    """A non-loopback address without TLS or the explicit flag, or an address that cannot be bound."""

    reason = "UNSAFE_ADDRESS"


class Aborted(SessiondError):
    """A concurrent change won; read again and retry."""

    status = Status.ABORTED
    reason = "ABORTED"


class SessionBusy(Aborted):
    """Another turn holds the lease. Retry after it ends, or ask to wait."""

    reason = "SESSION_BUSY"


class RevisionMismatch(Aborted):
    """The head is not the base_revision the caller named."""

    reason = "REVISION_MISMATCH"


class EtagMismatch(Aborted):
    """The session changed since the caller read it."""

    reason = "ETAG_MISMATCH"


class TurnSuspended(Aborted):
    """A suspended turn stands on this session; metadata carries its request_id."""

    reason = "TURN_SUSPENDED"


class StreamStalled(Aborted):
    """The other side of an export or import neither took nor sent anything for archive_idle_seconds; start again."""

    reason = "STREAM_STALLED"


class ResourceExhausted(SessiondError):
    """A limit is reached; retry later."""

    status = Status.RESOURCE_EXHAUSTED
    reason = "RESOURCE_EXHAUSTED"


class MemoryBudget(ResourceExhausted):
    """The session's KV does not fit the memory budget beside the running turns."""

    reason = "MEMORY_BUDGET"


class DiskFull(ResourceExhausted):
    """Free space is below the reserve; reads and deletes go on."""

    reason = "DISK_FULL"


class QueueFull(ResourceExhausted):
    """Too many turns wait."""

    reason = "QUEUE_FULL"


class Quota(ResourceExhausted):
    """The tenant's quota is used up."""

    reason = "QUOTA"


class DataLoss(SessiondError):
    """Stored bytes are wrong or gone."""

    status = Status.DATA_LOSS
    reason = "DATA_LOSS"


class RecordCorrupt(DataLoss):
    """A record fails its checksum or belongs to another identity; metadata names its key."""

    reason = "RECORD_CORRUPT"


class Unavailable(SessiondError):
    """Not now; the one status a client retries by itself."""

    status = Status.UNAVAILABLE
    reason = "UNAVAILABLE"


class Draining(Unavailable):
    """The daemon is shutting down."""

    reason = "DRAINING"


class Starting(Unavailable):
    """The daemon is not serving yet."""

    reason = "STARTING"


class Unauthenticated(SessiondError):
    """Credentials are required and are missing or wrong."""

    status = Status.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class Unimplemented(SessiondError):
    """Not built in this version."""

    status = Status.UNIMPLEMENTED
    reason = "UNIMPLEMENTED"


class NotImplementedYet(Unimplemented):
    """An RPC or mode that the contract names and a later version will serve."""

    reason = "NOT_IMPLEMENTED_YET"
