"""Budgets over scores, against plain loops; ties go to the earlier layer, head, token."""

from __future__ import annotations

import pytest
import torch

from sessiond.policies.prior import ALWAYS, BUDGETS, Prior, all_kept, kept_by

L, G, N = 3, 2, 37
Place = tuple[int, int, int]


def draw(seed: int, levels: int = 5) -> torch.Tensor:
    """Scores with many ties; the first three tokens are always kept."""
    scores = torch.randint(levels, (L, G, N), generator=torch.Generator().manual_seed(seed)) / levels
    scores[:, :, :3] = ALWAYS
    return scores.half()


def by_loops(scores: torch.Tensor, share: float, budget: str) -> set[Place]:
    values = scores.tolist()
    places = [(a, b, c) for a in range(L) for b in range(G) for c in range(N)]
    kept = {place for place in places if values[place[0]][place[1]][place[2]] > 1}
    counted = [place for place in places if place not in kept]
    heads = list(dict.fromkeys((a, b) for a, b, _ in counted))

    def best(some: list[Place]) -> list[Place]:
        return sorted(some, key=lambda p: (-values[p[0]][p[1]][p[2]], p))[: round(share * len(some))]

    if budget == "pair":
        return kept | set(best(counted))
    if budget == "pair-uniform":
        return kept.union(*(best([p for p in counted if p[:2] == head]) for head in heads))
    most = {head: max(values[a][b][c] for a, b, c in counted if (a, b) == head) for head in heads}
    chosen = sorted(heads, key=lambda head: (-most[head], head))[: round(share * len(heads))]
    return kept | {place for place in counted if place[:2] in chosen}


def places(mask: torch.Tensor) -> set[Place]:
    return {(a, b, c) for a, b, c in mask.nonzero().tolist()}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_each_budget_keeps_what_plain_loops_keep(budget, share, seed):
    scores = draw(seed)
    assert places(kept_by(scores, share, budget)) == by_loops(scores, share, budget)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_layer_nobody_chooses_in_is_kept_whole_and_costs_the_others_nothing(budget):
    scores = draw(1)
    scores[1] = ALWAYS
    mask = kept_by(scores, 0.3, budget)
    assert mask[1].all()
    assert places(mask) == by_loops(scores, 0.3, budget)
    others = kept_by(scores[[0, 2]], 0.3, budget)
    assert torch.equal(mask[[0, 2]], others)


def test_pair_has_no_floor_for_a_head_and_pair_uniform_gives_each_the_same():
    scores = draw(2)
    scores[0, 0, 3:] = 0
    assert not kept_by(scores, 0.3, "pair")[0, 0, 3:].any()
    assert set(kept_by(scores, 0.3, "pair-uniform").sum(-1).flatten().tolist()) == {3 + round(0.3 * (N - 3))}


def test_a_mask_is_computed_once_for_all_layers():
    prior = Prior(draw(0))
    mask = prior.kept(0.3, "pair")
    assert prior.kept(0.3, "pair") is mask
    assert prior.kept(0.4, "pair") is not mask
    assert prior.nbytes == prior.scores.nbytes + 2 * mask.nbytes


def test_it_goes_through_bytes_unchanged_and_refuses_those_of_another_shape():
    prior = all_kept(L, G, 4).followed_by(draw(0))
    back = Prior.from_bytes(prior.to_bytes(), L, G)
    assert torch.equal(back.scores, prior.scores)
    assert back.scores.dtype == torch.float16
    with pytest.raises(ValueError, match="reshape"):
        Prior.from_bytes(prior.to_bytes()[:-2], L, G)
