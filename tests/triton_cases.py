"""Where the Triton twins are tested: on a GPU in its dtypes, else in Triton's interpreter in fp32, on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'sessiond[gpu]'")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Each with how far a result of size 1 may be from the reference's, which is in fp32.
DTYPES = [pytest.param(torch.float32, 1e-5, id="fp32")]
if GPU:
    DTYPES += [
        pytest.param(torch.bfloat16, 0.02, id="bf16"),
        pytest.param(torch.float16, 0.003, id="fp16"),
    ]


class Draw:
    """Random tensors on the tested device, the same on every run."""

    def __init__(self, seed: int = 5) -> None:
        self._source = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self._source).to(DEVICE, dtype)

    def cached(self, n_groups: int, n: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """[G, n, D] as a cache holds it: in the middle of more room, where what lies beyond is NaN."""
        room = torch.full((n_groups, n + 9, head_dim), float("nan"), device=DEVICE, dtype=dtype)
        room[:, :n] = self.normal(n_groups, n, head_dim, dtype=dtype)
        return room[:, :n]

    def positions(self, n_groups: int, k: int, below: int) -> torch.Tensor:
        """[G, k] different positions, ascending."""
        rows = [torch.randperm(below, generator=self._source)[:k].sort().values for _ in range(n_groups)]
        return torch.stack(rows).to(DEVICE)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """Whether no number is further off than `tolerance`; NaN is."""
    assert found.shape == wanted.shape
    return found.numel() == 0 or bool((found.cpu().double() - wanted.cpu().double()).abs().max() <= tolerance)
