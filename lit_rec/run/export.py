"""`lit_rec export`: a finished run's models as folders that other programs load."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_rec import __version__
from lit_rec.config import plain
from lit_rec.errors import UserError
from lit_rec.llm.prompts import user_words
from lit_rec.recipes.loop import Loop
from lit_rec.rerankers.module import RerankerModule
from lit_rec.run import cards
from lit_rec.run.differing import REACHED, differences_beyond
from lit_rec.run.export_llm import write_adapter, write_merged
from lit_rec.run.export_reranker import TOLERANCE, export_onnx, need_onnx, write_reranker
from lit_rec.run.folder import RunFolder, other_configuration, write_atomic
from lit_rec.run.progress import console

MARK = "export.json"  # what tells an export from a folder of somebody's own
FREE = ("run", "trainer", "logging")  # parts of the configuration that no exported file depends on


def check_target(target: Path, run: Path, overwrite: bool) -> None:
    """Refuse a folder that must not be written, before anything is done.

    Raises:
        UserError: It holds something, or stands above the run folder, in it, or nowhere.
    """
    where, here, home = "--output", target.resolve(), run.resolve()
    if not here.parent.is_dir():
        raise UserError(
            f"cannot write {target}", where=where, why="there is no such folder to put it in", fix="make it"
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file", where=where, fix="name a folder")
    if here == home or here in home.parents or home in here.parents:
        raise UserError(
            f"{target} and the run folder {run} overlap", where=where, fix="name a folder outside the run folder"
        )
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{target} is not empty", where=where, fix="name another folder, or replace this one with --overwrite"
        )
    if not (target / MARK).is_file():
        raise UserError(
            f"{target} holds files that no export wrote",
            where="--overwrite",
            why=f"--overwrite removes the whole folder, and there is no {MARK} in it",
            fix="name another folder, or empty this one yourself",
        )


def check_finished(cfg: DictConfig, run: RunFolder, needed: str) -> None:
    """Refuse a run that was made with another configuration, or lacks what is to be exported.

    Raises:
        UserError: The first difference, or what is missing.
    """
    kept = run.path / "config.yaml"
    if not kept.is_file() or not (run.path / needed).exists():
        missing = "config.yaml" if not kept.is_file() else needed
        raise UserError(
            f"{run.path} is not finished: there is no {missing}",
            where="config key run.dir",
            fix="start `python -m lit_rec fit` with the same configuration again: it goes on where it was",
        )
    old, new = ({k: v for k, v in tree.items() if k not in FREE} for tree in (plain(OmegaConf.load(kept)), plain(cfg)))
    if found := differences_beyond(old, new, REACHED):
        raise other_configuration(run.path, str(kept), found, "restore the value, or choose another run.dir")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to work in that becomes `target` when all is well; else nothing is left and an old one stays."""
    target = target.resolve()
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    old = work.with_name(f"{work.name}.old")
    try:
        folder = work / "new"
        folder.mkdir()
        yield folder
        if target.is_dir():
            os.replace(target, old)
        try:
            os.replace(folder, target)
        except BaseException:
            if old.is_dir():
                os.replace(old, target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def export_models(
    cfg: DictConfig,
    run: RunFolder,
    final: tuple[Loop, str, RerankerModule],
    target: Path,
    *,
    merged: bool = False,
    onnx: bool = False,
    convention: str = "standard",
) -> None:
    """Export a finished run of RLRF4Rec: adapter/, reranker/ and, where asked for, merged/ and reranker.onnx.

    Args:
        cfg: The run's configuration.
        run: Its folder.
        final: Its loop, the row of its reranker, and the reranker.
        target: The folder; `check_target` has let it pass.
        merged: Also write the model with the adapter merged into it.
        onnx: Also write the reranker as ONNX.
        convention: Of the metrics on the cards.

    Raises:
        UserError: ONNX is not installed, or its graph differs from torch.
    """
    if onnx:
        need_onnx()
    loop, row, module = final
    facts = _facts(cfg, run, loop, row, convention)
    with whole_folder(target) as work:
        write_adapter(cfg, run.path / "adapter", work / "adapter", facts)
        if merged:
            write_merged(cfg, loop, run.path / "adapter", work / "merged", facts)
        config = write_reranker(run.path / "reranker", work / "reranker", module, loop.ground.data)
        about = None
        if onnx:
            sizes = {"candidates": cfg.lists.size, "history": cfg.lists.history}
            about = export_onnx(module, work / "reranker" / "reranker.onnx", **sizes, seed=cfg.seed)
        _reranker_card(work / "reranker", cfg, facts, config, module, about)
        mark(work, run, {"row": row, "merged": merged, "onnx": onnx})
    parts = ["adapter", *["merged"] * merged, "reranker"]
    console.print(f"{row} of {run.path} -> {target}: {', '.join(parts)}", highlight=False)
    if about:
        console.print(f"reranker.onnx differs from torch by at most {about['difference']:.1e}", highlight=False)


def _facts(cfg: DictConfig, run: RunFolder, loop: Loop, row: str, convention: str) -> dict[str, Any]:
    """What all cards of a run share."""
    ground = loop.ground
    lines = json.loads((run.path / "results.json").read_text())
    base = cards.base_model(cfg.llm, ground.llm.source, ground.llm.fingerprint)
    is_hub = cfg.llm.hub is not None and not Path(ground.llm.source).is_dir()
    data = ground.data.name
    metrics = [f"{name}@{cfg.reranker.metric.partition('@')[2]}" for name in cards.SHOWN]
    licence = cards.licence("models", base["name"], base["where"], cfg.llm.name)
    folds = cfg.evaluation.folds
    note = f"{lines[0]['protocol']} protocol, metric convention {convention}, data {data}."
    if folds > 1:
        note += f" The numbers are over {folds} folds, each with models of its own; these are fold {loop.fold}'s."
    system = {messages[0]["content"] for messages in ground.prompts.users([0, ground.data.n_users - 1])}
    return {
        "row": row,
        "base": base,
        "is_hub": is_hub,
        "base_path": base["name"] if is_hub else "folder of the base model",
        "lines": lines,
        "metrics": metrics,
        "convention": convention,
        "data": data,
        "noun": ground.data.item_noun,
        "licence": licence,
        "licences": [licence["note"], cards.licence("data", data)["note"]],
        "table": cards.metric_table(lines, metrics=metrics, convention=convention),
        "note": note,
        "training": _training(cfg, loop),
        "system": system.pop() if len(system) == 1 else None,
        "asked": user_words(cfg.prompt.template),
    }


def _training(cfg: DictConfig, loop: Loop) -> list[str]:
    """How the adapter was trained, in three lines."""
    p, s = cfg.policy, cfg.pairs
    users = len(loop.splits.train)
    return [
        f"The LLM wrote {s.samples} texts about each of {users} training users of {loop.ground.data.name}; a "
        f"{cfg.reranker.architecture} reranker scored each ({cfg.reward.metric}@{cfg.reward.k} of the user's lists).",
        f"Pairs of texts ({s.rule.replace('_', ' and ')} by that reward) tuned LoRA adapters (r={p.lora.r}, "
        f"alpha={p.lora.alpha}) with the {p.loss} preference loss, beta {p.beta:g}, learning rate {p.lr:g}.",
        f"So for {p.rounds} round{'s' * (p.rounds > 1)}, {p.epochs} epoch{'s' * (p.epochs > 1)} each, reference: "
        f"{p.reference}; RLRF4Rec (arXiv 2410.05939), seed {cfg.seed}, lit_rec {__version__}.",
    ]


def _reranker_card(
    folder: Path,
    cfg: DictConfig,
    facts: dict[str, Any],
    config: dict[str, Any],
    module: RerankerModule,
    onnx: dict[str, Any] | None,
) -> None:
    front = cards.front_matter(facts, f"{cfg.name}-reranker", "onnx" if onnx else "lit_rec")
    front |= {"license": "other", "license_name": "see-data-set", "pipeline_tag": "text-ranking"}
    for key in ("base_model", "base_model_revision", "base_model_identity"):
        front.pop(key)  # the texts come from it, the weights do not
    cards.write_card(
        folder / "README.md",
        "card_reranker.md.j2",
        front,
        title=f"{cfg.name}: a {config['architecture']} reranker for {facts['data']}",
        config=config,
        onnx=onnx,
        tolerance=TOLERANCE,
        uses_history=module.uses_history,
        has_knowledge=(folder / "knowledge.safetensors").is_file(),
        longest=len(module.ranker.positions) if hasattr(module.ranker, "positions") else None,
        **{k: facts[k] for k in ("noun", "table", "note", "licences")},
    )


def mark(folder: Path, run: RunFolder, about: dict[str, Any]) -> None:
    """Write the file that tells an export, and which run it is of."""
    environment = json.loads((run.path / "environment.json").read_text())
    commit = environment.get("commit", "unknown")
    made = {"lit_rec": __version__, "run": run.path.name, "commit": commit, **about}
    write_atomic(folder / MARK, json.dumps(made, indent=1))
