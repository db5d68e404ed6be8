"""What each subcommand does once the configuration stands."""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch
from omegaconf import DictConfig, OmegaConf

from lit_rec import __version__
from lit_rec.errors import UserError
from lit_rec.recipes import rlrf
from lit_rec.recipes.ground import Ground
from lit_rec.recipes.loop import Loop
from lit_rec.rerankers.rewards import score_lists
from lit_rec.rerankers.training import load_reranker
from lit_rec.run.folder import LIBRARIES, RunFolder, write_atomic
from lit_rec.run.predicting import predict
from lit_rec.run.progress import console
from lit_rec.run.report import write_report
from lit_rec.run.results import render_table, result_rows, write_results


def fit(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Run the recipe and leave the results, the report and the final models at the top of the run folder."""
    started = time.perf_counter()
    with RunFolder(cfg.run.dir, fresh=args.fresh) as run:
        console.print(f"lit_rec {__version__}: {cfg.name} -> {run.path}", highlight=False)
        frames, loops = rlrf.fit(cfg, run)
        rows = result_rows(
            frames, task="reranking", dataset=loops[0].ground.data.name, protocol=cfg.lists.protocol, seed=cfg.seed
        )
        write_atomic(run.path / "config.yaml", OmegaConf.to_yaml(cfg))
        write_results(run.path / "results.json", rows)
        keep_final(loops[0], run)
        environment = describe_environment(time.perf_counter() - started)
        write_atomic(run.path / "environment.json", json.dumps(environment, indent=1))
        report(cfg, run, rows, frames, loops, environment)
        console.print(render_table(rows, frames))
        made = loops[0].ground.store.generated
        console.print(
            f"{made:,} LLM answers written, {len(loops[0].ground.store):,} in the store. "
            f"{time.perf_counter() - started:.0f} s, {environment['peak_memory_gb']:.1f} GB at most.\n"
            f"Report: {run.path / 'report.html'}\n"
            f"Curves: tensorboard --logdir {run.path / 'tensorboard'}",
            highlight=False,
        )


def final_row(loop: Loop) -> str:
    """The row whose reranker is the run's product: the last round, or the strongest row there is without one."""
    cfg = loop.cfg
    controls = cfg.evaluation.controls
    if cfg.policy.rounds > 0:
        return f"round_{cfg.policy.rounds}"
    order = ("zero_shot", "history_only", "item_only", "no_knowledge")
    return next(row for row in order if controls[row])


def keep_final(loop: Loop, run: RunFolder) -> None:
    """Copy the final reranker with its knowledge, and the tuned adapter, to the top of the run folder."""
    row = final_row(loop)
    source = run.stage(loop.name(f"rows/{row}"))
    _replace(source / "reranker", run.path / "reranker")
    for file in source.glob("knowledge.safetensors"):
        shutil.copy2(file, run.path / "reranker" / file.name)
    write_atomic(run.path / "reranker" / "row.json", json.dumps({"row": row, "fold": loop.fold}))
    if loop.cfg.policy.rounds > 0:
        _replace(run.stage(loop.name(f"{row}/policy")) / "adapter", run.path / "adapter")


def _replace(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def report(
    cfg: DictConfig,
    run: RunFolder,
    rows: list[dict[str, Any]],
    frames: pl.DataFrame,
    loops: list[Loop],
    environment: dict[str, Any],
) -> None:
    """Write report.html from the first split's rounds and all splits' rows."""
    loop = loops[0]
    states = loop.states() if cfg.policy.rounds > 0 else []
    rounds = [{"round": number, **loop.summary(state)} for number, state in states]
    seconds = {entry["name"]: entry["seconds"] for entry in run.log}
    for one in rounds:
        prefix = loop.name(f"{one['name']}/")
        one["seconds"] = sum(s for name, s in seconds.items() if name.startswith(prefix))
        one["validation"] = loop.validation(frames, one["name"])
    ids = loop.ground.data.users["user_id"]
    rewards = [
        loop.rewards(state)
        .filter(pl.col("split") == "train")
        .with_columns(pl.lit(number).alias("round"), pl.col("user").map_elements(lambda u: ids[u], pl.String).alias("user_id"))
        for number, state in states
        if loop.cfg.policy.rounds > 0 and not loop.is_control(state)
    ]
    pairs = [
        loop.pairs(state, cfg.pairs.rule).select(
            pl.lit(number + 1).alias("round"),
            "user_id",
            pl.col("prompt").list.last().struct.field("content"),
            pl.col("chosen").list.first().struct.field("content"),
            pl.col("rejected").list.first().struct.field("content"),
            "chosen_reward",
            "rejected_reward",
        )
        for number, state in states
        if loop.samples_of(state) > 1
    ]
    write_report(
        run.path / "report.html",
        rows=rows,
        frames=frames,
        rounds=rounds,
        rewards=pl.concat(rewards) if rewards else None,
        pairs=pl.concat(pairs) if pairs else None,
        stages=run.log,
        config_yaml=OmegaConf.to_yaml(cfg),
        environment=environment,
    )


def describe_environment(seconds: float) -> dict[str, Any]:
    """Versions, machine and cost of a run; nothing secret, no environment variables."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "lit_rec": __version__,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(usage / 2**20, 2),
    }


def finished_run(cfg: DictConfig) -> RunFolder:
    """Open a run folder that `fit` has finished.

    Raises:
        UserError: There is no finished run.
    """
    if not (Path(cfg.run.dir) / "results.json").is_file():
        raise UserError(
            f"{cfg.run.dir} holds no finished run",
            where="config key run.dir",
            fix="run `python -m lit_rec fit` with the same configuration first",
        )
    return RunFolder(cfg.run.dir)


def show(split: str) -> Callable[[DictConfig, argparse.Namespace], None]:
    """The command that measures the kept reranker on a split."""

    def command(cfg: DictConfig, args: argparse.Namespace) -> None:
        with finished_run(cfg) as run:
            ground = Ground(cfg, run)
            about = json.loads((run.path / "reranker" / "row.json").read_text())
            loop = Loop(ground, ground.keep_split(about["fold"]), about["fold"])
            fitted = load_reranker(run.path / "reranker", **loop.kept_knowledge(run.path / "reranker"))
            frame = loop.measure(about["row"], 0, fitted.module).filter(pl.col("split") == split)
            if frame.is_empty():
                raise UserError(
                    f"there are no {split} users",
                    where=f"config key evaluation.{split}",
                    fix=f"hold some out: evaluation.{split}=0.1",
                )
            rows = result_rows(frame, task="reranking", dataset=ground.data.name, protocol=cfg.lists.protocol)
            console.print(f"final reranker ({about['row']}, fold {about['fold']}), {split} users", highlight=False)
            console.print(render_table(rows, frame))

    return command


COMMANDS: dict[str, Callable[[DictConfig, argparse.Namespace], None]] = {
    "fit": fit,
    "validate": show("validation"),
    "test": show("test"),
    "predict": lambda cfg, args: predict(cfg, finished_run(cfg), args.input, Path(args.output)),
}
_ = score_lists
