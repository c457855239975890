"""Settings: their defaults, ranges and sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from sessiond.config import Settings, default_data_dir, read_auth_tokens
from sessiond.errors import InvalidConfig


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SESSIOND_{name.upper()}", raising=False)


def test_defaults_are_safe():
    settings = Settings()
    assert settings.listen == "127.0.0.1:7431"
    assert settings.is_loopback
    assert not settings.insecure_allow_remote
    assert not settings.trust_tenant_metadata
    assert not settings.stream_before_log
    assert settings.detached_turn_seconds == 60
    assert settings.model == "smollm2"


def test_every_field_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SESSIOND_LISTEN", "127.0.0.1:1")
    monkeypatch.setenv("SESSIOND_IDLE_SECONDS", "2.5")
    monkeypatch.setenv("SESSIOND_TRUST_TENANT_METADATA", "true")
    settings = Settings()
    assert (settings.listen, settings.idle_seconds, settings.trust_tenant_metadata) == ("127.0.0.1:1", 2.5, True)
    assert Settings(listen="127.0.0.1:2").listen == "127.0.0.1:2"


def test_settings_do_not_change():
    with pytest.raises(ValidationError):
        Settings().listen = "127.0.0.1:1"


@pytest.mark.parametrize(
    "given",
    [
        {"no_such_setting": 1},
        {"listen": "localhost"},
        {"listen": ":7431"},
        {"listen": "localhost:"},
        {"listen": "localhost:x"},
        {"listen": "localhost:65536"},
        {"listen": "localhost:-1"},
        {"listen": "localhost:²"},
        {"threads": 0},
        {"threads": 1025},
        {"dtype": "int8"},
        {"weights": "int3"},
        {"cell_tokens": 64},
        {"cell_tokens": 0},
        {"memory_budget_bytes": 1},
        {"memory_budget_bytes": -1},
        {"idle_seconds": 0},
        {"idle_seconds": "nan"},
        {"idle_seconds": -1},
        {"max_queued_turns": 0},
        {"detached_turn_seconds": -0.1},
        {"detached_turn_seconds": "nan"},
        {"detached_turn_seconds": "inf"},
        {"delete_retention_seconds": -1},
        {"delete_retention_seconds": "inf"},
        {"sweep_seconds": 0},
        {"sweep_seconds": "inf"},
        {"drain_seconds": -1},
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given):
    with pytest.raises(ValidationError) as caught:
        Settings(**given)
    assert [error["loc"] for error in caught.value.errors()] == [tuple(given)]


@pytest.mark.parametrize(
    ("listen", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.1.2.3:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.com:1", False),
        ("127.0.0.1.example.com:1", False),
        ("127.example.com:1", False),
        ("localhost.example.com:1", False),
    ],
)
def test_only_loopback_is_loopback(listen: str, loopback: bool):
    assert Settings(listen=listen).is_loopback is loopback


def test_data_lies_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "sessiond"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_data_dir() == Path.home() / ".local" / "share" / "sessiond"


def test_a_token_file_maps_tokens_to_tenants(tmp_path: Path):
    path = tmp_path / "tokens.json"
    path.write_text('{"secret": "alice", "other": "bob"}')
    assert read_auth_tokens(path) == {"secret": "alice", "other": "bob"}


@pytest.mark.parametrize("text", [None, "", "{", "[]", '"x"', '{"a": 1}', '{"a": ""}', '{"": "a"}', b"\xff"])
def test_a_file_that_maps_no_tokens_is_refused(tmp_path: Path, text: str | bytes | None):
    path = tmp_path / "tokens.json"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    with pytest.raises(InvalidConfig):
        read_auth_tokens(path)


def test_a_tenant_in_a_token_file_must_fit_a_key(tmp_path: Path):
    path = tmp_path / "tokens.json"
    path.write_text('{"secret": "%s"}' % ("x" * 129))
    with pytest.raises(InvalidConfig):
        read_auth_tokens(path)
