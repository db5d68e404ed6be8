"""Metrics of 200,000 lists of 10 against torchmetrics' retrieval metrics and a Python loop."""

import math

import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP, RetrievalMRR, RetrievalNormalizedDCG

from lit_rec.metrics.ranking import ranking_metrics
from tests.benchmarks.harness import Row, faster, interleave

LISTS, SIZE = 200_000, 10
PART, MORE = 2_000, 20_000  # the peers are timed on so many lists, the loop on more: their time grows in proportion
OF_TORCHMETRICS = {
    "ndcg@5": RetrievalNormalizedDCG,
    "map@5": RetrievalMAP,
    "hr@5": RetrievalHitRate,
    "mrr@5": RetrievalMRR,
}


def loop(scores: list[list[float]], labels: list[list[float]]) -> dict[str, float]:
    """Means of the five metrics at 5 as they are written down, list by list."""
    total = dict.fromkeys(("ndcg@5", "map@5", "hr@5", "mrr@5", "click@5"), 0.0)
    for s, y in zip(scores, labels, strict=True):
        ranked = [label for _, label in sorted(zip(s, y, strict=True), key=lambda pair: -pair[0])][:5]
        gain = sum(label / math.log2(place + 2) for place, label in enumerate(ranked))
        ideal = sum(label / math.log2(place + 2) for place, label in enumerate(sorted(y, reverse=True)[:5]))
        hits = [place for place, label in enumerate(ranked) if label]
        total["click@5"] += sum(ranked)
        if hits:
            total["ndcg@5"] += gain / ideal
            total["map@5"] += sum((n + 1) / (place + 1) for n, place in enumerate(hits)) / len(hits)
            total["hr@5"] += 1
            total["mrr@5"] += 1 / (hits[0] + 1)
    return {name: value / len(scores) for name, value in total.items()}


def run(full: bool = False) -> list[Row]:
    """Seconds for all lists."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(LISTS, SIZE, generator=draw)
    labels = (torch.rand(LISTS, SIZE, generator=draw) < 0.3).float()
    mask = torch.ones_like(labels, dtype=torch.bool)
    query = torch.arange(LISTS)[:, None].expand(-1, SIZE)

    def ours() -> None:
        found.update(ranking_metrics(scores, labels, mask, [5], "kar"))

    def torchmetrics() -> None:
        flat = (scores[:PART].flatten(), labels[:PART].flatten().long(), query[:PART].flatten())
        for name, kind in OF_TORCHMETRICS.items():
            theirs[name] = float(kind(top_k=5)(flat[0], flat[1], indexes=flat[2]))

    def by_hand() -> None:
        hand.update(loop(scores[:MORE].tolist(), labels[:MORE].tolist()))

    found: dict[str, torch.Tensor] = {}
    theirs: dict[str, float] = {}
    hand: dict[str, float] = {}
    ours()
    mine, metric, looped = interleave(ours, torchmetrics, by_hand, repeats=7)
    for means, lists in ((theirs, PART), (hand, MORE)):
        for name, value in means.items():
            assert abs(float(found[name][:lists].mean()) - value) < 1e-4, name  # the same work
    work = "NDCG, MAP, HR, MRR and clicks of 200,000 lists of 10"
    peers = (("torchmetrics retrieval (without clicks)", metric, PART), ("a Python loop", looped, MORE))
    return [
        faster(work, peer, (mine, taken * LISTS / lists), 40, f"peer's time extrapolated: {lists:,} lists timed")
        for peer, taken, lists in peers
    ]
