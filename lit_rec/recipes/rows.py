"""Rows of the result table: a reranker trained with one kind of knowledge, and what it is worth on held-out users."""

from pathlib import Path
from typing import Any

import polars as pl
from safetensors.torch import save_file
from torch import Tensor

from lit_rec.config import plain
from lit_rec.metrics.ranking import METRICS, Convention, ranking_metrics
from lit_rec.recipes.loop import Loop
from lit_rec.recipes.models import reranker_health
from lit_rec.rerankers.rewards import score_lists
from lit_rec.rerankers.training import fit_reranker, save_reranker
from lit_rec.run.progress import step

CONVENTIONS: tuple[Convention, ...] = ("kar", "standard")


def evaluate_row(
    loop: Loop,
    name: str,
    *,
    user: Tensor | None,
    item: Tensor | None,
    after: tuple[str, ...],
    encode: str | None = None,
) -> pl.DataFrame:
    """Train the reranker with this knowledge, once per seed, and measure it on validation and test users.

    Args:
        loop: The split.
        name: Row of the result table.
        user: [U, width] user knowledge, or None.
        item: [n_items + 1, width] item knowledge, or None.
        after: Stages the knowledge was made in.
        encode: How the LLM's answers reach the reranker, where they do.

    Returns:
        Per-list metrics: row, reranker, seed, fold, split, user, list and one column per metric and convention.
    """
    seeds = range(loop.cfg.evaluation.seeds)

    def build(work: Path) -> dict[str, Any]:
        frames, values = [], []
        with step(f"{name}: training the reranker", len(seeds), "seeds") as progress:
            for seed in seeds:
                fitted = fit_reranker(
                    lists=loop.ground.lists,
                    train_users=loop.splits.train,
                    validation_users=loop.splits.validation,
                    test_users=loop.splits.test,
                    user_vectors=user,
                    item_vectors=item,
                    seed=loop.cfg.seed + 1000 * seed,
                    callbacks=[reranker_health(loop.cfg)],
                    **loop.ground.reranker_arguments(selection=loop.cfg.evaluation.selection),
                )
                frames.append(measure(loop, name, seed, fitted.module))
                values.append({"epoch": fitted.best_epoch, "value": round(fitted.best_value, 5)})
                if seed == 0:
                    save_reranker(fitted, work / "reranker")
                    given = {"user": user, "item": item}
                    save_file({k: v for k, v in given.items() if v is not None}, work / "knowledge.safetensors")
                progress(1)
        pl.concat(frames).write_parquet(work / "metrics.parquet")
        return {"chosen": values}

    evaluation = plain(loop.cfg.evaluation)
    key = {
        "reranker": plain(loop.cfg.reranker),
        "evaluation": {k: evaluation[k] for k in ("seeds", "ks", "selection")},
        "seed": loop.cfg.seed,
        **({} if encode is None else {"encode": encode}),
    }
    folder = loop.stage(f"rows/{name}", build, key, "split", *(["/knowledge"] if item is not None else []), *after)
    return loop.table(f"rows/{name}", folder, "metrics.parquet")


def measure(
    loop: Loop, name: str, seed: int, module: Any, splits: tuple[str, ...] = ("validation", "test")
) -> pl.DataFrame:
    """Per-list metrics of a trained reranker on held-out users."""
    frames = []
    for split in splits:
        index = loop.ground.lists.of_users(getattr(loop.splits, split))
        if not len(index):
            continue
        logits = score_lists(module, loop.ground.lists, index)
        labels, mask = loop.ground.lists.labels[index], loop.ground.lists.items[index] > 0
        columns: dict[str, Any] = {
            "user": loop.ground.lists.user[index].numpy(),
            "list": index.numpy(),
        }
        for convention in CONVENTIONS:
            measured = ranking_metrics(logits, labels, mask, list(loop.cfg.evaluation.ks), convention)
            columns.update({f"{m}|{convention}": v.numpy() for m, v in measured.items() if m.split("@")[0] in METRICS})
        about = {
            "row": name,
            "reranker": loop.cfg.reranker.architecture.rpartition(".")[2].lower(),
            "seed": seed,
            "fold": loop.fold,
            "split": split,
        }
        frames.append(pl.DataFrame(columns).select([pl.lit(v).alias(k) for k, v in about.items()] + [pl.all()]))
    return pl.concat(frames).with_columns(pl.col("seed", "fold").cast(pl.Int64))
