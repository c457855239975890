"""The floors are measured by work that is really done: every byte read, every multiply-add counted."""

from __future__ import annotations

import pytest
import torch
from engine_harness import torch_threads

from sessiond.kernels.native_library import BUILT, lib
from sessiond.kernels.probe import KINDS, multiply_adds, multiply_rate, read_rate, read_sum, read_sum_reference


@pytest.fixture(params=[0, 1, 2] if BUILT else [0])
def level(request):
    """Each level of instructions that this processor has."""
    if BUILT:
        if lib.isa_here() < request.param:
            pytest.skip("this processor has no such instructions")
        lib.limit_isa(request.param)
        yield request.param
        lib.limit_isa(2)
    else:
        yield request.param


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_words", [0, 32, 131072 - 32, 131072, 131072 + 32, 3 * 131072 + 64])
def test_every_word_is_read(level, n_words, threads):
    data = torch.randint(-(2**62), 2**62, (n_words,), generator=torch.Generator().manual_seed(n_words))
    with torch_threads(threads):
        assert read_sum(data) == read_sum_reference(data)
        for at in (0, n_words // 2, n_words - 1) if n_words else ():
            data[at] += 1
            assert read_sum(data) == read_sum_reference(data)


@pytest.mark.parametrize("data", [torch.zeros(31, dtype=torch.int64), torch.zeros(64), torch.zeros(64, 2).long().T[0]])
def test_what_is_no_whole_step_is_refused(data):
    with pytest.raises(ValueError, match="multiple of 256"):
        read_sum(data)


@pytest.mark.skipif(not BUILT, reason="the kernels are not compiled")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_multiply_adds_are_done_as_are_counted(level, kind, threads):
    for rounds in (0, 1, 129):
        with torch_threads(threads):
            n, sums = multiply_adds(kind, rounds)
        assert sums.shape == (threads, 16)
        assert int(sums.sum()) == n
        assert (n > 0) == (rounds > 0)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="fp64"):
        multiply_adds("fp64", 1)


def test_rates_are_positive():
    assert read_rate(torch.zeros(1 << 16, dtype=torch.int64)) > 0
    assert multiply_rate("fp32", 8) > 0
