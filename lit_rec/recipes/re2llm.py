"""Re2LLM (arXiv 2403.16427), top to bottom as in the paper, with the lines that a hint has to beat.

choose on validation sessions how the frozen LLM is asked
for round t = 1..T: sessions the agent still gets wrong -> reflection -> hints that help -> rewards -> PPO
test sessions: the LLM with the hint that the agent picks, beside no hint, one hint for all, and the best hint of each
"""

import polars as pl
from omegaconf import DictConfig

from lit_rec.errors import UserError
from lit_rec.recipes import agents
from lit_rec.recipes.models import extra_callbacks
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.recipes.session_hints import SessionHints
from lit_rec.recipes.session_rows import SessionRows, uses_hints
from lit_rec.run.folder import RunFolder


def fit(cfg: DictConfig, run: RunFolder) -> tuple[pl.DataFrame, SessionRows]:
    """Run the whole recipe, or what is left of it.

    Args:
        cfg: The configuration.
        run: The run folder.

    Returns:
        Per-session metrics of every row, and where they came from.
    """
    ground = SessionGround(cfg, run)
    extra_callbacks(cfg)  # a mistake there is told before anything is paid for
    if not any(cfg.evaluation.rows.values()):
        raise UserError(
            "nothing to evaluate: every row is off", where="config key evaluation.rows", fix="switch a row on"
        )
    if uses_hints(cfg):
        ground.check_encoder("states")
    ground.keep_sessions()
    loop = SessionHints(ground)
    if uses_hints(cfg):
        loop.board("ppo")  # loggers that cannot be used are told before the LLM works for hours
        agents.train(loop, loop.rounds, lambda: extra_callbacks(cfg))
        more_agents(loop)
    rows = SessionRows(loop)
    return rows.evaluate(), rows


def more_agents(loop: SessionHints) -> None:
    """Agents with other seeds, and the full-information ones: what chance does to the choice.

    They learn what the first agent learns, in its order: the base of every round, as many epochs, each round going on
    from the best epoch of the one before. The bases are those the first agent has led to; nothing is reflected on anew.
    """
    cfg = loop.cfg
    if not loop.base(loop.rounds).kept:
        return
    kinds: list[tuple[str, range]] = []
    if cfg.evaluation.rows.ppo:
        kinds.append(("ppo", range(1, cfg.agent.seeds)))
    if cfg.evaluation.rows.full_information:
        kinds.append(("full_information", range(cfg.agent.seeds)))
    rounds = range(1, loop.rounds + 1)
    for kind, seeds in kinds:
        for seed in seeds:
            loop.keep_agent(f"agents/{kind}_{seed}", loop.rounds, agents.trained(loop, kind, rounds, seed))
