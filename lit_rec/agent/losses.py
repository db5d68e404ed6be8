"""The agent's losses and diagnostics as pure functions, under the names the field gives them.

Episodes have one step (METHODS 2.2): the return of a choice is its reward, and its advantage the reward minus the
value that the critic expected.
"""

import torch
from torch import Tensor


def clipped_surrogate(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective, negated (arXiv 1707.06347, eq. 7).

    Args:
        logp: [N] log pi(a|s) of the chosen actions under the policy being trained.
        old_logp: [N] the same under the policy that chose them, exploration included.
        advantages: [N].
        clip: how far the ratio may move from 1 before its gradient is cut.

    Returns:
        Scalar, to be minimised.

    >>> up = torch.tensor([1.5]).log()
    >>> round(clipped_surrogate(up, torch.zeros(1), torch.ones(1), clip=0.2).item(), 4)
    -1.2
    """
    ratio = (logp - old_logp).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor | None = None, clip: float | None = None) -> Tensor:
    """Half the mean squared error of the critic.

    Args:
        values: [N] what the critic expects.
        returns: [N] what came.
        old_values: [N] what it expected at the rollout; only read with `clip`.
        clip: with a number, the larger of the error and of the error of values held within `clip` of the old ones.

    Returns:
        Scalar.
    """
    errors = (values - returns) ** 2
    if clip is not None:
        if old_values is None:
            raise ValueError("a clipped value loss needs the values of the rollout")
        held = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.max(errors, (held - returns) ** 2)
    return 0.5 * errors.mean()


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats of each row.

    Args:
        logp: [..., A] log-probabilities; actions that cannot be chosen hold a large negative FINITE number, so that
            they count zero and their gradient is zero.

    Returns:
        [...].
    """
    return -(logp.exp() * logp).sum(-1)


def normalise(advantages: Tensor) -> Tensor:
    """Advantages [N] with mean 0 and deviation 1; a single one, which has no deviation, is left as it is."""
    if len(advantages) < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def approx_kl(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Estimate KL(old || new) from the chosen actions [N]: mean of (r - 1) - log r, never negative.

    The k3 estimator of http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = logp - old_logp
    return (log_ratio.expm1() - log_ratio).mean()


def clipfrac(logp: Tensor, old_logp: Tensor, clip: float) -> Tensor:
    """Share of the chosen actions [N] whose ratio has left [1 - clip, 1 + clip]."""
    return (((logp - old_logp).exp() - 1).abs() > clip).float().mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), both [N]: 1 is a perfect critic, 0 one that says a constant.

    nan where all returns are equal: there was nothing to explain.
    """
    variance = returns.var(unbiased=False)
    explained = 1 - (returns - values).var(unbiased=False) / variance
    return torch.where(variance > 0, explained, torch.full_like(explained, float("nan")))


def full_information_loss(logp: Tensor, rewards: Tensor) -> Tensor:
    """Minus the expected reward, when the reward of every action is known (METHODS 2.6).

    Args:
        logp: [N, A] log pi(a|s).
        rewards: [N, A] finite; those of actions that cannot be chosen do not matter.

    Returns:
        Scalar: - mean_s sum_a pi(a|s) r(s, a).
    """
    return -(logp.exp() * rewards).sum(-1).mean()
