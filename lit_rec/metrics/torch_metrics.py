"""The ranking metrics as `torchmetrics.Metric`: thin classes that only keep state.

They follow the values of `lit_rec.metrics.ranking` over batches and over ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_rec.metrics.ranking import Convention, parse_metric, ranking_metrics, user_mean


class ListMean(Metric):
    """Mean of one ranking metric over lists.

    Args:
        name: metric and cut-off, such as `ndcg@5`.
        convention: `kar` or `standard`, see `lit_rec.metrics.ranking`.

    >>> metric = ListMean("mrr@2")
    >>> metric.update(torch.tensor([[0.9, 0.5]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2).bool())
    >>> metric.compute().item()
    0.5
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, name: str, convention: Convention = "kar", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name, self.cut = name, parse_metric(name)[1]
        self.convention: Convention = convention
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, mask: Tensor) -> None:
        """Add a batch of lists: logits, labels and mask, each [L, C]."""
        values = ranking_metrics(logits, labels, mask, (self.cut,), self.convention)[self.name]
        self.total += values.double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """Return the mean so far (nan before the first list)."""
        return (self.total / self.count).float()


class NDCG(ListMean):
    """Mean NDCG@k over lists."""

    def __init__(self, k: int = 5, convention: Convention = "kar", **kwargs: Any) -> None:
        super().__init__(f"ndcg@{k}", convention, **kwargs)


class MAP(ListMean):
    """Mean average precision at k over lists; the convention decides its divisor."""

    def __init__(self, k: int = 5, convention: Convention = "kar", **kwargs: Any) -> None:
        super().__init__(f"map@{k}", convention, **kwargs)


class HitRate(ListMean):
    """Share of lists with a positive in the top k."""

    def __init__(self, k: int = 5, convention: Convention = "kar", **kwargs: Any) -> None:
        super().__init__(f"hr@{k}", convention, **kwargs)


class MRR(ListMean):
    """Mean reciprocal rank of the first positive in the top k."""

    def __init__(self, k: int = 5, convention: Convention = "kar", **kwargs: Any) -> None:
        super().__init__(f"mrr@{k}", convention, **kwargs)


class Clicks(ListMean):
    """Mean number of positives in the top k."""

    def __init__(self, k: int = 5, convention: Convention = "kar", **kwargs: Any) -> None:
        super().__init__(f"click@{k}", convention, **kwargs)


class DistinctMeans(Metric):
    """Per-user and per-list means of given values, each list counted once.

    A DistributedSampler pads the last batches with lists already seen; the list's index tells them apart. The
    means do not depend on the number of ranks or on the order of the batches.

    >>> metric = DistinctMeans()
    >>> metric.update(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3, 4, 4]), torch.tensor([10, 11, 11]))
    >>> metric.update(torch.tensor([0.0, 1.0]), torch.tensor([4, 3]), torch.tensor([12, 10]))
    >>> by_user, by_list = metric.compute()
    >>> round(by_user.item(), 4), round(by_list.item(), 4)
    (0.5, 0.3333)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    values: list[Tensor]
    users: list[Tensor]
    lists: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("values", "users", "lists"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor, users: Tensor, lists: Tensor) -> None:
        """Add a batch: values [L] or [L, n], and each list's user and index, [L]."""
        self.values.append(values.detach())
        self.users.append(users)
        self.lists.append(lists)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the mean over users of their lists' mean, and the mean over lists; scalars or [n]."""
        values, users, lists = (dim_zero_cat(s) for s in (self.values, self.users, self.lists))
        order = lists.argsort(stable=True)
        lists = lists[order]
        first = torch.ones_like(lists, dtype=torch.bool)
        first[1:] = lists[1:] != lists[:-1]
        keep = order[first]
        return user_mean(values[keep], users[keep]), values[keep].double().mean(dim=0).float()
