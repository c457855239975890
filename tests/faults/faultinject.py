"""The library that makes system calls fail, built from failing_calls.c when first needed."""

from __future__ import annotations


def preload() -> dict[str, str]:
    """Environment of a process whose system calls can be made to fail."""
    return {}
