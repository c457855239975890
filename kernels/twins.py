"""Which implementation serves a tensor: the Triton twin where it lies on a GPU, else the caller's own.

A twin has the contract of the function it is named after. Its module is imported when a tensor first asks for it, so
an installation without GPUs needs no Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

# The module that holds the twin of each operation, under the operation's name.
MODULES = {
    "attend_few": "triton_decode",
    "attend_few_batch": "triton_decode",
    "attend_chosen": "triton_chosen",
    "attend_chosen_batch": "triton_chosen",
    "attend_codes": "triton_codes",
    "attend_prefill": "triton_prefill",
    "page_scores": "triton_pages",
    "coded_key_scores": "triton_key_scores",
    "reconstruct_keys": "triton_lowrank",
    "encode_rows": "triton_encode",
}
# Types of device that twins serve; torch names AMD's GPUs "cuda" as well.
DEVICES = ("cuda",)

log = logging.getLogger(__name__)


def for_device(tensor: Tensor, operation: str) -> Callable[..., Any] | None:
    """The twin of `operation` for where `tensor` lies. None: there is none, or no Triton; the caller computes it.

    Raises KeyError for an operation that has no twin anywhere.
    """
    module = MODULES[operation]
    if tensor.device.type not in DEVICES or not installed():
        return None
    return _twin(module, operation)


@functools.cache
def installed() -> bool:
    """Whether Triton is there: the extra "gpu"; torch's builds for CUDA bring it along."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _twin(module: str, operation: str) -> Callable[..., Any]:
    twin: Callable[..., Any] = getattr(importlib.import_module(f"sessiond.kernels.{module}"), operation)
    log.info("%s runs in Triton", operation)
    return twin
