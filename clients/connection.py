"""Where and as whom to call: channel options, credentials, metadata, and the health check."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import grpc

from sessiond.clients.errors import UnavailableError

HEALTH_CHECK = "/grpc.health.v1.Health/Check"
# HealthCheckRequest { service: "" } and HealthCheckResponse { status: SERVING } by hand: the base install
# needs no health package.
HEALTH_REQUEST = b""
HEALTH_SERVING = b"\x08\x01"

_OPTIONS: tuple[tuple[str, Any], ...] = (
    # A dead peer is noticed within 40 s, even when a turn is silent for long.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 << 20),
    # The default waits up to two minutes before it tries a restarted server again.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, slots=True)
class Connection:
    """`root_certificates` (PEM), `certificate` and `private_key` (PEM, both or neither) or `tls` turn TLS on.

    `token` is sent as a bearer token. `tenant` counts only where the server trusts it. `timeout` (seconds) is
    the deadline of each attempt at a unary call; streams have none.
    """

    target: str
    token: str | None = field(default=None, repr=False)
    tenant: str | None = None
    tls: bool = False
    root_certificates: bytes | None = None
    certificate: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    timeout: float | None = None

    def open(self) -> grpc.Channel:
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.target, options=_OPTIONS)
        return grpc.secure_channel(self.target, credentials, options=_OPTIONS)

    def open_async(self) -> grpc.aio.Channel:
        """Needs a running event loop."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.target, options=_OPTIONS)
        return grpc.aio.secure_channel(self.target, credentials, options=_OPTIONS)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        pairs = []
        if self.token is not None:
            pairs.append(("authorization", f"Bearer {self.token}"))
        if self.tenant is not None:
            pairs.append(("sessiond-tenant", self.tenant))
        return tuple(pairs)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if not (self.tls or self.root_certificates or self.certificate):
            return None
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate)


def check_health(response: bytes) -> None:
    """Raises UnavailableError unless the response says SERVING."""
    if response != HEALTH_SERVING:
        raise UnavailableError("the server is not serving yet", reason="STARTING")
