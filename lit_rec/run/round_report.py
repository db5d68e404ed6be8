"""The part of a report that tells of rounds of preference optimisation: rewards, answers, training, pairs."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import polars as pl
from markupsafe import escape

from lit_rec.run.figures import length_figure, rewards_figure, rounds_figure
from lit_rec.run.reranking_story import place, place_name, round_number, state_name
from lit_rec.run.results import with_interval

PAIRS = 100  # at most in the page, per group
EXAMPLES = 12  # of them not folded away
TEXT = 2000  # characters of a prompt or an answer in the page
BYTES = 800_000  # of a group's texts: the page has to stay a file that can be sent around, in any alphabet
FLATTERED = (
    "* The agent that picks the hints was kept as it was in its best epoch by these users' rewards: they flatter it. "
    "Test users were not looked at."
)
_TEXTS = ("prompt", "chosen", "rejected")
_POLICY_COLUMNS = (
    ("train_reward_mean", "training reward", ".4f"),
    ("reward_spread", "spread per user", ".4f"),
    ("tie_rate", "users with ties only", ".1%"),
    ("small_gap_rate", "users below pairs.min_gap", ".1%"),
    ("unique_in_user_rate", "unique answers of one user", ".1%"),
    ("unique_answer_rate", "unique answers among users", ".1%"),
    ("distinct_2", "distinct-2", ".3f"),
    ("cut_rate", "answers cut off", ".1%"),
    ("answer_tokens_mean", "tokens per answer", ".1f"),
    ("reward_length_correlation", "reward-length correlation", "+.2f"),
    ("pairs", "pairs", ",d"),
)
_TRAIN_COLUMNS = (
    ("loss", "training loss", ".4f"),
    ("margin", "margin", ".4f"),
    ("accuracy", "accuracy", ".1%"),
    ("chosen_reward", "implicit reward, chosen", "+.4f"),
    ("rejected_reward", "implicit reward, rejected", "+.4f"),
    ("kl", "KL to reference", ".4f"),
)


def round_context(
    rounds: Sequence[Mapping[str, Any]],
    rewards: pl.DataFrame | None,
    pairs: pl.DataFrame | None,
    metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what `report_rounds.html.j2` shows; the arguments are those of `write_report`, and metrics to draw."""
    rewards = None if rewards is None or rewards.is_empty() else rewards
    return {
        "rounds_figure": rounds_figure([(at, r) for r in rounds if (at := _place(r)) is not None], metrics),
        "rewards_figure": rewards_figure(rewards.filter(pl.col("sample") == 0)) if rewards is not None else None,
        "length_figure": length_figure(rewards) if rewards is not None else None,
        "round_tables": _round_tables(rounds),
        "flattered": FLATTERED if any(r.get("heldout_flattered") for r in rounds) else "",
        "hinted": any(str(r.get("name")).startswith("hinted_") for r in rounds),
        "examples": _examples(pairs),
    }


def answered_states(states: Sequence[str]) -> list[str]:
    """Return the states of the LLM whose answers are shown: no controls, and of a round the answers that made pairs.

    Where those were written with hints, the state before the hints has one answer a user, and is left out.

    >>> answered_states(["zero_shot", "hinted_1", "round_1", "hinted_2", "round_2", "best_of_n"])
    ['zero_shot', 'hinted_1', 'hinted_2', 'round_2']
    """
    hinted = {f"round_{number - 1}" for state in states if (number := round_number(state, "hinted"))}
    return [state for state in states if place(state) is not None and state not in hinted]


def _round_tables(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two tables, answers and training, without the columns that no round has."""
    answers = [(_state_name(s), {**s, **_held_out(s)}) for s in rounds]
    training = [(_state_name(s), {**(s.get("train") or {}), "time": s.get("training_seconds")}) for s in rounds]
    held_out = (("held_out", "held-out reward", "s"), ("gain", "gain over zero-shot (paired)", "s"))
    tables = [
        make_table("Answers and rewards", answers, (*held_out, *_POLICY_COLUMNS)),
        make_table("Training", training, (*_TRAIN_COLUMNS, ("time", "seconds of training", ",.0f"))),
    ]
    return [t for t in tables if t["columns"]]


def _held_out(state: Mapping[str, Any]) -> dict[str, Any]:
    value = state.get("heldout_reward")
    if not value or not known(value.get("mean")):
        return {"held_out": None}
    star = "*" if state.get("heldout_flattered") else ""
    shown = with_interval({"mean": value["mean"], "ci95": value.get("ci95") or (None, None)})
    gain = state.get("heldout_gain")
    return {"held_out": f"{shown}{star}", "gain": f"{signed(gain)}{star}" if gain else None}


def signed(gain: Mapping[str, Any]) -> str:
    """Write a gain with its interval, as far as there is one.

    >>> signed({"mean": 0.02, "ci95": [-0.001, 0.041]}), signed({"mean": 0.02, "ci95": [math.nan, math.nan]})
    ('+0.0200 [-0.0010, +0.0410]', '+0.0200')
    """
    low, high = gain["ci95"]
    return f"{gain['mean']:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if known(low) and known(high) else "")


def _place(state: Mapping[str, Any]) -> float | None:
    """Where a state stands on the axis of rounds; None for controls."""
    return place(str(state["name"])) if state.get("name") else state["round"]


def _state_name(state: Mapping[str, Any]) -> str:
    return state_name(str(state["name"])) if state.get("name") else place_name(state["round"])


def known(value: Any) -> bool:
    """Whether a cell has something to show: neither missing nor nan."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def make_table(
    title: str, lines: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[tuple[str, str, str]]
) -> dict[str, Any]:
    """Return a table without the columns that no line has.

    Args:
        title: Above it.
        lines: (name, values) of each line; one with none of the columns is left out.
        columns: (key, label, format) of each column; what has none of a key gets an empty cell.
    """
    used = [c for c in columns if any(known(values.get(c[0])) for _, values in lines)]
    return {
        "title": title,
        "columns": [label for _, label, _ in used],
        "lines": [
            {
                "name": name,
                "cells": [format(v[key], form) if known(v.get(key)) else "" for key, _, form in used],
            }
            for name, v in lines
            if any(known(v.get(key)) for key, _, _ in used)
        ],
    }


def _examples(pairs: pl.DataFrame | None) -> dict[str, Any] | None:
    """Return the pairs with the largest gaps, and random ones, which do not flatter.

    The random ones stand in the order in which they were drawn, so that the first of them, which are not folded away,
    are as random as all.
    """
    if pairs is None or pairs.is_empty():
        return None
    gaps = pairs.with_columns(gap=pl.col("chosen_reward") - pl.col("rejected_reward")).with_row_index("line")
    most = min(PAIRS, max(EXAMPLES, len(gaps) // 2))
    largest = gaps.sort("gap", descending=True, nulls_last=True, maintain_order=True).head(most)
    rest = gaps.filter(~pl.col("line").is_in(largest["line"].to_list()))
    drawn = rest.sample(min(PAIRS, len(rest)), shuffle=True, seed=0)
    found = [
        _group(*group) for group in (("Largest reward gaps", largest), ("Drawn at random", drawn)) if len(group[1])
    ]
    return {"groups": found, "shown": sum(len(g["pairs"]) + len(g["more"]) for g in found), "total": len(gaps)}


def _group(title: str, part: pl.DataFrame) -> dict[str, Any]:
    """The pairs with their texts cut, and of those folded away as many as there is room for."""
    pairs = [pair | {name: _cut(pair[name]) for name in _TEXTS} for pair in part.to_dicts()]
    sizes = [sum(len(escape(pair[name]["text"]).encode(errors="replace")) for name in _TEXTS) for pair in pairs]
    room = sum(size <= BYTES for size in accumulate(sizes))
    more = pairs[EXAMPLES:room]
    return {"title": title, "pairs": pairs[:EXAMPLES], "more": more, "open": title.startswith("Largest")}


def _cut(text: str) -> dict[str, Any]:
    """A text's beginning, and how long it was where that is not all of it."""
    whole = len(text) <= TEXT
    return {"text": text if whole else text[:TEXT] + "\u2026", "cut": None if whole else len(text)}
