"""Compile every twin for a GPU that is not there, and print each kernel with its shared memory in bytes.

The interpreter is laxer than the compiler: what runs in it need not compile. A program of its own, because Triton
decides once, when it is loaded, whether it interprets.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sessiond.kernels import twins
from sessiond.kernels.rope import Rope


class Absent:
    """A driver's word on a GPU of compute capability 9.0; nothing can be launched on it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_only() -> None:
    """Let every launch end when its kernel is compiled."""
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **constants)
        assert kernel.asm["cubin"], self.fn.__name__
        sys.stdout.write(f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__} {kernel.metadata.shared}\n")
        return kernel

    JITFunction.run = run


def call(dtype: torch.dtype, head_dim: int) -> None:
    """Every operation once. The numbers do not matter."""
    query, keys = torch.zeros(6, 2, head_dim, dtype=dtype), torch.zeros(2, 100, head_dim, dtype=dtype)
    codes = torch.zeros(2, 100, head_dim // 2, dtype=torch.uint8)
    scales = torch.zeros(2, 100, 2 * -(-head_dim // 32), dtype=torch.bfloat16)
    chosen, own, coded = torch.arange(10).expand(2, -1), slice(80, 92), (codes, scales)
    grouped = query.view(2, 6, head_dim)
    factors = torch.zeros(50, 20, dtype=dtype), torch.zeros(2 * head_dim, 20, dtype=dtype), torch.zeros(2 * head_dim)
    arguments: dict[str, tuple[Any, ...]] = {
        "attend_few": (query, keys, keys, 90, 8, 1.0, None),
        "attend_few_batch": (query[None], [keys], [keys], [90], 8, 1.0),
        "attend_chosen": (query, keys, keys, chosen, own, 1.0, None),
        "attend_chosen_batch": (query[None], [keys], [keys], [chosen], [own], 1.0),
        "attend_codes": (query, coded, coded, 4, 32, 70, keys, keys, own, 1.0, chosen),
        "attend_prefill": (query, keys, keys, 90, 8, 1.0),
        "page_scores": (keys, keys, grouped, grouped > 0),
        "coded_key_scores": (codes, scales[..., :2].contiguous(), 4, grouped, 70),
        "reconstruct_keys": (*factors, chosen, Rope(torch.zeros(head_dim // 2)), dtype),
        "encode_rows": (keys, 4, 32, codes, scales),
    }
    assert arguments.keys() == twins.MODULES.keys()
    for operation, given in arguments.items():
        twin = twins.for_device(query, operation)
        assert twin is not None
        twin(*given)


if __name__ == "__main__":
    driver.set_active(Absent())
    compile_only()
    twins.DEVICES = ("cpu",)
    for size in sys.argv[1:]:
        call(torch.bfloat16, int(size))
