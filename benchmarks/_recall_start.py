"""Weights from which the recall model learns within minutes: first layer local, second layer by likeness.

Recall takes two layers in series: the first tells each token which tokens stand before it, the second finds the token
that stands behind what is asked. From random weights neither part gets a gradient until the other works, which takes
thousands of steps. So the first layer's heads start by looking one or two tokens back (a bias, turned by the rotary
embedding, is a preference for a distance), and what they write is what the second layer's keys start by reading.
How sharply, which of it counts when, and the copying to the output is left to training: at the start a few percent of
facts are recalled at the benchmark's length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

N_TURNING = 8  # fastest pairs of channels of a head: these tell positions, the slower ones tell tokens
BIAS = 8.0  # of a pair in the first layer: sharp to about one token
WRITE, LIKENESS, COPY = 0.2, 2.5, 0.8  # scales of the first layer's output, of the second's scores, of its output


@torch.no_grad()
def set_start(module: LlamaForCausalLM, draw: torch.Generator) -> None:
    """Set the attention weights of a model of two layers and two key/value heads; its MLPs start by adding nothing."""
    config = module.config
    hidden, size = config.hidden_size, config.head_dim
    shares = config.num_attention_heads // 2
    first, second = (layer.self_attn for layer in module.model.layers)
    for layer in module.model.layers:
        layer.mlp.down_proj.weight.zero_()
        for linear in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.bias.zero_()

    def heads(one: Tensor, other: Tensor) -> Tensor:
        """Query heads of the first key/value head, then of the second."""
        return torch.cat([one] * shares + [other] * shares)

    token = _orthogonal(hidden, draw)[:size]  # what of a token is told, to all later readers
    one_back, two_back = _orthogonal(hidden, draw).split(size)[:2]  # where the first layer writes it
    frequencies = module.model.rotary_emb.inv_freq
    for linear in (first.q_proj, first.k_proj):
        linear.weight.mul_(0.1)  # who stands there matters little
    ahead = [_preference(size, draw) for _ in range(2)]
    first.k_proj.bias.copy_(torch.cat(ahead))
    first.q_proj.bias.copy_(heads(*(turned(ahead[back - 1], frequencies, -back) for back in (1, 2))))
    first.v_proj.weight.copy_(torch.cat([token, token]) * WRITE)
    first.o_proj.weight.copy_(heads(one_back, two_back).T * WRITE)

    # One head asks: before whom does the token stand that I am? The other: two before whom, the one before me?
    second.q_proj.weight.copy_(heads(token, one_back) * LIKENESS)
    second.k_proj.weight.copy_(torch.cat([one_back, two_back]) * LIKENESS)
    copied = _orthogonal(hidden, draw).split(size)[:2]
    second.v_proj.weight.copy_(torch.cat(copied) * COPY)
    second.o_proj.weight.copy_(heads(*copied).T * COPY)


def turned(vector: Tensor, frequencies: Tensor, distance: float) -> Tensor:
    """A head's [D] as the rotary embedding turns it over `distance` positions: channel i is paired with D/2 + i."""
    real, imaginary = vector.chunk(2)
    cos, sin = torch.cos(frequencies * distance), torch.sin(frequencies * distance)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin])


def _preference(size: int, draw: torch.Generator) -> Tensor:
    """A bias [D] of which only the turning pairs are not zero."""
    phases = torch.rand(N_TURNING, generator=draw) * 2 * math.pi
    bias = torch.zeros(2, size // 2)
    bias[0, :N_TURNING], bias[1, :N_TURNING] = phases.cos() * BIAS, phases.sin() * BIAS
    return bias.flatten()


def _orthogonal(n: int, draw: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=draw))[0]
