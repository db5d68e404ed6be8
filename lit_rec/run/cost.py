"""What a run that tunes its LLM cost, part by part: LLM answers, tokens written, seconds.

All of it comes from the stages, so a resumed run tells the same as one that was never stopped. Sample 0 of a state's
answers is the users' knowledge, which a run without DPO has to write as well; the others are there for the pairs alone.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from lit_rec.run.reranking_story import family, round_number
from lit_rec.run.round_report import make_table

TRAINING = "training_seconds"  # in a stage's counts: training that went on before the stage was built
WRITTEN = "tokens_written"  # in the counts of answers: tokens that the store did not have, which alone took time
HINTS, DPO = "hints", "DPO"
_DATA, _JUDGE, _SAMPLING, _TRAINING = "Data, items and histories", "Reward reranker", "Answers of round", "DPO training"
_SCORING, _CONTROLS, _ROWS = "Encoding and scoring", "Controls (random pairs, best of N)", "Final rerankers"
_KNOWLEDGE = {  # family of a state -> what its users' knowledge is called, and what it is part of
    "zero_shot": ("Zero-shot knowledge", ""),
    "hinted": ("Knowledge with hints", HINTS),
    "round": ("Knowledge after DPO", DPO),
}
_OF_HINTS = {"hints": "Reflection and hints", "rewards": "Rewards of hints", "agent": "Agent"}
_ORDER = (
    _DATA,
    "Zero-shot knowledge",
    _JUDGE,
    *_OF_HINTS.values(),
    "Knowledge with hints",
    _SAMPLING,
    _TRAINING,
    "Knowledge after DPO",
    _SCORING,
    _CONTROLS,
    _ROWS,
)
_UNKNOWN = " Tokens that the store had took none of these seconds; how many they were was not counted."
_COLUMNS = (
    ("of", "part of", "s"),
    ("answers", "LLM answers", ",d"),
    ("tokens", "tokens", ",d"),
    ("stored", "from the store", ",d"),
    ("seconds", "seconds", ",.1f"),
)


@dataclass(frozen=True)
class Part:
    """What one part of the loop cost, over all folds; None is what was not counted.

    Attributes:
        name: Of the part.
        of: "hints", "DPO", or "" for what a run without both needs as well.
        answers: Written by the LLM.
        tokens: Of these answers.
        seconds: Of all its stages.
        stored: Tokens that the store had when they were asked for: they took no seconds.
    """

    name: str
    of: str
    answers: int | None
    tokens: int | None
    seconds: float | None
    stored: int | None = 0

    @property
    def order(self) -> tuple[int, int, str]:
        """Sort key: the order of the loop; rounds of one name by number."""
        name, _, number = self.name.rpartition(" ")
        return (_ORDER.index(name), int(number), self.of) if name in _ORDER else (_ORDER.index(self.name), 0, self.of)


@dataclass(frozen=True)
class _Answers:
    """Answers of a state: all, and those that are a user's knowledge; `written` as its stage has counted it."""

    answers: int
    tokens: int
    first_answers: int
    first_tokens: int
    written: int | None

    @property
    def first(self) -> float:
        """Share of the tokens that is knowledge."""
        return self.first_tokens / self.tokens if self.tokens else 1.0

    def stored(self, tokens: int) -> int | None:
        """How many of some of the tokens came from the store: the same share as of all, as seconds are shared out."""
        if self.written is None:
            return None
        return round((1 - self.written / self.tokens) * tokens) if self.tokens else 0


def stage_seconds(stage: Mapping[str, Any]) -> float:
    """Seconds of a stage, with the training before it where its manifest counts that."""
    return (stage.get("seconds") or 0.0) + ((stage.get("counts") or {}).get(TRAINING) or 0.0)


def cost_parts(stages: Iterable[Mapping[str, Any]], folder: Path) -> list[Part]:
    """Sum up what the stages took.

    Args:
        stages: Manifests of all stages: name, key, counts, seconds.
        folder: Where the stages lie.

    Returns:
        Parts in the order of the loop.
    """
    stages = list(stages)
    hinted = any("/hints/" in stage["name"] for stage in stages)
    written = {
        stage["name"].removesuffix("/answers"): _answers(stage, folder)
        for stage in stages
        if stage["name"].endswith("/answers")
    }
    return summed(part for stage in stages for part in _pieces(stage, written, hinted))


def summed(parts: Iterable[Part]) -> list[Part]:
    """Parts of the same name as one, such as those of several runs, in the order of the loop."""
    found: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        found.setdefault((part.name, part.of), []).append(part)
    return sorted((_together(mine) for mine in found.values()), key=lambda part: part.order)


def _answers(stage: Mapping[str, Any], folder: Path) -> _Answers:
    table = pl.read_parquet(folder / stage["name"] / "answers.parquet", columns=["sample", "tokens"])
    first = table.filter(pl.col("sample") == 0)
    written = (stage.get("counts") or {}).get(WRITTEN)
    return _Answers(len(table), int(table["tokens"].sum()), len(first), int(first["tokens"].sum()), written)


def _pieces(stage: Mapping[str, Any], written: Mapping[str, _Answers], hinted: bool) -> Iterator[Part]:
    """A stage as one part, or as two where it serves the users' knowledge and the pairs."""
    counts, key, seconds = stage.get("counts") or {}, stage.get("key") or {}, stage_seconds(stage)
    short = re.sub(r"^fold_\d+/", "", stage["name"])
    state, _, kind = short.partition("/")
    mine = written.get(stage["name"].removesuffix(f"/{kind}"))
    if state == "hints":
        kind = short.rpartition("/")[2]
        asks = kind != "agent" or (key.get("agent") or {}).get("rewards") == "online"
        none = None if asks else 0
        yield Part(_OF_HINTS[kind], HINTS, counts.get("answers", none), counts.get("tokens", none), seconds)
    elif state == "rows":
        yield Part(_ROWS, "", 0, 0, seconds)
    elif not kind:
        count = None if key.get("item_text") == "llm" else 0
        yield Part(_DATA, "", count, count, seconds)
    elif family(state) in ("random_pairs", "best_of_n") or kind == "pairs_random":
        told = (mine.answers, mine.tokens, mine.stored(mine.tokens)) if mine and kind == "answers" else (0, 0, 0)
        timed = None if kind == "policy" and TRAINING not in counts else seconds
        yield Part(_CONTROLS, "", *told[:2], timed, told[2])
    elif kind == "policy":
        yield Part(_TRAINING, DPO, 0, 0, seconds if TRAINING in counts else None)
    elif kind in ("reward_model", "refreshed_model"):
        yield Part(_JUDGE, "" if hinted else DPO, 0, 0, seconds)
    elif kind.startswith("pairs_"):
        yield Part(_SCORING, DPO, 0, 0, seconds)
    elif mine is not None:
        yield from _shared(state, kind, mine, seconds)


def _shared(state: str, kind: str, mine: _Answers, seconds: float) -> Iterator[Part]:
    """What was written, encoded or scored of a state: knowledge, and the further answers that pairs are made of."""
    name, of = _KNOWLEDGE[family(state)]
    number = round_number(state, "hinted") or (round_number(state) or 0) + 1
    if kind != "answers":
        yield Part(_SCORING, of, 0, 0, seconds * mine.first)
        if mine.first < 1:
            yield Part(_SCORING, DPO, 0, 0, seconds * (1 - mine.first))
        return
    yield Part(name, of, mine.first_answers, mine.first_tokens, seconds * mine.first, mine.stored(mine.first_tokens))
    if mine.answers > mine.first_answers:
        answers, tokens = mine.answers - mine.first_answers, mine.tokens - mine.first_tokens
        yield Part(f"{_SAMPLING} {number}", DPO, answers, tokens, seconds * (1 - mine.first), mine.stored(tokens))


def _together(parts: Sequence[Part]) -> Part:
    """Parts as one; a number that one of them lacks is unknown."""

    def total(values: Sequence[Any]) -> Any:
        return None if None in values else sum(values)

    numbers = [total([getattr(part, name) for part in parts]) for name in ("answers", "tokens", "seconds", "stored")]
    return Part(parts[0].name, parts[0].of, *numbers)


def cost_context(parts: Sequence[Part]) -> dict[str, Any]:
    """Return what `report_cost.html.j2` shows."""
    columns = [one for one in _COLUMNS if one[0] != "stored" or any(part.stored for part in parts)]
    whole = [("The whole run", vars(_together(parts)) | {"of": ""})] if parts else []
    return {
        "table": make_table("Cost", [*((part.name, vars(part)) for part in parts), *whole], columns),
        "sentence": cost_sentence(parts),
    }


def cost_sentence(parts: Sequence[Part], *, runs: int = 1) -> str:
    """Say what DPO and hints cost, beside the whole run; empty where there was no DPO.

    Args:
        parts: Of `cost_parts`, or of several runs `summed`.
        runs: How many.

    >>> parts = [Part("Zero-shot knowledge", "", 5, 50, 4.0), Part("Answers of round 1", "DPO", 10, 90, 20.0)]
    >>> cost_sentence(parts)
    'DPO cost 90 tokens and 20 s (1 round), of 140 tokens and 24 s for the whole run.'
    """
    rounds = sum(part.name.startswith(_SAMPLING) for part in parts)
    if not rounds:
        return ""
    each = "" if runs == 1 else f" in each of {runs} runs"
    told = {of: amount(_together(mine)) for of in (DPO, HINTS) if (mine := [p for p in parts if p.of == of])}
    clauses = [f"DPO cost {told[DPO]} ({rounds} round{'' if rounds == 1 else 's'}{each})"] if told[DPO] else []
    if told.get(HINTS):
        clauses.append(f"{'h' if clauses else 'H'}ints cost {told[HINTS]}")
    if not clauses:
        return ""
    whole, all_of = amount(_together(parts)), "the whole run" if runs == 1 else f"all {runs} runs"
    unknown = any(part.stored is None for part in parts)
    return " and ".join(clauses) + (f", of {whole} for {all_of}." if whole else ".") + (_UNKNOWN if unknown else "")


def amount(part: Part) -> str:
    """Tokens and seconds as far as they were counted.

    >>> amount(Part("", "", 5, 1000, 4.0, 300))
    '1,000 tokens (300 of them from the store) and 4.0 s'
    """
    share = "all" if part.stored == part.tokens else f"{part.stored:,}" if part.stored else ""
    stored = f" ({share} of them from the store)" if share else ""
    told = [f"{part.tokens:,} tokens{stored}"] if part.tokens else []
    if part.seconds is not None:
        told.append(f"{part.seconds:,.1f} s" if part.seconds < 10 else f"{part.seconds:,.0f} s")
    return " and ".join(told)
