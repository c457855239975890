"""Quantized weights on disk come back as they were written; what is no such file is said to be damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sessiond.blockfile import read_blocks, write_blocks
from sessiond.errors import ModelCorrupt
from sessiond.kernels.blockweights import BlockWeights, quantize


def same(one: BlockWeights, other: BlockWeights) -> bool:
    parts = [(one.codes, other.codes), (one.scales, other.scales)]
    if one.lows is not None and other.lows is not None:
        parts.append((one.lows, other.lows))
    return one.bits == other.bits and all(torch.equal(*pair) for pair in parts)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (0, 64)])
def test_blocks_come_back(tmp_path: Path, bits: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    written = {"a.weight": quantize(torch.randn(shape), bits), "a.b.weight": quantize(torch.randn(3, 32), 12 - bits)}
    write_blocks(tmp_path / "blocks.safetensors", written)
    found = read_blocks(tmp_path / "blocks.safetensors")
    assert found.keys() == written.keys()
    assert all(same(found[name], written[name]) for name in written)


def test_two_codes_of_four_bits_share_a_byte(tmp_path: Path) -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    ones = torch.ones(1, 1).half()
    write_blocks(tmp_path / "b", {"w": BlockWeights(4, codes, ones, -ones)})
    assert load_file(tmp_path / "b")["w.codes"].tolist() == [[n | n << 4 for n in range(16)]]


@pytest.mark.parametrize(
    "damage", ["missing", "garbage", "no scales", "scales of another shape", "codes in no blocks", "flat"]
)
def test_a_damaged_file_is_a_typed_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "b"
    codes, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 2).half()
    if damage == "garbage":
        path.write_bytes(b"no safetensors")
    elif damage == "no scales":
        save_file({"w.codes": codes}, path)
    elif damage == "scales of another shape":
        save_file({"w.codes": codes, "w.scales": scales[:1]}, path)
    elif damage == "codes in no blocks":
        save_file({"w.codes": codes[:, :5].contiguous(), "w.scales": scales, "w.lows": scales.clone()}, path)
    elif damage == "flat":
        save_file({"w.codes": codes.flatten(), "w.scales": scales, "w.lows": scales.clone()}, path)
    with pytest.raises(ModelCorrupt, match="cannot be read"):
        read_blocks(path)
