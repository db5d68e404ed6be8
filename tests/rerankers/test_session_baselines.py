"""The baselines against loops that follow their definitions word by word."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from lit_rec.data.lists import ListSet
from lit_rec.errors import UserError
from lit_rec.metrics.sessions import target_ranks
from lit_rec.rerankers import session_baselines
from lit_rec.rerankers.session_baselines import item_knn_scores, popularity_scores, random_scores

ITEMS = 30


def ragged(rows: int, width: int, shortest: int, generator: torch.Generator) -> Tensor:
    """Left-aligned sequences of skewed items, with repetitions."""
    items = 1 + (ITEMS * torch.rand(rows, width, generator=generator) ** 2).long()
    length = torch.randint(shortest, width + 1, (rows, 1), generator=generator)
    return torch.where(torch.arange(width) < length, items, 0)


def make(seed: int, sessions: int = 25, candidates: int = 12) -> tuple[Tensor, ListSet]:
    generator = torch.Generator().manual_seed(seed)
    sequences = ragged(40, 7, 0, generator)
    items = torch.stack([1 + torch.randperm(ITEMS, generator=generator)[:candidates] for _ in range(sessions)])
    items[:5, 9:] = 0
    history = ragged(sessions, 6, 0, generator)
    lists = ListSet(torch.arange(sessions), items, torch.zeros(items.shape), history, torch.zeros(history.shape))
    return sequences, lists


def knn_by_hand(
    sequences: Tensor, history: list[int], candidates: list[int], shrinkage: float, k: int | None, recency: float
) -> list[tuple[float, int]]:
    """(similarity, popularity) of each candidate, from sets and loops."""
    holders = {i: {t for t, row in enumerate(sequences.tolist()) if i in row} for i in range(1, ITEMS + 1)}
    popular = Counter(i for row in sequences.tolist() for i in row if i)

    def similarity(i: int, j: int) -> float:
        both = len(holders[i] & holders[j])
        return both / (math.sqrt(len(holders[i]) * len(holders[j])) + shrinkage) if both and i != j else 0.0

    def counts(i: int, j: int) -> bool:
        ranked = sorted((x for x in holders if similarity(i, x)), key=lambda x: (-similarity(i, x), -popular[x], x))
        return k is None or j in ranked[:k]

    real = [i for i in history if i]
    found = []
    for j in candidates:
        total = 0.0
        for place, i in enumerate(real):
            if j and counts(i, j):
                total += similarity(i, j) * recency ** (len(real) - 1 - place)
        found.append((round(total, 9), popular[j] if j else 0))
    return found


@pytest.mark.parametrize("parts", ["one part", "many parts"])
@pytest.mark.parametrize(
    ("shrinkage", "k", "recency"), [(10.0, None, 1.0), (0.0, 3, 1.0), (2.0, 1, 0.7), (0.5, 5, 0.9)]
)
def test_item_knn_equals_a_loop(
    shrinkage: float, k: int | None, recency: float, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts == "many parts":
        monkeypatch.setattr(session_baselines, "PAIRS", 20)
        monkeypatch.setattr(session_baselines, "QUERIES", 3)
    for seed in (0, 1):
        sequences, lists = make(seed)
        index = torch.randperm(25, generator=torch.Generator().manual_seed(seed))[:20]
        scores = item_knn_scores(sequences, lists, index, ITEMS, shrinkage=shrinkage, k=k, recency=recency)
        informed = 0
        for row, session in enumerate(index.tolist()):
            expected = knn_by_hand(
                sequences, lists.history_items[session].tolist(), lists.items[session].tolist(), shrinkage, k, recency
            )
            places = {value: place for place, value in enumerate(sorted(set(expected)))}
            assert scores[row].tolist() == [places[value] for value in expected]
            informed += any(value > 0 for value, _ in expected)
        assert informed > 10  # else only popularity was compared


def test_item_knn_without_anything_to_learn_from_ranks_by_popularity() -> None:
    sequences, lists = make(2)
    lonely = sequences.clone()
    lonely[:, 1:] = 0  # no two items are ever together
    index = torch.arange(25)
    found = item_knn_scores(lonely, lists, index, ITEMS)
    popular = popularity_scores(lonely, lists, index, ITEMS)
    for row in range(25):
        levels = popular[row].unique()
        assert torch.equal(levels[found[row].long()], popular[row])
    assert item_knn_scores(torch.zeros(0, 4, dtype=torch.int64), lists, index, ITEMS).unique().tolist() == [0]


def test_item_knn_of_no_session_is_empty() -> None:
    sequences, lists = make(3)
    assert item_knn_scores(sequences, lists, torch.zeros(0, dtype=torch.int64), ITEMS).shape == (0, 12)


@pytest.mark.parametrize("wrong", [{"shrinkage": -1.0}, {"k": 0}, {"recency": 0.0}, {"recency": 1.5}])
def test_item_knn_refuses_what_means_nothing(wrong: dict[str, float]) -> None:
    sequences, lists = make(4)
    with pytest.raises(UserError, match=next(iter(wrong))):
        item_knn_scores(sequences, lists, torch.arange(3), ITEMS, **wrong)  # type: ignore[arg-type]


def test_popularity_equals_a_counter() -> None:
    sequences, lists = make(5)
    counted = Counter(i for row in sequences.tolist() for i in row if i)
    index = torch.tensor([7, 0, 24])
    expected = [[float(counted[i]) for i in lists.items[s].tolist()] for s in index.tolist()]
    assert popularity_scores(sequences, lists, index, ITEMS).tolist() == expected
    assert expected[1][9:] == [0, 0, 0]  # padding


def test_chance_is_uniform_seeded_and_the_same_whoever_else_is_asked() -> None:
    sessions, size = 4000, 20
    items = torch.arange(1, size + 1).repeat(sessions, 1)
    lists = ListSet(torch.arange(sessions), items, torch.zeros(items.shape), items[:, :1], items[:, :1].float())
    every = torch.arange(sessions)
    scores = random_scores(lists, every, seed=1)
    ranks = target_ranks(scores, items, torch.full((sessions,), 3)).double()
    assert ranks.mean().item() == pytest.approx((size + 1) / 2, abs=4 * math.sqrt((size**2 - 1) / 12 / sessions))
    counts = torch.bincount(ranks.long(), minlength=size + 1)[1:].double()
    chi_square = ((counts - sessions / size) ** 2 / (sessions / size)).sum().item()
    assert chi_square < 43.8  # the 0.1% quantile with 19 degrees of freedom
    some = torch.tensor([5, 3999, 2])
    assert torch.equal(random_scores(lists, some, seed=1), scores[some])
    assert not torch.equal(random_scores(lists, every, seed=2), scores)
