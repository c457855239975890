"""Every policy with knobs so small that it leaves tokens out of a short conversation."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sinks": 2, "recent": 24},
    "h2o": {"budget": 24, "recent": 8},
    "snapkv": {"budget": 16, "window": 8, "once": True},
    "adakv": {"budget": 16, "window": 8},
    "quest": {"budget": 16, "dense_layers": 0},
    "rocketkv": {"budget": 32, "window": 8, "kernel": 7},
    "sieve": {"least": 4, "most": 16},
    "kvzip": {"chunk": 64},
}
