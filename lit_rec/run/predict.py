"""`lit_rec predict`: what a finished run is for."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_rec.data.canonical import RatingsData
from lit_rec.data.lists import ListSet
from lit_rec.errors import UserError
from lit_rec.recipes.ground import Ground
from lit_rec.recipes.loop import Loop
from lit_rec.rerankers.features import USER
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.rewards import score_lists
from lit_rec.rerankers.training import load_reranker
from lit_rec.run.candidates import Candidates, Given, lists_of, not_among, rank_table, read_table, test_lists
from lit_rec.run.folder import RunFolder, publish
from lit_rec.run.newcomers import Newcomers, describe, newcomers_of
from lit_rec.run.outcome import finished_run
from lit_rec.run.predict_sessions import SessionPredictor, read_sessions
from lit_rec.run.progress import console, step

Progress = Callable[[int, int], None]


def predict(cfg: DictConfig, source: str | None, target: Path, history: str | None = None) -> None:
    """Rank candidates with a finished run, and write them as Parquet (or CSV, by `target`), in the order they came in.

    Recipes rlrf and unified: list_id, user_id, rank (from 1), item_id, title, score, knowledge (the LLM's text on the
    user). Recipe re2llm: session_id, rank, item_id, title, score, hint (that the agent picked; "": none).

    Args:
        cfg: The run's configuration.
        source: Candidate lists, `lit_rec.run.candidates.lists_of`, or sessions, `lit_rec.run.predict_sessions`; None:
            the test users' own lists, or the test sessions.
        target: Where the table goes.
        history: What people who are not in the data set have rated, `lit_rec.run.newcomers.newcomers_of`.

    Raises:
        UserError: The input is missing a column or names an unknown id, `target` has no folder, another suffix or is
            an input itself, or the run is not finished.
    """
    _check(cfg, source, target, history)
    with finished_run(cfg) as run:
        if cfg.recipe == "re2llm":
            told = _sessions(SessionPredictor(cfg, run), source, target)
        else:
            told = _lists(UserPredictor(cfg, run), source, target, history)
        console.print(f"{told} -> {target}", highlight=False)


def _check(cfg: DictConfig, source: str | None, target: Path, history: str | None) -> None:
    """Refuse what makes no sense before anything is read."""
    if not target.parent.is_dir() or target.is_dir():
        raise UserError(
            f"cannot write {target}",
            where="--output",
            why="there is no such folder, or it is one",
            fix="name a file in one",
        )
    if target.suffix not in (".parquet", ".csv"):
        raise UserError(
            f"{target.name} says no form that can be written",
            where="--output",
            fix=f"name it {target.stem or 'ranked'}.parquet, or .csv",
        )
    for option, given in (("--input", source), ("--history", history)):
        if given is not None and Path(given).resolve() == target.resolve():
            raise UserError(
                f"{target} would be written over by its own ranking",
                where=f"{option} and --output",
                fix="name another file with --output",
            )
    if history is not None and cfg.recipe == "re2llm":
        raise UserError(
            "--history is for runs that rerank the lists of users",
            where="--history",
            why="recipe re2llm ranks sessions, and every session brings its own history",
            fix="leave it out: `session` in the input says what happened so far",
        )
    if history is not None and source is None:
        raise UserError(
            "--history without lists to rank",
            where="--history",
            why="without --input the test users of the run are ranked, who are in the data set",
            fix="name the new users' candidates with --input FILE",
        )


def _sessions(predictor: SessionPredictor, source: str | None, target: Path) -> str:
    given = predictor.own() if source is None else read_sessions(Path(source), predictor.items)
    with step("ranking sessions", len(given.names), "questions") as progress:
        write_table(predictor.rank(given, progress), target)
    return f"{len(given.names):,} sessions ranked"


def _lists(predictor: "UserPredictor", source: str | None, target: Path, history: str | None) -> str:
    new = None if history is None else predictor.newcomers(read_table(Path(history), "--history"))
    wanted = predictor.own() if source is None else predictor.lists(read_table(Path(source), "--input"), new)
    asked = len(predictor.strangers(wanted))
    if asked:
        with step("the LLM describes new users", asked, "answers") as progress:
            ranked = predictor.rank(wanted, new, progress)
    else:
        ranked = predictor.rank(wanted)
    write_table(ranked, target)
    return f"{len(wanted.user):,} lists{f', {asked:,} new users,' * bool(asked)} ranked by {predictor.row}"


def write_table(table: pl.DataFrame, target: Path) -> None:
    """Write Parquet, or CSV where the file is called so, that is there whole or not at all."""
    work = target.with_name(f".{target.name}.tmp")
    try:
        table.write_csv(work) if target.suffix == ".csv" else table.write_parquet(work)
        publish(work, target)
    finally:
        work.unlink(missing_ok=True)


def final_reranker(cfg: DictConfig, run: RunFolder) -> tuple[Loop, str, RerankerModule]:
    """The kept reranker with its knowledge, its split and its row.

    Raises:
        UserError: A file of it is missing or damaged.
    """
    folder = run.path / "reranker"
    ground = Ground(cfg, run)
    with _whole(folder):
        about = json.loads((folder / "row.json").read_bytes())
        row, fold = str(about["row"]), int(about["fold"])
        file = folder / "knowledge.safetensors"
        knowledge = load_file(file) if file.is_file() else {}
        module = load_reranker(folder, user_vectors=knowledge.get("user"), item_vectors=knowledge.get("item")).module
    return Loop(ground, ground.keep_split(fold), fold), row, module


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Say of what cannot be read here that the folder is damaged, and how it comes back."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # the disk's trouble, and not the folder's
        raise UserError(
            f"the final reranker in {folder} cannot be read",
            where=str(folder),
            why=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            fix="copy the folder whole, or start `fit` with the same configuration again: it puts the folder back",
        ) from error


class UserPredictor:
    """A finished run of recipe rlrf or unified, opened: the reranker it has kept, and what that reads of users.

    Args:
        cfg: The run's configuration.
        run: Its folder; what is needed of it later is read now, but for models.
    """

    def __init__(self, cfg: DictConfig, run: RunFolder) -> None:
        self.cfg = cfg
        self.loop, self.row, self.module = final_reranker(cfg, run)
        self.data: RatingsData = self.loop.ground.data
        self.base: ListSet = self.loop.ground.lists
        _ = self.loop.ground.prompts
        self.texts: dict[int, str] = {}
        if run.done(self.loop.name(f"{self.row}/answers")):
            answers = self.loop.kept_answers(self.row).filter(pl.col("sample") == 0)
            self.texts = dict(answers.select("user", "text").rows())

    def own(self) -> Candidates:
        """The test users' own lists."""
        return test_lists(self.loop)

    def newcomers(self, given: Given) -> Newcomers:
        """Histories of people who are not in the data set, as `newcomers_of` reads them."""
        c = self.cfg.lists
        return newcomers_of(given, self.data, length=c.history, once=c.protocol == "strict")

    def lists(self, given: Given, new: Newcomers | None = None) -> Candidates:
        """Candidate lists of a table, as `lists_of` reads them."""
        return lists_of(given, self.data, None if new is None else new.users["user_id"])

    def text(self, given: Given) -> str:
        """What the final reranker reads about the user_id of a table's one line; "" where it reads no text.

        Raises:
            UserError: The user is unknown.
        """
        fix = "name a user of the data the run was trained on"
        return self.texts.get(int(given.known("user_id", self.data.users["user_id"], not_among(self.data), fix)[0]), "")

    def strangers(self, wanted: Candidates) -> Tensor:
        """Which of the new people are asked for: rows of `Newcomers`, ascending."""
        return wanted.user[wanted.user >= self.data.n_users].unique() - self.data.n_users

    def rank(self, wanted: Candidates, new: Newcomers | None = None, progress: Progress | None = None) -> pl.DataFrame:
        """Rank lists.

        Args:
            wanted: The lists.
            new: The new people among their users.
            progress: Called with (answers, tokens) where the LLM describes them.

        Returns:
            What `rank_table` says.
        """
        data, user, texts = self.data, wanted.user, self.texts
        items, ratings = self.base.history_items, self.base.history_ratings
        vectors = None
        rows = self.strangers(wanted)
        if len(rows):
            assert new is not None
            some = new.take(rows)
            told, vectors = describe(self.loop, self.row, some, progress)
            if vectors is not None:
                assert USER in self.module.knowledge.towers
                vectors = torch.cat([self.module.knowledge.user_vectors, vectors])
            place = data.n_users + torch.searchsorted(rows, user - data.n_users)
            user = torch.where(user < data.n_users, user, place)
            texts = texts | {data.n_users + n: text for n, text in enumerate(told)}
            data = RatingsData(**{**vars(data), "users": pl.concat([data.users, some.users])})
            items, ratings = torch.cat([items, some.items]), torch.cat([ratings, some.ratings])
        lists = ListSet(user, wanted.items, torch.zeros(wanted.items.shape), items, ratings)
        scores = score_lists(self.module, lists, torch.arange(len(user)), user_vectors=vectors)
        return rank_table(lists, scores, wanted.names, data, texts)
