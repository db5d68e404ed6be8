"""Metrics of next-item ranking: one target per session, so everything follows from the target's rank."""

import math
from collections.abc import Mapping, Sequence

import polars as pl
import torch
from torch import Tensor


def target_ranks(scores: Tensor, candidates: Tensor, target: Tensor, seed: int = 0) -> Tensor:
    """Rank of the target among its candidates, 1 being the best.

    Equal scores are ordered at random by seed: an order that is given would flatter whoever keeps it. A target that was
    not ranked at all (-inf) is last.

    Args:
        scores: [n, C] higher is better; -inf: not ranked.
        candidates: [n, C] items, 0 = padding.
        target: [n] the item that came next.
        seed: Of the order among equals.

    Returns:
        [n] int64.

    Raises:
        ValueError: A target is not among its candidates, or a score is nan.
    """
    real = candidates > 0
    hit = real & (candidates == target[:, None])
    if not bool((hit.sum(1) == 1).all()):
        raise ValueError("every target must stand among its candidates, once")
    if bool(scores[real].isnan().any()):
        raise ValueError("a score is nan")
    own = scores[hit][:, None]
    tie = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    better = (scores > own) | ((scores == own) & (tie > tie[hit][:, None]))
    ranks = 1 + (better & real & ~hit).sum(1)
    return torch.where(own.squeeze(1) == -math.inf, real.sum(1), ranks)


def rank_metrics(ranks: Tensor, ks: Sequence[int], size: int) -> dict[str, Tensor]:
    """Per-session metrics.

    Args:
        ranks: [...] rank of the target.
        ks: Cut-offs.
        size: Candidates per session: the reciprocal rank is not cut.

    Returns:
        `hr@k`, `ndcg@k` (1 / log2(rank + 1) within k, else 0) and `mrr@size`: float32 of the shape of `ranks`.

    >>> {name: round(value.item(), 3) for name, value in rank_metrics(torch.tensor(3), [1, 5], 50).items()}
    {'hr@1': 0.0, 'ndcg@1': 0.0, 'hr@5': 1.0, 'ndcg@5': 0.5, 'mrr@50': 0.333}
    """
    found: dict[str, Tensor] = {}
    gain = 1 / torch.log2(ranks.double() + 1)
    for k in ks:
        inside = ranks <= k
        found[f"hr@{k}"] = inside.float()
        found[f"ndcg@{k}"] = torch.where(inside, gain, 0.0).float()
    found[f"mrr@{size}"] = (1 / ranks.double()).float()
    return found


def random_metrics(items: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Chance: what `rank_metrics` are on average when every rank among the real candidates [n, C] is equally likely."""
    size, real = items.shape[1], (items > 0).sum(1)
    each = rank_metrics(torch.arange(1, size + 1), ks, size)
    return {name: (values.double().cumsum(0)[real - 1] / real).float() for name, values in each.items()}


def session_frame(
    row: str, reranker: str, split: str, sessions: Tensor, metrics: Mapping[str, Tensor], seed: int = 0
) -> pl.DataFrame:
    """Per-session metrics of a row of the result table, as `lit_rec.run.results` reads them."""
    about = {"row": row, "reranker": reranker, "seed": seed, "fold": 0, "split": split}
    columns = {f"{metric}|standard": values.float().numpy() for metric, values in metrics.items()}
    table = pl.DataFrame({"user": sessions.numpy(), "list": sessions.numpy(), **columns})
    named = table.select([pl.lit(value).alias(key) for key, value in about.items()] + [pl.all()])
    return named.with_columns(pl.col("seed", "fold").cast(pl.Int64))
