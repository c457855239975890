"""The kernels' threads: every chunk is computed once, whoever asks, how many at once, and in whichever process."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_harness import torch_threads
from kernel_marks import needs_build

from sessiond.kernels.matrix import Matrix
from sessiond.kernels.native_library import lib

pytestmark = needs_build


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return Matrix(torch.randn(768, 256, generator=torch.Generator().manual_seed(1)).bfloat16())


def rows(seed: int, n: int = 3) -> torch.Tensor:
    return torch.randn(n, 256, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("n_threads", [2, 3, 9])
def test_any_number_of_threads_gives_the_same(matrix: Matrix, n_threads: int):
    with torch_threads(1):
        expected = matrix.product(rows(1))
    with torch_threads(n_threads):
        assert all(torch.equal(matrix.product(rows(1)), expected) for _ in range(500))


@pytest.mark.parametrize("n_threads", [2, 7])
def test_every_chunk_is_run_once_before_its_region_ends(n_threads: int):
    assert lib.probe_regions(100_000, 16, n_threads) == 0


def test_many_callers_at_once_each_get_their_own(matrix: Matrix):
    with torch_threads(1):
        expected = [matrix.product(rows(seed)) for seed in range(6)]
    together = threading.Barrier(6)

    def ask(seed: int) -> bool:
        torch.set_num_threads(4)
        x = rows(seed)
        together.wait()
        return all(torch.equal(matrix.product(x), expected[seed]) for _ in range(300))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(6)))


def test_workers_sleep_and_are_woken(matrix: Matrix):
    with torch_threads(3):
        expected = matrix.product(rows(2))
        for pause in (0.0, 0.0001, 0.001, 0.01) * 20:
            threading.Event().wait(pause)
            assert torch.equal(matrix.product(rows(2)), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("busy", [False, True], ids=["between regions", "in the middle of one"])
def test_a_forked_process_starts_threads_of_its_own(matrix: Matrix, busy: bool):
    stop = threading.Event()

    def ask() -> None:
        torch.set_num_threads(2)
        while not stop.is_set():
            matrix.product(rows(4))

    with torch_threads(2):
        expected, x = matrix.product(rows(3)), rows(3)
        other = threading.Thread(target=ask)
        if busy:
            other.start()
        try:
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)  # one that waits for threads it has not got must not wait forever
                    os._exit(0 if all(torch.equal(matrix.product(x), expected) for _ in range(50)) else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            stop.set()
            if busy:
                other.join()
