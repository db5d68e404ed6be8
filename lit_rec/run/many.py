"""Several finished runs side by side: what differs between them, their numbers over users, and what follows.

Runs that differ in nothing but their seed are one SETTING: a user's value is the mean over the seeds in which the user
was measured, and users are the sample, as everywhere (lit_rec/run/statistics.py). Two settings are compared on the
users both have, and only where both ordered the same candidates; the p-values of all these comparisons are one family
for Holm's correction (without rows that are the same in both for every user), those of rows within a setting one more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import polars as pl

from lit_rec.errors import UserError
from lit_rec.run.comparisons import choose_headline, compare_rows
from lit_rec.run.differing import group_configs, label_of, letter_of
from lit_rec.run.finished import FinishedRun
from lit_rec.run.headline import Comparison, Headline, claim, describe_difference, limit
from lit_rec.run.reranking_story import split_name
from lit_rec.run.results import metric_columns, result_rows
from lit_rec.run.seeds import RUNS, count_seeds, seeds_of
from lit_rec.run.statistics import PAIRED_RESAMPLES, Difference, holm, table_differences, user_table
from lit_rec.run.stories import Story

_USERS = 1 << 40  # users of one population, at most


@dataclass(frozen=True)
class Setting:
    """Runs that are the same but for the seed.

    Attributes:
        letter: A, B, ...: names it where there is no room.
        label: What sets it apart, in words.
        values: Its values of the section's `keys`.
        runs: Its runs.
        frames: Per-list metrics of all its runs; `user` counts the same in all settings of a section, `ground` says on
            which candidates.
    """

    letter: str
    label: str
    values: tuple[str, ...]
    runs: list[FinishedRun]
    frames: pl.DataFrame

    @property
    def name(self) -> str:
        """Letter and label."""
        return f"{self.letter}: {self.label}"

    @property
    def grounds(self) -> set[str]:
        """The candidate lists that were ordered."""
        return {run.ground for run in self.runs}

    @property
    def run_seeds(self) -> set[int]:
        """The seeds of its runs."""
        return {int(run.config["seed"]) for run in self.runs}

    def trained_like(self, other: "Setting") -> bool:
        """Whether a seed gives its models the same initial weights and batches as those of another setting."""
        mine, theirs = self.runs[0].config, other.runs[0].config
        return all(mine.get(part) == theirs.get(part) for part in self.runs[0].story.trained)


@dataclass(frozen=True)
class Section:
    """All runs of one recipe.

    Attributes:
        story: Of the recipe.
        headline: What is counted.
        keys: Configuration keys that tell the settings apart.
        differing: (key, value per setting) of every key in which settings differ.
        settings: In the order in which their first runs were named.
        lines: `result_rows` of every setting, with `setting` = its letter.
        gaps: The same row in two settings; `reranker` and `against` are letters.
        within: Two rows of one setting; `reranker` is its letter.
        notes: What has to be said about the comparisons.
    """

    story: Story
    headline: Headline
    keys: tuple[str, ...]
    differing: list[tuple[str, list[str]]]
    settings: list[Setting]
    lines: list[dict[str, Any]]
    gaps: list[Comparison] = field(default_factory=list)
    within: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[str]:
        """Names of all rows, in table order."""
        return sorted({line["row"] for line in self.lines}, key=self.story.row_order)

    def setting(self, letter: str) -> Setting:
        """The setting of a letter."""
        return next(one for one in self.settings if one.letter == letter)

    def main_row(self) -> str | None:
        """The row that the recipe is about, as far as two settings have it: the last round, or the agent."""
        shared = [
            row
            for row in self.rows()
            if sum(line["row"] == row for line in self.picked()) > 1 and not split_name(row)[1]
        ]
        best = [row for row in shared if self.story.family(row) == self.story.accent]
        return next(iter([*best[-1:], *shared[-1:]]), None)

    def _apart(self, mine: Setting, other: Setting) -> str:
        """What a setting has that the other has not."""
        own = [(k, a) for k, a, b in zip(self.keys, mine.values, other.values, strict=True) if a != b]
        return label_of([key for key, _ in own], [value for _, value in own])

    def picked(self, metric: str = "") -> list[dict[str, Any]]:
        """The lines that count as the headline says, by row and setting."""
        order = [one.letter for one in self.settings]
        found = [line for line in self.lines if self.headline.counts(line, metric)]
        return sorted(found, key=lambda line: (self.story.row_order(line["row"]), order.index(line["setting"])))

    def verdict(self) -> list[str]:
        """What the comparisons of the main row show, one sentence each."""
        lines = []
        for gap in self.gaps:
            if gap.row == self.main_row():
                mine, other = self.setting(gap.reranker), self.setting(gap.against)
                words = (f"{mine.letter} is better than {other.letter}", f"{mine.letter} is worse than {other.letter}")
                told = claim(gap, (*words, f"{mine.letter} is not shown to differ from {other.letter}"))
                here, there = self._apart(mine, other), self._apart(other, mine)
                found = f"{describe_difference(gap, self.headline.drawn)} in {self.headline.full_label()}"
                bound = limit(gap, self.headline.drawn).replace("two rows", "two settings")
                lines.append(f"{told}: {gap.row} with {here} against {there} is {found}.{bound}")
        return lines


def sections(runs: Sequence[FinishedRun], *, resamples: int = PAIRED_RESAMPLES, seed: int = 0) -> list[Section]:
    """One section per recipe, in the order in which the recipes come first.

    Args:
        runs: Finished runs.
        resamples: Bootstrap samples behind the differences.
        seed: Of the bootstrap.

    Raises:
        UserError: Runs of one recipe share no metric.
    """
    tasks = dict.fromkeys(run.story.task for run in runs)
    return [_section([run for run in runs if run.story.task == task], resamples, seed) for task in tasks]


def _section(runs: list[FinishedRun], resamples: int, seed: int) -> Section:
    story, shared = runs[0].story, _shared_metrics(runs)
    protocols = {run.results[0]["protocol"] for run in runs}
    convention = "kar" if protocols == {"kar"} else "standard"
    one = runs[0].frames.select("split", *shared)
    headline = choose_headline(one, convention=convention, story=story)
    columns = [c for c in shared if c.split("|")[0].endswith(f"@{headline.k}")]
    keys, differing, groups = group_configs([run.config for run in runs])
    populations = {name: n for n, name in enumerate(dict.fromkeys(run.population for run in runs))}
    ids = {name: _numbered([run for run in runs if run.population == name]) for name in populations}
    settings = []
    for number, (values, places) in enumerate(groups.items()):
        members = [runs[place] for place in places]
        label = label_of(keys, values) or str(members[0].config.get("name") or members[0].path.name)
        mine = [c for c in columns if c in members[0].frames.columns]
        frames = _joined(members, populations, ids, mine, headline.split)
        settings.append(Setting(letter_of(number), label, values, members, frames))
    gaps = _compare_settings(settings, story, headline, resamples, seed)
    marked = [one.frames.with_columns(pl.lit(one.letter).alias("reranker")) for one in settings]
    within = compare_rows(pl.concat(marked), headline, resamples=resamples, seed=seed, story=story)
    return Section(
        story,
        headline,
        keys,
        differing,
        settings,
        [line for one in settings for line in _lines(one, story)],
        gaps,
        within,
        _notes(settings, headline) + _seed_notes(within, headline),
    )


def _shared_metrics(runs: Sequence[FinishedRun]) -> list[str]:
    shared = [c for c in metric_columns(runs[0].frames) if all(c in run.frames.columns for run in runs)]
    if not any(column.startswith("ndcg@") for column in shared):
        raise UserError(
            "these runs have no metric in common",
            where="config key evaluation.ks",
            why="; ".join(f"{run.path}: {run.config['evaluation'].get('ks')}" for run in runs)[:300],
            fix="fit them with a cut-off that all have (--fresh keeps the LLM's answers)",
        )
    return shared


def _numbered(runs: Sequence[FinishedRun]) -> dict[str, int]:
    """One number for every user of these runs, whichever sample it is in; empty where they do not name them."""
    return {user: n for n, user in enumerate(dict.fromkeys(user for run in runs for user in run.users))}


def _joined(
    runs: Sequence[FinishedRun],
    populations: dict[str, int],
    ids: dict[str, dict[str, int]],
    columns: list[str],
    split: str,
) -> pl.DataFrame:
    """The runs of a setting as one evaluation frame: their seeds become seeds of it, and folds stand side by side."""
    seeds = {seed: n for n, seed in enumerate(dict.fromkeys(run.config["seed"] for run in runs))}
    parts = []
    for run in runs:
        mine = run.frames.filter(pl.col("split") == split)
        user = pl.col("user").cast(pl.Int64)
        if run.users:
            user = user.replace_strict(range(len(run.users)), [ids[run.population][name] for name in run.users])
        parts.append(
            mine.select(
                "row",
                "reranker",
                (pl.col("seed").cast(pl.Int64) + RUNS * seeds[run.config["seed"]]).alias("seed"),
                pl.col("fold").cast(pl.Int64),
                "split",
                (user + _USERS * populations[run.population]).alias("user"),
                pl.col("list").cast(pl.Int64),
                pl.lit(run.ground).alias("ground"),
                pl.lit(run.config["seed"]).cast(pl.Int64).alias("run_seed"),
                *columns,
            ).pipe(run.story.with_layouts, run.config)
        )
    return pl.concat(parts)


def _lines(setting: Setting, story: Story) -> list[dict[str, Any]]:
    first = setting.runs[0].results[0]
    about = {"dataset": first["dataset"], "protocol": first["protocol"]}
    whole = setting.runs[0].config.get("users") is None
    rows = result_rows(setting.frames, **about, story=story, whole=whole)
    return [{**row, "setting": setting.letter} for row in rows]


def against(settings: Sequence[Setting]) -> list[tuple[int, int]]:
    """Which settings are compared: each with the one that differs in ONE key and has that key's first value.

    A setting that has no such neighbour is compared with the first that ordered the same candidates.
    """
    pairs = []
    for n, one in enumerate(settings):
        mine = []
        for key in range(len(one.values)):
            rest = [*one.values[:key], *one.values[key + 1 :]]
            same = [m for m in range(n) if [*settings[m].values[:key], *settings[m].values[key + 1 :]] == rest]
            mine += same[:1]
        others = [m for m in range(n) if settings[m].grounds & one.grounds]
        mine = [m for m in mine if m in others] or others[:1]
        pairs += [(n, m) for m in mine]
    return pairs


def _compare_settings(
    settings: Sequence[Setting], story: Story, headline: Headline, resamples: int, seed: int
) -> list[Comparison]:
    """Every row that two compared settings have, on the candidates and the users that both have."""
    column = headline.column()
    unit = "list" if headline.unit == "list" else "user"  # the frames call a session a user with one list
    found: list[tuple[Any, ...]] = []
    for n, m in against(settings):
        pair = (settings[n], settings[m])
        alike = all(one.trained_like(pair[0]) for one in pair)  # else a seed is another luck in each
        marked = [
            frames.with_columns(
                pl.lit("").alias("reranker"),
                pl.concat_str(pl.lit(f"{one.letter}/"), "row").alias("row"),
                pl.concat_str(pl.lit("" if alike else one.letter), "layout").alias("layout"),
            )
            for one, frames in zip(pair, _in_common(*pair, column), strict=True)
        ]
        table = user_table(pl.concat(marked), [column])
        users = {str(key[0]): set(part["user"]) for key, part in table.group_by("row")}
        both = {
            row: (f"{pair[0].letter}/{row}", f"{pair[1].letter}/{row}")
            for row in sorted(_row_names(pair), key=story.row_order)
        }
        both = {row: (a, b) for row, (a, b) in both.items() if users.get(a, set()) & users.get(b, set())}
        gaps = table_differences(table, list(both.values()), column, unit=unit, resamples=resamples, seed=seed)
        named = [("", *rows, gap) for rows, gap in zip(both.values(), gaps, strict=True)]
        told = count_seeds(pl.concat(marked), column, unit, named)
        found += [(pair[0].letter, row, pair[1].letter, *one) for row, one in zip(both, told, strict=True)]
    # What a setting does not touch is no question that was asked: it must not make the others harder to answer.
    corrected = holm([math.nan if equal(gap) else gap.p for *_, gap, _, _ in found])
    return [
        Comparison(one, row, other, gap, 1.0 if equal(gap) else p, by_seed, spread)
        for (one, row, other, gap, by_seed, spread), p in zip(found, corrected, strict=True)
    ]


def _in_common(one: Setting, other: Setting, column: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What both have measured: of every row the same users, candidates and, if they share any, seeds.

    A user whom one of them has measured under a second seed as well would bring that seed's luck into the difference.
    """
    keys = ["row", "ground", "user"]
    frames = [part.frames.filter(pl.col(column).is_not_null()) for part in (one, other)]
    if shared := sorted(set(frames[0]["run_seed"]) & set(frames[1]["run_seed"])):
        keys.append("run_seed")
        run = pl.col("run_seed").replace_strict(shared, range(len(shared)), default=None, return_dtype=pl.Int64)
        frames = [part.with_columns(seed=pl.col("seed") % RUNS + RUNS * run) for part in frames]  # the same for both
    return frames[0].join(frames[1], on=keys, how="semi"), frames[1].join(frames[0], on=keys, how="semi")


def equal(gap: Difference) -> bool:
    """Whether two rows are the same for every user."""
    return gap.mean == gap.low == gap.high == 0


def _row_names(pair: Sequence[Setting]) -> set[str]:
    return set.intersection(*(set(one.frames["row"].unique()) for one in pair))


def _notes(settings: Sequence[Setting], headline: Headline) -> list[str]:
    """What a reader has to know before comparing anything by eye."""
    notes = []
    apart = [(a.letter, b.letter) for a, b in combinations(settings, 2) if not a.grounds & b.grounds]
    if apart:
        shown = ", ".join(f"{a} and {b}" for a, b in apart[:6]) + (" and others" if len(apart) > 6 else "")
        notes.append(
            f"Not compared: {shown} did not order the same candidates for the same {headline.drawn}s, so their numbers "
            f"only stand side by side."
        )
    for a, b in combinations(settings, 2):
        if a.grounds & b.grounds and (a.grounds != b.grounds or a.run_seeds ^ b.run_seeds):
            notes.append(f"{a.letter} and {b.letter} are compared on the data of the seeds that both have.")
    twice = [one.letter for one in settings if _repeats(one.runs)]
    if twice:
        notes.append(f"Runs of one setting with the same seed are averaged like seeds: {', '.join(twice)}.")
    return notes


def _seed_notes(within: Sequence[Comparison], headline: Headline) -> list[str]:
    """In which settings nothing tells what another draw of training seeds would do."""
    told = {c.reranker for c in within if seeds_of(c.by_seed)}
    if not (alone := sorted({c.reranker for c in within} - told)):
        return []
    return [
        f"In {', '.join(alone)} no {headline.drawn}s were measured under two training seeds: intervals and p-values "
        f"are over {headline.drawn}s alone there (evaluation.seeds, or agent.seeds, above 1 adds them)."
    ]


def _repeats(runs: Sequence[FinishedRun]) -> bool:
    same = [(run.config["seed"], str(run.config["evaluation"].get("only_folds"))) for run in runs]
    return len(set(same)) < len(same)
