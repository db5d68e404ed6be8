"""Metrics of 200,000 lists of 10 against torchmetrics' retrieval metrics and a Python loop."""

import math

import torch
from torchmetrics.retrieval import RetrievalMAP, RetrievalNormalizedDCG

from lit_rec.metrics.ranking import ranking_metrics
from tests.benchmarks.harness import Row, interleave

LISTS, SIZE, PART = 200_000, 10, 2_000  # the peers are timed on a part of the lists: their time grows in proportion


def loop(scores: list[list[float]], labels: list[list[float]]) -> tuple[float, float]:
    """NDCG@5 and MAP@5 as they are written down, list by list."""
    ndcg = precision = 0.0
    for s, y in zip(scores, labels, strict=True):
        ranked = [label for _, label in sorted(zip(s, y, strict=True), key=lambda pair: -pair[0])]
        gain = sum(label / math.log2(place + 2) for place, label in enumerate(ranked[:5]))
        ideal = sum(label / math.log2(place + 2) for place, label in enumerate(sorted(y, reverse=True)[:5]))
        ndcg += gain / ideal if ideal else 0.0
        hits = [place for place, label in enumerate(ranked[:5]) if label]
        precision += sum((n + 1) / (place + 1) for n, place in enumerate(hits)) / len(hits) if hits else 0.0
    return ndcg / len(scores), precision / len(scores)


def run() -> list[Row]:
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
        theirs["ndcg"] = float(RetrievalNormalizedDCG(top_k=5)(flat[0], flat[1], indexes=flat[2]))
        theirs["map"] = float(RetrievalMAP(top_k=5)(flat[0], flat[1], indexes=flat[2]))

    def by_hand() -> None:
        theirs["hand"], theirs["hand map"] = loop(scores[:PART].tolist(), labels[:PART].tolist())

    found: dict[str, torch.Tensor] = {}
    theirs: dict[str, float] = {}
    ours()
    mine, metric, hand = interleave(ours, torchmetrics, by_hand)
    for name, value in (("ndcg@5", theirs["ndcg"]), ("ndcg@5", theirs["hand"]), ("map@5", theirs["hand map"])):
        assert abs(float(found[name][:PART].mean()) - value) < 1e-4, name  # the same work
    scale = LISTS / PART
    work = "metrics of 200,000 lists of 10 (ours: five metrics; peers: NDCG@5 and MAP@5)"
    note = f"peers timed on {PART:,} lists"
    return [
        Row(work, "torchmetrics retrieval", mine, metric * scale, "s", metric * scale / mine, 40, note),
        Row(work, "a Python loop", mine, hand * scale, "s", hand * scale / mine, 40, note),
    ]
