"""A transformers model's layers handed over to the compiled decoder, where its architecture and this machine allow it.

The plan is read off the loaded module, part by part; a part that the decoder does not know makes no plan, and the step
then goes through the module's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sessiond.kernels.blockweights import BLOCK, BlockWeights
from sessiond.kernels.decoder import MOST_HEAD_DIM, Decoder, DecoderLayer, DecoderShape, DecoderStep
from sessiond.kernels.matrix import GATE_RUN, Matrix, interleaved, stacked
from sessiond.kernels.native_library import BUILT
from sessiond.kernels.rope import Rope
from sessiond.modelweights import BlockLinear

_GATES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Fused:
    """The compiled decoder of a model, with what goes in: embeddings and angles."""

    def __init__(
        self,
        decoder: Decoder,
        embed: Callable[[Tensor], Tensor],
        ropes: Sequence[Rope],
        softcap: float | None,
    ) -> None:
        """`ropes`: of each kind of layer. `softcap` of logits."""
        self.decoder = decoder
        self.seeing_all = tuple(i for i, layer in enumerate(decoder.layers) if not layer.window)  # of history
        self._embed = embed
        self._ropes = ropes
        self._angles = torch.empty(0, 2, 0, 0)
        self._softcap = softcap

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """The residual stream of tokens: [N, hidden] fp32."""
        return self._embed(torch.tensor(ids)).float()

    def logits(self, step: DecoderStep, rows: Sequence[int]) -> Tensor:
        """Of a computed step's rows: [len(rows), V] fp32."""
        logits = step.logits(rows)
        return logits if self._softcap is None else (logits / self._softcap).tanh() * self._softcap

    def angles(self, n: int) -> Tensor:
        """Cosines and sines of at least the first `n` positions: [kinds, 2, P, rotary / 2] fp32."""
        if self._angles.shape[2] < n:
            self._angles = torch.stack([rope.table(n) for rope in self._ropes])
        return self._angles


def fuse(module: Any, windows: Sequence[int]) -> Fused | None:
    """The compiled decoder of a causal language model; None where it cannot compute this one.

    It takes the weights of the layers out of `module` (`let_go`), which then has no forward of its own.

    `windows`: keys that a query sees in each layer, 0: all.
    """
    config, model = module.config.get_text_config(), getattr(module.model, "language_model", module.model)
    gate = _GATES.get(getattr(config, "hidden_activation", None) or config.hidden_act)
    ropes = ropes_of(model.rotary_emb)
    first = model.layers[0].self_attn
    head_dim: int = first.head_dim
    if not BUILT or module.dtype is not torch.bfloat16 or gate is None or not ropes:
        return None
    if getattr(config, "attn_logit_softcapping", None):
        return None
    if not all(_is_plain(child) for child in (module.lm_head, *model.modules())):
        return None
    if config.hidden_size % BLOCK or config.intermediate_size % BLOCK or head_dim % BLOCK or head_dim > MOST_HEAD_DIM:
        return None
    shape = DecoderShape(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        config.intermediate_size,
        2 * len(next(iter(ropes.values())).inv_freq),
        gate,
        float(config.rms_norm_eps),
    )
    kinds = list(ropes)
    layers = []
    for layer, window in zip(model.layers, windows, strict=True):
        layers.append(_layer(layer, shape, kinds, window))
        let_go(layer)  # now, not when all have been copied: memory never holds the weights twice
    decoder = Decoder(shape, layers, _norm(model.norm), _matrix([module.lm_head], lambda parts: parts[0]))
    softcap = getattr(config, "final_logit_softcapping", None)
    return Fused(decoder, model.embed_tokens, list(ropes.values()), softcap)


def ropes_of(embedding: nn.Module | None) -> dict[str, Rope]:
    """Rotary embedding of each kind of layer that has its own, of all under ""; empty if it has no frequencies."""
    ropes = {}
    for name, inv_freq in embedding.named_buffers() if embedding is not None else ():
        prefix = name.removesuffix("inv_freq")
        if prefix != name and not prefix.endswith("original_"):
            scaling = float(getattr(embedding, f"{prefix}attention_scaling", 1.0))
            ropes[prefix.removesuffix("_")] = Rope(inv_freq.float(), scaling)
    return ropes


def let_go(module: Any) -> None:
    """Free the weights of linear layers, which the compiled decoder has in its own layout. Embeddings stay."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
        elif isinstance(linear, BlockLinear):
            linear.weights = None


def _is_plain(child: nn.Module) -> bool:
    """Whether a module computes by its class alone, and is no adapter around a linear layer."""
    if child._forward_hooks or child._forward_pre_hooks:
        return False
    return not hasattr(child, "base_layer") and (not isinstance(child, nn.Linear) or type(child) is nn.Linear)


def _layer(layer: Any, shape: DecoderShape, kinds: list[str], window: int) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    is_gemma = hasattr(layer, "pre_feedforward_layernorm")
    kind = getattr(attention, "layer_type", "") or ""
    return DecoderLayer(
        qkv=_qkv(attention),
        out=_matrix([attention.o_proj], stacked),
        gate_up=_gate_up(mlp, shape.inner),
        down=_matrix([mlp.down_proj], stacked),
        before_attention=_norm(layer.input_layernorm),
        after_attention=_norm(layer.post_attention_layernorm) if is_gemma else None,
        before_mlp=_norm(layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm),
        after_mlp=_norm(layer.post_feedforward_layernorm) if is_gemma else None,
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        window=window,
        rope=kinds.index(kind) if kind in kinds else 0,
        scaling=float(attention.scaling),
    )


def _qkv(attention: Any) -> Matrix:
    if hasattr(attention, "qkv_proj"):
        return _matrix([attention.qkv_proj], stacked)
    return _matrix([attention.q_proj, attention.k_proj, attention.v_proj], stacked)


def _gate_up(mlp: Any, inner: int) -> Matrix:
    def turns(bias: Tensor) -> Tensor:
        return bias.view(2, -1, GATE_RUN).transpose(0, 1).flatten()

    if not hasattr(mlp, "gate_up_proj"):
        return _matrix([mlp.gate_proj, mlp.up_proj], lambda parts: interleaved(*parts), turns)
    return _matrix([mlp.gate_up_proj], lambda parts: interleaved(*_halves(parts[0], inner)), turns)


def _matrix(
    linears: Sequence[nn.Module],
    join: Callable[[Any], Tensor | BlockWeights | None],
    order: Callable[[Tensor], Tensor] | None = None,
) -> Matrix:
    """Linear layers as one matrix. They are all dense, or in codes of one kind (modelweights.py).

    `order`: brings the biases, one after the other, into the order of `join`'s outputs, if that is another.
    """
    weights = [_weight(linear) for linear in linears]
    joined = join(weights)
    assert joined is not None
    biases: list[Tensor | None] = [linear.bias for linear in linears]  # type: ignore[misc]
    if all(bias is None for bias in biases):
        return Matrix(joined)
    given = [torch.zeros(w.shape[0]) if bias is None else bias.float() for bias, w in zip(biases, weights, strict=True)]
    bias = torch.cat(given)
    return Matrix(joined, bias if order is None else order(bias))


def _weight(linear: Any) -> Tensor | BlockWeights:
    weight: Tensor | BlockWeights | None = linear.weights if isinstance(linear, BlockLinear) else linear.weight
    assert weight is not None
    return weight


def _halves(weight: Tensor | BlockWeights, n: int) -> tuple[Any, Any]:
    """The first `n` outputs, and the others."""
    if isinstance(weight, Tensor):
        return weight[:n], weight[n:]
    parts = []
    for rows in (slice(0, n), slice(n, None)):
        lows = None if weight.lows is None else weight.lows[rows]
        parts.append(BlockWeights(weight.bits, weight.codes[rows], weight.scales[rows], lows))
    return parts[0], parts[1]


def _norm(norm: Any) -> Tensor:
    """Factors of an RMS norm, fp32; Gemma's are stored as what they differ by from 1."""
    weight: Tensor = norm.weight.detach().float()
    return weight + 1 if type(norm).__name__.startswith("Gemma") else weight.contiguous()
