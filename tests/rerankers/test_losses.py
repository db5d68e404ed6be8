"""The losses against their formulas, and finite where the formulas overflow."""

import math

import pytest
import torch
from torch import Tensor

from lit_rec.errors import UserError
from lit_rec.rerankers.losses import LOSSES, get_loss, list_log_likelihood
from lit_rec.rerankers.module import loss_of

LOGITS = torch.tensor([[0.3, -0.2, 0.9], [0.1, 0.4, 7.0]])
LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def softmax(values: list[float], temperature: float) -> list[float]:
    powers = [math.exp(v / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def lists() -> list[tuple[list[float], list[float]]]:
    return [(s[m].tolist(), y[m].tolist()) for s, y, m in zip(LOGITS, LABELS, MASK, strict=True)]


def test_bce() -> None:
    terms = [
        -math.log(1 / (1 + math.exp(-s if y else s)))
        for scores, labels in lists()
        for s, y in zip(scores, labels, strict=True)
    ]
    assert LOSSES["bce"](LOGITS, LABELS, MASK, 1.0).item() == pytest.approx(sum(terms) / 5, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_list_wise_losses(temperature: float) -> None:
    expected = {"attention": 0.0, "attention_rank": 0.0, "list_softmax": 0.0}
    for scores, labels in lists():
        b = softmax(scores, temperature)
        a = [y / sum(labels) for y in labels]  # softmax of equal labels, on the positives
        for p, q, y in zip(a, b, labels, strict=True):
            expected["attention"] -= p * math.log(q) / 2
            expected["attention_rank"] -= (p * math.log(q) + (1 - p) * math.log(1 - q)) / 2
            expected["list_softmax"] -= y * math.log(q) / 2
    for name, value in expected.items():
        assert LOSSES[name](LOGITS, LABELS, MASK, temperature).item() == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_of_kars_setrank(temperature: float) -> None:
    """KAR's code takes the element-wise BCE of two attention distributions; scores here are above 0."""
    generator = torch.Generator().manual_seed(3)
    logits = 0.1 + torch.rand(5, 10, generator=generator)
    labels = (torch.rand(5, 10, generator=generator) < 0.4).float().scatter(1, torch.zeros(5, 1).long(), 1.0)

    def attention_score(x: Tensor) -> Tensor:
        powers = torch.where(x > 0, (x / temperature).exp(), 0.0)
        return powers / powers.sum(dim=1, keepdim=True)

    theirs = torch.nn.functional.binary_cross_entropy(attention_score(logits), attention_score(labels))
    ours = get_loss(loss_of("setrank", "default"))(logits, labels, labels >= 0, temperature)
    torch.testing.assert_close(ours, 10 * theirs)  # summed over the ten candidates of a list, where KAR has their mean


def test_graded_labels_share_the_attention_by_softmax() -> None:
    logits, labels = torch.tensor([[0.3, -0.2, 0.9]]), torch.tensor([[2.0, 0.0, 1.0]])
    a, b = softmax([2.0, 1.0], 1.0), softmax([0.3, -0.2, 0.9], 1.0)
    expected = -(a[0] * math.log(b[0]) + a[1] * math.log(b[2]))
    assert LOSSES["attention"](logits, labels, labels >= 0, 1.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_finite_where_exponentials_overflow(name: str, scale: float) -> None:
    logits = torch.tensor([[1.0, -1.0, 0.5, 0.0]], requires_grad=True)
    loss = LOSSES[name](logits * scale, torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.ones(1, 4).bool(), 0.03)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_lists_without_positives_have_no_say(name: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    plain = LOSSES[name](logits, LABELS, MASK, 0.5)
    plain.backward()
    assert logits.grad is not None
    assert logits.grad[1, 2] == 0
    moved = torch.where(MASK, LOGITS, -50.0)
    torch.testing.assert_close(LOSSES[name](moved, LABELS, MASK, 0.5), plain.detach())
    if name != "bce":
        more = [torch.cat([t, t[:1]]) for t in (LOGITS, LABELS * 1, MASK)]
        more[1][2] = 0
        torch.testing.assert_close(LOSSES[name](more[0], more[1], more[2], 0.5), plain.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_one_candidate_alone(name: str) -> None:
    one: Tensor = torch.ones(1, 1)
    assert LOSSES[name](one, one, one.bool(), 0.03).isfinite()


def test_list_log_likelihood() -> None:
    value = list_log_likelihood(LOGITS, LABELS, MASK)
    p = softmax([0.3, -0.2, 0.9], 1.0)
    assert value[0].item() == pytest.approx((math.log(p[0]) + math.log(p[2])) / 2, abs=1e-6)
    assert list_log_likelihood(LOGITS, 0 * LABELS, MASK).tolist() == [0, 0]


def test_unknown_loss() -> None:
    with pytest.raises(UserError, match="no reranker loss 'hinge'"):
        get_loss("hinge")
