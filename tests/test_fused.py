"""What the plan of the compiled decoder takes of a model, what it leaves to transformers, and what its steps refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engine_harness import KERNEL_SIZED, draw_weights, make_exact_pair, peer_model, random_ids, torch_threads
from kernel_marks import levels, needs_build
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig

from sessiond import fused
from sessiond.blockfile import write_blocks
from sessiond.kernels.blockweights import quantize
from sessiond.kernels.decoder import SessionRows
from sessiond.kernels.matrix import Matrix, interleaved, stacked
from sessiond.model import Feed, Model
from sessiond.modelcheck import BLOCKS
from sessiond.modelweights import load_blocks, with_blocks

pytestmark = needs_build

# As in test_kernels_in_models.py: of the peer's largest logit.
TOLERANCE = 0.05
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def threads():
    with torch_threads(2):
        yield


def modules(config: Any) -> tuple[Any, Any]:
    """A model in bf16, and the same weights in fp32."""
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    draw_weights(module, seed=4)
    module = module.to(torch.bfloat16).eval()
    return module, copy.deepcopy(module).float()


def difference(model: Model, peer: Any, ids: list[int]) -> float:
    with torch.inference_mode():
        expected = peer(torch.tensor([ids])).logits[0]
    found = model.step([Feed(model.new_cache(), ids, 0)], range(len(ids)))
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_bias": True},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 0.5},
        {"head_dim": 256},
        {"sliding_window": 8},  # not a Llama's: transformers knows no such thing, and the config keeps it
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 128,
            }
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_llama_of_any_kind_is_computed_as_transformers_does(changes):
    module, peer = modules(LlamaConfig(**SIZES | changes))
    model = Model(module)
    assert model.invariant_rows is None, "it goes through the compiled decoder"
    assert difference(model, peer, [token % 131 for token in random_ids(60, 1)]) < TOLERANCE


def test_a_gemma_with_images_is_computed_by_its_language_model():
    text = SIZES | {"query_pre_attn_scalar": 32, "sliding_window": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=128, boi_token_index=129, eoi_token_index=130,
    )  # fmt: skip
    module, peer = modules(config)
    model = Model(module)
    assert model.invariant_rows is None
    assert difference(model, peer, [token % 128 for token in random_ids(60, 2)]) < TOLERANCE


class Adapted(nn.Module):
    """A linear layer with something added, as adapters do it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.weight, self.bias = base_layer, base_layer.weight, base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + 1


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("how", ["adapter", "subclass", "hook"])
def test_a_model_that_computes_more_than_its_weights_goes_through_its_own_forward(how):
    module, _ = modules(LlamaConfig(**SIZES))
    mlp = module.model.layers[1].mlp
    if how == "adapter":
        mlp.up_proj = Adapted(mlp.up_proj)
    elif how == "subclass":
        doubled = Doubled(64, 160, bias=False, dtype=torch.bfloat16)
        doubled.weight = mlp.up_proj.weight
        mlp.up_proj = doubled
    else:
        mlp.register_forward_hook(lambda *args: args[-1] * 2)
    peer = copy.deepcopy(module).float()
    model = Model(module)
    assert model.invariant_rows == 1
    assert difference(model, peer, [token % 131 for token in random_ids(30, 3)]) < TOLERANCE


def test_the_weights_of_a_layer_are_let_go_before_the_next_is_laid_out(monkeypatch):
    module, _ = modules(LlamaConfig(**SIZES))
    held = []

    class Watched(Matrix):
        def __init__(self, *args):
            super().__init__(*args)
            held.append([layer.mlp.down_proj.weight.numel() > 0 for layer in module.model.layers])

    monkeypatch.setattr(fused, "Matrix", Watched)
    Model(module)
    assert held == [[True, True]] * 4 + [[False, True]] * 4 + [[False, False]]


@levels
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama-kernels", "qwen2-kernels", "phi3-kernels", "gemma3-kernels"])
def test_quantized_weights_are_computed_on_every_level(name, kind, level, tmp_path):
    """Beside transformers in fp32 on the effective weights: only what rows lose in codes of 8 bits is between them."""
    module, peer = peer_model(name, dtype=torch.bfloat16), peer_model(name)
    blocks = load_blocks(tmp_path, module, kind)
    for weight, codes in blocks.items():
        peer.get_submodule(weight.removesuffix(".weight")).weight = nn.Parameter(codes.dequantize())
    peer.get_input_embeddings().weight = nn.Parameter(module.get_input_embeddings().weight.float())
    for parameter in peer.parameters():
        if parameter.dim() == 1:
            parameter.data.copy_(parameter.bfloat16())
    model = Model(with_blocks(module, blocks))
    assert model.invariant_rows is None
    with level:
        assert difference(model, peer, random_ids(40, 6)) < 2 * TOLERANCE


@pytest.mark.parametrize("bits", [{"q_proj": 8, "k_proj": 4}, {"v_proj": 8}, {"gate_proj": 4, "up_proj": 8}])
def test_the_decoder_multiplies_by_the_codes_that_were_loaded(bits, tmp_path, monkeypatch):
    """Also where a file has parts of one of its matrices in different kinds of codes."""
    module, kept, given = peer_model("llama-kernels", dtype=torch.bfloat16), {}, []
    for name, parameter in module.named_parameters():
        kind = bits.get(name.removesuffix(".weight").rpartition(".")[2])
        if kind:
            kept[name] = quantize(parameter, kind)
            parameter.data = kept[name].dequantize(torch.bfloat16)
    write_blocks(tmp_path / BLOCKS, kept)
    blocks = load_blocks(tmp_path, module, "int4")

    class Watched(Matrix):
        def __init__(self, weight, *rest):
            super().__init__(weight, *rest)
            given.append(weight.dequantize())

    monkeypatch.setattr(fused, "Matrix", Watched)
    Model(with_blocks(module, blocks))
    for layer in range(3):
        at = f"model.layers.{layer}"
        parts = [blocks[f"{at}.self_attn.{name}_proj.weight"].dequantize() for name in "qkv"]
        assert torch.equal(given[4 * layer], stacked(parts))
        parts = [blocks[f"{at}.mlp.{name}_proj.weight"].dequantize() for name in ("gate", "up")]
        assert torch.equal(given[4 * layer + 2], interleaved(*parts))


@levels
@pytest.mark.parametrize("name", KERNEL_SIZED)
def test_every_level_of_instructions_computes_the_layers(name, level):
    pair, ids = make_exact_pair(name), random_ids(150, 5)
    expected = pair.peer_logits(ids)
    with level:
        cache = pair.ours.new_cache()
        rows = [pair.ours.step([Feed(cache, ids[:140], 0)], range(140))]
        rows += [pair.ours.step([Feed(cache, [ids[at]], at)], [0]) for at in range(140, 150)]
    assert float((torch.cat(rows) - expected).abs().max() / expected.abs().max()) < 2 * TOLERANCE


# --- what would read or write beyond memory ------------------------------------------------------------------------


def test_a_step_beyond_a_sessions_memory_is_refused():
    model = make_exact_pair("llama-kernels").ours
    cache = model.new_cache()
    model.step([Feed(cache, [1], cache.capacity - 1)], [0])
    with pytest.raises(ValueError, match="positions from"):
        model.step([Feed(cache, [1, 2], cache.capacity - 1)], [0])
    with pytest.raises(ValueError, match="positions from"):
        model.step([Feed(cache, [1], -1)], [0])


def test_a_step_with_a_session_without_rows_is_refused():
    """Its spans have room for one a row."""
    model = make_exact_pair("llama-kernels").ours
    with pytest.raises(ValueError, match="0 rows of a session"):
        model.step([Feed(model.new_cache(), ids, 0) for ids in ([1], *[[]] * 8)], [])


@pytest.mark.parametrize("rows", [[2], [-1], [0, 1, 0]])
def test_logits_of_rows_that_are_not_there_are_refused(rows):
    model = make_exact_pair("llama-kernels").ours
    with pytest.raises(ValueError, match="logits of rows"):
        model.step([Feed(model.new_cache(), [1, 2], 0)], rows)


def test_parts_of_other_sizes_are_refused():
    decoder = make_exact_pair("llama-kernels").ours._fused.decoder
    hidden, angles = torch.zeros(2, 64), torch.zeros(1, 2, 2, decoder.shape.rotary // 2)
    session = SessionRows(0, 64, 0, 0, 2)
    for wrong in (
        (hidden[:, :32], angles, [session]),
        (hidden, angles[:, :1], [session]),
        (hidden, angles[:, :, :1], [session]),
        (hidden.double(), angles, [session]),
        (hidden, angles, [SessionRows(0, 64, 0, 0, 1)]),
        (hidden, angles, [SessionRows(0, 64, 0, 1, 1), SessionRows(0, 64, 0, 0, 1)]),
    ):
        with pytest.raises(ValueError, match=r"hidden|angles|rows|positions"):
            decoder.step(*wrong)
