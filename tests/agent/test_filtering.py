"""Which hints are kept: every fate reached by a case made for it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_rec.agent.environment import AskedEnvironment, Trial
from lit_rec.agent.filtering import FilterSettings, choose, try_out, written
from lit_rec.agent.hints import KEPT, Hint, HintBase
from lit_rec.agent.reflection import Mistake

MISTAKES = [
    Mistake(4, ["Alien", "Heat"], ["Ran"], "The Matrix"),
    Mistake(2, ["Amélie"], ["Ran"], "Up"),
]


def talk(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "1. Not this one at all"}, {"role": "assistant", "content": answer}]


def test_titles_and_copies_of_the_example_are_no_hints() -> None:
    answer = "1. The Lion King (1994)\n2. Prefer the example.\n3. Prefer films such as The Lion King."
    hints = written(
        MISTAKES[:1], [talk(answer)], number=1, first_id=1, limit=3, example="prefer the example", titles={"lion king"}
    )
    assert [h.fate for h in hints] == ["only a title", "copied from the prompt", ""]


def test_hints_as_they_are_written() -> None:
    first = "1. Prefer dark films.\n2. Watch the Matrix again.\n3. Films.\n4. Prefer quiet dramas."
    second = "1. PREFER dark films.\n2. Watch the Matrix again.\n3. Look up old films."
    hints = written(MISTAKES, [talk(first), talk(second)], number=2, first_id=10, limit=3)
    assert [(h.id, h.text, h.session, h.fate) for h in hints] == [
        (10, "Prefer dark films.", 4, ""),
        (11, "Watch the Matrix again.", 4, "leaks the target"),
        (12, "Films.", 4, "malformed"),
        (13, "PREFER dark films.", 2, "repeated"),
        (14, "Watch the Matrix again.", 2, ""),  # it names another session's target
        (15, "Look up old films.", 2, "leaks the target"),
    ]
    assert {h.round for h in hints} == {2}
    assert [(h.titles, h.target) for h in hints[2:4]] == [(["Alien", "Heat"], "The Matrix"), (["Amélie"], "Up")]
    assert written([], [], number=0, first_id=0, limit=3) == []
    assert written(MISTAKES[:1], [talk("")], number=0, first_id=0, limit=3) == []


class Table(AskedEnvironment):
    """Ranks from a table: (session, hint) -> rank; a place is worth its reciprocal."""

    def __init__(self, ranks: dict[tuple[int, str | None], int]) -> None:
        super().__init__()
        self.known = ranks
        self.asked: set[tuple[int, str]] = set()

    def ask(self, sessions: Tensor, hints: Sequence[Sequence[str | None]]) -> tuple[Tensor, Tensor]:
        self.asked |= {(s, h) for s, tried in zip(sessions.tolist(), hints, strict=True) for h in tried if h}
        ranks = [[self.known[s, h] for h in tried] for s, tried in zip(sessions.tolist(), hints, strict=True)]
        return torch.tensor(ranks), torch.zeros(len(ranks), len(ranks[0]))

    def gains(self, sessions: Tensor, hints: Sequence[Sequence[str | None]]) -> Tensor:
        ranks = self.ask(sessions, [[None, *tried] for tried in hints])[0]
        return (1 / ranks[:, 1:] - 1 / ranks[:, :1]).float()

    def trial(self, session: int, hints: Sequence[str]) -> Trial:
        ranks = self.ask(torch.tensor([session]), [[None, *hints]])[0][0].tolist()
        return Trial(super().trial(session, hints).gains, ranks)


def hint(number: int, text: str, *, session: int = 4, fate: str = "", round: int = 1) -> Hint:
    return Hint(number, text, round, session, [], "", fate=fate)


def test_hints_are_tried_on_their_own_session_and_on_others() -> None:
    base = {4: 8, 2: 4, 7: 2, 9: 5}
    better = {"a": {4: 2, 2: 4, 7: 1, 9: 10}, "b": {4: 8, 2: 1, 7: 2, 9: 5}, "c": {4: 9, 2: 2, 7: 4, 9: 1}}
    ranks = {(s, None): r for s, r in base.items()} | {(s, h): better[h][s] for h in better for s in base}
    environment = Table(ranks)
    hints = [hint(0, "a"), hint(1, "x", fate="malformed"), hint(2, "b", session=2), hint(3, "c")]
    others = torch.tensor([7, 4, 9])
    try_out(hints, environment, others, whole=environment)
    for h in (hints[0], hints[2], hints[3]):
        gain = {s: 1 / better[h.text][s] - 1 / base[s] for s in base}
        rest = [s for s in others.tolist() if s != h.session]
        assert (h.rank_before, h.rank_after) == (base[h.session], better[h.text][h.session])
        assert h.gain_source == pytest.approx(gain[h.session])
        assert h.others == len(rest)
        assert h.gain_others == pytest.approx(sum(gain[s] for s in rest) / len(rest))
    assert [h.others for h in hints] == [2, 0, 3, 2]
    assert (hints[1].rank_before, hints[1].gain_source, hints[1].gain_others) == (None, None, None)
    assert not any(text == "x" for _, text in environment.asked)


@pytest.mark.parametrize("others", [[], [4]])
def test_without_other_sessions_nothing_is_said_about_them(others: list[int]) -> None:
    environment = Table({(4, None): 3, (4, "a"): 1})
    hints = [hint(0, "a")]
    try_out(hints, environment, torch.tensor(others, dtype=torch.long), whole=environment)
    assert (hints[0].gain_others, hints[0].others, hints[0].rank_after) == (None, 0, 1)


def test_the_own_session_is_asked_about_all_candidates() -> None:
    """An error session's target is off any shortlist, where no hint could be seen to help it."""
    short = Table({(4, None): 30, (4, "a"): 30, (7, None): 4, (7, "a"): 2})
    whole = Table({(4, None): 30, (4, "a"): 11})
    hints = [hint(0, "a")]
    try_out(hints, short, torch.tensor([7]), whole=whole)
    assert (hints[0].rank_before, hints[0].rank_after) == (30, 11)
    assert hints[0].gain_others == pytest.approx(1 / 2 - 1 / 4)


def test_where_there_is_no_target_the_reward_says_what_helped() -> None:
    class Rewards(Table):
        trial = AskedEnvironment.trial

    environment = Rewards({(4, None): 3, (4, "a"): 2, (4, "b"): 3, (4, "c"): 5})
    hints = [hint(n, text) for n, text in enumerate("abc")]
    try_out(hints, environment, torch.zeros(0, dtype=torch.long), whole=environment)
    assert [h.rank_before for h in hints] == [None] * 3
    assert [h.gain_source for h in hints] == pytest.approx([1 / 2 - 1 / 3, 0, 1 / 5 - 1 / 3])
    assert [h.helped_source for h in hints] == [True, False, False]


def test_nothing_to_try() -> None:
    environment = Table({})
    try_out([hint(0, "a", fate="repeated")], environment, torch.tensor([1, 2]), whole=environment)
    try_out([], environment, torch.tensor([1, 2]), whole=environment)
    assert environment.asked == set()


# --- choosing ---------------------------------------------------------------------------------------------------------


class Judge:
    """An LLM that takes hints for the same when they end alike."""

    def __init__(self, answer: bool | None = True) -> None:
        self.answer = answer
        self.asked: list[tuple[str, list[str]]] = []

    def same(self, text: str, known: Sequence[str]) -> bool | None:
        self.asked.append((text, list(known)))
        return self.answer if any(text.split()[-1] == k.split()[-1] for k in known) else False


def encode(texts: Sequence[str]) -> Tensor:
    """Hints that begin alike are alike; lengths differ, so that only angles count."""
    vectors = torch.zeros(len(texts), 26)
    for row, text in enumerate(texts):
        vectors[row, ord(text[0]) - ord("a")] = row + 1.0
    return vectors


def tried(
    number: int, text: str, *, others: float | None = 0.1, source: float = 0.2, ranks: tuple[int, int] = (9, 2)
) -> Hint:
    made = hint(number, text)
    made.rank_before, made.rank_after = ranks
    made.gain_source, made.gain_others = source, others
    return made


def chosen(hints: list[Hint], base: HintBase | None = None, judge: Judge | None = None, **options: object) -> list[str]:
    settings = FilterSettings(**{"room": 10, **options})
    choose(hints, base or HintBase(), settings, encode=encode, reflector=judge or Judge())
    return [h.fate for h in hints]


def test_every_fate() -> None:
    base = HintBase([hint(1, "zebra known", fate=KEPT, round=0)])
    hints = [
        tried(10, "a x1", ranks=(4, 4)),
        tried(11, "b x2", ranks=(4, 5), others=0.9),
        tried(12, "c x3", others=0.0),
        tried(13, "d x4", others=-0.1),
        tried(14, "e x5", others=0.5),
        tried(15, "e x6", others=0.4),
        tried(16, "zoo x7", others=0.3),
        tried(17, "f x5", others=0.2),
        tried(18, "g x8", others=None, source=0.3),
        tried(19, "h x9", others=None, source=0.2),
        hint(20, "i x0", fate="malformed"),
    ]
    assert chosen(hints, base, room=2) == [
        "does not help where it was written",
        "does not help where it was written",
        "does not help others",
        "does not help others",
        KEPT,
        "same as hint 14 (cosine 1.00)",
        "same as hint 1 (cosine 1.00)",
        "same as a kept hint, says the LLM",
        KEPT,
        "the base is full",
        "malformed",
    ]


def test_the_most_useful_come_first() -> None:
    """By gain on others, then on their own session, then in the order they were written."""
    hints = [
        tried(5, "a x1", others=0.1),
        tried(4, "b x2", others=0.3),
        tried(3, "c x3", others=0.2, source=0.1),
        tried(2, "d x4", others=0.2, source=0.5),
        tried(1, "e x5", others=0.1),
    ]
    for room, kept in enumerate([{4}, {4, 2}, {4, 2, 3}, {4, 2, 3, 1}, {4, 2, 3, 1, 5}], 1):
        for h in hints:
            h.fate = ""
        chosen(hints, room=room)
        assert {h.id for h in hints if h.fate == KEPT} == kept
        assert {h.fate for h in hints if h.fate != KEPT} <= {"the base is full"}


def test_room_is_that_of_the_round() -> None:
    base = HintBase(hint(n, f"{letter} q{n}", fate=KEPT, round=0) for n, letter in enumerate("uvw"))
    hints = [tried(10, "a x1"), tried(11, "b x2"), tried(12, "c x3")]
    assert chosen(hints, base, room=2) == [KEPT, KEPT, "the base is full"]
    assert chosen([tried(10, "a x1")], room=0) == ["the base is full"]


def test_a_refused_hint_takes_no_room_and_does_not_refuse_others() -> None:
    hints = [tried(10, "a x1", others=0.9), tried(11, "a x2", others=0.8), tried(12, "b x2", others=0.7)]
    assert chosen(hints, room=2) == [KEPT, "same as hint 10 (cosine 1.00)", KEPT]


def test_smallest_gain_and_similarity_are_limits() -> None:
    assert chosen([tried(1, "a x1", others=0.1)], min_gain=0.1) == ["does not help others"]
    assert chosen([tried(1, "a x1", others=0.1)], min_gain=0.099) == [KEPT]
    assert chosen([tried(1, "a x1"), tried(2, "a x2")], similarity=1.1) == [KEPT, KEPT]
    orthogonal = [tried(1, "a x1"), tried(2, "b x2")]
    assert chosen(orthogonal, similarity=0.0) == [KEPT, "same as hint 1 (cosine 0.00)"]


@pytest.mark.parametrize(("answer", "kept"), [(True, False), (False, True), (None, True)])
def test_the_llm_is_asked_about_what_is_kept(answer: bool | None, kept: bool) -> None:
    judge = Judge(answer)
    fates = chosen([tried(1, "a same", others=0.9), tried(2, "b same"), tried(3, "b other")], judge=judge)
    assert fates[0] == KEPT
    assert (fates[1] == KEPT) is kept
    assert judge.asked[0] == ("b same", ["a same"])  # the first has nothing to be compared with
    silent = Judge(True)
    assert chosen([tried(1, "a same"), tried(2, "b same")], judge=silent, ask=False) == [KEPT, KEPT]
    assert silent.asked == []


def test_the_base_grows_in_the_order_of_its_rounds() -> None:
    base = HintBase()
    for number in range(3):
        before = base.texts
        hints = [tried(10 * number + n, f"{'abcdefgh'[2 * number + n]} x{number}{n}", others=0.1 + n) for n in range(2)]
        for h in hints:
            h.round = number
        chosen(hints, base)
        base.hints += hints
        assert base.texts[: len(before)] == before
        assert len(base.texts) == len(before) + 2
