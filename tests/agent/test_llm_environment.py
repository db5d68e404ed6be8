"""Rewards of hints from a ranker whose scores are known, against counting by hand."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rec.agent.llm_environment import CHUNK, HintEnvironment
from tests.few_sessions import few_sessions

HINTS = ["a", "b", "c"]
DATA = few_sessions(40)


class Table:
    """A ranker with a table of scores."""

    def __init__(self, score: Callable[[int, str | None], list[float]], shortlist: int | None = None) -> None:
        self.data, self.seed, self.score, self.shortlist = DATA, 3, score, shortlist
        self.asked: list[tuple[int, tuple[str | None, ...]]] = []
        self.chunks: list[int] = []

    def scores(self, sessions: Tensor, hints: Sequence[Sequence[str | None]], progress: Any = None) -> list[Tensor]:
        self.asked += [(s, tuple(tried)) for s, tried in zip(sessions.tolist(), hints, strict=True)]
        self.chunks.append(len(sessions))
        if progress is not None:
            progress(sum(map(len, hints)), 1)
        return [
            torch.tensor([self.score(s, hint) for hint in tried])
            for s, tried in zip(sessions.tolist(), hints, strict=True)
        ]

    def shortlisted(self, sessions: Tensor) -> Tensor:
        plain = torch.tensor([self.score(s, None) for s in sessions.tolist()])
        if self.shortlist is None:
            return plain > -math.inf
        return plain >= plain.topk(self.shortlist, dim=1).values[:, -1:]


def drawn(session: int, hint: str | None) -> list[float]:
    """Scores without ties; padding as rankers mark it."""
    draw = random.Random(f"{session}-{hint}")
    return [draw.gauss(0, 1) if item else -math.inf for item in DATA.lists.items[session].tolist()]


def rank(session: int, hint: str | None) -> int:
    scores, column = drawn(session, hint), int(DATA.lists.labels[session].argmax())
    return 1 + sum(s > scores[column] for s in scores)


def log_probability(session: int, hint: str | None) -> float:
    scores, column = drawn(session, hint), int(DATA.lists.labels[session].argmax())
    return scores[column] - math.log(sum(map(math.exp, scores)))


def worth(reward: str, k: int | None, session: int, hint: str | None) -> float:
    if reward == "soft":
        return log_probability(session, hint)
    r = rank(session, hint)
    return 0.0 if k is not None and r > k else 1 / math.log2(r + 1) if reward == "ndcg" else 1 / r


SESSIONS = torch.tensor([5, 0, 17, 3, 5])


@pytest.mark.parametrize("reward", ["ndcg", "mrr", "soft"])
@pytest.mark.parametrize("k", [None, 1, 3])
def test_gains_by_hand(reward: str, k: int | None) -> None:
    environment = HintEnvironment(Table(drawn), reward=reward, k=k)
    tried = [None, "b", "a", "b"]
    found = environment.gains(SESSIONS, [tried] * 5)
    assert found.dtype == torch.float32
    for s, row in zip(SESSIONS.tolist(), found.tolist(), strict=True):
        expected = [worth(reward, k, s, hint) - worth(reward, k, s, None) for hint in tried]
        assert row == pytest.approx(expected, abs=1e-6)
        assert row[0] == 0
    assert float(found.abs().max()) > 0.1


def test_ranks_and_log_probabilities() -> None:
    ranks, logps = HintEnvironment(Table(drawn)).ask(SESSIONS, [["c", None]] * 5)
    assert ranks.tolist() == [[rank(s, "c"), rank(s, None)] for s in SESSIONS.tolist()]
    for s, row in zip(SESSIONS.tolist(), logps.tolist(), strict=True):
        assert row == pytest.approx([log_probability(s, "c"), log_probability(s, None)], abs=1e-6)
    assert len(set(ranks.flatten().tolist())) > 2


def test_actions_and_their_rewards() -> None:
    environment = HintEnvironment(Table(drawn), reward="mrr")
    environment.set_hints(HINTS)
    matrix = environment.matrix(SESSIONS)
    texts = [None, *HINTS]
    expected = [[1 / rank(s, t) - 1 / rank(s, None) for t in texts] for s in SESSIONS.tolist()]
    assert matrix.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    assert environment.ranks(SESSIONS).tolist() == [[rank(s, t) for t in texts] for s in SESSIONS.tolist()]
    actions = torch.tensor([3, 0, 1, 2, 1])
    assert torch.equal(environment.rewards(SESSIONS, actions), matrix.gather(1, actions[:, None]).squeeze(1))
    assert environment.rewards(SESSIONS, torch.zeros(5, dtype=torch.long)).tolist() == [0.0] * 5


@pytest.mark.parametrize("level", [0.0, -math.inf])
def test_ties_make_no_gain(level: float) -> None:
    """All candidates alike, with every hint: whoever orders equals anew each time would see gains."""

    def alike(session: int, hint: str | None) -> list[float]:
        return [level if item else -math.inf for item in DATA.lists.items[session].tolist()]

    environment = HintEnvironment(Table(alike))
    environment.set_hints(HINTS)
    assert environment.matrix(torch.arange(40)).abs().max() == 0
    ranks = environment.ranks(torch.arange(40))
    assert bool((ranks == ranks[:, :1]).all())
    real = (DATA.lists.items > 0).sum(1)
    assert bool((ranks[:, 0] <= real).all())
    assert bool((ranks[:, 0] == real).all()) == (level == -math.inf)  # unranked is last, equal is anywhere


def test_partial_ties_are_broken_alike_with_every_hint() -> None:
    """A hint that lifts the target out of the tied ones gains, one that shifts all of them alike does not."""

    def score(session: int, hint: str | None) -> list[float]:
        column = int(DATA.lists.labels[session].argmax())
        return [
            (float(p == column) if hint == "a" else 5.0 if hint == "b" else 0.0) if item else -math.inf
            for p, item in enumerate(DATA.lists.items[session].tolist())
        ]

    environment = HintEnvironment(Table(score))
    environment.set_hints(["a", "b"])
    ranks, gains = environment.ranks(torch.arange(40)), environment.matrix(torch.arange(40))
    assert ranks[:, 1].tolist() == [1] * 40
    assert torch.equal(ranks[:, 2], ranks[:, 0])
    assert bool((gains[:, 2] == 0).all())
    assert torch.equal(gains[:, 1] > 0, ranks[:, 0] > 1)
    assert bool((ranks[:, 0] > 1).any())


def test_what_was_asked_is_remembered() -> None:
    ranker = Table(drawn)
    environment = HintEnvironment(ranker)
    first = environment.gains(SESSIONS, [["a", "a", "b"]] * 5)
    assert {s for s, _ in ranker.asked} == {0, 3, 5, 17}
    assert all(tried == (None, "a", "b") for _, tried in ranker.asked)
    assert torch.equal(first[:, 0], first[:, 1])
    ranker.asked.clear()
    assert torch.equal(environment.gains(SESSIONS, [["a", "a", "b"]] * 5), first)
    assert ranker.asked == []
    environment.gains(torch.tensor([3, 8]), [["b", "c"]] * 2)
    # A chunk with anything new is asked whole, so that a resumed run asks the same: the store knows the rest.
    assert ranker.asked == [(3, (None, "b", "c")), (8, (None, "b", "c"))]


def test_sessions_are_asked_in_chunks_and_progress_is_told() -> None:
    ranker = Table(drawn)
    environment = HintEnvironment(ranker)
    done: list[int] = []
    environment.progress = lambda n, tokens: done.append(n)
    environment.ask(torch.arange(40), [["a"]] * 40)
    assert len(ranker.asked) == sum(done) == 40
    assert max(ranker.chunks) <= CHUNK


def test_a_base_only_grows() -> None:
    environment = HintEnvironment(Table(drawn))
    environment.set_hints([])
    assert environment.matrix(SESSIONS).shape == (5, 1)
    environment.set_hints(["a"])
    environment.set_hints(["a", "b"])
    for other in (["a"], ["b", "a"], ["b"], []):
        with pytest.raises(ValueError, match="only grows"):
            environment.set_hints(other)
    assert environment.hints == ["a", "b"]


def test_unknown_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="ndcg, mrr, soft"):
        HintEnvironment(Table(drawn), reward="hr")


def test_hints_are_not_asked_where_the_target_is_out_of_reach() -> None:
    ranker = Table(drawn, shortlist=3)
    environment = HintEnvironment(ranker)
    done: list[int] = []
    environment.progress = lambda n, tokens: done.append(n)
    sessions = torch.arange(12)
    reach = [rank(s, None) <= 3 for s in range(12)]
    assert 0 < sum(reach) < 12
    gains = environment.gains(sessions, [["a", "b"]] * 12)
    assert {s for s, tried in ranker.asked if set(tried) & {"a", "b"}} == {s for s in range(12) if reach[s]}
    assert {s for s, tried in ranker.asked if None in tried} == set(range(12))
    assert sum(done) == 36
    for s, row in enumerate(gains.tolist()):
        expected = [1 / math.log2(rank(s, h) + 1) - 1 / math.log2(rank(s, None) + 1) for h in "ab"]
        assert row == pytest.approx(expected if reach[s] else [0.0, 0.0], abs=1e-6)
    ranker.asked.clear()
    environment.gains(sessions, [["a", "b"]] * 12)
    assert ranker.asked == []
