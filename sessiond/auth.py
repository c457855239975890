"""Whose request it is: the tenant of an authenticated principal, else `default`."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any, Protocol

from sessiond.config import Settings, read_auth_tokens
from sessiond.errors import BadRequest, Unauthenticated

DEFAULT_TENANT = "default"


class CallContext(Protocol):
    """What is needed of a gRPC call."""

    def invocation_metadata(self) -> Any: ...
    def auth_context(self) -> Any: ...


class Principals:
    """Maps a call to its tenant: client certificate first, then bearer token, then (if trusted) metadata."""

    def __init__(self, settings: Settings) -> None:
        self._tokens = read_auth_tokens(settings.auth_tokens) if settings.auth_tokens else {}
        self._mtls = settings.tls_client_ca is not None
        self._trust_metadata = settings.trust_tenant_metadata

    def tenant(self, context: CallContext) -> str:
        """Raises Unauthenticated when credentials are required and missing or wrong."""
        metadata = dict(context.invocation_metadata() or ())
        if self._mtls:
            return _of_certificate(context.auth_context().get("x509_common_name") or [])
        if self._tokens:
            return self._of_token(str(metadata.get("authorization", "")))
        if self._trust_metadata and "sessiond-tenant" in metadata:
            tenant = str(metadata["sessiond-tenant"])
            if not 1 <= len(tenant.encode("utf-8")) <= 128:
                raise BadRequest("a tenant is 1 to 128 bytes", field="sessiond-tenant")
            return tenant
        return DEFAULT_TENANT

    def _of_token(self, header: str) -> str:
        scheme, _, secret = header.partition(" ")
        given = secret.encode("utf-8") if scheme.lower() == "bearer" else b""
        found = ""
        for token, tenant in self._tokens.items():  # every one is compared: no answer by timing
            if hmac.compare_digest(token.encode("utf-8"), given):
                found = tenant
        if not found:
            raise Unauthenticated("a valid bearer token is required")
        return found


def _of_certificate(names: Sequence[bytes]) -> str:
    """The common name, as the tenant it must be able to be. Raises Unauthenticated."""
    try:
        name = names[0].decode("utf-8") if names else ""
    except UnicodeDecodeError:
        name = ""
    if not 1 <= len(name.encode("utf-8")) <= 128:
        raise Unauthenticated("the client certificate has no usable common name")
    return name
