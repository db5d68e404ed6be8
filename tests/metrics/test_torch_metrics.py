"""The stateful metrics: the pure function's values, whatever the batches and the ranks."""

import pytest
import torch

from lit_rec.metrics.ranking import ranking_metrics, user_mean
from lit_rec.metrics.torch_metrics import MAP, MRR, NDCG, Clicks, DistinctMeans, HitRate

LOGITS = torch.rand(50, 10, generator=torch.Generator().manual_seed(1))
LABELS = (torch.rand(50, 10, generator=torch.Generator().manual_seed(2)) < 0.3).float()
MASK = torch.arange(10) < torch.randint(1, 11, (50, 1), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "name"), [(NDCG, "ndcg"), (MAP, "map"), (HitRate, "hr"), (MRR, "mrr"), (Clicks, "click")]
)
@pytest.mark.parametrize("convention", ["kar", "standard"])
def test_mean_over_batches(kind: type, name: str, convention: str) -> None:
    metric = kind(k=3, convention=convention)
    for batch in torch.arange(50).split(16):
        metric.update(LOGITS[batch], LABELS[batch], MASK[batch])
    expected = ranking_metrics(LOGITS, LABELS, MASK, (3,), convention)[f"{name}@3"].mean()
    torch.testing.assert_close(metric.compute(), expected)
    metric.reset()
    metric.update(LOGITS[:1], LABELS[:1], MASK[:1])
    assert metric.count == 1


def test_a_list_seen_twice_counts_once() -> None:
    values, users = torch.rand(20, 2), torch.arange(20) % 3
    plain, padded = DistinctMeans(), DistinctMeans()
    plain.update(values, users, torch.arange(20))
    order = torch.cat([torch.randperm(20), torch.tensor([4, 4, 7])])  # as a padded sampler serves them
    for batch in order.split(6):
        padded.update(values[batch], users[batch], batch)
    for a, b in zip(plain.compute(), padded.compute(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(plain.compute()[0], user_mean(values, users))
    torch.testing.assert_close(plain.compute()[1], values.mean(dim=0))
