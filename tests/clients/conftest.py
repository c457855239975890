import pytest

from sessiond.clients import retry


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Come back at once: what is tested is what comes back, not the wait."""
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.001)
