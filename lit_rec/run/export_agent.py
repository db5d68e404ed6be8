"""The hints and the agent of a finished run of Re2LLM as a folder of their own."""

import json
import shutil
from pathlib import Path

from omegaconf import DictConfig

from lit_rec import __version__
from lit_rec.agent.hints import HintBase
from lit_rec.agent.policy import HintPolicy
from lit_rec.errors import UserError
from lit_rec.llm.loading import fingerprint, local_source
from lit_rec.run import cards
from lit_rec.run.export import mark, whole_folder
from lit_rec.run.folder import RunFolder
from lit_rec.run.progress import console


def export_agent(cfg: DictConfig, run: RunFolder, target: Path, *, data: str, noun: str) -> None:
    """Export a finished run of Re2LLM: hints.json, agent/ and a card; the LLM is as it was and stays where it is.

    Args:
        cfg: The run's configuration.
        run: Its folder.
        target: The folder; `check_target` has let it pass.
        data: Name of the data set.
        noun: What an item is called.
    """
    lines = json.loads((run.path / "results.json").read_text())
    base = HintBase.load(run.path / "hints.json")
    if not base.kept:
        raise UserError(
            "there are no hints to export",
            where=str(run.path / "hints.json"),
            why="none that the LLM wrote was kept",
            fix="raise reflection.sessions, lower reflection.min_gain, or use a larger LLM",
        )
    cache = Path(cfg.run.cache).expanduser() if cfg.run.cache else None
    source = "" if cfg.llm.server is not None else local_source(cfg.llm, "llm", cache)
    about = cards.base_model(cfg.llm, source, fingerprint(source, cfg.llm.revision) if source else "")
    licence = cards.licence("models", about["name"], about["where"], cfg.llm.name)
    metrics = [f"{name}@{max(cfg.evaluation.ks)}" for name in ("hr", "ndcg")]
    a, r = cfg.agent, cfg.reflection
    facts = {"base": about, "lines": lines, "row": "ppo", "data": data, "licence": licence}
    facts |= {"metrics": metrics, "convention": "standard"}
    front = cards.front_matter(facts, cfg.name, "lit_rec", pipeline_tag="text-ranking")
    front["tags"] = ["recommendation", "lit_rec", "re2llm"]
    with whole_folder(target) as work:
        shutil.copy2(run.path / "hints.json", work / "hints.json")
        shutil.copytree(run.path / "agent", work / "agent")
        policy = HintPolicy.load(work / "agent")
        cards.write_card(
            work / "README.md",
            "card_hints.md.j2",
            front,
            title=f"{cfg.name}: hints for {about['name']} that ranks {data} sessions",
            base=about,
            encoder=f"{cfg.encoder.name} (at most {cfg.encoder.max_tokens} tokens a text)",
            kept=len(base.kept),
            written=len(base.hints),
            dim=policy.shape["dim"],
            training=[
                f"The frozen LLM ranked {noun}s by {cfg.ranking.method}; about up to {r.sessions} training sessions a "
                f"round that it got wrong it wrote {r.hints} hints each; those that gained on others were kept.",
                f"An agent learnt with PPO (reward {a.reward}, {a.epochs} epochs, step size {a.lr:g}) which to show.",
                f"So for {a.rounds} round{'s' * (a.rounds > 1)}; Re2LLM (arXiv 2403.16427), seed {cfg.seed}, "
                f"lit_rec {__version__}.",
            ],
            table=cards.metric_table(lines, metrics=metrics, convention="standard"),
            note=f"data {data}.",
            licences=[licence["note"], cards.licence("data", data)["note"]],
        )
        mark(work, run, {"row": "ppo"})
    console.print(f"hints and agent of {run.path} -> {target}", highlight=False)
