"""Preference losses as pure functions of sequence log-probabilities."""

import torch
import torch.nn.functional as F
from torch import Tensor


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and implicit rewards of preference pairs.

    Args:
        chosen_logps: [pairs], log pi(chosen | prompt), summed over tokens; likewise the next three.
        rejected_logps: [pairs].
        ref_chosen_logps: [pairs], under the reference policy.
        ref_rejected_logps: [pairs].
        chosen_tokens: [pairs], tokens of the chosen answer (for the losses that normalise by length).
        rejected_tokens: [pairs].
        loss: "sigmoid" (DPO, arXiv 2305.18290, eq. 7; with `label_smoothing` the conservative form), "sigmoid_norm"
            (the same on per-token averages), "ipo" (arXiv 2310.12036, eq. 17, on per-token averages as its authors
            confirmed), "hinge" (SLiC, arXiv 2305.10425), "robust" (arXiv 2403.00409), "sft" (negative log-likelihood
            per token of the chosen answer: best-of-N fine-tuning, rejected answers unused).
        beta: Strength of the pull towards the reference.
        label_smoothing: Assumed share of pairs whose order is wrong, below 0.5.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [pairs]; rewards are beta * log(pi / pi_ref), detached.

    >>> zero = torch.zeros(1); one = torch.ones(1)
    >>> losses, chosen, rejected = preference_loss(
    ...     zero, zero, zero, zero, chosen_tokens=one, rejected_tokens=one, beta=0.1)
    >>> round(losses.item(), 4)  # -log sigmoid(0)
    0.6931
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    delta = chosen - rejected
    per_token = chosen / chosen_tokens.clamp(min=1) - rejected / rejected_tokens.clamp(min=1)
    if loss in ("sigmoid", "sigmoid_norm"):
        h = beta * (delta if loss == "sigmoid" else per_token)
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    elif loss == "robust":
        right, wrong = F.logsigmoid(beta * delta), F.logsigmoid(-beta * delta)
        losses = (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss == "hinge":
        losses = torch.relu(1 - beta * delta)
    elif loss == "ipo":
        losses = (per_token - 1 / (2 * beta)) ** 2
    elif loss == "sft":
        # Weighted so that the batch mean is the mean over tokens, not over answers.
        losses = -chosen_logps * len(chosen_logps) / chosen_tokens.sum().clamp(min=1)
    else:
        raise ValueError(f"unknown preference loss {loss!r}")
    return losses, beta * chosen.detach(), beta * rejected.detach()
