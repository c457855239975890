"""The rotary embedding is the models' own, and undoing it gives back what was rotated."""

from __future__ import annotations

import pytest
import torch
from engine_harness import peer_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_to_a_part

from sessiond.fused import ropes_of
from sessiond.kernels.rope import Rope

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
POSITIONS = torch.tensor([0, 1, 2, 63, 700, 2047])


def rope_of(peer) -> Rope:
    (rope,) = ropes_of(peer.model.rotary_emb).values()
    return rope


def keys_of(peer, seed: int = 0) -> torch.Tensor:
    config = peer.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(config.num_key_value_heads, len(POSITIONS), head_dim, generator=draw)


@pytest.mark.parametrize("name", ["llama", "phi3", "yarn"])
def test_rotates_as_the_model_does(name):
    peer = peer_model("llama", rope_parameters=YARN) if name == "yarn" else peer_model(name)
    keys = keys_of(peer)
    cos, sin = peer.model.rotary_emb(keys, POSITIONS[None])
    apply = apply_to_a_part if name == "phi3" else apply_rotary_pos_emb
    wanted = apply(keys[None], keys[None], cos, sin)[1][0]
    torch.testing.assert_close(rope_of(peer).rotate(keys, POSITIONS), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted[:, 1:], keys[:, 1:], atol=0.1)


def test_yarn_scales_what_it_rotates_and_phi3_leaves_channels_as_they_are():
    """Otherwise the tests above would not see either."""
    assert rope_of(peer_model("llama", rope_parameters=YARN)).scale > 1.1
    peer = peer_model("phi3")
    assert 2 * len(rope_of(peer).inv_freq) < keys_of(peer).shape[-1]


@pytest.mark.parametrize("name", ["llama", "phi3", "yarn"])
def test_undo_gives_back_what_was_rotated(name):
    peer = peer_model("llama", rope_parameters=YARN) if name == "yarn" else peer_model(name)
    rope, keys = rope_of(peer), keys_of(peer)
    torch.testing.assert_close(rope.undo(rope.rotate(keys, POSITIONS), POSITIONS), keys, rtol=1e-5, atol=1e-5)


def test_every_head_may_have_positions_of_its_own():
    rope, keys = Rope(torch.tensor([1.0, 0.1, 0.01])), torch.randn(2, 5, 8)
    positions = torch.tensor([[0, 3, 4, 9, 11], [1, 2, 3, 4, 5]])
    found = rope.rotate(keys, positions)
    for group in range(2):
        assert torch.equal(found[group], rope.rotate(keys[group], positions[group]))
