"""Whose request it is: certificate before token before trusted metadata before `default`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sessiond.auth import DEFAULT_TENANT, Principals
from sessiond.config import Settings
from sessiond.errors import BadRequest, Unauthenticated


class Call:
    """A gRPC call's context, as far as it matters here."""

    def __init__(self, metadata: dict[str, str | bytes] | None = None, names: tuple[bytes, ...] = ()) -> None:
        self._metadata = tuple((metadata or {}).items())
        self._names = list(names)

    def invocation_metadata(self) -> Any:
        return self._metadata

    def auth_context(self) -> Any:
        return {"x509_common_name": self._names} if self._names else {}


def principals(**settings: Any) -> Principals:
    return Principals(Settings(**settings))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SESSIOND_{name.upper()}", raising=False)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"secret-a": "alice", "secret-b": "bob", "sécret": "zoë"}), "utf-8")
    return path


def test_without_any_setting_everyone_is_the_default_tenant():
    assert principals().tenant(Call()) == DEFAULT_TENANT
    assert principals().tenant(Call({"sessiond-tenant": "alice", "authorization": "Bearer x"})) == DEFAULT_TENANT


def test_metadata_counts_where_it_is_trusted():
    trusting = principals(trust_tenant_metadata=True)
    assert trusting.tenant(Call({"sessiond-tenant": "alice"})) == "alice"
    assert trusting.tenant(Call()) == DEFAULT_TENANT


@pytest.mark.parametrize("tenant", ["", "x" * 129, "é" * 65])
def test_a_trusted_tenant_has_1_to_128_bytes(tenant: str):
    with pytest.raises(BadRequest):
        principals(trust_tenant_metadata=True).tenant(Call({"sessiond-tenant": tenant}))


def test_a_token_names_its_tenant(tokens: Path):
    known = principals(auth_tokens=tokens)
    assert known.tenant(Call({"authorization": "Bearer secret-a"})) == "alice"
    assert known.tenant(Call({"authorization": "Bearer secret-b"})) == "bob"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer ", "Bearer wrong", "Bearer secret-", "Bearer secret-aa", "Basic secret-a", "secret-x"]
)
def test_a_missing_or_wrong_token_is_refused(tokens: Path, header: str | None):
    with pytest.raises(Unauthenticated):
        principals(auth_tokens=tokens).tenant(Call({} if header is None else {"authorization": header}))


def test_the_scheme_is_needed(tokens: Path):
    with pytest.raises(Unauthenticated):
        principals(auth_tokens=tokens).tenant(Call({"authorization": "secret-a"}))


def test_trusted_metadata_does_not_replace_a_token(tokens: Path):
    both = principals(auth_tokens=tokens, trust_tenant_metadata=True)
    assert both.tenant(Call({"authorization": "Bearer secret-a", "sessiond-tenant": "bob"})) == "alice"
    with pytest.raises(Unauthenticated):
        both.tenant(Call({"sessiond-tenant": "bob"}))


def test_a_certificate_comes_first(tokens: Path, tmp_path: Path):
    mutual = principals(auth_tokens=tokens, tls_client_ca=tmp_path / "ca.crt", trust_tenant_metadata=True)
    call = Call({"authorization": "Bearer secret-b", "sessiond-tenant": "bob"}, names=(b"alice",))
    assert mutual.tenant(call) == "alice"


def test_a_certificates_name_does_not_count_without_a_ca_to_check_it():
    assert principals().tenant(Call(names=(b"alice",))) == DEFAULT_TENANT


def test_a_certificate_without_a_name_is_nobody(tmp_path: Path):
    mutual = principals(tls_client_ca=tmp_path / "ca.crt")
    with pytest.raises(Unauthenticated):
        mutual.tenant(Call())


@pytest.mark.parametrize("name", [b"\xff\xfe", b"", b"x" * 129])
def test_a_certificates_name_that_cannot_be_a_tenant_is_refused(tmp_path: Path, name: bytes):
    mutual = principals(tls_client_ca=tmp_path / "ca.crt")
    with pytest.raises(Unauthenticated):
        mutual.tenant(Call(names=(name,)))
