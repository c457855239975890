"""The arithmetic of bench-weights: what it scores, and what it takes of llama-server."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from engine_harness import make_pair

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
IDS = list(range(3, 43))


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("weights")


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("_llama_logits")


def noisy(noise: float):
    """Logits that are `noise` away from those of noise 0."""

    def forward(ids):
        torch.manual_seed(ids[0])
        clean, more = 4 * torch.randn(100, 50), torch.randn(100, 50)
        return (clean + noise * more)[: len(ids) - 32]

    return forward


def test_distances_are_from_the_reference_and_graded_by_bf16s(weights: ModuleType) -> None:
    forwards = {"bf16": noisy(0.01), "int8": noisy(0.012), "llama": noisy(2.0)}
    told = weights.measure([IDS, IDS[::-1]], noisy(0.0), forwards)
    assert {found["n"] for found in told.values()} == {2 * (len(IDS) - 33)}
    assert 0 < told["bf16"]["kl_mean"] < told["int8"]["kl_mean"] < told["llama"]["kl_mean"]
    assert [told[name]["grade"] for name in forwards] == ["lossless", "lossless", "lossy"]
    found = weights.summary(told)
    assert found["kl_llama_q4_1"] == told["llama"]["kl_mean"]
    assert (found["kl_p99_int8"], found["grade_int8"]) == (told["int8"]["kl_p99"], "lossless")


def test_a_text_in_pieces_has_the_logits_of_the_whole(weights: ModuleType) -> None:
    model = make_pair("llama").ours
    whole = weights.computed(model, IDS, 128)
    assert whole.shape == (len(IDS) - 32, model.vocab_size)
    for chunk in (1, 7):
        assert torch.allclose(weights.computed(model, IDS, chunk), whole, atol=1e-4)


def test_beside_llama_all_are_lumped_by_the_tokens_it_tells(weights: ModuleType) -> None:
    clean, ours = noisy(0.0), noisy(0.5)

    def llama(ids):
        """The same numbers as `ours`, as far as its twenty likeliest tokens go."""
        found = ours(ids).double().log_softmax(-1).topk(20)
        return found.indices, found.values

    told = weights.measure([IDS], clean, {"bf16": ours}, llama)
    assert told["llama"] == told["bf16"]
    whole = weights.measure([IDS], clean, {"bf16": ours})
    assert 0 < told["bf16"]["kl_mean"] < whole["bf16"]["kl_mean"]


def test_lumped_rows_are_distributions_and_answers_find_their_place(weights: ModuleType) -> None:
    logits, tokens = torch.randn(6, 40), torch.stack([torch.randperm(40)[:8] for _ in range(6)])
    rows = weights.lumped(logits, tokens)
    p = logits.double().softmax(-1)
    assert torch.allclose(rows[:, :8].exp(), p.gather(1, tokens))
    assert torch.allclose(rows[:, 8].exp(), 1 - p.gather(1, tokens).sum(1))
    answer = tokens[torch.arange(6), torch.tensor([0, 7, 3, 3, 5, 1])].clone()
    answer[2] = 40
    assert weights.place(answer, tokens).tolist() == [0, 7, 8, 3, 5, 1]


def answering(llama: ModuleType, n_told: int, computed: int):
    """A server that tells token i of the vocabulary to have the log probability -i - (tokens asked about)."""
    server = llama.LlamaServer(Path("p"), Path("g"), Path("l"), 1, 64)

    def answer(ids, n_probs):
        told = [{"id": i, "logprob": -i - len(ids)} for i in range(n_told)]
        return {"timings": {"prompt_n": computed}, "completion_probabilities": [{"top_logprobs": told}]}

    server._next = answer
    return server


def test_llama_tells_tokens_with_their_logarithms_for_every_position(llama: ModuleType) -> None:
    tokens, logarithms = answering(llama, 3, 1).probabilities([7, 8, 9], 1, 3)
    assert tokens.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert logarithms.tolist() == [[-2.0, -3.0, -4.0], [-3.0, -4.0, -5.0]]


def test_llama_that_computes_otherwise_than_in_decoding_or_tells_too_little_is_no_measurement(
    llama: ModuleType,
) -> None:
    with pytest.raises(RuntimeError, match="computed 2 tokens"):
        answering(llama, 5, 2).probabilities([7, 8, 9], 1, 5)
    with pytest.raises(RuntimeError, match="told 4 probabilities of 5"):
        answering(llama, 4, 1).probabilities([7, 8, 9], 1, 5)
