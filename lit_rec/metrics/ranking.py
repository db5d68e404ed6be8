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
SHORT = 64  # candidates; up to here comparing all pairs is faster than sorting (measured)
BLOCK = 50_000  # lists at a time: few enough to stay in the cache, and enough that the steps cost more than their calls


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
    return _ordered(scores.t(), labels.t().masked_fill(~mask.t(), 0), mask.t()).t()


def misplaced(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Say of every list whether a candidate without a label stands above one with: [L] bool.

    Args:
        scores: [L, C] float, higher is better.
        labels: [L, C] relevance.
        mask: [L, C] bool, true where there is a candidate.

    >>> labels = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    >>> misplaced(torch.tensor([[3.0, 2.0, 1.0]]).expand(3, 3), labels, torch.ones(3, 3, dtype=torch.bool)).tolist()
    [True, False, False]
    """
    hit = labels_in_order(scores, labels, mask) > 0
    return (hit[:, 1:] & ~hit[:, :-1]).any(dim=1)


def _ordered(scores: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """What `labels_in_order` gives, with one row per candidate: [C, L], labels of padding being 0 already.

    Without a mask nothing is padding.
    """
    lowest = torch.finfo(scores.dtype).min
    # A candidate scored minus infinity must still come before padding; what is no number comes first, as in a sort.
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=lowest)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if len(scores) > SHORT:
        return labels.gather(0, scores.argsort(dim=0, descending=True, stable=True))
    return torch.empty_like(labels).scatter_(0, _places(scores), labels)


def _places(scores: Tensor) -> Tensor:
    """The place of every candidate, from 0, by comparing all pairs: for short lists far less work than sorting.

    Args:
        scores: [C, L], one ROW per candidate, so that one comparison runs over all lists at once; no nan.

    Returns:
        [C, L] int64; of equal scores the earlier candidate has the smaller place.
    """
    count = len(scores)
    place = torch.arange(count - 1, -1, -1, dtype=torch.uint8, device=scores.device)[:, None].repeat(1, scores.shape[1])
    for later in range(1, count):
        loses = (scores[:later] >= scores[later]).view(torch.uint8)  # against which earlier candidates
        place[later] += loses.sum(0, dtype=torch.uint8)
        place[:later] -= loses
    return place.long()


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
    parts = [slice(at, at + BLOCK) for at in range(0, max(len(logits), 1), BLOCK)]
    blocks = [_metrics(logits[part].t(), labels[part].t(), mask[part].t(), k, convention) for part in parts]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]} if blocks[1:] else blocks[0]


def _metrics(logits: Tensor, labels: Tensor, mask: Tensor, k: Sequence[int], convention: str) -> dict[str, Tensor]:
    """The metrics of one block, with one row per candidate, [C, L]: every step runs over all lists at once."""
    # A fill writes in the order of what it reads; so the turning comes first.
    labels, logits = labels.float().contiguous(), logits.float().contiguous()
    if padded := not bool(mask.all()):
        labels = labels.masked_fill(~mask, 0)
    ranked = _ordered(logits, labels, mask if padded else None)
    rank = torch.arange(1, len(ranked) + 1, device=ranked.device)[:, None]
    discount = 1 / torch.log2(rank + 1)
    binary = torch.equal(labels * labels, labels)  # gains of 1 and 0, so that counts say what a sort would
    positives = (labels > 0).sum(dim=0, dtype=torch.float32)
    if not binary:
        ideal = _gain(labels.sort(dim=0, descending=True).values) * discount
    top = ranked[: max(k)]
    hit = (top > 0).float()
    gain = (top if binary else _gain(top)) * discount[: len(top)]
    precision = hit * hit.cumsum(dim=0) / rank[: len(top)]
    reciprocal = hit / rank[: len(top)]
    values: dict[str, Tensor] = {}
    for cut in k:
        hits = hit[:cut].sum(dim=0)
        if binary:
            best = torch.cat([discount.new_zeros(1), discount[:cut, 0].cumsum(dim=0)])[positives.clamp(max=cut).int()]
        else:
            best = ideal[:cut].sum(dim=0)
        divisor = hits if convention == "kar" else positives.clamp(max=cut)
        # Without a positive the numerators are 0, so any divisor that is not 0 gives the 0 that is asked for.
        values[f"ndcg@{cut}"] = gain[:cut].sum(dim=0) / best.where(best > 0, 1.0)
        values[f"map@{cut}"] = precision[:cut].sum(dim=0) / divisor.clamp(min=1)
        values[f"hr@{cut}"] = hits.clamp(max=1)
        values[f"mrr@{cut}"] = reciprocal[:cut].amax(dim=0)
        values[f"click@{cut}"] = top[:cut].sum(dim=0)
    return values


def _gain(labels: Tensor) -> Tensor:
    return labels.exp2() - 1


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
