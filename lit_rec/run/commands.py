"""What each subcommand does once the configuration stands."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from lit_rec import __version__, distributed
from lit_rec.errors import UserError
from lit_rec.recipes import rlrf, unified
from lit_rec.recipes.loop import Loop
from lit_rec.recipes.rows import measure
from lit_rec.recipes.unified import UnifiedLoop
from lit_rec.run import session_commands
from lit_rec.run.comparisons import choose_headline, compare_rows
from lit_rec.run.cost import cost_sentence
from lit_rec.run.export import check_finished, check_target, export_models
from lit_rec.run.folder import RunFolder, write_atomic
from lit_rec.run.hint_report import hint_table
from lit_rec.run.outcome import commit, finished_run, leave_results, replace_folder, tell_finished
from lit_rec.run.plan import PlannedRun
from lit_rec.run.predict import final_reranker, predict
from lit_rec.run.progress import console, tell_results
from lit_rec.run.rehearsal import rehearse
from lit_rec.run.results import render_table, result_rows
from lit_rec.run.rlrf_report import hint_story, report, round_summaries, round_table, run_cost
from lit_rec.run.stories import RERANKING
from lit_rec.run.validate_data import validate_data


def fit_rlrf(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Run RLRF4Rec and leave the results, the report and the final models at the top of the run folder."""
    started = time.perf_counter()
    commit()
    with PlannedRun(cfg, fresh=args.fresh) as run:
        console.print(f"lit_rec {__version__}: {cfg.name} -> {run.path}", highlight=False)
        frames, loops = (unified if cfg.recipe == "unified" else rlrf).fit(cfg, run)
        made = sum(distributed.gathered(loops[0].ground.store.generated))
        if not distributed.leave():
            return
        rows = result_rows(
            frames,
            task="reranking",
            dataset=loops[0].ground.data.name,
            protocol=cfg.lists.protocol,
            whole=cfg.users is None,
        )
        environment = leave_results(cfg, run, rows, lambda: keep_final(loops[0], run), started)
        headline = choose_headline(frames, convention=convention_of(cfg))
        comparisons = compare_rows(RERANKING.with_layouts(frames, cfg), headline)
        rounds = round_summaries(loops[0], rows)
        write_atomic(run.path / "rounds.json", json.dumps(rounds, indent=1))
        hints, cost = hint_story(loops[0]), run_cost(run)
        told = {"headline": headline, "comparisons": comparisons, "hints": hints, "cost": cost}
        report(cfg, run, rows, frames, loops[0], environment, rounds, told)
        console.print(render_table(rows, frames, headline=headline, comparisons=comparisons))
        if rounds:
            console.print(cost_sentence(cost), highlight=False)
            console.print(round_table(rounds))
        if hints is not None:
            console.print(hint_table(hints))
        answers = f"{made:,} LLM answers written, {len(loops[0].ground.store):,} in the store."
        tell_finished(run, rows, headline, answers, environment)


def convention_of(cfg: DictConfig) -> str:
    """The metric convention of the headline: KAR's own under its protocol, else the standard one."""
    return "kar" if cfg.lists.protocol == "kar" else "standard"


def final_row(loop: Loop) -> str:
    """The row whose reranker is the run's product: the last round, or the strongest row there is without one."""
    cfg = loop.cfg
    controls = cfg.evaluation.controls
    if cfg.policy.rounds > 0:
        return f"round_{cfg.policy.rounds}"
    order = ("zero_shot", "history_only", "item_only", "no_knowledge", "shuffled", "history_shuffled")
    return next(row for row in order if controls[row])


def keep_final(loop: Loop, run: RunFolder) -> None:
    """Copy the final reranker with its knowledge, and the tuned adapter, to the top of the run folder."""
    row = final_row(loop)
    source = run.stage(loop.name(f"rows/{row}"))
    more: dict[str, Path | str] = {file.name: file for file in source.glob("knowledge.safetensors")}
    more["row.json"] = json.dumps({"row": row, "fold": loop.fold})
    replace_folder(source / "reranker", run.path / "reranker", more)
    if loop.cfg.policy.rounds > 0:
        replace_folder(run.stage(loop.name(f"{row}/policy")) / "adapter", run.path / "adapter")
    if isinstance(loop, UnifiedLoop):
        loop.keep_hints(run.path)


def show(cfg: DictConfig, split: str) -> None:
    """Measure the kept reranker on a split and print the table."""
    with finished_run(cfg) as run:
        loop, row, module = final_reranker(cfg, run)
        if not len(getattr(loop.splits, split)):
            raise UserError(
                f"there are no {split} users",
                where=f"config key evaluation.{split}",
                fix=f"hold some out: evaluation.{split}=0.1",
            )
        frame = measure(loop, row, 0, module, (split,))
        about = {"dataset": loop.ground.data.name, "protocol": cfg.lists.protocol}
        rows = result_rows(frame, task="reranking", **about, whole=cfg.users is None)
        headline = choose_headline(frame, convention=convention_of(cfg), split=split)
        console.print(f"final reranker: {row}, fold {loop.fold}, {split} users", highlight=False)
        console.print(render_table(rows, frame, headline=headline))
        tell_results(rows, headline.counts, command="show", run=str(run.path), row=row)


def export(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Leave the finished run's models in a folder that other programs load.

    Raises:
        UserError: The run is not finished or has nothing to export, or the folder must not be written.
    """
    target = Path(args.output)
    check_target(target, Path(cfg.run.dir), args.overwrite)
    if sessions(cfg):
        session_commands.check_export(cfg, args)
    elif cfg.policy.rounds == 0:
        raise UserError(
            "there is no adapter to export",
            where="config key policy.rounds",
            why="policy.rounds=0: the language model was not tuned",
            fix=f"export a run with one round or more; the reranker lies in {cfg.run.dir}/reranker",
        )
    with finished_run(cfg) as run:
        check_finished(cfg, run, "agent" if sessions(cfg) else "adapter")
        if sessions(cfg):
            session_commands.export(cfg, run, target)
            return
        export_models(
            cfg,
            run,
            final_reranker(cfg, run),
            target,
            merged=args.merged,
            onnx=args.onnx,
            convention=convention_of(cfg),
        )


def sessions(cfg: DictConfig) -> bool:
    """Whether the recipe is the one that ranks sessions."""
    return bool(cfg.recipe == "re2llm")


def fit(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Run the recipe."""
    rehearse(cfg)
    (session_commands.fit if sessions(cfg) else fit_rlrf)(cfg, args)


def check_data(cfg: DictConfig, _: argparse.Namespace) -> None:
    """Tell what there is to tell before a run."""
    validate_data(cfg)
    rehearse(cfg)


COMMANDS: dict[str, Callable[[DictConfig, argparse.Namespace], None]] = {
    "fit": fit,
    "validate": lambda cfg, args: (session_commands.show if sessions(cfg) else show)(cfg, "validation"),
    "test": lambda cfg, args: (session_commands.show if sessions(cfg) else show)(cfg, "test"),
    "predict": lambda cfg, args: predict(cfg, args.input, Path(args.output), getattr(args, "history", None)),
    "export": export,
    "validate-data": check_data,
}
