"""The policy: its formula, growing and permuted bases, what cannot be chosen, and the disk."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from lit_rec.agent.policy import BLOCK, Centring, HintPolicy, mlp
from lit_rec.errors import UserError

DIM = 6


def some(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(hints: int = 5, dead: tuple[int, ...] = ()) -> HintPolicy:
    """A policy as it might be after training: nothing is near zero."""
    torch.manual_seed(0)
    policy = HintPolicy(DIM, hidden=8, rank=4)
    policy.center_states.fit(some(1, 30, DIM) + 2)
    alive = torch.ones(hints, dtype=torch.bool)
    alive[list(dead)] = False
    policy.set_hints(some(2, hints, DIM) + 1, alive)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return policy.eval()


def by_hand(policy: HintPolicy, state: Tensor) -> list[float]:
    """The formula of the class, one session and one hint at a time."""

    def centred(centring: Centring, vector: Tensor) -> Tensor:
        moved = vector - centring.mean
        return moved / moved.norm() * math.sqrt(DIM)

    x = centred(policy.center_states, state)
    q = policy.query(x)
    logits = [float(q @ policy.no_hint_key / math.sqrt(policy.rank) + policy.no_hint_bias)]
    for hint in policy.hints:
        h = centred(policy.center_hints, hint)
        fit = q @ (policy.key.weight @ h) / math.sqrt(policy.rank)
        logits.append(float(fit + policy.affinity * (x @ h) / DIM + policy.bias @ h / math.sqrt(DIM)))
    return logits


@pytest.mark.parametrize("hints", [1, 5, BLOCK, BLOCK + 1])
def test_logits_equal_the_formula(hints: int) -> None:
    policy, states = make(hints), some(3, 4, DIM) + 2
    with torch.no_grad():
        found = policy(states)
        for row, state in zip(found, states, strict=True):
            assert row.tolist() == pytest.approx(by_hand(policy, state), abs=1e-4)
    assert found.shape == (4, hints + 1)


@pytest.mark.parametrize("grown", [7, BLOCK - 1, BLOCK, 3 * BLOCK + 5])
def test_a_growing_base_leaves_old_logits_and_parameters_as_they_are(grown: int) -> None:
    policy, states = make(5, dead=(3,)), some(4, 50, DIM) + 2
    parameters = [p.detach().clone() for p in policy.parameters()]
    names = [(id(p), n) for n, p in policy.named_parameters()]
    before = policy(states)
    more = torch.cat([policy.hints, 9 * some(5, grown - 5, DIM)])
    policy.set_hints(more, torch.cat([policy.alive, torch.ones(grown - 5, dtype=torch.bool)]))
    after = policy(states)
    assert after.shape == (50, grown + 1)
    assert torch.equal(after[:, :6], before)
    assert [(id(p), n) for n, p in policy.named_parameters()] == names  # an optimizer keeps its hold
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), parameters, strict=True))
    assert after[:, 6:].std() > 0.1  # new hints are scored by what they say


def test_permuted_hints_have_permuted_logits() -> None:
    policy, states = make(40, dead=(7, 12)), some(6, 20, DIM) + 2
    before = policy(states)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(7))
    other = make(40)
    other.load_state_dict({**policy.state_dict(), "hints": policy.hints[order], "alive": policy.alive[order]})
    assert not torch.equal(order, torch.arange(40))
    torch.testing.assert_close(other(states)[:, 1:], before[:, 1:][:, order])
    torch.testing.assert_close(other(states)[:, 0], before[:, 0])


def test_a_hint_added_twice_has_one_logit() -> None:
    policy, states = make(5), some(8, 20, DIM)
    policy.set_hints(torch.cat([policy.hints, policy.hints[2:3]]), torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(policy(states)[:, 6], policy(states)[:, 3])


@pytest.mark.parametrize("exploration", [0.0, 0.2])
def test_dead_hints_are_never_chosen_and_no_hint_always_can_be(exploration: float) -> None:
    policy, states = make(5, dead=(0, 3)), some(9, 200, DIM) + 2
    chances = policy.log_probs(states, exploration).exp()
    assert chances[:, [1, 4]].count_nonzero() == 0
    assert (chances[:, [0, 2, 3, 5]] > 0).all()
    torch.testing.assert_close(chances.sum(-1), torch.ones(200))
    assert not set(policy.greedy(states).tolist()) & {1, 4}
    policy.set_hints(policy.hints, torch.zeros(5, dtype=torch.bool))
    assert policy.log_probs(states, exploration).exp()[:, 0].tolist() == pytest.approx([1] * 200)
    assert policy.greedy(states).tolist() == [0] * 200


def test_without_hints_there_is_one_action() -> None:
    policy = HintPolicy(DIM)
    assert policy.n_actions == 1
    assert policy(some(1, 3, DIM)).shape == (3, 1)
    assert policy.log_probs(some(1, 3, DIM), 0.1).flatten().tolist() == pytest.approx([0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("exploration", [0.0, 0.1, 0.9])
def test_exploration_is_a_mixture_with_the_uniform_choice(exploration: float) -> None:
    policy, states = make(5, dead=(2,)), some(10, 30, DIM) + 2
    with torch.no_grad():
        live = torch.tensor([0, 1, 2, 4, 5])
        greedy = Categorical(logits=policy(states)[:, live]).probs
        found = policy.log_probs(states, exploration)
    torch.testing.assert_close(found[:, live].exp(), (1 - exploration) * greedy + exploration / 5)


def test_gradients_are_numbers_with_dead_hints() -> None:
    policy, states = make(5, dead=(1,)), some(11, 10, DIM)
    logp = policy.log_probs(states, 0.1)
    (logp.exp() * logp).sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_first_policy_is_near_uniform() -> None:
    torch.manual_seed(0)
    policy = HintPolicy(32)
    policy.set_hints(some(12, 20, 32), torch.ones(20, dtype=torch.bool))
    chances = policy.log_probs(some(13, 100, 32)).exp()
    assert (chances - 1 / 21).abs().max() < 0.01


def test_what_a_base_must_not_do() -> None:
    policy = make(5)
    alive = torch.ones(5, dtype=torch.bool)
    for wrong in (policy.hints[:4], policy.hints.flip(0), some(1, 5, DIM + 1)):
        with pytest.raises(ValueError, match="grows|fit"):
            policy.set_hints(wrong, alive[: len(wrong)])
    with pytest.raises(ValueError, match="fit"):
        policy.set_hints(policy.hints, alive[:3])
    assert policy.has_base(policy.hints, alive)
    assert not policy.has_base(policy.hints[:4], alive[:4])
    assert not policy.has_base(policy.hints, ~alive)
    assert not policy.has_base(policy.hints + 1, alive)


def test_centring_takes_the_mean_once_and_scales_to_one_length() -> None:
    centring, vectors = Centring(DIM), some(14, 50, DIM) + 10
    centring.fit(vectors)
    torch.testing.assert_close(centring.mean, vectors.mean(0))
    torch.testing.assert_close(centring(3 + vectors).norm(dim=-1), torch.full((50,), math.sqrt(DIM)))
    lonely = Centring(DIM)
    lonely.fit(vectors[:1])
    assert lonely.mean.tolist() == [0] * DIM
    assert lonely(torch.zeros(1, DIM)).tolist() == [[0] * DIM]


def test_the_towers_start_orthogonal_with_the_gain_asked_for() -> None:
    torch.manual_seed(0)
    tower = mlp(16, 8, 4, gain=0.01)
    for layer, gain in ((tower[0], math.sqrt(2)), (tower[2], math.sqrt(2)), (tower[4], 0.01)):
        assert isinstance(layer, torch.nn.Linear)
        torch.testing.assert_close(layer.weight @ layer.weight.T, gain**2 * torch.eye(len(layer.weight)))
        assert layer.bias.count_nonzero() == 0


@pytest.mark.parametrize("hints", [0, 5])
def test_save_and_load(tmp_path: Path, hints: int) -> None:
    policy, states = make(hints, dead=(1,) if hints else ()), some(15, 20, DIM)
    policy.save(tmp_path / "agent")
    loaded = HintPolicy.load(tmp_path / "agent")
    assert torch.equal(loaded(states), policy(states))
    assert torch.equal(loaded.alive, policy.alive)
    assert not loaded.training
    loaded.set_hints(torch.cat([loaded.hints, some(16, 2, DIM)]), torch.ones(hints + 2, dtype=torch.bool))
    assert sorted(p.name for p in (tmp_path / "agent").iterdir()) == ["policy.json", "policy.safetensors"]


def test_a_missing_policy_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hint policy") as caught:
        HintPolicy.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
