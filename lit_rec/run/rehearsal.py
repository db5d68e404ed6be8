"""What a run builds only after the LLM has written for hours, built once before: its mistakes are told at the start."""

import inspect

from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig

from lit_rec.checks import has_key
from lit_rec.config import plain
from lit_rec.errors import UserError
from lit_rec.extensions import find, is_path
from lit_rec.llm.prompts import find_template
from lit_rec.rerankers.module import RerankerModule


def rehearse(cfg: DictConfig) -> None:
    """Refuse arguments that the reranker does not take, and templates and rewards that are not there.

    Raises:
        UserError: With the key.
    """
    if has_key(cfg, "reflection") and cfg.agent.get("pick") != "none":
        find_template("reflection", cfg.reflection.template)
    for template in cfg.ranking.templates if has_key(cfg, "ranking") else ():
        find_template("ranking", template)
    if has_key(cfg, "reward") and is_path(cfg.reward.metric):
        find(cfg.reward.metric, "reward.metric")
    if has_key(cfg, "reranker"):
        _reranker(cfg)


def _reranker(cfg: DictConfig) -> None:
    """Build the shipped one at another width; of a user's own, which may depend on the width, look at the arguments."""
    r, args = cfg.reranker, plain(cfg.reranker.args)
    try:
        if is_path(r.architecture):
            kind = find(r.architecture, "reranker.architecture")
            more = {"history_width": 0, "field": 0} if getattr(kind, "uses_history", False) else {}
            inspect.signature(kind).bind(0, **{**more, **args})
            return
        with isolate_rng():
            RerankerModule(n_items=1, architecture=r.architecture, architecture_args=args, loss=r.loss)
    except (UserError, TypeError) as error:
        if isinstance(error, UserError) and error.where != "reranker.args":
            raise
        raise UserError(
            f"the reranker {r.architecture} cannot be built",
            where="config key reranker.args",
            why=getattr(error, "why", str(error)),
            fix=f"give it the arguments that its class takes, as +reranker.args.NAME=...; now: {args or 'none'}",
        ) from error
