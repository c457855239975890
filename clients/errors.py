"""What a call can raise: one class for each canonical code, decoded from google.rpc.Status.

SessiondClientError
├── InvalidArgumentError     the request is wrong; do not send it again unchanged
├── NotFoundError            no such session or revision for this tenant
├── AlreadyExistsError
├── FailedPreconditionError  change the session's or the server's state first
├── AbortedError             a concurrent change won: busy, head or etag moved, a suspended turn stands
├── ResourceExhaustedError   a limit is reached; `retry_after` says for how long
├── DataLossError            stored or transferred bytes are damaged
├── UnavailableError         the server comes up or goes down; clients retry it by themselves
├── DeadlineExceededError  CancelledError  UnauthenticatedError  PermissionDeniedError  UnimplementedError
└── InternalError            a bug in the server
    └── ProtocolError        the server broke its contract
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status


class SessiondClientError(Exception):
    """A call failed. `reason` is a name of ErrorReason without its prefix, or "" if the server gave none.

    `retry_after` is in seconds; None: the server did not say that a retry may help.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.code = code or self.default_code
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
        name = self.code.name + (f" / {reason}" if reason else "")
        super().__init__(f"{name}: {message}")


class InvalidArgumentError(SessiondClientError):
    default_code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(SessiondClientError):
    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(SessiondClientError):
    default_code = grpc.StatusCode.ALREADY_EXISTS


class FailedPreconditionError(SessiondClientError):
    default_code = grpc.StatusCode.FAILED_PRECONDITION


class AbortedError(SessiondClientError):
    default_code = grpc.StatusCode.ABORTED


class ResourceExhaustedError(SessiondClientError):
    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DataLossError(SessiondClientError):
    default_code = grpc.StatusCode.DATA_LOSS


class UnavailableError(SessiondClientError):
    default_code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(SessiondClientError):
    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledError(SessiondClientError):
    default_code = grpc.StatusCode.CANCELLED


class UnauthenticatedError(SessiondClientError):
    default_code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(SessiondClientError):
    default_code = grpc.StatusCode.PERMISSION_DENIED


class UnimplementedError(SessiondClientError):
    default_code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(SessiondClientError):
    default_code = grpc.StatusCode.INTERNAL


class ProtocolError(InternalError):
    """The server's stream cannot be what the contract says."""


_CLASSES: dict[grpc.StatusCode, type[SessiondClientError]] = {
    cls.default_code: cls
    for cls in (
        InvalidArgumentError,
        NotFoundError,
        AlreadyExistsError,
        FailedPreconditionError,
        AbortedError,
        ResourceExhaustedError,
        DataLossError,
        UnavailableError,
        DeadlineExceededError,
        CancelledError,
        UnauthenticatedError,
        PermissionDeniedError,
        UnimplementedError,
        InternalError,
    )
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc_error(error: grpc.RpcError) -> SessiondClientError:
    """The typed form of what a gRPC call raised, of grpc or grpc.aio."""
    # What calls raise has code(), details() and the metadata, but its declared type does not.
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        # Details that contradict the code, or do not parse: the code alone is certain.
        status = None
    if status is not None:
        return from_status(status)
    return make_error(error.code(), error.details() or "")


def from_status(status: status_pb2.Status) -> SessiondClientError:
    """The typed form of a status, as in the event `failed`."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after: float | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return make_error(
        _CODES.get(status.code, grpc.StatusCode.UNKNOWN),
        status.message,
        reason=info.reason,
        metadata=info.metadata,
        retry_after=retry_after,
    )


def make_error(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    metadata: Mapping[str, str] | None = None,
    retry_after: float | None = None,
) -> SessiondClientError:
    """An error of the class that stands for `code`."""
    cls = _CLASSES.get(code, SessiondClientError)
    return cls(message, code=code, reason=reason, metadata=metadata, retry_after=retry_after)
