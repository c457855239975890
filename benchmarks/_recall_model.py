"""A small model that recalls perfectly, trained here and kept: what it then forgets, a policy made it forget.

Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): a fact is a key and its values; later the key
stands there again, and the model must tell the values. The model learns nothing else, and is as good as sure of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _recall_start import set_start
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

FOLDER = Path.home() / ".cache" / "sessiond" / "benchmarks"
N_VALUES = 2  # of a fact: what is asked, and found by its key alone, then what only the pair finds
BEGIN = 0  # the first token; then the keys, then the values
N_THREADS = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """`steps` on texts of `facts` facts, `batch` at a time; the learning rate goes from `rate` to `last_rate`."""

    facts: int
    batch: int
    steps: int
    rate: float
    last_rate: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the weights. Another recipe is another model, trained and kept beside this one."""

    keys: int = 1024
    values: int = 255
    hidden: int = 128
    heads: int = 4
    head_dim: int = 64
    mlp: int = 32
    # Slow enough that two thirds of a head's channels hardly turn over 8K tokens: likeness must not fade with age.
    rope_theta: float = 1e9
    max_context: int = 8192
    embedding_std: float = 0.09
    seed: int = 1
    stages: tuple[Stage, ...] = (
        Stage(32, 8, 120, 2e-3, 2e-3),  # to match tokens
        Stage(128, 2, 100, 1e-3, 1e-3),  # and pairs of them
        Stage(400, 1, 340, 1.5e-3, 0.0),  # sharply, among as many as in the benchmark
    )
    version: int = 1  # of the code below

    @property
    def name(self) -> str:
        told = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"recall-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def untrained(recipe: Recipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=1 + recipe.keys + recipe.values,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=2,
        num_attention_heads=recipe.heads,
        num_key_value_heads=2,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_context,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        attention_bias=True,
        initializer_range=recipe.embedding_std,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=None,
    )
    module = LlamaForCausalLM(config)
    set_start(module, torch.Generator().manual_seed(recipe.seed))
    return module


def facts(recipe: Recipe, n_texts: int, n_facts: int, draw: torch.Generator) -> Tensor:
    """[n_texts, n_facts, 1 + N_VALUES] ids: in a text no key stands twice, values may."""
    keys = 1 + torch.rand(n_texts, recipe.keys, generator=draw).argsort(1)[:, :n_facts, None]
    values = torch.randint(recipe.values, (n_texts, n_facts, N_VALUES), generator=draw)
    return torch.cat([keys, 1 + recipe.keys + values], 2)


def texts(recipe: Recipe, n_texts: int, n_facts: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids [n_texts, T] in which each fact stands twice, in random order, and where the second ones are: [n_texts, F].

    The second time a fact's key is its ask, and its values are what the model must tell.
    """
    told = facts(recipe, n_texts, n_facts, draw)
    order = torch.rand(n_texts, 2 * n_facts, generator=draw).argsort(1)
    places = order.argsort(1)
    second = torch.maximum(places[:, :n_facts], places[:, n_facts:])
    ids = told.gather(1, (order % n_facts)[..., None].expand(-1, -1, 1 + N_VALUES)).flatten(1)
    return F.pad(ids, (1, 0), value=BEGIN), 1 + (1 + N_VALUES) * second


def answers(module: LlamaForCausalLM, ids: Tensor, asks: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, V] of the values asked for at `asks`, and the right ids [n]; a fact's values follow each other."""
    hidden = module.model(input_ids=ids, use_cache=False).last_hidden_state
    before = (asks[..., None] + torch.arange(N_VALUES)).flatten(1)
    rows = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
    return module.lm_head(rows).flatten(0, 1), ids.gather(1, before + 1).flatten()


@torch.no_grad()
def accuracy(module: LlamaForCausalLM, recipe: Recipe, n_facts: int, n_texts: int = 4, seed: int = 0) -> float:
    """Share of facts all of whose values are told right, in texts of `n_facts`, each fact asked once."""
    draw = torch.Generator().manual_seed(seed)
    right = []
    for _ in range(n_texts):
        logits, ids = answers(module, *texts(recipe, 1, n_facts, draw))
        right.append((logits.argmax(-1) == ids).view(-1, N_VALUES).all(1).float().mean())
    return float(torch.stack(right).mean())


def train(recipe: Recipe, tell: Callable[[str], None] = lambda line: None) -> LlamaForCausalLM:
    """Loss on asked values only. Deterministic on one machine; takes some minutes on two cores."""
    module = untrained(recipe)
    draw = torch.Generator().manual_seed(recipe.seed + 1)
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    began, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(N_THREADS)
    try:
        for stage in recipe.stages:
            right = _run(stage, recipe, module, optimizer, draw)
            seconds = time.perf_counter() - began
            tell(f"{stage.facts} facts, {stage.steps} steps: {right:.2%} of values right after {seconds:.0f} s")
    finally:
        torch.set_num_threads(threads)
    return module.eval()


def _run(
    stage: Stage, recipe: Recipe, module: LlamaForCausalLM, optimizer: torch.optim.Optimizer, draw: torch.Generator
) -> float:
    """The share of values told right lately."""
    right = 0.0
    for step in range(stage.steps):
        rate = stage.rate + (stage.last_rate - stage.rate) * step / stage.steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        logits, ids = answers(module, *texts(recipe, stage.batch, stage.facts, draw))
        loss = F.cross_entropy(logits, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        right += ((logits.argmax(-1) == ids).float().mean().item() - right) / min(step + 1, 20)
    return right


def trained(
    recipe: Recipe, n_facts: int, target: float, tell: Callable[[str], None], folder: Path = FOLDER
) -> tuple[Path, float]:
    """The directory of the recipe's model, in bf16, and the seconds that training took: 0 if it was there already.

    Raises RuntimeError if in texts of `n_facts` it recalls fewer than `target`: losses would not be a policy's.
    """
    path = folder / recipe.name
    if (path / "config.json").is_file():
        return path, 0.0
    began = time.perf_counter()
    module = train(recipe, tell).to(torch.bfloat16)
    seconds = time.perf_counter() - began
    found = accuracy(module, recipe, n_facts)
    tell(f"in bf16, {n_facts} facts: {found:.2%} recalled")
    if found < target:
        raise RuntimeError(f"the trained model recalls {found:.2%} of {n_facts} facts, asked were {target:.2%}")
    transformers_logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        module.save_pretrained(Path(fresh) / "model")
        (Path(fresh) / "model").rename(path)  # whole, or not at all
    return path, seconds
