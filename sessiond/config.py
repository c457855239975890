"""Settings of the daemon: the only reader of its environment (`SESSIOND_*`) and of its token file."""

from __future__ import annotations

import ipaddress
import json
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sessiond.errors import InvalidConfig
from sessiond.types import WeightsKind

GIB = 1 << 30


def default_data_dir() -> Path:
    """$XDG_DATA_HOME/sessiond, else ~/.local/share/sessiond."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "sessiond"


class Settings(BaseSettings):
    """Frozen. Every field is also an environment variable SESSIOND_<NAME> and a flag of `sessiond serve`."""

    model_config = SettingsConfigDict(env_prefix="SESSIOND_", frozen=True, extra="forbid")

    # What is served, and where its memory lives.
    model: str = Field("smollm2", description="Known name, transformers directory, GGUF file or hub id.")
    data_dir: Path = Field(default_factory=default_data_dir, description="Token log and KV; one daemon at a time.")
    database_url: str | None = Field(None, description="SQL catalog; default is SQLite inside the data directory.")

    accept_damage: bool = Field(False, description="Serve a token log known to lack or misplace records.")

    # Who may connect.
    listen: str = Field("127.0.0.1:7431", description="host:port; port 0 takes a free one.")
    insecure_allow_remote: bool = Field(False, description="Bind beyond loopback without TLS.")
    tls_cert: Path | None = Field(None, description="PEM certificate chain of the server.")
    tls_key: Path | None = Field(None, description="PEM private key of the server.")
    tls_client_ca: Path | None = Field(None, description="PEM roots; clients must then present a certificate.")
    auth_tokens: Path | None = Field(None, description="JSON file {bearer token: tenant}.")
    trust_tenant_metadata: bool = Field(False, description="Take the tenant from `sessiond-tenant` metadata.")
    metrics_listen: str | None = Field(None, description="host:port of Prometheus metrics; off by default.")
    reflection: bool | None = Field(None, description="gRPC reflection; default: only on loopback.")

    # How it computes.
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, le=1024)
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="Weights and KV; auto: as stored.")
    weights: WeightsKind = Field("bf16", description="Matrices: as loaded, or quantized in blocks.")
    batch_invariant: bool = Field(False, description="A decode step gives every session the same bits as alone.")
    cell_tokens: int = Field(128, description="Unit of canonical computation; fixed when a data directory is made.")
    seal: bool = Field(True, description="Recompute provisional KV canonically while idle.")

    # What it keeps in memory, and for how long.
    memory_budget_bytes: int = Field(8 * GIB, ge=1 << 20, description="KV in RAM; idle sessions leave beyond it.")
    offload: bool = Field(
        True, description="Under a policy that reads little of it, exact KV lies in a file in the data directory."
    )
    idle_seconds: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="An idle session leaves memory after this."
    )
    max_queued_turns: int = Field(256, ge=1, description="Turns that run or wait; more are refused.")

    archive_idle_seconds: float = Field(
        60.0, gt=0, allow_inf_nan=False, description="An export nobody reads, an import that stands still: ended."
    )

    # Turns and their durability.
    detached_turn_seconds: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="A turn nobody listens to runs on for this."
    )
    stream_before_log: bool = Field(False, description="Stream tokens before they are durable, at your risk.")
    delete_retention_seconds: float = Field(
        7 * 86400.0, ge=0, allow_inf_nan=False, description="Soft-deleted sessions are kept for this."
    )
    settle_seconds: float = Field(
        0.2, ge=0, allow_inf_nan=False, description="Idle time after a turn before KV is sealed and written."
    )
    sweep_seconds: float = Field(
        5.0, gt=0, allow_inf_nan=False, description="How often expiry and idleness are looked at."
    )
    drain_seconds: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="SIGTERM lets running turns go on for this."
    )

    # The care of the store.
    scrub_bytes_per_second: float = Field(
        4e6, ge=0, allow_inf_nan=False, description="Stored records are checked again at this rate; 0: never."
    )
    collect_seconds: float = Field(
        6 * 3600.0, ge=0, allow_inf_nan=False, description="How often unreferenced records are erased; 0: never."
    )

    @field_validator("cell_tokens")
    @classmethod
    def _cell(cls, value: int) -> int:
        if value not in (128, 256):
            raise ValueError("cell_tokens is 128 or 256")
        return value

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None:
            host, _, port = value.rpartition(":")
            if not host or not port.isdigit() or int(port) > 65535:
                raise ValueError("an address is host:port with a port of 0 to 65535")
        return value

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_auth_tokens(path: Path) -> dict[str, str]:
    """Bearer token -> tenant. Raises InvalidConfig when the file is not a JSON object of strings."""
    try:
        tokens = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"auth token file {path}: {error}") from error
    if not isinstance(tokens, dict) or not all(isinstance(t, str) and t for kv in tokens.items() for t in kv):
        raise InvalidConfig(f"auth token file {path} is not a JSON object of token: tenant")
    if any(len(tenant.encode("utf-8")) > 128 for tenant in tokens.values()):
        raise InvalidConfig(f"auth token file {path}: a tenant is at most 128 bytes")
    return tokens
