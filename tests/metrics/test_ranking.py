"""The vectorised metrics against torchmetrics and against a plain loop over METHODS 1.7."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import retrieval

from lit_rec.errors import UserError
from lit_rec.metrics import ranking
from lit_rec.metrics.ranking import METRICS, labels_in_order, parse_metric, ranking_metrics, user_mean

CUTS = (1, 3, 5, 10, 13)


def random_lists(seed: int, ties: bool = False, padding: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """300 lists of 10; among them lists without a positive and lists of positives alone."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(300, 10, generator=generator) + 0.01
    if ties:
        logits = (logits * 3).floor()
    labels = (torch.rand(300, 10, generator=generator) < torch.rand(300, 1, generator=generator)).float()
    labels[:20], labels[20:40] = 0, 1
    mask = torch.ones(300, 10, dtype=torch.bool)
    if padding:
        length = torch.randint(1, 11, (300, 1), generator=generator)
        mask = torch.arange(10) < length
        logits = torch.where(mask, logits, 99.0)  # padding must lose however it is scored
    return logits, labels, mask


def by_hand(scores: list[float], labels: list[float], k: int, convention: str) -> dict[str, float]:
    """METHODS 1.7, word by word."""
    order = sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)
    top = [labels[i] for i in order][:k]
    ideal = sorted(labels, reverse=True)[:k]
    dcg = sum((2**rel - 1) / math.log2(i + 1) for i, rel in enumerate(top, 1))
    best = sum((2**rel - 1) / math.log2(i + 1) for i, rel in enumerate(ideal, 1))
    hits, precision, reciprocal = 0, 0.0, 0.0
    for i, rel in enumerate(top, 1):
        if rel > 0:
            hits += 1
            precision += hits / i
            reciprocal = reciprocal or 1 / i
    divisor = hits if convention == "kar" else min(k, sum(rel > 0 for rel in labels))
    return {
        "ndcg": dcg / best if best else 0.0,
        "map": precision / divisor if divisor else 0.0,
        "hr": float(hits > 0),
        "mrr": reciprocal,
        "click": sum(top),
    }


@pytest.mark.parametrize("convention", ["kar", "standard"])
@pytest.mark.parametrize(("ties", "padding"), [(False, False), (True, False), (True, True)])
def test_equals_a_loop_over_lists(convention: str, ties: bool, padding: bool) -> None:
    logits, labels, mask = random_lists(1, ties, padding)
    values = ranking_metrics(logits, labels, mask, CUTS, convention)
    for row in range(len(logits)):
        real = mask[row]
        for k in CUTS:
            expected = by_hand(logits[row][real].tolist(), labels[row][real].tolist(), k, convention)
            for metric in METRICS:
                assert values[f"{metric}@{k}"][row].item() == pytest.approx(expected[metric], abs=1e-6)


def test_equals_torchmetrics() -> None:
    """Its MAP at k divides by the hits inside k, which is the `kar` convention."""
    logits, labels, mask = random_lists(2)
    oracles = {
        "ndcg": retrieval.retrieval_normalized_dcg,
        "map": retrieval.retrieval_average_precision,
        "hr": retrieval.retrieval_hit_rate,
        "mrr": retrieval.retrieval_reciprocal_rank,
    }
    for k in (1, 3, 5, 10):
        values = ranking_metrics(logits, labels, mask, (k,), "kar")
        for metric, oracle in oracles.items():
            expected = [oracle(s, y, top_k=k) for s, y in zip(logits, labels.long(), strict=True)]
            torch.testing.assert_close(values[f"{metric}@{k}"], torch.stack(expected).float(), atol=1e-6, rtol=0)


def test_conventions_agree_on_the_whole_list_and_differ_on_a_cut_one() -> None:
    logits, labels, mask = random_lists(3)
    kar = ranking_metrics(logits, labels, mask, (5, 10), "kar")
    standard = ranking_metrics(logits, labels, mask, (5, 10), "standard")
    torch.testing.assert_close(kar["map@10"], standard["map@10"])
    assert (kar["map@5"] >= standard["map@5"]).all()
    assert (kar["map@5"] > standard["map@5"]).any()
    for metric in ("ndcg", "hr", "mrr", "click"):
        assert torch.equal(kar[f"{metric}@5"], standard[f"{metric}@5"])


def test_graded_labels_gain_exponentially() -> None:
    logits, labels = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 3.0, 0.0]])
    value = ranking_metrics(logits, labels, torch.ones(1, 3, dtype=torch.bool), (2,))["ndcg@2"].item()
    assert value == pytest.approx((1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3)), abs=1e-6)


def test_a_candidate_scored_minus_infinity_still_beats_padding() -> None:
    logits = torch.tensor([[9.0, -torch.inf]])
    values = ranking_metrics(logits, torch.tensor([[0.0, 1.0]]), torch.tensor([[False, True]]), (1,))
    assert values["hr@1"].item() == 1


def test_users_weigh_the_same() -> None:
    values, users = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([5, 5, 1])
    assert user_mean(values, users).tolist() == [0.5, 0.5]


def test_mistakes_are_explained() -> None:
    logits, labels, mask = random_lists(4)
    with pytest.raises(UserError, match="convention"):
        ranking_metrics(logits, labels, mask, (5,), "other")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 1"):
        ranking_metrics(logits, labels, mask, (0,))
    for name in ("ndcg", "ndcg@", "auc@5", "ndcg@0"):
        with pytest.raises(UserError, match="no ranking metric"):
            parse_metric(name)


@pytest.mark.parametrize("size", [1, ranking.SHORT, ranking.SHORT + 1, 90])
@pytest.mark.parametrize("graded", [False, True])
def test_short_and_long_lists_and_lists_in_blocks_are_ranked_alike(
    size: int, graded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(size)
    logits = torch.randint(0, 1 + size // 2, (50, size), generator=draw).float()  # many ties
    labels = torch.randint(0, 4 if graded else 2, (50, size), generator=draw).float()
    mask = torch.arange(size) < torch.randint(1, size + 1, (50, 1), generator=draw)
    monkeypatch.setattr(ranking, "BLOCK", 7)
    values = ranking_metrics(logits, labels, mask, (10, 2), "standard")
    for row in range(len(logits)):
        real = mask[row]
        for k in (2, 10):
            expected = by_hand(logits[row][real].tolist(), labels[row][real].tolist(), k, "standard")
            for metric in METRICS:
                assert values[f"{metric}@{k}"][row].item() == pytest.approx(expected[metric], abs=1e-6)


@pytest.mark.parametrize("size", [4, ranking.SHORT + 4])
def test_what_is_no_number_comes_first_and_displaces_nothing(size: int) -> None:
    logits = torch.arange(float(size), 0, -1)[None].clone()
    logits[0, -1] = torch.nan
    ranked = labels_in_order(logits, torch.arange(size)[None].float(), torch.ones(1, size, dtype=torch.bool))
    assert ranked[0].tolist() == [size - 1, *range(size - 1)]
