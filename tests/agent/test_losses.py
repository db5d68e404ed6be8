"""The losses against loops over rows, torch.distributions and numeric gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lit_rec.agent import losses
from lit_rec.agent.policy import NEVER


def draw(seed: int, rows: int = 64, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """New and old log-probabilities of choices, and advantages, float64."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(rows, generator=generator, dtype=torch.float64)
    return new, old, torch.randn(rows, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("clip", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_clipped_surrogate_is_the_papers_objective_negated(clip: float, seed: int) -> None:
    new, old, advantages = draw(seed)
    total = 0.0
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(n) / math.exp(o)
        total += min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a)
    assert losses.clipped_surrogate(new, old, advantages, clip).item() == pytest.approx(-total / len(new), rel=1e-12)


def test_clipped_surrogate_stops_pushing_only_outside_and_only_outwards() -> None:
    """Gradient zero: a good action already above 1 + clip, a bad one already below 1 - clip; nowhere else."""
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    logp = ratios.log().requires_grad_()
    losses.clipped_surrogate(logp, torch.zeros(6, dtype=torch.float64), advantages, 0.2).backward()
    expected = torch.where(torch.tensor([False, False, True, True, True, True]), -advantages * ratios / 6, 0.0)
    torch.testing.assert_close(logp.grad, expected)


def test_at_the_behaviour_policy_the_surrogate_is_the_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(50, 5, generator=generator, dtype=torch.float64).requires_grad_()
    actions = torch.randint(5, (50,), generator=generator)
    advantages = torch.randn(50, generator=generator, dtype=torch.float64)
    logp = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
    found = torch.autograd.grad(losses.clipped_surrogate(logp, logp.detach(), advantages, 0.05), logits)[0]
    expected = torch.autograd.grad(-(Categorical(logits=logits).log_prob(actions) * advantages).mean(), logits)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("advantage", [0.0, -0.0])
def test_zero_advantages_give_no_loss_and_no_gradient(advantage: float) -> None:
    logp = torch.tensor([0.3, -0.4]).requires_grad_()
    loss = losses.clipped_surrogate(logp, torch.zeros(2), torch.full((2,), advantage), 0.2)
    loss.backward()
    assert loss.item() == 0
    assert logp.grad is not None
    assert logp.grad.tolist() == [0, 0]


@pytest.mark.parametrize("clip", [None, 0.1, 0.5])
def test_value_loss_equals_a_loop(clip: float | None) -> None:
    values, old, returns = draw(4)
    total = 0.0
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        error = (v - r) ** 2
        if clip is not None:
            error = max(error, (o + min(max(v - o, -clip), clip) - r) ** 2)
        total += error
    found = losses.value_loss(values, returns, old, clip)
    assert found.item() == pytest.approx(0.5 * total / len(values), rel=1e-12)
    if clip is None:
        assert losses.value_loss(values, returns).item() == found.item()


def test_a_clipped_value_loss_asks_for_the_old_values() -> None:
    with pytest.raises(ValueError, match="rollout"):
        losses.value_loss(torch.zeros(1), torch.zeros(1), clip=0.1)


@pytest.mark.parametrize("actions", [1, 2, 21])
def test_entropy_equals_torch_distributions(actions: int) -> None:
    logits = 3 * torch.randn(30, actions, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(losses.entropy(logits.log_softmax(-1)), Categorical(logits=logits).entropy())


def test_entropy_of_one_action_is_zero_and_of_equal_ones_the_logarithm() -> None:
    assert losses.entropy(torch.zeros(3, 1).log_softmax(-1)).tolist() == [0, 0, 0]
    assert losses.entropy(torch.zeros(1, 7).log_softmax(-1)).item() == pytest.approx(math.log(7))


def test_entropy_leaves_out_what_cannot_be_chosen_and_its_gradient_is_a_number() -> None:
    live = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    logits = torch.cat([live, torch.full((1, 2), NEVER, dtype=torch.float64)], dim=1).requires_grad_()
    found = losses.entropy(logits.log_softmax(-1))
    torch.testing.assert_close(found, Categorical(logits=live).entropy())
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 3:].tolist() == [0, 0]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_normalised_advantages_have_mean_0_and_deviation_1(scale: float) -> None:
    values = 7 + scale * torch.randn(100, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = losses.normalise(values)
    assert found.mean().item() == pytest.approx(0, abs=1e-9)
    assert found.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(found.argsort(), values.argsort())


def test_normalising_one_advantage_or_equal_ones() -> None:
    assert losses.normalise(torch.tensor([3.0])).tolist() == [3]
    assert losses.normalise(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0, 0, 0]


def test_approx_kl_is_the_mean_of_a_never_negative_term() -> None:
    new, old, _ = draw(7)
    expected = [math.exp(n - o) - 1 - (n - o) for n, o in zip(new.tolist(), old.tolist(), strict=True)]
    assert min(expected) >= 0
    assert losses.approx_kl(new, old).item() == pytest.approx(sum(expected) / len(expected), rel=1e-10)
    assert losses.approx_kl(old, old).item() == 0


def test_approx_kl_of_many_choices_estimates_the_divergence_old_from_new() -> None:
    generator = torch.Generator().manual_seed(8)
    old = Categorical(logits=torch.randn(6, generator=generator, dtype=torch.float64))
    new = Categorical(logits=old.logits + torch.randn(6, generator=generator, dtype=torch.float64))
    actions = torch.multinomial(old.probs, 200_000, replacement=True, generator=generator)
    found = losses.approx_kl(new.log_prob(actions), old.log_prob(actions)).item()
    assert found == pytest.approx(kl_divergence(old, new).item(), rel=0.02)
    assert found != pytest.approx(kl_divergence(new, old).item(), rel=0.1)


@pytest.mark.parametrize("clip", [0.05, 0.2])
def test_clipfrac_equals_a_loop(clip: float) -> None:
    new, old, _ = draw(9, spread=0.15)
    outside = [not 1 - clip <= math.exp(n - o) <= 1 + clip for n, o in zip(new.tolist(), old.tolist(), strict=True)]
    assert 0 < sum(outside) < len(outside)
    assert losses.clipfrac(new, old, clip).item() == pytest.approx(sum(outside) / len(outside))


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert losses.explained_variance(returns + 3, returns).item() == pytest.approx(1)
    assert losses.explained_variance(torch.full((3,), 9.0), returns).item() == pytest.approx(0)
    assert losses.explained_variance(-returns, returns).item() == pytest.approx(-3)
    assert losses.explained_variance(returns, torch.ones(3)).isnan()


def test_full_information_loss_equals_a_loop_and_its_gradient_a_difference_quotient() -> None:
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    rewards = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    found = losses.full_information_loss(logits.log_softmax(-1), rewards)
    total = 0.0
    for row in range(4):
        weights = [math.exp(x) for x in logits[row].tolist()]
        total += sum(w * r for w, r in zip(weights, rewards[row].tolist(), strict=True)) / sum(weights)
    assert found.item() == pytest.approx(-total / 4, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: losses.full_information_loss(x.log_softmax(-1), rewards), logits)


def test_full_information_gradient_is_the_expected_policy_gradient() -> None:
    """d/dz_a sum_b pi_b r_b = pi_a (r_a - sum_b pi_b r_b)."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(1, 5, generator=generator, dtype=torch.float64).requires_grad_()
    rewards = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    losses.full_information_loss(logits.log_softmax(-1), rewards).backward()
    chances = logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, -chances * (rewards - (chances * rewards).sum()))


def test_full_information_of_one_action_is_its_reward_and_dead_ones_do_not_count() -> None:
    assert losses.full_information_loss(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])).item() == -2
    logp = torch.tensor([[0.0, NEVER]]).log_softmax(-1)
    assert losses.full_information_loss(logp, torch.tensor([[0.25, 1e6]])).item() == -0.25
