"""The Triton twin of attention over codes, against the reference over the numbers that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, DTYPES, Draw, close

from sessiond.kernels.chosen import ChosenSpan, attend_chosen_reference
from sessiond.kernels.triton_codes import attend_codes
from sessiond.policies.quantized import Codes

pytestmark = pytest.mark.usefixtures("unwritten_shows")

# head_dim, heads of a group, new tokens, coded tokens, group
SHAPES = [
    (32, 1, 1, 1, 0),
    (32, 3, 1, 15, 16),
    (64, 8, 1, 16, 32),
    (80, 3, 1, 17, 32),
    (80, 1, 5, 70, 0),
    (128, 3, 1, 1000, 64),
]


def coded(codes: Codes) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [G, N, B] and scales [G, N, 2 P] on the tested device, room to grow included."""
    return codes._codes.to(DEVICE), codes._scales.to(DEVICE)


def session(head_dim, share, n_new, n, group, bits, dtype, seed=5):
    """Query, coded keys and values of the first `n` tokens, keys and values of all, the turn's own run."""
    draw = Draw(seed)
    query = draw.normal(2 * share, n_new, head_dim, dtype=dtype)
    own = slice(n, n + 3 + n_new)
    keys, values = (draw.cached(2, own.stop, head_dim, dtype) for _ in range(2))
    codes = [Codes(bits, group) for _ in range(2)]
    for held, exact in zip(codes, (keys, values), strict=True):
        held.extend(exact[:, :n].cpu())
    return query, codes, keys, values, own


def expected(query, codes, keys, values, own, chosen):
    """The reference, in fp32, with what the codes stand for at the `chosen` positions."""
    query, keys, values = (part.float().cpu() for part in (query, keys, values))
    forms = tuple(held.rows(held.n).at(chosen.clamp(min=0), torch.float32) for held in codes)
    return attend_chosen_reference(ChosenSpan(query, keys, values, chosen, own, forms), 0.2)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("head_dim", "share", "n_new", "n", "group"), SHAPES)
def test_it_is_attention_over_what_the_codes_stand_for(head_dim, share, n_new, n, group, bits, dtype, tolerance):
    query, codes, keys, values, own = session(head_dim, share, n_new, n, group, bits, dtype)
    coded_keys, coded_values = map(coded, codes)
    found = attend_codes(query, coded_keys, coded_values, bits, group, n, keys, values, own, 0.2)
    assert close(found, expected(query, codes, keys, values, own, torch.arange(n).expand(2, -1)), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("k", [0, 1, 40, 300])
def test_only_the_chosen_ones_of_the_coded_tokens_take_part(k, dtype, tolerance):
    query, codes, keys, values, own = session(80, 3, 1, 320, 32, 4, dtype)
    coded_keys, coded_values = map(coded, codes)
    chosen = Draw().positions(2, k, 320)
    chosen[0, k // 2 :] = -1
    found = attend_codes(query, coded_keys, coded_values, 4, 32, 320, keys, values, own, 0.2, chosen)
    assert close(found, expected(query, codes, keys, values, own, chosen.cpu()), tolerance)


def test_what_does_not_fit_is_refused():
    query, codes, keys, values, own = session(32, 3, 1, 20, 16, 4, torch.float32)
    (one, scales), other = map(coded, codes)
    for wrong in ((one[..., :8], scales), (one, scales[..., :2]), (one[:, :19], scales), (one, scales.float())):
        with pytest.raises(ValueError, match=r"codes|scales"):
            attend_codes(query, wrong, other, 4, 16, 20, keys, values, own, 0.2)
    with pytest.raises(ValueError, match="chosen"):
        attend_codes(query, (one, scales), other, 4, 16, 20, keys, values, own, 0.2, torch.zeros(1, 4).long())
