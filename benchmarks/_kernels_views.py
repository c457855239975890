"""Attention over few chosen tokens of a long history, and over all of it in few bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from _kernelcase import KernelCase
from torch import Tensor

from sessiond.kernels.attention import Scratch
from sessiond.kernels.chosen import ChosenSpan, attend_chosen, attend_chosen_reference
from sessiond.policies.choosing import first
from sessiond.policies.quantized import Codes

H, G, D = 9, 3, 64
HISTORY, CHOSEN, OWN = 8192, 512, 16
LAYERS = 30  # one after the other, as in a step: more than caches hold


def cases() -> list[KernelCase]:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(H, 1, D, generator=draw).bfloat16()
    memory = torch.randn(LAYERS, 2, G, HISTORY + 64, D, generator=draw).bfloat16()
    picked = torch.stack([torch.randperm(HISTORY, generator=draw)[:CHOSEN].sort().values for _ in range(G)])
    own = slice(HISTORY, HISTORY + OWN)
    exact = [ChosenSpan(query, keys, values, picked, own) for keys, values in memory]
    row = G * 2 * D * 2  # bytes of a token's keys and values
    found = [_case(f"attention over {CHOSEN} chosen of {HISTORY}", exact, (CHOSEN + OWN) * row, CHOSEN + OWN)]
    for bits in (8, 4):
        coded = [_coded(span, bits) for span in exact]
        nbytes = HISTORY * row * bits // 16 + HISTORY * G * 2 * (D // 32) * 4 + OWN * row
        found.append(_case(f"attention over {HISTORY} in {bits} bits", coded, nbytes, HISTORY + OWN))
        some = [replace(span, chosen=picked, whole=False) for span in coded]
        few = CHOSEN * row * bits // 16 + CHOSEN * G * 2 * (D // 32) * 4 + OWN * row
        found.append(_case(f"attention over {CHOSEN} chosen in {bits} bits", some, few, CHOSEN + OWN))
    return found


def _coded(span: ChosenSpan, bits: int) -> ChosenSpan:
    forms = []
    for exact in (span.keys, span.values):
        codes = Codes(bits, 32)
        codes.extend(exact[:, :HISTORY])
        forms.append(codes.rows(HISTORY))
    return replace(span, chosen=first(HISTORY, G), forms=(forms[0], forms[1]), whole=True)


def _case(name: str, spans: list[ChosenSpan], nbytes: int, n_keys: int) -> KernelCase:
    """`nbytes` and `n_keys` of one layer; each call is for the next one."""
    scratch, turn = Scratch(), itertools.cycle(spans)
    out = torch.empty(1, H, D, dtype=torch.bfloat16)
    span = next(turn)

    def fresh() -> None:
        nonlocal span
        span = next(turn)

    def run() -> Tensor:
        attend_chosen([span], [out], D**-0.5, scratch)
        return out

    return KernelCase(
        name, run, lambda: attend_chosen_reference(span, D**-0.5), nbytes, 2 * H * n_keys * D, fresh=fresh
    )
