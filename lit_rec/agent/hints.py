"""The hint base: what the LLM told itself, where each hint came from, what it gained, and why it was kept or not."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_rec.errors import UserError
from lit_rec.run.folder import write_atomic

KEPT = "kept"


@dataclass
class Hint:
    """One hint.

    Attributes:
        id: Its number over all rounds.
        text: An imperative sentence.
        round: The round it was written in.
        session: Number of the session, or user, whose reflection it comes from.
        titles: Titles of that session or user.
        target: Title of the item that came next there, or should have; the text must not name it.
        gain_source: Reward gain on that session; None: not tried.
        rank_before: Rank of the target there without the hint; None for users, who have no single target.
        rank_after: Rank of the target there with it.
        gain_others: Mean reward gain on other sessions; None: not tried.
        others: How many other sessions it was tried on.
        fate: "kept", or why not.
    """

    id: int
    text: str
    round: int
    session: int
    titles: list[str]
    target: str
    gain_source: float | None = None
    rank_before: int | None = None
    rank_after: int | None = None
    gain_others: float | None = None
    others: int = 0
    fate: str = ""

    @property
    def helped_source(self) -> bool:
        """Whether it did any good where it comes from: a better rank; where there is no rank, a reward above 0."""
        if self.rank_before is not None and self.rank_after is not None:
            return self.rank_after < self.rank_before
        return self.gain_source is not None and self.gain_source > 0


class HintBase:
    """All hints ever written, kept or not, in the order they were written.

    Args:
        hints: What there is so far.
    """

    def __init__(self, hints: Iterable[Hint] = ()) -> None:
        self.hints = list(hints)

    @property
    def kept(self) -> list[Hint]:
        """The base proper: action a > 0 of the agent is `kept[a - 1]`. It only grows, round by round."""
        return sorted((h for h in self.hints if h.fate == KEPT), key=lambda h: h.round)

    @property
    def texts(self) -> list[str]:
        """Texts of the kept hints."""
        return [hint.text for hint in self.kept]

    def fates(self) -> dict[str, int]:
        """How many hints met which fate; what was the same as another counts as one fate."""
        found: dict[str, int] = {}
        for hint in self.hints:
            fate = "same as another hint" if hint.fate.startswith("same as") else hint.fate
            found[fate] = found.get(fate, 0) + 1
        return found

    def save(self, path: Path) -> None:
        """Write a JSON file a person can read."""
        write_atomic(path, json.dumps({"hints": [asdict(h) for h in self.hints]}, indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> "HintBase":
        """Read what `save` wrote.

        Raises:
            UserError: It is no hint base.
        """
        try:
            return cls(Hint(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))["hints"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                "this is not a hint base",
                where=str(path),
                why=str(error)[:200],
                fix="restore the file, or start anew with --fresh",
            ) from error
