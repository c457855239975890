"""The Triton twin of attention over chosen positions, against the reference in torch."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, Draw, close

from sessiond.kernels.chosen import ChosenSpan, attend_chosen_reference
from sessiond.kernels.triton_chosen import attend_chosen as twin
from sessiond.kernels.triton_chosen import attend_chosen_batch

pytestmark = pytest.mark.usefixtures("unwritten_shows")

# head_dim, heads of a group, new tokens, chosen positions, tokens before the turn, tokens of the turn before the new
SHAPES = [
    (32, 1, 1, 0, 0, 0),
    (32, 3, 1, 0, 20, 4),
    (64, 3, 1, 1, 20, 0),
    (64, 8, 1, 15, 15, 1),
    (80, 3, 1, 16, 40, 2),
    (128, 1, 5, 17, 90, 30),
    (80, 3, 1, 400, 1000, 300),
    (32, 3, 3, 64, 300, 17),
]


def expected(query, keys, values, chosen, own, scaling, forms=(None, None)):
    """What the reference computes in fp32 on the CPU. It reads no further than `own`."""
    query, keys, values = (part.float().cpu() for part in (query, keys, values))
    forms = tuple(form if form is None else form.float().cpu() for form in forms)
    return attend_chosen_reference(ChosenSpan(query, keys, values, chosen.cpu(), own, forms), scaling)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("head_dim", "share", "n_new", "k", "before", "so_far"), SHAPES)
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_it_is_the_references_attention(head_dim, share, n_new, k, before, so_far, ragged, dtype, tolerance):
    draw = Draw()
    n = before + so_far + n_new
    query = draw.normal(2 * share, n_new, head_dim, dtype=dtype)
    keys, values = draw.cached(2, n, head_dim, dtype), draw.cached(2, n, head_dim, dtype)
    chosen = draw.positions(2, k, before)
    if ragged:
        chosen[1, k // 2 :] = -1
    own = slice(before, n)
    found = twin(query, keys, values, chosen, own, 0.2, None)
    assert close(found, expected(query, keys, values, chosen, own, 0.2), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=["keys", "values", "both"])
def test_forms_stand_in_at_the_chosen_positions(which, dtype, tolerance):
    draw = Draw()
    query = draw.normal(6, 1, 80, dtype=dtype)
    keys, values = draw.cached(2, 100, 80, dtype), draw.cached(2, 100, 80, dtype)
    chosen, own = draw.positions(2, 33, 90), slice(92, 100)
    chosen[0, 20:] = -1
    forms = tuple(draw.normal(2, 33, 80, dtype=dtype) if there else None for there in which)
    found = twin(query, keys, values, chosen, own, 0.2, None, forms)
    assert close(found, expected(query, keys, values, chosen, own, 0.2, forms), tolerance)
    assert not close(found, expected(query, keys, values, chosen, own, 0.2), tolerance)


def test_a_session_comes_out_the_same_to_the_bit_beside_any_others():
    draw = Draw()
    counts, lengths = [0, 300, 7], [5, 700, 40]
    query = draw.normal(3, 6, 1, 32)
    keys, values = ([draw.cached(2, n, 32, torch.float32) for n in lengths] for _ in range(2))
    chosen = [draw.positions(2, k, n - 2) for k, n in zip(counts, lengths, strict=True)]
    own = [slice(n - 2, n) for n in lengths]
    found = attend_chosen_batch(query, keys, values, chosen, own, 0.3)
    for b in range(3):
        alone = twin(query[b], keys[b], values[b], chosen[b], own[b], 0.3, None)
        assert close(found[b], expected(query[b], keys[b], values[b], chosen[b], own[b], 0.3), 1e-5)
        assert torch.equal(found[b], alone)


def test_what_does_not_fit_is_refused():
    draw = Draw()
    query, keys = draw.normal(6, 1, 32), draw.normal(2, 20, 32)
    chosen, own = draw.positions(2, 4, 10), slice(12, 20)
    for wrong in (chosen.int(), chosen[:1]):
        with pytest.raises(ValueError, match="chosen"):
            twin(query, keys, keys, wrong, own, 1.0, None)
    with pytest.raises(ValueError, match="form"):
        twin(query, keys, keys, chosen, own, 1.0, None, (torch.zeros(2, 3, 32, device=DEVICE), None))
    with pytest.raises(ValueError, match="keys"):
        twin(query, keys, keys, chosen, slice(12, 21), 1.0, None)
