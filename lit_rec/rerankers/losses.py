"""Losses of the rerankers: pure functions of (logits, labels, mask), each [B, C], to a scalar.

All of them are in log-softmax or logit form: exp(score / T) overflows float32 at the T = 0.03 of RLRF4Rec,
these stay finite. Padding takes no part. The list-wise losses average over the lists that have a positive: a
list without one says nothing about an order.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rec.errors import UserError


def bce(logits: Tensor, labels: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Binary cross-entropy on sigmoid scores, mean over candidates: KAR's loss of DLCM, PRM and MIR.

    The temperature has no part in it. Labels above 1 count as 1.
    """
    return F.binary_cross_entropy_with_logits(logits, labels.clamp(max=1), weight=mask, reduction="sum") / mask.sum()


def attention(logits: Tensor, labels: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of softmax(score / T) to softmax(label / T) of the positives; KAR's SetRank: `attention_rank`."""
    log_p = log_probabilities(logits / temperature, mask)
    return _mean_over_lists(-(_target(labels, mask, temperature) * log_p).sum(dim=1), labels, mask)


def attention_rank(logits: Tensor, labels: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """SetRank's loss in KAR's code, and DLCM's original one: -sum_i a_i log b_i + (1 - a_i) log(1 - b_i).

    a = softmax(label / T) on the positives, b = softmax(score / T). DLCM's original shifts the scores by their
    minimum, which a softmax does not see. KAR takes the mean over the candidates instead of the sum, and gives b = 0 to
    every score that is not above 0: what such a candidate gets wrong has no gradient, so ours counts it as any other.
    """
    scores = (logits / temperature).masked_fill(~mask, -1e9)
    target = _target(labels, mask, temperature)
    log_b = log_probabilities(logits / temperature, mask)
    # log(1 - b_i) is the log-sum of all the others over the log-sum of all: exact where b_i rounds to 1.
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    others = scores.unsqueeze(1).masked_fill(itself, -1e9).logsumexp(dim=2)
    log_rest = others - scores.logsumexp(dim=1, keepdim=True)
    loss = -(target * log_b + (1 - target) * mask * log_rest).sum(dim=1)
    return _mean_over_lists(loss, labels, mask)


def list_softmax(logits: Tensor, labels: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """PRM's original loss: -sum over the positives of log softmax(score / T)."""
    log_p = log_probabilities(logits / temperature, mask)
    return _mean_over_lists(-((labels > 0) * log_p).sum(dim=1), labels, mask)


def list_log_likelihood(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Mean over a list's positives of log softmax(logits), [B]; 0 for a list without positives.

    Logits of a loss with a temperature come divided by it: the loss has made those the log-probabilities.
    """
    positive = (labels > 0) & mask
    return (log_probabilities(logits, mask) * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)


def log_probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over the candidates of each list, 0 (not minus infinity) on padding."""
    return scores.masked_fill(~mask, -torch.inf).log_softmax(dim=1).masked_fill(~mask, 0)


def _target(labels: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Softmax of label / T over the positives of each list; zeros for a list without positives."""
    positive = (labels > 0) & mask
    return (labels / temperature).masked_fill(~positive, -1e9).softmax(dim=1) * positive


def _mean_over_lists(loss: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    has_positive = ((labels > 0) & mask).any(dim=1)
    return (loss * has_positive).sum() / has_positive.sum().clamp(min=1)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "bce": bce,
    "attention": attention,
    "attention_rank": attention_rank,
    "list_softmax": list_softmax,
}


def get_loss(name: str) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Return a loss by name.

    Raises:
        UserError: when there is none of that name.
    """
    if name not in LOSSES:
        raise UserError(f"There is no reranker loss {name!r}.", fix=f"Write one of {', '.join(LOSSES)}, or default.")
    return LOSSES[name]
