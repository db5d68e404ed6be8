"""Sessions that a finished run of Re2LLM ranks: by the frozen LLM, with the hint that the kept agent picks for each."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from omegaconf import DictConfig

from lit_rec.agent.hints import HintBase
from lit_rec.agent.policy import HintPolicy
from lit_rec.data.lists import ListSet
from lit_rec.errors import UserError
from lit_rec.llm.ranker import Counts
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.recipes.session_rows import uses_hints
from lit_rec.run.candidates import Given, padded, ranked, read_table
from lit_rec.run.folder import RunFolder

Progress = Callable[[int, int], None]
JSON_LINES = (".jsonl", ".ndjson", ".json")
FORM = '{"session": [ids], "candidates": [ids]}, ids as numbers or text, and where it is known "session_id"'
ROLES = ("history", "candidate")


@dataclass(frozen=True)
class GivenSessions:
    """Sessions to rank.

    Attributes:
        names: What each is called.
        sessions: Item rows of each, in time order.
        candidates: Item rows of each, in the order they came.
        numbers: What the order is drawn by in which an LLM that is shown the candidates sees them.
    """

    names: list[str]
    sessions: list[list[int]]
    candidates: list[list[int]]
    numbers: list[int]


@dataclass
class Told:
    """A session as it was handed in: ids with the place where each stands."""

    name: str
    place: str
    session: list[tuple[str, str]] = field(default_factory=list)
    candidates: list[tuple[str, str]] = field(default_factory=list)


def read_sessions(path: Path, items: pl.DataFrame) -> GivenSessions:
    """Read sessions from JSON lines (.jsonl, .ndjson, .json), or from a table, see `sessions_of`.

    Args:
        path: The file. A line is {"session": [ids], "candidates": [ids]}, and may have a "session_id"; else its number
            is its name. Other keys, a target among them, are not looked at.
        items: item_id of every item, row 0 padding.

    Raises:
        UserError: The file is missing, a line is malformed, or a session is, see `checked`.
    """
    if path.suffix not in JSON_LINES:
        return sessions_of(read_table(path, "--input"), items)
    if not path.is_file():
        raise UserError(f"input not found: {path}", where="--input", fix="name a file with JSON lines, parquet or CSV")
    lines = path.read_bytes().rstrip().split(b"\n")
    if lines == [b""]:
        raise UserError("there is no session to rank", where=str(path), fix=f"write lines like {FORM}")
    return checked([_line(line, number, f"{path}:{number}") for number, line in enumerate(lines, 1)], items)


def _line(line: bytes, number: int, place: str) -> Told:
    try:
        found = json.loads(line)
        name, session, shown = found.get("session_id", number), found["session"], found["candidates"]
        if not (isinstance(session, list) and isinstance(shown, list)):
            raise TypeError
        if any(isinstance(i, bool) or not isinstance(i, (int, str)) for i in (name, *session, *shown)):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(
            "bad session (malformed)", where=place, why=f"expected {FORM}", fix="correct or remove the line"
        ) from None
    return told(str(name), place, session, shown)


def told(name: str, place: str, session: Sequence[str | int], candidates: Sequence[str | int]) -> Told:
    """A session all of whose items stand in one place."""
    return Told(name, place, [(str(i), place) for i in session], [(str(i), place) for i in candidates])


def sessions_of(given: Given, items: pl.DataFrame) -> GivenSessions:
    """Sessions of a table with session_id, item_id and role ("history", in time order, or "candidate").

    Raises:
        UserError: A column is missing, there is no line, a role is neither, or a session is bad, see `checked`.
    """
    columns = ("session_id", "item_id", "role")
    given.need(columns, "name the columns session_id, item_id and role (history or candidate)")
    found: dict[str, Told] = {}
    table = given.table.select(pl.col(columns).cast(pl.String).fill_null(""))
    for number, (name, item, role) in enumerate(table.rows()):
        place = given.place(number)
        if role not in ROLES:
            raise UserError(f"unknown role {role!r}", where=place, fix=f"write {' or '.join(ROLES)}")
        one = found.setdefault(name, Told(name, place))
        (one.session if role == "history" else one.candidates).append((item, place))
    return checked(list(found.values()), items)


def checked(given: Sequence[Told], items: pl.DataFrame) -> GivenSessions:
    """Number the items of sessions.

    Raises:
        UserError: The first session whose name is taken, whose history or candidates are missing, that names an unknown
            item, or a candidate twice. An item may come twice in the history.
    """
    row_of = {item: row for row, item in enumerate(items["item_id"].to_list()) if row}
    names: dict[str, str] = {}
    for one in given:
        if one.name in names:
            raise _bad(one, one.place, "its session_id is taken", f"see {names[one.name]}", "give it another one")
        names[one.name] = one.place
        for item, place in (*one.session, *one.candidates):
            if item not in row_of:
                why = "it does not occur in the data the run was trained on"
                raise _bad(one, place, f"unknown item {item!r}", why, "leave it out")
        if not one.session:
            raise _bad(one, one.place, "empty history", "nothing tells what may come next", "say what came before")
        if not one.candidates:
            raise _bad(one, one.place, "no candidates", "there is nothing to rank", "name the items to rank")
        seen: set[str] = set()
        for item, place in one.candidates:
            if item in seen:
                raise _bad(one, place, f"candidate {item!r} stands there twice", "", "name every candidate once")
            seen.add(item)
    sessions = [[row_of[item] for item, _ in one.session] for one in given]
    candidates = [[row_of[item] for item, _ in one.candidates] for one in given]
    # By content: wherever a session stands in a file, its candidates are shown in the same order.
    numbers = [_number(*pair) for pair in zip(sessions, candidates, strict=True)]
    return GivenSessions([one.name for one in given], sessions, candidates, numbers)


def _bad(one: Told, place: str, what: str, why: str, fix: str) -> UserError:
    return UserError(f"bad session {one.name!r}: {what}", where=place, why=why, fix=fix)


def _number(*parts: Any) -> int:
    return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8], 16)


class SessionPredictor:
    """A finished run of recipe re2llm, opened: how its LLM is asked, its hints, and the agent that picks one.

    Args:
        cfg: The run's configuration.
        run: Its folder; what is needed of it later is read now, but for models.
    """

    def __init__(self, cfg: DictConfig, run: RunFolder) -> None:
        self.ground = SessionGround(cfg, run)
        self.ground.keep_sessions()
        self.ranker = self.ground.ranker
        self.policy: HintPolicy | None = None
        self.hints: list[str | None] = [None]
        if uses_hints(cfg):
            self.hints += HintBase.load(run.path / "hints.json").texts
        if len(self.hints) > 1:
            self.policy = HintPolicy.load(run.path / "agent")

    @property
    def items(self) -> pl.DataFrame:
        """The items that can be ranked; row 0 is padding."""
        return self.ground.data.items

    def own(self) -> GivenSessions:
        """The test sessions, each called by its number."""
        lists, test = self.ground.data.lists, self.ground.test.tolist()
        sessions, candidates = (
            [row[row > 0].tolist() for row in part[test]] for part in (lists.history_items, lists.items)
        )
        return GivenSessions([str(n) for n in test], sessions, candidates, test)

    def rank(self, given: GivenSessions, progress: Progress | None = None) -> pl.DataFrame:
        """Rank the candidates of sessions.

        Args:
            given: The sessions.
            progress: Called with (questions, tokens).

        Returns:
            session_id, rank (from 1), item_id, title, score (-inf: the LLM did not list it), hint ("": none).
        """
        data = self.ground.data
        width = data.lists.history_items.shape[1]
        history, items = padded([one[-width:] for one in given.sessions], width), padded(given.candidates)
        nothing = torch.zeros(items.shape)
        lists = ListSet(torch.arange(len(items)), items, nothing, history, torch.zeros(history.shape))
        ranker = replace(self.ranker, data=replace(data, lists=lists), numbers=given.numbers, counts=Counts())
        hints: list[str | None] = [None] * len(items)
        if self.policy is not None:
            actions = self.policy.greedy(self.ground.mean_vectors(history))
            hints = [self.hints[action] for action in actions.tolist()]
        scores = torch.cat(ranker.scores(lists.user, [[hint] for hint in hints], progress))
        row, columns = ranked(items, scores, data.items)
        columns["title"] = [title or item for item, title in zip(columns["item_id"], columns["title"], strict=True)]
        names = {"session_id": [given.names[r] for r in row]}
        return pl.DataFrame({**names, **columns, "hint": [hints[r] or "" for r in row]})
