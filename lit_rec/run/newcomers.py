"""People who are not in the data set: their history is read, and becomes the knowledge that a finished run asks for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import polars as pl
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from lit_rec.agent.hints import HintBase
from lit_rec.config import plain
from lit_rec.data.canonical import RatingsData
from lit_rec.data.columns import TIMES, seconds
from lit_rec.errors import UserError
from lit_rec.llm.prompts import Hints, Prompts
from lit_rec.recipes.ground import encode_knowledge
from lit_rec.recipes.loop import Loop
from lit_rec.recipes.user_hints import UserHints
from lit_rec.run.candidates import Given, padded
from lit_rec.run.differing import REACHED, differences_beyond
from lit_rec.run.folder import other_configuration

Progress = Callable[[int, int], None]
BORROWED = ("shuffled", "history_shuffled")  # rows whose users read somebody else's text
# Parts of the configuration that a text or vector rests on, where a recipe has them.
ASKED = ("prompt", "knowledge", "llm", "encoder", "lists", "policy", "reflection", "agent")


@dataclass(frozen=True)
class Newcomers:
    """Histories of people who are not in the data set.

    Attributes:
        users: user_id, and the other columns that the data set has of its users; "" where nothing is told.
        items: [N, H] int64, what they rated, in time order, left-aligned; 0 = padding.
        ratings: [N, H] float32.
    """

    users: pl.DataFrame
    items: Tensor
    ratings: Tensor

    def take(self, rows: Tensor) -> "Newcomers":
        """Some of them."""
        return Newcomers(self.users[rows.tolist()], self.items[rows], self.ratings[rows])


def newcomers_of(given: Given, data: RatingsData, *, length: int, once: bool) -> Newcomers:
    """Histories of a table: one line per rating.

    Args:
        given: user_id, item_id, rating (but of data without ratings), and optionally timestamp (as the data may have
            it; without it the order of the lines is that of time) and the columns that the data set has of its users,
            of which the first value counts.
        data: Names the items.
        length: Of longer histories the last ratings stay.
        once: Of repeated ratings of an item the first counts.

    Raises:
        UserError: A column is missing, an item is unknown, a user is in the data set, or a value is no number.
    """
    wanted = ("user_id", "item_id", *(("rating",) if data.rated else ()))
    given.need(wanted, f"name the columns {', '.join(wanted)} and, where it is known, timestamp")
    user = given.texts("user_id")
    _refuse(given, user.is_null() | (user == ""), "user_id", "there is no user_id", "name whose rating it is")
    known = user.is_in(data.users["user_id"].implode())
    _refuse(
        given,
        known,
        "user_id",
        f"is in {data.name}: what the run knows of this user is used",
        "leave such lines out, or give the user another id",
    )
    items = given.known(
        "item_id", data.items["item_id"][1:], f"do not occur in {data.name}", "leave such items out of the history"
    )
    rating = _ratings(given, data)
    table = pl.DataFrame({"user_id": user, "item": items + 1, "rating": rating, "time": _times(given)})
    people = table.select("user_id").unique(maintain_order=True)
    table = table.sort("time", maintain_order=True)
    if once:
        table = table.unique(["user_id", "item"], keep="first", maintain_order=True)
    told = table.group_by("user_id").agg(pl.col("item", "rating").tail(length))
    histories = people.join(told, on="user_id", how="left", maintain_order="left")
    matrix = padded(histories["item"].to_list(), length)
    ratings = torch.zeros(matrix.shape)
    ratings[matrix > 0] = torch.tensor(histories["rating"].explode().to_list(), dtype=torch.float32)
    return Newcomers(_described(given, people, data.users), matrix, ratings)


def _refuse(given: Given, bad: pl.Series, column: str, what: str, fix: str) -> None:
    """Refuse the first bad line."""
    lines = bad.arg_true()
    if len(lines):
        first = int(lines[0])
        told = f"{column} {given.table[column][first]!r} {what}"
        raise UserError(told, where=given.place(first), why=f"so in {len(lines)} lines", fix=fix)


def _ratings(given: Given, data: RatingsData) -> pl.Series:
    """The rating of every line; where the data have none, what stands for it there."""
    if not data.rated:
        return pl.Series([data.rating_max] * len(given.table), dtype=pl.Float64)
    rating = given.texts("rating").cast(pl.Float64, strict=False)
    scale = f"is no rating from 0 to {data.rating_max:g}"
    _refuse(given, ~rating.is_between(0, data.rating_max).fill_null(False), "rating", scale, "give ratings as the data")
    return rating


def _times(given: Given) -> pl.Series:
    """Seconds of every line; its number where no time is told."""
    if "timestamp" not in given.table.columns:
        return pl.Series(range(len(given.table)), dtype=pl.Float64)
    time = seconds(given.table["timestamp"], given.name)
    _refuse(given, time.is_null() | time.is_nan(), "timestamp", "is no time", f"give {TIMES} in all lines")
    return time


def _described(given: Given, people: pl.DataFrame, like: pl.DataFrame) -> pl.DataFrame:
    """The people with the columns of the data set's users."""
    told = [column for column in like.columns if column != "user_id" and column in given.table.columns]
    table = pl.DataFrame([given.texts(column) for column in ("user_id", *told)])
    first = table.group_by("user_id").agg(pl.col(told).drop_nulls().first())
    found = people.join(first, on="user_id", how="left", maintain_order="left")
    missing = [pl.lit("").alias(column) for column in like.columns if column not in found.columns]
    return found.with_columns(missing).select(like.columns).with_columns(pl.col(pl.String).fill_null(""))


def prompts_about(loop: Loop, newcomers: Newcomers) -> Prompts:
    """The prompts of the run, about these people."""
    prompts = loop.ground.prompts
    histories = (newcomers.items, newcomers.ratings)
    return replace(prompts, data=replace(prompts.data, users=newcomers.users), histories=histories)


def check_asked(loop: Loop) -> None:
    """Refuse to ask with another configuration than that of the run.

    Raises:
        UserError: The first values that differ.
    """
    kept = loop.run.path / "config.yaml"

    def parts(tree: Any) -> dict[str, Any]:
        return {k: {n: v for n, v in tree[k].items() if n != "batch_size"} for k in ASKED if k in tree}

    made, asked = parts(plain(OmegaConf.load(kept))), parts(plain(loop.cfg))
    if found := differences_beyond(made, asked, REACHED):
        fix = "restore the value: knowledge of new users has to be made as that of all others was"
        raise other_configuration(loop.run.path, str(kept), found, fix)


def describe(
    loop: Loop, row: str, newcomers: Newcomers, progress: Progress | None = None
) -> tuple[list[str], Tensor | None]:
    """What the final reranker reads of new people.

    Args:
        loop: Of a finished run.
        row: The row of the result table whose reranker it is.
        newcomers: At least one.
        progress: Called with (answers, tokens).

    Returns:
        The LLM's texts, "" where the row has none; and their vectors [N, width], None where it reads nothing of users.

    Raises:
        UserError: Users of the row read somebody else's text, or the configuration is not that of the run.
    """
    check_asked(loop)
    if row in BORROWED:
        raise UserError(
            f"a reranker of the row {row} knows nothing to read of a new user",
            where="config key evaluation.controls",
            why="its users read somebody else's text, as a control",
            fix="predict with a run that has rounds, or the row zero_shot",
        )
    ground, kind = loop.ground, loop.cfg.knowledge.encode
    prompts, rows = prompts_about(loop, newcomers), list(range(len(newcomers.users)))
    if row in ("no_knowledge", "item_only"):
        return [""] * len(rows), None
    hints: Hints | None = None
    histories = None
    hinted = loop.cfg.recipe == "unified" and loop.cfg.agent.pick != "none" and row != "zero_shot"
    if row == "history_only" or hinted or kind == "both":
        texts = [prompts.history_text(n, limit=loop.cfg.lists.history) for n in rows]
        histories = ground.encoder.encode(texts)
    if row == "history_only":
        return [""] * len(rows), histories
    if hinted:
        assert histories is not None
        hints = pick_hints(loop, newcomers.users["user_id"].to_list(), histories)
    if row != "zero_shot":
        loop.llm.load_adapter(load_file(loop.run.path / "adapter" / "adapter_model.safetensors"))
    given = loop.llm.answers(prompts.users(rows, hints), [1] * len(rows), progress=progress)
    texts = [answers[0].text for answers in given]
    return texts, encode_knowledge(ground.encoder, kind, prompts, rows, texts, histories)


def pick_hints(loop: Loop, ids: list[str], states: Tensor) -> list[str | None]:
    """The hint of each new user [n] that the last round's choice gives to their histories' vectors [n, d]."""
    hints = UserHints(loop)
    known: list[str | None] = [None, *HintBase.load(hints.folder(f"round_{hints.rounds}/hints") / "hints.json").texts]
    return [known[action] for action in hints.choice(hints.rounds, len(known) - 1, states, ids).tolist()]
