"""Which implementation serves a tensor, and that an installation without GPUs never loads Triton."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sessiond.kernels import twins

CPU, GPU = torch.empty(1), torch.empty(1, device="meta")  # `meta` stands for a device that twins serve
needs_triton = pytest.mark.skipif(not twins.installed(), reason="Triton is not installed: pip install 'sessiond[gpu]'")


@pytest.fixture
def meta_is_served(monkeypatch):
    monkeypatch.setattr(twins, "DEVICES", ("meta",))


@needs_triton
@pytest.mark.usefixtures("meta_is_served")
@pytest.mark.parametrize("operation", twins.MODULES)
def test_a_twin_serves_its_devices_and_no_others(operation):
    twin = twins.for_device(GPU, operation)
    assert twin is not None
    assert twin.__name__ == operation
    assert twins.for_device(CPU, operation) is None


@pytest.mark.usefixtures("meta_is_served")
def test_without_triton_there_is_no_twin(monkeypatch):
    monkeypatch.setattr(twins, "installed", lambda: False)
    assert twins.for_device(GPU, "attend_few") is None


def test_an_operation_that_nobody_knows_is_a_mistake():
    with pytest.raises(KeyError):
        twins.for_device(CPU, "attend_nothing")


def test_every_twin_is_in_the_table():
    """A public function that takes tensors, in a module named after Triton, is either a twin or a part of some."""
    shared = {"triton_parts": {"padded"}, "triton_decode": {"attend_runs", "n_splits"}, "triton_codes": {"check_codes"}}
    folder = Path(str(twins.__file__)).parent
    for path in folder.glob("triton_*.py"):
        public = {
            node.name
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not node.decorator_list
        }
        listed = {operation for operation, module in twins.MODULES.items() if module == path.stem}
        assert public - shared.get(path.stem, set()) == listed


def test_a_cpu_asks_without_loading_triton():
    asks = "import sys, torch\nfrom sessiond.kernels import twins\n"
    asks += "assert all(twins.for_device(torch.empty(1), name) is None for name in twins.MODULES)\n"
    asks += "assert 'triton' not in sys.modules, 'triton was loaded'\n"
    subprocess.run([sys.executable, "-P", "-c", asks], check=True, timeout=120)


@needs_triton
def test_the_twin_of_a_reference_takes_the_same_arguments():
    import inspect

    from sessiond.kernels.attention import attend_few

    twin = importlib.import_module(f"sessiond.kernels.{twins.MODULES['attend_few']}").attend_few
    assert list(inspect.signature(twin).parameters) == list(inspect.signature(attend_few).parameters)
