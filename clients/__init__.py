"""Python clients of sessiond: `Client` and, with the same methods as coroutines, `AsyncClient`.

Needs gRPC and protobuf only; it never imports the daemon.
"""

from sessiond.clients.async_client import AsyncClient
from sessiond.clients.async_session import AsyncSession
from sessiond.clients.client import Client
from sessiond.clients.errors import (
    AbortedError,
    AlreadyExistsError,
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    ResourceExhaustedError,
    SessiondClientError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from sessiond.clients.events import Event
from sessiond.clients.session import Session

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncSession",
    "CancelledError",
    "Client",
    "DataLossError",
    "DeadlineExceededError",
    "Event",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "PermissionDeniedError",
    "ProtocolError",
    "ResourceExhaustedError",
    "Session",
    "SessiondClientError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
]
