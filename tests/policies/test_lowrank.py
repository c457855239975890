"""Low rank: what an SVD of the rows about their mean says, also when the rows come in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sessiond.policies import lowrank
from sessiond.policies.lowrank import WHOLE, LowRank

C = 12
PARTS = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank: int, n: int, seed: int = 0, noise: float = 0.01) -> Tensor:
    """Rows of `rank` and a little noise about a mean that is most of them."""
    basis = draw(rank, C, seed=seed)
    return 20 + draw(n, rank, seed=seed + 1) @ basis + noise * draw(n, C, seed=seed + 2)


def cover(factors: LowRank, rows: Tensor, n: int | None = None) -> None:
    factors.cover(lambda start, end: rows[start:end], len(rows) if n is None else n)


def held(factors: LowRank) -> Tensor:
    """All rows as the factors have them: [n, C]."""
    positions = torch.arange(factors.n).expand(PARTS, -1)
    return factors.take(positions).transpose(0, 1).flatten(1)


def plain(rows: Tensor, rank: int) -> Tensor:
    """The best of `rank` about the mean, by an SVD in double precision."""
    mean = rows.double().mean(0)
    u, s, vh = torch.linalg.svd(rows.double() - mean, full_matrices=False)
    return (u[:, :rank] * s[:rank] @ vh[:rank] + mean).float()


def close(found: Tensor, wanted: Tensor, atol: float = 0.1) -> None:
    """Factors in bf16: an error of 2^-8 of a row's distance from the mean (about 10), some times."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("n", [5, 63, 200])
@pytest.mark.parametrize("rank", [1, 4, C])
def test_holds_what_an_svd_holds(n: int, rank: int):
    rows = 20 + draw(n, C) * torch.linspace(3, 0.3, C)
    factors = LowRank(rank, 1.0, 0.05)
    cover(factors, rows)
    assert (factors.n, factors.rank) == (n, rank)
    close(held(factors), plain(rows, rank))


def test_all_ranks_hold_all_rows():
    rows = of_rank(5, 63)
    factors = LowRank(C, 1.0, 0.05)
    cover(factors, rows)
    close(held(factors), rows)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_takes_the_least_rank_that_holds_it(energy: float):
    rows = draw(500, C) * torch.linspace(3, 0.3, C)
    factors = LowRank(0, energy, 0.05)
    cover(factors, rows)
    s = torch.linalg.svdvals((rows - rows.mean(0)).double()).square()
    shares = (s.cumsum(0) / s.sum()).tolist()
    assert shares[factors.rank - 1] >= energy - 1e-6
    assert factors.rank == 1 or shares[factors.rank - 2] < energy


def test_every_part_has_positions_of_its_own():
    rows = of_rank(4, 40)
    factors = LowRank(4, 1.0, 0.05)
    cover(factors, rows)
    positions = torch.tensor([[0, 7], [39, 3], [5, 5]])
    taken = factors.take(positions)
    whole = held(factors)
    for part in range(PARTS):
        assert torch.equal(taken[part], whole[positions[part], part * 4 : part * 4 + 4])


def test_rows_of_the_same_subspace_are_appended_and_the_basis_stays():
    rows = of_rank(4, 300)
    factors = LowRank(4, 1.0, 0.05)
    for n in (100, 163, 164, 300):
        cover(factors, rows, n)
    assert factors.factored == 100
    close(held(factors), plain(rows, 4))


def test_a_block_outside_the_subspace_has_all_factored_again():
    rows = torch.cat([of_rank(4, 100), of_rank(4, 60), of_rank(4, 60, seed=9)])
    factors = LowRank(8, 1.0, 0.05)
    cover(factors, rows, 100)
    cover(factors, rows, 101)
    assert factors.factored == 100
    cover(factors, rows, 220)
    assert factors.factored == 220
    close(held(factors), plain(rows, 8))


def test_a_mean_that_moves_away_has_all_factored_again():
    rows = of_rank(4, 200)
    rows[100:] -= 30
    factors = LowRank(5, 1.0, 0.05)
    cover(factors, rows, 100)
    cover(factors, rows)
    assert factors.factored == 200
    close(held(factors), plain(rows, 5), atol=0.3)


def test_a_basis_is_about_the_mean_of_all_rows_not_of_the_first():
    """The first five lie far off along channel 1; what varies most in all of them is channel 0."""
    rows = draw(1000, C) * torch.tensor([4.0] + [0.1] * (C - 1))
    rows[:5, 1] += 30
    factors = LowRank(1, 1.0, 0.05)
    for n in (5, 1000):
        cover(factors, rows, n)
    close(held(factors), plain(rows, 1), atol=0.2)


def test_a_basis_that_is_too_small_for_its_own_rows_is_not_made_again_for_others_like_them():
    """The bound is on top of what the factored rows lost themselves."""
    rows = draw(2000, C)
    factors = LowRank(2, 1.0, 0.05)
    for n in (1000, 1500, 2000):
        cover(factors, rows, n)
    assert factors.factored == 1000


@pytest.mark.parametrize("n_pieces", [2, 7])
def test_the_sums_of_pieces_are_those_of_all_rows(n_pieces: int):
    """Every piece has another subspace, so that the last one has all factored again."""
    rows = torch.cat([of_rank(1, 31, seed=5 * i) for i in range(n_pieces)])
    pieces, whole = LowRank(9, 1.0, 0.001), LowRank(9, 1.0, 0.001)
    for i in range(n_pieces):
        cover(pieces, rows, 31 * (i + 1))
    cover(whole, rows)
    assert pieces.factored == whole.factored == len(rows)
    close(held(pieces), held(whole))


def test_many_rows_are_taken_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(lowrank, "AT_ONCE", 10)
    rows = of_rank(4, 63)
    factors, asked = LowRank(4, 1.0, 0.05), []

    def ask(start: int, end: int) -> Tensor:
        asked.append(end - start)
        return rows[start:end]

    factors.cover(ask, 35)
    factors.cover(ask, 63)
    assert max(asked) == 10
    close(held(factors), plain(rows, 4))


def test_a_cut_behind_the_factored_rows_leaves_the_basis_and_growth_is_as_if_nothing_had_been_there():
    rows, gone = of_rank(4, 150), of_rank(4, 150)
    gone[120:] = rows[:30]
    cut, never = LowRank(4, 1.0, 0.05), LowRank(4, 1.0, 0.05)
    for factors in (cut, never):
        cover(factors, rows, 100)
    cover(cut, gone, 140)
    assert cut.factored == 100
    cut.keep(120)
    assert cut.n == 120
    cover(cut, rows)
    cover(never, rows)
    assert torch.equal(held(cut), held(never))


@pytest.mark.parametrize("n", [0, 1, 62])
def test_a_cut_into_the_factored_rows_forgets_the_basis(n: int):
    factors, fresh = LowRank(4, 1.0, 0.05), LowRank(4, 1.0, 0.05)
    cover(factors, of_rank(4, 63, seed=7))
    factors.keep(63)
    assert factors.n == 63
    factors.keep(n)
    assert (factors.n, factors.nbytes) == (0, 0)
    cover(factors, of_rank(4, 63))
    cover(fresh, of_rank(4, 63))
    assert torch.equal(held(factors), held(fresh))


@pytest.mark.parametrize("n", [0, 40, 99, 120])
def test_rows_that_are_computed_again_and_change_little_leave_the_basis(n: int):
    rows = of_rank(4, 150)
    factors = LowRank(4, 1.0, 0.05)
    for end in (100, 130):
        cover(factors, rows, end)
    rows[n:] = of_rank(4, 150, noise=0.02)[n:] + 0.01
    factors.renew(n)
    assert factors.n == n
    cover(factors, rows)
    assert factors.factored == 100
    close(held(factors), plain(rows, 4))


@pytest.mark.parametrize("n", [0, 40, 99])
def test_a_basis_made_after_rows_were_computed_again_is_of_those_that_are_there_now(n: int):
    rows = of_rank(4, 150)
    factors = LowRank(4, 1.0, 0.05)
    cover(factors, rows, 100)
    rows[n:] = of_rank(4, 150, seed=9)[n:]
    factors.renew(n)
    cover(factors, rows)
    fresh = LowRank(4, 1.0, 0.05)
    cover(fresh, rows)
    assert factors.factored == 150
    close(held(factors), held(fresh))


def test_a_cut_after_a_renewal_still_forgets_a_basis_made_of_what_is_gone():
    factors = LowRank(4, 1.0, 0.05)
    cover(factors, of_rank(4, 100))
    factors.renew(60)
    factors.keep(80)
    assert (factors.n, factors.nbytes) == (0, 0)


def test_rows_that_are_all_the_same_are_their_mean():
    factors = LowRank(0, 0.9, 0.05)
    cover(factors, torch.full((9, C), 7.0))
    close(held(factors), torch.full((9, C), 7.0), atol=1e-5)


def test_memory_is_that_of_coordinates_and_basis_in_two_bytes_and_of_the_sums():
    factors = LowRank(4, 1.0, 0.05)
    cover(factors, of_rank(4, 100))
    assert factors.nbytes == 2 * WHOLE * (100 + C) + 4 * (3 * C + C * C)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_basis_of_rows_that_do_not_vary_is_given_up_for_the_first_that_do(rank: int):
    draw = torch.randn(600, 24, generator=torch.Generator().manual_seed(5)) @ torch.diag(0.5 ** torch.arange(24))

    def rows(start: int, end: int) -> torch.Tensor:
        return draw[start:end]

    factors, fresh = LowRank(rank, 0.9, 0.05), LowRank(rank, 0.9, 0.05)
    factors.cover(rows, 1)
    factors.cover(rows, 600)
    fresh.cover(rows, 600)
    assert factors.factored == 600
    assert factors.rank == fresh.rank
