"""Every policy with knobs so small that it leaves tokens out of a short conversation."""

from __future__ import annotations

from typing import Any

_SIEVE = {"name": "sieve", "least": 4, "most": 16}

SMALL: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sinks": 2, "recent": 24},
    "h2o": {"budget": 24, "recent": 8},
    "snapkv": {"budget": 16, "window": 8, "once": True},
    "adakv": {"budget": 16, "window": 8},
    "quest": {"budget": 16, "dense_layers": 0},
    "rocketkv": {"budget": 32, "window": 8, "kernel": 7},
    "auto": {"dense_until": 32, "scarce_until": 0},
    "sieve": {"least": 4, "most": 16},
    "int8": {"group": 16},
    "int4": {"group": 16},
    "kivi": {"group": 8, "residual": 16},
    "layers": {
        "rules": [{"layers": "0", "policy": {"name": "window", "recent": 24}}],
        "otherwise": {"name": "viewed", "of": _SIEVE},
    },
    "viewed": {"of": {"name": "quest", "budget": 16, "dense_layers": 0}, "bits": 2},
    "prior": {"of": {"name": "viewed", "of": _SIEVE, "bits": 8}, "share": 0.5},
    "shadowkv": {"chunk": 4, "budget": 16, "outliers": 1, "local": 1},
}
