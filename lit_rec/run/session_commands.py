"""What the subcommands do for Re2LLM."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from omegaconf import DictConfig, OmegaConf

from lit_rec import __version__, distributed
from lit_rec.errors import UserError
from lit_rec.llm.language_model import LanguageModel
from lit_rec.recipes import agents, re2llm
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.recipes.session_hints import SessionHints
from lit_rec.recipes.session_rows import AGENTS, SessionRows, uses_hints
from lit_rec.run.comparisons import choose_headline, compare_rows
from lit_rec.run.export_agent import export_agent
from lit_rec.run.folder import RunFolder
from lit_rec.run.hint_report import hint_table
from lit_rec.run.outcome import commit, finished_run, leave_results, replace_folder, tell_finished
from lit_rec.run.plan import PlannedRun
from lit_rec.run.progress import console, tell_results
from lit_rec.run.report import write_report
from lit_rec.run.results import render_table, result_rows
from lit_rec.run.session_report import SessionStory
from lit_rec.run.stories import SESSIONS

EXAMPLES = 6  # test sessions shown per group


def fit(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Run the recipe and leave the results, the report, the hints and the agent at the top of the run folder."""
    started = time.perf_counter()
    commit()
    with PlannedRun(cfg, fresh=args.fresh) as run:
        console.print(f"lit_rec {__version__}: {cfg.name} -> {run.path}", highlight=False)
        frames, rows = re2llm.fit(cfg, run)
        made = sum(distributed.gathered(rows.ground.store.generated))
        if not distributed.leave():
            return
        lines = lines_of(frames, rows)
        environment = leave_results(cfg, run, lines, lambda: keep_final(rows, run), started)
        headline = choose_headline(frames, story=SESSIONS)
        comparisons = compare_rows(frames, headline, story=SESSIONS)
        story = story_of(rows)
        write_report(
            run.path / "report.html",
            rows=lines,
            frames=frames,
            stages=run.log,
            config_yaml=OmegaConf.to_yaml(cfg),
            environment=environment,
            headline=headline,
            comparisons=comparisons,
            story=SESSIONS,
            hints=story,
        )
        console.print(render_table(lines, frames, headline=headline, comparisons=comparisons, story=SESSIONS))
        if uses_hints(cfg):
            console.print(hint_table(story))
        answers = f"{made:,} LLM answers computed, {len(rows.ground.store):,} in the store."
        tell_finished(run, lines, headline, answers, environment)


def keep_final(rows: SessionRows, run: RunFolder) -> None:
    """Copy the hints and the agent to the top of the run folder, where the run has any."""
    if uses_hints(rows.cfg):
        rows.loop.base(rows.rounds).save(run.path / "hints.json")
        replace_folder(run.stage(f"round_{rows.rounds}/agent"), run.path / "agent")


def lines_of(frames: pl.DataFrame, rows: SessionRows) -> list[dict[str, Any]]:
    """The lines of results.json."""
    return result_rows(frames, dataset=rows.data.name, protocol="next_item", story=SESSIONS)


def story_of(rows: SessionRows) -> SessionStory:
    """What the report tells beside the table."""
    loop, cfg = rows.loop, rows.cfg
    hinted = uses_hints(cfg)
    choices = rows.choices() if hinted else pl.DataFrame()
    talks = _talks(rows) if hinted else []
    return SessionStory(
        scoring=rows.ground.scoring,
        hints=[asdict(hint) for hint in loop.base(rows.rounds).hints] if hinted else [],
        choices=choices,
        examples=_examples(rows, choices),
        bias=_bias(rows),
        counts=_counts(rows),
        curves=_curves(rows) if hinted else {},
        rounds=cfg.agent.epochs,
        talk=talks[0] if talks else [],
    )


def _talks(rows: SessionRows) -> list[Any]:
    return json.loads((rows.run.stage(f"round_{rows.rounds}/hints") / "conversations.json").read_text())


def _curves(rows: SessionRows) -> dict[str, list[dict[str, Any]]]:
    shown = [kind for kind in AGENTS if kind in rows.shown]
    return {kind: rows.loop.curves(rows.agents(kind)[0]) for kind in shown}


def _counts(rows: SessionRows) -> dict[str, Any]:
    ground = rows.ground
    counts = {
        **ground.ranker.counts.as_dict(),
        "computed in this run": ground.store.generated,
        "in the store": len(ground.store),
    }
    return counts | ({} if isinstance(ground.llm, LanguageModel) else asdict(ground.llm.usage))


def _bias(rows: SessionRows) -> pl.DataFrame:
    """HR@10 by the fifth of the shown list in which the target stands."""
    empty = pl.DataFrame(schema={"row": pl.String, "fifth": pl.Int64, "hr": pl.Float64, "n": pl.Int64})
    if not rows.ground.ranker.prompts.shows_candidates:
        return empty
    fifth = (rows.ground.ranker.shown_place(rows.ground.test) * 5).long().clamp(max=4) + 1
    found = [empty]
    for name in ("no_hint", "best_fixed_hint", "ppo"):
        if name not in rows.shown:
            continue
        hit = (rows.ranks(name)["test"][0, 0] <= 10).double()
        table = pl.DataFrame({"fifth": fifth.numpy(), "hit": hit.numpy()})
        grouped = table.group_by("fifth").agg(pl.col("hit").mean().alias("hr"), pl.len().cast(pl.Int64).alias("n"))
        found.append(grouped.sort("fifth").select(pl.lit(name).alias("row"), "fifth", "hr", "n"))
    return pl.concat(found)


def _examples(rows: SessionRows, choices: pl.DataFrame) -> list[dict[str, Any]]:
    """Test sessions drawn at random, and those the agent helped and hurt most."""
    if choices.is_empty():
        return []
    mine = choices.filter(pl.col("agent") == "ppo")
    if mine.is_empty() or mine["rank_no_hint"].null_count():
        return []
    best = choices.filter(pl.col("agent") == "oracle").select("session", best_hint="hint", best_rank="rank")
    mine = mine.join(best, on="session", how="left", maintain_order="left")
    mine = mine.with_columns(gain=pl.col("rank_no_hint") - pl.col("rank"))
    by_gain = mine.sort("gain", descending=True, maintain_order=True)
    groups = {
        "Drawn at random": mine.sample(min(EXAMPLES, len(mine)), seed=0),
        "Largest gains": by_gain.filter(pl.col("gain") > 0).head(EXAMPLES),
        "Largest losses": by_gain.reverse().filter(pl.col("gain") < 0).head(EXAMPLES),
    }
    texts = {0: "", **{hint.id: hint.text for hint in rows.loop.base(rows.rounds).kept}}
    shown = rows.cfg.ranking.history
    return [
        {
            "group": group,
            "titles": rows.ground.titles(line["session"])[-shown:],
            "target": rows.ground.title(rows.ground.target(line["session"])),
            "hint": texts[line["hint"]],
            "rank_no_hint": line["rank_no_hint"],
            "rank": line["rank"],
            "best_hint": None if line["best_hint"] is None else texts[line["best_hint"]],
            "best_rank": line["best_rank"],
        }
        for group, part in groups.items()
        for line in part.iter_rows(named=True)
    ]


def show(cfg: DictConfig, split: str) -> None:
    """Measure the kept agent on a split, beside the LLM without a hint, and print the table."""
    with finished_run(cfg) as run:
        ground = SessionGround(cfg, run)
        ground.keep_sessions()
        if not len(ground.part(split)):
            raise UserError(
                f"there are no {split} sessions",
                where=f"config key data.{split}",
                fix=f"hold some out: data.{split}=0.1",
            )
        rows = SessionRows(SessionHints(ground))
        if uses_hints(cfg):
            agents.train(rows.loop, rows.rounds)
            re2llm.more_agents(rows.loop)
        frames = rows.evaluate().filter(pl.col("split") == split)
        headline = choose_headline(frames, split=split, story=SESSIONS)
        lines = lines_of(frames, rows)
        console.print(render_table(lines, frames, headline=headline, story=SESSIONS))
        tell_results(lines, headline.counts, command="show", run=str(run.path))


def check_export(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Refuse what cannot be exported of this recipe.

    Raises:
        UserError: --merged or --onnx was asked for, or the run has no hints.
    """
    asked = [f"--{name}" for name in ("merged", "onnx") if getattr(args, name)]
    if asked:
        raise UserError(
            f"{asked[0]} is for recipe rlrf",
            where=asked[0],
            why="recipe re2llm leaves the language model as it is, and has no reranker",
            fix="leave it out: the hints and the agent are exported",
        )
    if not uses_hints(cfg):
        raise UserError(
            "there are no hints to export",
            where="config key evaluation.rows",
            why="every row that needs hints is off",
            fix="export a run with the row ppo",
        )


def export(cfg: DictConfig, run: RunFolder, target: Path) -> None:
    """Leave hints.json, agent/ and a card in a folder."""
    ground = SessionGround(cfg, run)
    ground.keep_sessions()
    export_agent(cfg, run, target, data=ground.data.name, noun=ground.data.item_noun)
