"""The rows of RLRF4Rec and of the loop with hints: order, what each has to beat, and that in words (METHODS 1.9)."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import polars as pl

from lit_rec.run.headline import Comparison, Headline, claim, describe_difference, limit
from lit_rec.run.seeds import seeds_of

ONE_SEED, SEVERAL_SEEDS = "Each row of", "Training seeds"  # how the sentence about training seeds begins
VARIANTS = ("both", "kar", "answer")  # how it reaches the reranker: with the history's vector, as KAR does, alone
_FAMILIES = (
    "no_knowledge",
    "item_only",
    "history_shuffled",
    "history_only",
    "shuffled",
    "zero_shot",
    "best_of_n",
    "random_pairs",
    "round",
)
_CONTROLS = ("no_knowledge", "item_only", "history_shuffled", "history_only", "shuffled")


def split_name(row: str) -> tuple[str, str]:
    """Split a row's name into its base and its variant.

    >>> split_name("round_2_both"), split_name("history_only")
    (('round_2', 'both'), ('history_only', ''))
    """
    for variant in VARIANTS:
        if row.endswith(f"_{variant}"):
            return row.removesuffix(f"_{variant}"), variant
    return row, ""


def family(row: str) -> str:
    """Return the kind of a row: `round` for `round_2_both`, `other` for what has no fixed place."""
    return next((name for name in (*_FAMILIES, "hinted") if row.startswith(name)), "other")


def reads_llm(row: str) -> bool:
    """Whether a row's reranker reads texts that the LLM has written.

    >>> reads_llm("shuffled"), reads_llm("history_shuffled")
    (True, False)
    """
    return family(row) == "shuffled" or family(row) not in (*_CONTROLS, "other")


def is_tuned(row: str) -> bool:
    """Whether a row's texts come from an LLM that DPO has tuned, or that was asked with hints."""
    return reads_llm(row) and family(row) not in ("shuffled", "zero_shot")


def idle(rows: Collection[str]) -> list[str]:
    """Facts of the configuration that no row has anything of: the LLM where none reads its texts, pairs without DPO."""
    unused = [] if any(is_tuned(row) for row in rows) else ["Answers per user and round", "Reward"]
    return unused if any(reads_llm(row) for row in rows) else ["LLM", *unused]


def round_number(row: str, kind: str = "round") -> int | None:
    """Return k of `round_k` (any variant), or of `hinted_k` where that kind is asked for, else None."""
    match = re.fullmatch(rf"{kind}_(\d+)", split_name(row)[0])
    return int(match[1]) if match else None


def with_layouts(frames: pl.DataFrame, cfg: Mapping[str, Any]) -> pl.DataFrame:
    """Add which inputs every row's reranker has, as `count_seeds` asks: none, items' vectors, one or two of the user.

    Args:
        frames: An evaluation frame.
        cfg: The run's configuration: rows of texts without a variant read what `knowledge.encode` says.
    """
    layouts = {row: _layout(row, cfg["knowledge"]["encode"]) for row in frames["row"].unique()}
    return frames.with_columns(pl.col("row").replace_strict(layouts, return_dtype=pl.String).alias("layout"))


def _layout(row: str, encode: str) -> str:
    if row in ("no_knowledge", "item_only"):
        return row
    plain = family(row) in ("history_only", "history_shuffled")
    return "both" if not plain and (split_name(row)[1] or encode) == "both" else "one"


def place(state: str) -> float | None:
    """Return where a state of the LLM stands on an axis of rounds; None for controls, which stand beside it.

    >>> place("zero_shot"), place("hinted_2"), place("round_2"), place("best_of_n")
    (0, 1.5, 2, None)
    """
    if state == "zero_shot":
        return 0
    hints = round_number(state, "hinted")
    return round_number(state) if hints is None else hints - 0.5


def place_name(at: float) -> str:
    """Return what stands at a place of that axis, for people.

    >>> place_name(0), place_name(1.5), place_name(2)
    ('zero-shot', 'hints 2', 'round 2')
    """
    if at == 0:
        return "zero-shot"
    return f"round {int(at)}" if at == int(at) else f"hints {int(at + 0.5)}"


def state_name(state: str) -> str:
    """Return how a state of the LLM is called in tables: `hints 1` for `hinted_1`; controls keep their names."""
    at = place(state)
    return state if at is None else place_name(at)


def row_order(row: str) -> tuple[int, float, str, int]:
    """Sort key: controls, the zero-shot LLM, round after round, each behind its hints; variants after their base."""
    base, variant = split_name(row)
    kind = family(row)
    where = [*_FAMILIES, "other"].index("round" if kind == "hinted" else kind)
    return where, place(base) or 0, base, VARIANTS.index(variant) + 1 if variant else 0


def wanted(row: str) -> Sequence[str]:
    """Return the rows that `row` must beat."""
    kind, (_, variant) = family(row), split_name(row)
    same = f"_{variant}" if variant else ""
    zero, hints = ["history_only", f"zero_shot{same}"], round_number(row, "hinted") or 1
    number = round_number(row)
    equal = [f"random_pairs{same}"] if number == 1 else []  # they had one round of DPO too
    return {
        "no_knowledge": [],
        "item_only": ["no_knowledge"],
        "history_shuffled": ["item_only"],
        "history_only": ["item_only", "history_shuffled"],
        "random_pairs": zero,
        "best_of_n": zero,
        "hinted": zero if hints == 1 else [*zero, f"round_{hints - 1}{same}"],
        "round": ["history_only", f"hinted_{number}{same}", f"zero_shot{same}", *equal],
    }.get(kind, ["history_only"])


def sentences(
    mine: Sequence[Comparison], means: Mapping[str, float], name: str, headline: Headline, runs: int = 1
) -> list[str]:
    """Did hints and DPO help, by how much and how sure, and does any text beat the raw history?

    The last round is judged, never the best one: picking the best on test users would flatter it.
    """
    lines = _part_lines(mine, name, headline) + _own_line(mine, name, headline) + _text_lines(mine, name, headline)
    return lines and lines + _seed_line(mine, name, runs)


_HINTS = ("The hints helped", "The hints hurt", "Whether the hints help is not shown")
_DPO = ("DPO helped", "DPO hurt", "Whether DPO helps is not shown")
_BEYOND = (
    "DPO helped beyond the hints",
    "DPO hurt beyond the hints",
    "Whether DPO helps beyond the hints is not shown",
)
_LOOP = (
    "Hints and DPO together helped",
    "Hints and DPO together hurt",
    "Whether hints and DPO together help is not shown",
)
_REWARD = (
    "The reward, not just more training, made the difference",
    "Pairs chosen by the reward did worse than random pairs",
    "Pairs chosen by the reward are not shown to be better than random pairs",
)


def _part_lines(mine: Sequence[Comparison], reranker: str, headline: Headline) -> list[str]:
    """What each part brought: the first hints, the reward, the last round over its hints and over the untouched LLM.

    The reward is judged by the first round: random pairs have had as much training as that one, and no more.
    """
    last = max((round_number(c.row) or 0 for c in mine), default=0)
    hinted = any(family(c.row) == "hinted" for c in mine)
    lines, reward = list[str](), list[str]()
    for c in mine:
        against = family(c.against)
        number, words = round_number(c.row), None
        if round_number(c.row, "hinted") == 1 and against == "zero_shot":
            words = _HINTS
        elif number == 1 and against == "random_pairs":
            words = _REWARD
        elif last and number == last:
            words = {"hinted": _BEYOND, "zero_shot": _LOOP if hinted else _DPO}.get(against)
        if words:
            beside = " (text and history together)" if split_name(c.row)[1] == "both" else ""
            name = f"with {reranker}, {c.row} against {c.against} is"
            told = f"{name} {describe_difference(c)} in {headline.full_label()}.{limit(c)}"
            (reward if words is _REWARD else lines).append(f"{claim(c, words)}{beside}: {told}")
    return lines + reward


def _seed_line(mine: Sequence[Comparison], reranker: str, runs: int) -> list[str]:
    """How far the differences move with another draw of training seeds."""
    seeds = [number for c in mine if (number := seeds_of(c.by_seed))]
    if not seeds:
        return [
            f"{ONE_SEED} {reranker} was trained with one seed: how far another one moves it is in no interval here "
            "(evaluation.seeds=3 shows it)."
        ]
    spreads = [
        f"of rows that read {words} inputs by {among(found)}"
        for words, alike in (("the same", True), ("different", False))
        if (found := sorted({c.spread.deviation for c in mine if c.spread and c.spread.alike == alike}))
    ]
    few = (
        " Few seeds tell the latter badly: evaluation.seeds=5 narrows it."
        if len(spreads) > 1 and min(seeds) < 5
        else ""
    )
    return [
        f"{SEVERAL_SEEDS} ({min(seeds)} a row): with {reranker}, the difference of two rows varies from one to the "
        f"next (standard deviation), {', '.join(spreads)}; intervals and p-values of differences count that in.{few}"
        f"{_llm_words(mine, runs)}"
    ]


def _llm_words(mine: Sequence[Comparison], runs: int) -> str:
    """How often the LLM was drawn; empty where no row reads a text of it."""
    rows = {row for c in mine for row in (c.row, c.against)}
    if not any(reads_llm(row) for row in rows):
        return ""
    drawn = "sampled and tuned once" if any(is_tuned(row) for row in rows) else "sampled once"
    if runs > 1:
        return f" The LLM was {drawn} in each of these {runs} runs."
    return f" The LLM was {drawn}: what another draw of that would do is in no number of one run."


def among(values: Sequence[float]) -> str:
    """Write the least and the greatest of some numbers.

    >>> among([0.01]), among([0.002, 0.01])
    ('0.0100', '0.0020 to 0.0100')
    """
    return " to ".join(f"{value:.4f}" for value in dict.fromkeys((values[0], values[-1])))


def _own_line(mine: Sequence[Comparison], reranker: str, headline: Headline) -> list[str]:
    """Does it matter whose history the vector is of?"""
    words = (
        "A user's own history helps beyond having a vector",
        "A user's own history does worse than somebody else's",
        "Whether it matters whose history a user gets is not shown",
    )
    return [
        f"{claim(c, words)}: with {reranker}, {c.row} against {c.against} is {describe_difference(c)} in "
        f"{headline.full_label()}.{limit(c)}"
        for c in mine
        if (c.row, c.against) == ("history_only", "history_shuffled")
    ]


def _text_lines(mine: Sequence[Comparison], reranker: str, headline: Headline) -> list[str]:
    texts = [c for c in mine if c.against == "history_only" and family(c.row) not in _CONTROLS]
    if not texts:
        return []
    name = f"with {reranker}: in {headline.full_label()}"
    winners = [c for c in texts if c.sure and c.difference.mean > 0]
    if winners:
        listed = "; ".join(f"{c.row} {describe_difference(c)}" for c in winners)
        lines = [f"Better than the raw history (history_only) {name}, {listed}."]
        others = [c for c in mine if c.against == "history_only" and family(c.row) == "shuffled"]
        same = [c for c in others if any(split_name(c.row)[1] == split_name(w.row)[1] for w in winners)]
        if found := [c for c in same if c.sure and c.difference.mean > 0]:
            theirs = "; ".join(f"{c.row} {describe_difference(c)}" for c in found)
            lines.append(f"So is somebody else's text {name}, {theirs}: what helps need not be what a text says.")
        return lines
    known = [c for c in texts if math.isfinite(c.difference.mean)]
    if not known:
        return [f"No LLM text could be compared with the raw history (history_only) {name}."]
    best = max(known, key=lambda c: c.difference.mean)
    worse = sum(c.sure and c.difference.mean < 0 for c in texts)
    closing = f" {worse} of {len(texts)} are clearly worse than it." if worse else ""
    return [
        f"No LLM text is shown to beat the raw history (history_only) {name}, the nearest is {best.row}, "
        f"{describe_difference(best)}.{closing}"
    ]
