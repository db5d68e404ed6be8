"""Rewards of answers: as evaluating the reranker once per answer, and never by one that saw the user."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rec.data.sessions import batch_of
from lit_rec.errors import UserError
from lit_rec.metrics.ranking import ranking_metrics
from lit_rec.rerankers import rewards as rewards_module
from lit_rec.rerankers.losses import list_log_likelihood
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.rewards import answer_rewards, cross_fit, score_lists
from lit_rec.rerankers.training import fit_reranker


def fit(world: Any, architecture: str = "dlcm", **arguments: Any) -> RerankerModule:
    every = world.arguments() | {"max_epochs": 1} | arguments
    return fit_reranker(architecture=architecture, **every).module


def answers(world: Any, many: int = 17) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(many, 8, generator=generator), torch.randint(0, 200, (many,), generator=generator)


@pytest.mark.parametrize("architecture", ["dlcm", "prm", "mir"])
def test_scores_equal_the_forward_pass(world: Any, architecture: str) -> None:
    module = fit(world, architecture)
    index = torch.randperm(300)[:100]
    with torch.no_grad():
        expected = module(batch_of(world.lists, index, history=True))
    torch.testing.assert_close(score_lists(module, world.lists, index, batch_size=33), expected)
    assert score_lists(module, world.lists, index[:0]).shape == (0, 8)


@pytest.mark.parametrize("architecture", ["dlcm", "mir"])
@pytest.mark.parametrize("reward", ["ndcg", "map", "soft"])
def test_one_pass_equals_an_evaluation_per_answer(world: Any, architecture: str, reward: str) -> None:
    module = fit(world, architecture)
    vectors, owner = answers(world)
    expected = []
    original = module.knowledge.user_vectors.clone()
    for vector, user in zip(vectors, owner, strict=True):
        module.knowledge.user_vectors = vector.expand_as(original).clone()
        index = world.lists.of_users(user[None])
        labels, mask = world.lists.labels[index], world.lists.items[index] > 0
        logits = score_lists(module, world.lists, index)
        if reward == "soft":
            expected.append(list_log_likelihood(logits, labels, mask).mean())
        else:
            expected.append(ranking_metrics(logits, labels, mask, (3,), "standard")[f"{reward}@3"].mean())
    module.knowledge.user_vectors = original
    module.train()
    for batch_size in (7, 8192):
        rewards = answer_rewards(module, world.lists, vectors, owner, reward=reward, k=3, batch_size=batch_size)
        torch.testing.assert_close(rewards, torch.stack(expected), atol=1e-6, rtol=0)
    assert module.training


def test_a_user_without_lists_has_no_reward(world: Any) -> None:
    lists = type(world.lists)(
        *(getattr(world.lists, name)[6:] for name in ("user", "items", "labels")),
        world.lists.history_items,
        world.lists.history_ratings,
        {},
    )
    rewards = answer_rewards(fit(world), lists, torch.randn(3, 8), torch.tensor([1, 0, 1]))
    assert rewards.isnan().tolist() == [False, True, False]


def test_soft_rewards_break_ties(world: Any) -> None:
    module = fit(world)
    vectors, owner = torch.randn(200, 8), torch.zeros(200, dtype=torch.int64)
    hard = answer_rewards(module, world.lists, vectors, owner)
    soft = answer_rewards(module, world.lists, vectors, owner, reward="soft")
    assert len(soft.unique()) > len(hard.unique())
    assert torch.corrcoef(torch.stack([hard, soft]))[0, 1] > 0.5


@pytest.mark.parametrize("loss", ["bce", "attention", "attention_rank", "list_softmax"])
def test_soft_rewards_are_the_probabilities_that_the_loss_has_trained(world: Any, loss: str) -> None:
    module = fit(world, loss=loss, temperature=0.5, lr=0.0)
    users = world.validation[:3]
    index = world.lists.of_users(users)
    logits = score_lists(module, world.lists, index) / (1 if loss == "bce" else 0.5)
    expected = list_log_likelihood(logits, world.lists.labels[index], world.lists.items[index] > 0)
    rewards = answer_rewards(module, world.lists, world.user_vectors[users], users, reward="soft")
    torch.testing.assert_close(rewards, expected.view(3, -1).mean(dim=1))


def test_the_right_answer_is_rewarded(world: Any) -> None:
    module = fit(world, max_epochs=6)
    users = world.validation
    right = answer_rewards(module, world.lists, world.user_vectors[users], users)
    wrong = answer_rewards(module, world.lists, world.user_vectors[users].roll(1, 0), users)
    assert right.mean() > wrong.mean() + 0.1


def test_mistakes_are_explained(world: Any) -> None:
    vectors, owner = answers(world)
    with pytest.raises(UserError, match="reads no user knowledge"):
        answer_rewards(fit(world, user_vectors=None), world.lists, vectors, owner)
    with pytest.raises(UserError, match=r"need vectors \[17, 8\]"):
        answer_rewards(fit(world), world.lists, vectors[:, :4], owner)
    with pytest.raises(UserError, match="no reward 'auc'"):
        answer_rewards(fit(world), world.lists, vectors, owner, reward="auc")  # type: ignore[arg-type]


def own_reward(given: Any) -> Any:
    """A reward function as a user writes it, which gives what it is told to."""

    def reward(logits: Tensor, labels: Tensor, mask: Tensor, k: int) -> Any:
        return given(logits)

    return reward


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (lambda logits: torch.full((len(logits),), torch.nan), r"\d+ of \d+ values that are nan or infinite"),
        (lambda logits: torch.ones(len(logits)).log() * torch.inf, "nan or infinite"),
        (lambda logits: logits, r"gave a tensor \[\d+, 8\]"),
        (lambda logits: logits.mean(), r"gave a tensor \[\]"),
        (lambda logits: logits.mean(dim=1)[:-1], "gave a tensor"),
        (lambda logits: logits.mean(dim=1).tolist(), "gave a list"),
        (lambda logits: None, "gave a NoneType"),
    ],
)
def test_what_is_no_reward_is_told(world: Any, monkeypatch: pytest.MonkeyPatch, given: Any, why: str) -> None:
    vectors, owner = answers(world)
    module = fit(world, lr=0.0)
    monkeypatch.setattr(rewards_module, "find", lambda path, key: own_reward(given))
    with pytest.raises(UserError, match=why) as caught:
        answer_rewards(module, world.lists, vectors, owner, reward="callbacks.mine.reward")
    assert caught.value.where == "config key reward.metric"


def test_your_own_reward_is_used(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, owner = answers(world)
    monkeypatch.setattr(rewards_module, "find", lambda path, key: own_reward(lambda logits: logits[:, 0] > -1e9))
    assert (
        answer_rewards(fit(world), world.lists, vectors, owner, reward="callbacks.mine.reward").tolist() == [1.0] * 17
    )


def test_a_model_that_scores_nan_ranks_nothing(world: Any) -> None:
    module = fit(world)
    vectors, owner = answers(world)
    padded = type(world.lists)(
        world.lists.user,
        world.lists.items.index_fill(1, torch.tensor([7]), 0),
        world.lists.labels,
        world.lists.history_items,
        world.lists.history_ratings,
        {},
    )
    plain = module.score
    module.score = lambda items, *rest: plain(items, *rest).masked_fill(items == 0, torch.nan)  # type: ignore[method-assign]
    assert score_lists(module, padded, torch.arange(9)).isnan().any(dim=0).tolist() == [False] * 7 + [True]
    del module.score
    with pytest.raises(UserError, match="'dlcm' scores candidates with nan"):
        answer_rewards(module, world.lists, vectors * torch.nan, owner)
    with torch.no_grad():
        module.features.item.weight[1:] = torch.nan
    with pytest.raises(UserError, match=r"features\.item\.weight holds values that are no finite numbers"):
        score_lists(module, world.lists, torch.arange(9))


def test_too_few_rows_or_epochs_are_told(world: Any) -> None:
    with pytest.raises(UserError, match=r"user_vectors must be \[200 or more, width\], not \[199, 8\]"):
        fit(world, user_vectors=world.user_vectors[:199])
    with pytest.raises(UserError, match=r"item_vectors must be \[81 or more, width\], not \[80, 8\]"):
        fit(world, item_vectors=world.item_vectors[1:])
    with pytest.raises(UserError, match="for 0 epochs"):
        fit(world, max_epochs=0)
    module = fit(world)
    with pytest.raises(UserError, match="user_vectors must be"):
        score_lists(module, world.lists, torch.arange(9), user_vectors=world.user_vectors[:1])


def test_a_user_is_judged_by_a_reranker_that_never_saw_him(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[int]] = {}
    original = RerankerModule.training_step

    def spy(self: RerankerModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        seen.setdefault(id(self), set()).update(batch["user"].tolist())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(RerankerModule, "training_step", spy)
    fitted = cross_fit(folds=3, **world.arguments() | {"max_epochs": 1})
    trained = [seen[id(one.module)] for one in fitted.fitted]
    assert set.union(*trained) == set(world.train.tolist())
    for user, judge in zip(world.train.tolist(), fitted.reranker_of(world.train).tolist(), strict=True):
        assert user not in trained[judge]
        assert sum(user in users for users in trained) == 2
    assert not set(world.validation.tolist()) & set.union(*trained)

    vectors, owner = answers(world, 40)
    rewards = fitted.answer_rewards(world.lists, vectors, owner, reward="soft")
    for one, user, reward in zip(vectors, owner, rewards, strict=True):
        module = fitted.fitted[int(fitted.reranker_of(user[None]))].module
        expected = answer_rewards(module, world.lists, one[None], user[None], reward="soft")
        torch.testing.assert_close(reward[None], expected, atol=1e-6, rtol=0)


def who_chose(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[int]]:
    """The users by whom each module's epoch is chosen, as the fits go by."""
    chose: dict[int, set[int]] = {}
    original = RerankerModule.validation_step

    def spy(self: RerankerModule, batch: dict[str, Tensor], batch_idx: int) -> None:
        chose.setdefault(id(self), set()).update(batch["user"].tolist())
        original(self, batch, batch_idx)

    monkeypatch.setattr(RerankerModule, "validation_step", spy)
    return chose


@pytest.mark.parametrize("many", [50, 2])
def test_a_user_has_not_chosen_the_epoch_of_the_reranker_that_judges_him(
    world: Any, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    chose = who_chose(monkeypatch)
    held_out = world.validation[:many]
    fitted = cross_fit(folds=3, **world.arguments() | {"max_epochs": 1, "validation_users": held_out})
    judges = fitted.reranker_of(held_out)
    for number, one in enumerate(fitted.fitted):
        assert chose[id(one.module)] == set(held_out[judges != number].tolist())


def test_a_reranker_with_nobody_to_choose_its_epoch_keeps_the_last_one(world: Any) -> None:
    alone = world.validation[:1]
    fitted = cross_fit(folds=3, **world.arguments() | {"max_epochs": 2, "validation_users": alone, "lr": 0.0})
    judge = int(fitted.reranker_of(alone))
    assert [one.best_epoch for one in fitted.fitted] == [int(number == judge) for number in range(3)]


def test_with_one_fold_a_tenth_of_the_training_users_choose_the_epoch(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chose = who_chose(monkeypatch)
    seen: set[int] = set()
    original = RerankerModule.training_step

    def spy(self: RerankerModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        seen.update(batch["user"].tolist())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(RerankerModule, "training_step", spy)
    cross_fit(folds=1, **world.arguments() | {"max_epochs": 1, "seed": 7})
    (choosing,) = chose.values()
    assert len(choosing) == 15
    assert not choosing & seen
    assert choosing | seen == set(world.train.tolist())
    # whom `pairs.users` draws by the same seed, from the beginning, are not those who choose
    drawn = torch.randperm(len(world.train), generator=torch.Generator().manual_seed(7))
    assert not choosing & set(world.train[drawn[:100]].tolist())


def test_one_fold_is_the_papers_way(world: Any) -> None:
    fitted = cross_fit(folds=1, **world.arguments() | {"max_epochs": 1})
    assert fitted.reranker_of(torch.arange(200)).eq(0).all()
    with pytest.raises(UserError, match="cannot make 300 folds"):
        cross_fit(folds=300, **world.arguments())
