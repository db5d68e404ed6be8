"""Drawing tokens against exact distributions."""

import pytest
import torch

from lit_rec.llm.nucleus import DRAWS, categorical, levels, nucleus_sample


def luck(rows: int, draws: int, size: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, draws, levels(size), generator=torch.Generator().manual_seed(seed))


def top_p_distribution(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The textbook: sort, keep the smallest set with at least top_p, renormalise."""
    probs = torch.softmax(logits / temperature, -1)
    values, order = probs.sort(descending=True)
    kept = values.cumsum(0) - values < top_p
    exact = torch.zeros_like(probs)
    exact[order[kept]] = values[kept]
    return exact / exact.sum()


def chi_square(counts: torch.Tensor, exact: torch.Tensor) -> tuple[float, int]:
    expected = exact * counts.sum()
    used = expected > 0
    return ((counts - expected)[used] ** 2 / expected[used]).sum().item(), int(used.sum()) - 1


@pytest.mark.parametrize("draws", [1, 2, DRAWS])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.95), (0.7, 0.5), (1.5, 0.8), (1.0, 1.0), (1.0, 0.05)])
def test_nucleus_sample_follows_the_exact_distribution(temperature: float, top_p: float, draws: int) -> None:
    rows = 60_000
    logits = 2 * torch.randn(30, generator=torch.Generator().manual_seed(1))
    exact = top_p_distribution(logits, temperature, top_p)
    drawn = nucleus_sample(logits.expand(rows, -1), temperature, top_p, luck(rows, draws, 30, seed=2))
    counts = torch.bincount(drawn, minlength=30).float()
    assert counts[exact == 0].sum() == 0
    found, freedom = chi_square(counts, exact)
    assert found < freedom + 5 * (2 * max(freedom, 1)) ** 0.5  # five standard deviations


def test_nucleus_sample_never_draws_an_impossible_token() -> None:
    logits = torch.full((2000, 5), -torch.inf)
    logits[:, [1, 3]] = 0.0
    for top_p in (0.3, 1.0):
        drawn = nucleus_sample(logits, 1.0, top_p, luck(2000, 1, 5, seed=0))
        assert set(drawn.tolist()) == {1, 3}  # equally probable: both are in the set, or neither


@pytest.mark.parametrize("size", [1, 2, 16, 17, 300])
def test_categorical_follows_its_weights(size: int) -> None:
    count = 60_000
    weights = torch.rand(size, generator=torch.Generator().manual_seed(3)) ** 4
    weights[1::5] = 0.0
    drawn = categorical(weights.expand(count, -1), luck(count, 1, size, seed=4)[:, 0])
    counts = torch.bincount(drawn, minlength=size).float()
    assert len(counts) == size
    assert counts[weights == 0].sum() == 0
    found, freedom = chi_square(counts, weights / weights.sum())
    assert found <= freedom + 5 * (2 * max(freedom, 1)) ** 0.5


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (16, 1), (17, 2), (256, 2), (49_152, 4), (65_537, 5)])
def test_levels(size: int, expected: int) -> None:
    assert levels(size) == expected


def test_rounding_seldom_changes_a_token() -> None:
    """What two threads and one differ by; one cumulative sum changes about one draw in 200."""
    draw = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(200, 40_000, generator=draw)
    other = logits + 1e-5 * torch.randn(logits.shape, generator=draw)
    changed = 0
    for seed in range(10):
        own = luck(200, DRAWS, 40_000, seed)
        first, second = (nucleus_sample(x, 1.0, 0.95, own) for x in (logits, other))
        changed += int((first != second).sum())
    assert changed <= 2  # of 2,000


@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("extreme", [0.0, 1.0])
def test_luck_at_its_ends_draws_a_possible_token(extreme: float, top_p: float) -> None:
    logits = torch.tensor([-torch.inf, 0.1, -torch.inf, 1.7, -torch.inf]).expand(3, -1)
    drawn = nucleus_sample(logits, 1.0, top_p, torch.full((3, 2, 1), extreme))
    assert set(drawn.tolist()) == {1 if top_p == 1 and extreme == 0 else 3}
