"""Ranking metrics of many lists at once: pure functions of tensors, one value per list.

Two conventions are in use for the average precision of a cut list, and numbers under one cannot be compared
with numbers under the other; everything here therefore names its convention:

- `kar`: divided by the number of hits inside the top k (KAR's code, and torchmetrics'
`RetrievalMAP(top_k=k)`);
- `standard`: divided by min(k, positives of the list), so that a positive left outside the top k costs.

With k at least the list's length the two agree. NDCG, HR, MRR and click do not depend on the convention.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_rec.errors import UserError

Convention = Literal["kar", "standard"]
METRICS = ("ndcg", "map", "hr", "mrr", "click")


def parse_metric(name: str) -> tuple[str, int]:
    """Split a metric's name into metric and cut-off.

    Raises:
        UserError: when the name is not `<metric>@<k>` with a metric of `METRICS` and k at least 1.

    >>> parse_metric("ndcg@5")
    ('ndcg', 5)
    """
    metric, _, k = name.partition("@")
    if metric not in METRICS or not k.isdigit() or int(k) < 1:
        raise UserError(
            f"There is no ranking metric {name!r}.",
            fix=f"Write one of {', '.join(f'{m}@5' for m in METRICS)}, with any cut-off from 1 up.",
        )
    return metric, int(k)


def labels_in_order(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the labels of every list in the order of its scores.

    Descending and stable: of two equal scores the earlier candidate stays first. Padding comes last, with
    label 0.

    Args:
        scores: [L, C] float, higher is better.
        labels: [L, C] relevance.
        mask: [L, C] bool, true where there is a candidate.

    >>> scores, labels = torch.tensor([[0.1, 0.9, 0.9]]), torch.tensor([[1.0, 2.0, 3.0]])
    >>> labels_in_order(scores, labels, torch.ones(1, 3, dtype=torch.bool))
    tensor([[2., 3., 1.]])
    """
    # A candidate scored minus infinity must still come before padding, hence the clamp.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~mask, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return labels.masked_fill(~mask, 0).gather(1, order)


def ranking_metrics(
    logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    k: Sequence[int] = (5,),
    convention: Convention = "kar",
) -> dict[str, Tensor]:
    """Compute NDCG, MAP, HR, MRR and clicks at every cut-off, per list (METHODS 1.7).

    Gain is 2^relevance - 1, discount log2(rank + 1), the ideal order comes from the same list; a candidate is
    a hit when its label is above 0. A list without a positive counts 0 in every metric. A cut-off beyond the
    list's length takes the whole list.

    Args:
        logits: [L, C] scores, higher is better.
        labels: [L, C] relevance, 0 for none.
        mask: [L, C] bool, true where there is a candidate.
        k: cut-offs, each at least 1.
        convention: divisor of the average precision, see the module's text.

    Returns:
        `ndcg@k`, `map@k`, `hr@k`, `mrr@k` (all in [0, 1]) and `click@k` (a sum of labels), each a float
        tensor [L].

    Raises:
        UserError: on an unknown convention or a cut-off below 1.

    >>> scores = torch.tensor([[0.9, 0.5, 0.1]])
    >>> labels = torch.tensor([[0.0, 1.0, 1.0]])
    >>> candidates = torch.ones(1, 3, dtype=torch.bool)
    >>> values = ranking_metrics(scores, labels, candidates, k=(2,), convention="kar")
    >>> {name: round(value.item(), 4) for name, value in values.items()}
    {'ndcg@2': 0.3869, 'map@2': 0.5, 'hr@2': 1.0, 'mrr@2': 0.5, 'click@2': 1.0}
    >>> ranking_metrics(scores, labels, candidates, k=(2,), convention="standard")["map@2"].item()
    0.25
    """
    if convention not in ("kar", "standard"):
        raise UserError(f"There is no metric convention {convention!r}.", fix="Write kar or standard.")
    if any(cut < 1 for cut in k):
        raise UserError(f"A metric's cut-off must be at least 1, not {min(k)}.")
    ranked = labels_in_order(logits.float(), labels.float(), mask)
    rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device, dtype=torch.float32)
    discount = 1 / torch.log2(rank + 1)
    hit = (ranked > 0).float()
    precision_at_hit = hit.cumsum(dim=1) / rank * hit
    reciprocal_rank = hit / rank
    dcg = ((2**ranked - 1) * discount).cumsum(dim=1)
    ideal = ((2 ** ranked.sort(dim=1, descending=True).values - 1) * discount).cumsum(dim=1)
    positives = hit.sum(dim=1)

    values: dict[str, Tensor] = {}
    for cut in k:
        last = min(cut, ranked.shape[1]) - 1
        hits = hit[:, : last + 1].sum(dim=1)
        divisor = hits if convention == "kar" else positives.clamp(max=cut)
        # Without a positive the numerators are 0, so any divisor that is not 0 gives the 0 that is asked for.
        values[f"ndcg@{cut}"] = dcg[:, last] / ideal[:, last].where(ideal[:, last] > 0, 1.0)
        values[f"map@{cut}"] = precision_at_hit[:, : last + 1].sum(dim=1) / divisor.clamp(min=1)
        values[f"hr@{cut}"] = (hits > 0).float()
        values[f"mrr@{cut}"] = reciprocal_rank[:, : last + 1].amax(dim=1)
        values[f"click@{cut}"] = ranked[:, : last + 1].sum(dim=1)
    return values


def user_mean(values: Tensor, users: Tensor) -> Tensor:
    """Average per user first, then over users, so that heavy users do not dominate.

    Args:
        values: [L] one value per list, or [L, n] for n metrics at once.
        users: [L] int64, the list's user.

    Returns:
        A scalar, or [n]; nan when there is no list.

    >>> user_mean(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([7, 7, 7, 2])).item()
    0.5
    """
    _, row, counts = users.unique(return_inverse=True, return_counts=True)
    # Summed in double precision: the order in which lists arrive must not show in the result.
    sums = values.new_zeros(len(counts), *values.shape[1:], dtype=torch.float64).index_add_(0, row, values.double())
    return (sums / counts.view(-1, *[1] * (values.dim() - 1))).mean(dim=0).float()
