"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is loaded: two spinning threads beside any other process take seconds for what takes milliseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure() -> None:
    """Before Triton is loaded: without a GPU its kernels run in its interpreter."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bytes are promised for a fixed number of threads; one is quickest for models this small."""
    from engine_harness import torch_threads

    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The default model's converted directory; SESSIOND_TEST_MODEL_DIR points at another copy."""
    override = os.environ.get("SESSIOND_TEST_MODEL_DIR")
    if override:
        return Path(override)
    from sessiond.modelstore import resolve

    return Path(resolve("smollm2").path)
