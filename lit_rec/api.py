"""A finished run in a program of one's own.

>>> import lit_rec
>>> recommender = lit_rec.load(run)                          # the run folder; its config.yaml says the rest
>>> best = recommender.rerank("u3", ["7", "19", "44"])       # [(item_id, score), ...], best first
>>> sorted(item for item, _ in best)
['19', '44', '7']
>>> isinstance(recommender.describe("u3"), str)              # what the LLM wrote about the user
True
>>> import polars as pl
>>> lists = pl.DataFrame({"user_id": ["u3", "u3", "u5"], "item_id": ["7", "19", "44"]})
>>> recommender.rerank_many(lists).columns                   # as `python -m lit_rec predict` writes them
['list_id', 'user_id', 'rank', 'item_id', 'title', 'score', 'knowledge']

Somebody new needs a history; the LLM writes about it, once, as its answers are kept:

>>> history = pl.DataFrame({"user_id": ["me"] * 3, "item_id": ["1", "2", "3"], "rating": [5, 4, 1]})
>>> mine = pl.DataFrame({"user_id": ["me"] * 2, "item_id": ["7", "19"]})
>>> recommender.rerank_many(mine, history)["rank"].to_list()
[1, 2]

A run of recipe re2llm ranks what may come next in a session:

>>> ranked = lit_rec.load(session_run).rerank_session(["1", "2", "3"], ["4", "17", "30"])
>>> sorted(item for item, _ in ranked.items)                 # (item_id, score), best first
['17', '30', '4']
>>> isinstance(ranked.hint, str)                             # the hint that the agent picked; "": none
True
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from omegaconf import DictConfig

from lit_rec.config import load_run
from lit_rec.data.assets import caching
from lit_rec.errors import UserError
from lit_rec.run.candidates import Given
from lit_rec.run.outcome import finished_run
from lit_rec.run.predict import UserPredictor
from lit_rec.run.predict_sessions import SessionPredictor, checked, sessions_of, told

Id = str | int
WAIT = 60.0  # seconds: other programs may be opening the same run


@dataclass(frozen=True)
class RankedSession:
    """Candidates of a session, ranked.

    Attributes:
        items: (item_id, score), best first; a score of -inf: the LLM did not list it.
        hint: The hint that stood in the prompt; "" for none.
    """

    items: list[tuple[Id, float]]
    hint: str


class Recommender:
    """A finished run. Ids are those of the data set, as text or as numbers, and come back as they were given.

    Data and fitted models are read when it is made, and the run folder is then free for others. The LLM and the text
    encoder are loaded when first needed: for people who are new, and for sessions. What the LLM says is kept in the
    run's answer store, and asked for once.

    Args:
        cfg: The run's configuration.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.config = cfg
        with caching(cfg.run.cache), finished_run(cfg, wait=WAIT) as run:
            self._users = None if cfg.recipe == "re2llm" else UserPredictor(cfg, run)
            self._sessions = SessionPredictor(cfg, run) if cfg.recipe == "re2llm" else None

    def rerank(self, user_id: Id, item_ids: Sequence[Id]) -> list[tuple[Id, float]]:
        """Rank items for a user of the data set, as one list: rerankers compare its items with each other.

        Returns:
            (item_id, score), best first.

        Raises:
            UserError: An id is unknown, an item comes twice, there is none, or the run ranks sessions.
        """
        users = self._need_users("rerank")
        table = pl.DataFrame({"user_id": [str(user_id)] * len(item_ids), "item_id": [str(i) for i in item_ids]})
        given = _given(table, "rerank(user_id, item_ids)")
        return _as_given(users.rank(users.lists(given)), item_ids)

    def rerank_many(self, table: pl.DataFrame, history: pl.DataFrame | None = None) -> pl.DataFrame:
        """Rank many lists, or sessions.

        Args:
            table: user_id, item_id and optionally list_id; for sessions session_id, item_id and role (history, in time
                order, or candidate).
            history: Of users who are not in the data set: user_id, item_id, rating and optionally timestamp.

        Returns:
            What `python -m lit_rec predict` writes.

        Raises:
            UserError: A column is missing, an id is unknown, a candidate comes twice, or sessions come with a history.
        """
        given = _given(table, "rerank_many(table)")
        if self._sessions is not None:
            if history is not None:
                raise UserError("sessions bring their own history", where="rerank_many(history)", fix="leave it out")
            return self._sessions.rank(sessions_of(given, self._sessions.items))
        users = self._need_users("rerank_many")
        new = None if history is None else users.newcomers(_given(history, "rerank_many(history)"))
        return users.rank(users.lists(given, new), new)

    def describe(self, user_id: Id) -> str:
        """The text that the final reranker reads about a user; "" where it reads none.

        Raises:
            UserError: The user is unknown, or the run ranks sessions.
        """
        users = self._need_users("describe")
        given = _given(pl.DataFrame({"user_id": [str(user_id)]}), "describe(user_id)")
        return users.text(given)

    def rerank_session(self, session: Sequence[Id], candidates: Sequence[Id]) -> RankedSession:
        """Rank what may come next in a session, with the hint that the agent picks for it.

        Args:
            session: Items in time order.
            candidates: Items to rank.

        Raises:
            UserError: An item is unknown, a candidate comes twice, either is empty, or the run ranks users' lists.
        """
        if self._sessions is None:
            raise _not_for("rerank_session", self.config.recipe, "rerank(user_id, item_ids)")
        one = told("session", "rerank_session", session, candidates)
        ranked = self._sessions.rank(checked([one], self._sessions.items))
        return RankedSession(_as_given(ranked, candidates), ranked["hint"][0])

    def _need_users(self, method: str) -> UserPredictor:
        if self._users is None:
            raise _not_for(method, self.config.recipe, "rerank_session(session, candidates)")
        return self._users


def _given(table: pl.DataFrame, call: str) -> Given:
    return Given(table, call, call)


def _as_given(ranked: pl.DataFrame, ids: Sequence[Id]) -> list[tuple[Id, float]]:
    known = {str(one): one for one in ids}
    return [(known[item], score) for item, score in ranked.select("item_id", "score").rows()]


def _not_for(method: str, recipe: str, instead: str) -> UserError:
    return UserError(
        f"a run of recipe {recipe} has no {method}", where=f"{method}(...)", fix=f"call {instead} of this run"
    )


def open_run(run_dir: str | Path) -> Recommender:
    """Open the run that `fit` has finished in a folder, wherever that was moved.

    Raises:
        UserError: There is no finished run, or its data or models are no longer where they were.
    """
    return Recommender(load_run(run_dir))
