"""Which matrices compute with which codes: a GGUF file's own where they are proven, rounded from bf16 elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sessiond import modelstore
from sessiond.blockfile import read_blocks, write_blocks
from sessiond.errors import ModelCorrupt
from sessiond.ggufblocks import kept_blocks
from sessiond.kernels.blockweights import linear_blocks_reference, quantize
from sessiond.model import Feed, Model
from sessiond.modelcheck import BLOCKS, weight_files
from sessiond.modelweights import BlockLinear, load_blocks

# As in smollm2's file, and a type of each other kind: Q4_0, a type that is not kept, and F32.
TYPES = {
    "token_embd.weight": "Q8_0",
    "attn_q.weight": "Q4_1",
    "attn_k.weight": "Q4_1",
    "attn_v.weight": "Q4_0",
    "attn_output.weight": "Q5_1",
    "ffn_gate.weight": "Q8_0",
    "ffn_down.weight": "Q4_1",
}
LAYER = "model.layers.1."
KEPT = {
    "self_attn.q_proj.weight": 4,
    "self_attn.k_proj.weight": 4,
    "self_attn.v_proj.weight": 4,
    "mlp.gate_proj.weight": 8,
    "mlp.down_proj.weight": 4,
}
ROUNDED = {"self_attn.o_proj.weight": 4, "mlp.up_proj.weight": 8}  # the second stands beside the gate
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", types=TYPES)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SESSIOND_CACHE", str(tmp_path_factory.mktemp("cache")))
        return modelstore.resolve(str(source)).path


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True)


def test_a_conversion_keeps_the_codes_of_the_files_own_types(converted: Path) -> None:
    kept = read_blocks(converted / BLOCKS)
    bits = {name.removeprefix(LAYER): weights.bits for name, weights in kept.items() if name.startswith(LAYER)}
    assert bits == KEPT
    assert kept[EMBEDDING].bits == 8
    assert len(kept) == 2 * len(KEPT) + 1


def test_kept_codes_are_the_converted_weights_bit_for_bit(converted: Path) -> None:
    weights = load(converted).state_dict()
    for name, kept in read_blocks(converted / BLOCKS).items():
        assert torch.equal(kept.dequantize(torch.bfloat16), weights[name]), name


def test_kept_codes_are_those_of_the_file(source: Path, converted: Path) -> None:
    reader = gguf.GGUFReader(str(source))
    (down,) = [tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight"]
    expected = gguf.quants.dequantize(down.data, down.tensor_type)
    assert np.array_equal(read_blocks(converted / BLOCKS)[f"{LAYER}mlp.down_proj.weight"].dequantize(), expected)


def test_codes_that_do_not_give_the_converted_weights_are_not_kept(source: Path, converted: Path) -> None:
    module = load(converted)
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    kept = kept_blocks(source, module)
    assert f"{LAYER}mlp.down_proj.weight" not in kept
    assert f"{LAYER}mlp.gate_proj.weight" in kept


def test_the_file_of_codes_is_taken_for_no_weights(converted: Path) -> None:
    assert [file.name for file in weight_files(converted)] == ["model.safetensors"]
    _, found = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True, local_files_only=True)
    assert not found["unexpected_keys"]
    assert json.loads((converted / "sessiond.json").read_text())["blocks"] is True


def test_a_file_without_such_types_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSIOND_CACHE", str(tmp_path / "cache"))
    path = modelstore.resolve(str(write_gguf(tmp_path / "plain.gguf"))).path
    assert not (path / BLOCKS).exists()
    assert json.loads((path / "sessiond.json").read_text())["blocks"] is False


def test_int4_takes_what_is_kept_and_rounds_the_rest(converted: Path) -> None:
    module = load(converted)
    blocks = load_blocks(converted, module, "int4")
    kept = read_blocks(converted / BLOCKS)
    assert len(blocks) == 2 * 7 + 1
    for name in KEPT:
        assert torch.equal(blocks[LAYER + name].dequantize(), kept[LAYER + name].dequantize())
    for name, bits in ROUNDED.items():
        expected = quantize(module.get_parameter(LAYER + name), bits)
        assert torch.equal(blocks[LAYER + name].dequantize(), expected.dequantize())
    assert torch.equal(blocks["lm_head.weight"].dequantize(), kept[EMBEDDING].dequantize())  # tied


@pytest.mark.parametrize(
    ("types", "names"),
    [
        ({"attn_q.weight": "Q8_0"}, ["q_proj", "k_proj", "v_proj"]),
        ({"attn_v.weight": "Q8_0"}, ["q_proj", "k_proj", "v_proj"]),
        ({"ffn_up.weight": "Q8_0"}, ["gate_proj", "up_proj"]),
        ({"attn_output.weight": "Q8_0"}, []),
    ],
    ids=["query", "value", "up", "none"],
)
def test_layers_with_the_same_inputs_have_codes_of_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, types: dict[str, str], names: list[str]
) -> None:
    monkeypatch.setenv("SESSIOND_CACHE", str(tmp_path / "cache"))
    path = modelstore.resolve(
        str(write_gguf(tmp_path / "tiny.gguf", types=TYPES | {"ffn_gate.weight": "Q4_0"} | types))
    ).path
    kept, module = read_blocks(path / BLOCKS), load(path)
    blocks = load_blocks(path, module, "int4")
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        weight, bits = f"{LAYER}{name}.weight", 8 if name.partition(".")[2] in names else 4
        own = kept.get(weight)
        expected = own if own and own.bits == bits else quantize(module.get_parameter(weight), bits)
        assert blocks[weight].bits == bits, name
        assert torch.equal(blocks[weight].dequantize(), expected.dequantize()), name


def test_int8_keeps_eight_bits_and_rounds_everything_else(converted: Path) -> None:
    module = load(converted)
    blocks = load_blocks(converted, module, "int8")
    kept = read_blocks(converted / BLOCKS)
    assert {weights.bits for weights in blocks.values()} == {8}
    gate, down = f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.down_proj.weight"
    assert torch.equal(blocks[gate].dequantize(), kept[gate].dequantize())
    assert torch.equal(blocks[down].dequantize(), quantize(module.get_parameter(down), 8).dequantize())


def test_without_the_kept_codes_everything_is_rounded_and_the_output_has_eight_bits(converted: Path) -> None:
    module = load(converted)
    blocks = load_blocks(converted, module, "int4", kept=False)
    assert {name: weights.bits for name, weights in blocks.items() if weights.bits == 8} == {"lm_head.weight": 8}
    down = f"{LAYER}mlp.down_proj.weight"
    assert torch.equal(blocks[down].dequantize(), quantize(module.get_parameter(down), 4).dequantize())


def test_matrices_whose_inputs_are_no_multiple_of_32_stay(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    blocks = load_blocks(tmp_path, LlamaForCausalLM(config), "int8")
    assert not any("down_proj" in name for name in blocks)
    assert len(blocks) == 7


def test_codes_that_do_not_fit_the_model_are_refused(converted: Path, tmp_path: Path) -> None:
    write_blocks(tmp_path / BLOCKS, {f"{LAYER}mlp.down_proj.weight": quantize(torch.zeros(3, 32), 4)})
    with pytest.raises(ModelCorrupt, match="another shape"):
        load_blocks(tmp_path, load(converted), "int4")
    module = load(converted)
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelCorrupt, match=r"layers\.0\.mlp\.up_proj .*cannot be quantized"):
        load_blocks(converted, module, "int4")


def test_codes_of_another_conversion_are_refused(source: Path, converted: Path, tmp_path: Path) -> None:
    other = kept_blocks(write_gguf(tmp_path / "other.gguf", types=TYPES, seed=1), load(converted))
    assert not other, "proven against the converted weights, they would not have been kept"
    kept = read_blocks(converted / BLOCKS)
    first, second = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
    write_blocks(tmp_path / BLOCKS, {first: kept[second]})
    with pytest.raises(ModelCorrupt, match=r"other weights than those of model\.layers\.0\.mlp\.down_proj"):
        load_blocks(tmp_path, load(converted), "int4")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        load_blocks(converted, load(converted).to(dtype), "int4")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_loaded_model_computes_with_its_codes(converted: Path, kind: str) -> None:
    model = Model.load(converted, torch.bfloat16, kind)
    down = model.module.model.layers[1].mlp.down_proj
    assert isinstance(down, BlockLinear)
    x = torch.randn(3, 64).bfloat16()
    expected = load_blocks(converted, load(converted), kind)[f"{LAYER}mlp.down_proj.weight"]
    assert torch.equal(down(x), linear_blocks_reference(x, expected))
    assert not any(isinstance(child, torch.nn.Linear) for child in model.module.modules())
    ids, logits = list(range(10, 40)), []
    for one in (model, Model.load(converted, torch.bfloat16)):
        logits.append(one.step([Feed(one.new_cache(), ids, 0)], [29])[0])
    apart = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert 0 < apart < 0.3  # random weights pass every rounding on, enlarged
