"""Ranks of targets and their metrics against loops and torchmetrics."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import retrieval

from lit_rec.metrics.sessions import random_metrics, rank_metrics, target_ranks

SIZE = 12


def make(seed: int, rows: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """Scores without ties, candidates of which some are padding, targets."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, SIZE, generator=generator)
    candidates = torch.stack([1 + torch.randperm(40, generator=generator)[:SIZE] for _ in range(rows)])
    real = torch.randint(1, SIZE + 1, (rows,), generator=generator)
    candidates[torch.arange(SIZE) >= real[:, None]] = 0
    place = (torch.rand(rows, generator=generator) * real).long()
    return scores, candidates, candidates.gather(1, place[:, None]).squeeze(1)


def test_ranks_equal_a_loop_and_padding_does_not_count() -> None:
    scores, candidates, target = make(0)
    scores[candidates == 0] = 99.0  # padding must lose however it is scored
    expected = []
    for row in range(len(scores)):
        listed = [(s, c) for s, c in zip(scores[row].tolist(), candidates[row].tolist(), strict=True) if c]
        expected.append([c for _, c in sorted(listed, reverse=True)].index(int(target[row])) + 1)
    assert target_ranks(scores, candidates, target).tolist() == expected
    assert len(set(expected)) == SIZE
    scores[candidates == 0] = float("nan")
    assert target_ranks(scores, candidates, target).tolist() == expected


def test_metrics_equal_torchmetrics() -> None:
    scores, candidates, target = make(1)
    ranks = target_ranks(scores, candidates, target)
    values = rank_metrics(ranks, (1, 3, 5, 10), SIZE)
    assert set(values) == {f"{m}@{k}" for m in ("hr", "ndcg") for k in (1, 3, 5, 10)} | {f"mrr@{SIZE}"}
    for row in range(len(scores)):
        real = candidates[row] > 0
        own = scores[row][real].sigmoid()  # torchmetrics takes what is not above 0 for not retrieved
        hit = candidates[row][real] == target[row]
        for k in (1, 3, 5, 10):
            hr = retrieval.retrieval_hit_rate(own, hit, top_k=k).item()
            assert values[f"hr@{k}"][row].item() == hr
            if len(own) > 1:  # torchmetrics has no NDCG of one document
                ndcg = retrieval.retrieval_normalized_dcg(own, hit.long(), top_k=k).item()
                assert values[f"ndcg@{k}"][row].item() == pytest.approx(ndcg, abs=1e-6)
        mrr = retrieval.retrieval_reciprocal_rank(own, hit).item()
        assert values[f"mrr@{SIZE}"][row].item() == pytest.approx(mrr, abs=1e-6)


def test_metrics_of_every_rank_by_hand_and_keep_the_shape() -> None:
    ranks = torch.arange(1, 13).view(3, 4)
    values = rank_metrics(ranks, [5], 12)
    for rank, hr, ndcg, mrr in zip(*(t.flatten().tolist() for t in (ranks, *values.values())), strict=True):
        assert hr == (rank <= 5)
        assert ndcg == pytest.approx(1 / math.log2(rank + 1) if rank <= 5 else 0, abs=1e-7)
        assert mrr == pytest.approx(1 / rank, abs=1e-7)
    assert {(v.shape, v.dtype) for v in values.values()} == {(ranks.shape, torch.float32)}


@pytest.mark.parametrize("target_place", [0, 4, 9])
def test_equal_scores_flatter_no_place(target_place: int) -> None:
    """Three candidates are better, five others tie: the rank is uniform over 4..9, wherever the target stands."""
    rows = 3000
    order = [target_place, *(p for p in range(10) if p != target_place)]
    row = torch.empty(10)
    row[order] = torch.tensor([1.0, 1, 1, 1, 1, 1, 2, 2, 2, 0])
    candidates = torch.arange(1, 11).repeat(rows, 1)
    target = torch.full((rows,), target_place + 1)
    ranks = target_ranks(row.repeat(rows, 1), candidates, target, seed=target_place)
    counts = torch.bincount(ranks, minlength=11).tolist()
    assert sum(counts[4:10]) == rows
    assert ((torch.tensor(counts[4:10]) - rows / 6) ** 2 / (rows / 6)).sum().item() < 20.5  # 0.1%, 5 degrees
    again = target_ranks(row.repeat(rows, 1), candidates, target, seed=target_place)
    assert torch.equal(again, ranks)
    assert not torch.equal(target_ranks(row.repeat(rows, 1), candidates, target, seed=77), ranks)


def test_an_unranked_target_is_last_of_what_is_real_and_others_unranked_do_not_matter() -> None:
    lost = -math.inf
    scores = torch.tensor([[lost, 1.0, lost, 5.0], [2.0, lost, lost, 5.0], [lost, lost, lost, 5.0]])
    candidates = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4], [1, 2, 0, 0]])
    assert target_ranks(scores, candidates, torch.tensor([1, 1, 1])).tolist() == [3, 2, 2]


def test_mistakes_are_refused() -> None:
    scores, candidates = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[4, 5, 0]])
    for target in (6, 0):
        with pytest.raises(ValueError, match="target"):
            target_ranks(scores, candidates, torch.tensor([target]))
    with pytest.raises(ValueError, match="target"):
        target_ranks(scores, torch.tensor([[4, 4, 0]]), torch.tensor([4]))
    with pytest.raises(ValueError, match="nan"):
        target_ranks(torch.tensor([[0.0, math.nan, 2.0]]), candidates, torch.tensor([4]))


def test_chance_is_the_mean_over_every_rank() -> None:
    items = torch.tensor([[5, 3, 9, 0], [1, 2, 3, 4], [7, 0, 0, 0]])
    found = random_metrics(items, [1, 2])
    for row, real in enumerate((3, 4, 1)):
        each = rank_metrics(torch.arange(1, real + 1), [1, 2], 4)
        assert {name: float(values[row]) for name, values in found.items()} == pytest.approx(
            {name: float(values.mean()) for name, values in each.items()}
        )
    assert found["hr@1"].tolist() == pytest.approx([1 / 3, 1 / 4, 1])
