"""No position outside what was asked for passes."""

from __future__ import annotations

import pytest
import torch

from sessiond.kernels.chosen_positions import has_none, has_none_reference


@pytest.mark.parametrize("asked", [has_none, has_none_reference])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_positions_are_within_or_refused(asked, dtype):
    there = torch.arange(100).to(dtype).view(2, 50)
    assert not asked(there, 100)
    assert not asked(there[:, :0], 0)
    assert not asked(there.T[3:], 100)
    with pytest.raises(ValueError, match="outside"):
        asked(there, 99)
    for place in range(0, 100, 9):
        padded = there.clone()
        padded.view(-1)[place] = -1
        assert asked(padded, 100)
        for outside in (-2, 100, torch.iinfo(dtype).min, torch.iinfo(dtype).max):
            padded.view(-1)[place] = outside
            with pytest.raises(ValueError, match="outside"):
                asked(padded, 100)
