"""The whole of a recipe on a handful of users or sessions: whether a configuration works from end to end."""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from lit_rec.checks import has_key
from lit_rec.config import moved, plain

USERS = 8
# Keys and the largest value each keeps; keys that a recipe lacks are left out.
AT_MOST = {
    "users": USERS,
    "lists.history": 12,  # so few users need lists
    "lists.item_core": 0,  # so few users rate few items in common
    "prompt.history": 3,  # reading a prompt costs more than writing these few words
    "llm.max_new_tokens": 4,
    "reranker.max_epochs": 1,
    "reward.folds": 2,
    "pairs.samples": 2,
    "pairs.max_pairs": 2,
    "policy.rounds": 1,
    "policy.epochs": 1,
    "policy.batch_size": 2,
    "policy.accumulate": 1,
    "evaluation.folds": 1,
    "evaluation.seeds": 1,
    "data.few_shot": 8,
    "data.candidates": 12,
    "ranking.choose_on": 2,
    "ranking.max_new_tokens": 32,
    "reflection.sessions": 4,
    "reflection.error_rank": 1,  # whatever is not first is an error: there is something to reflect on
    "reflection.max_new_tokens": 24,  # a hint needs a few words
    "reflection.tried": 4,
    "reflection.others": 2,
    "reflection.min_gain": -1e6,  # what is written in so few words may be kept all the same
    "reflection.size": 2,
    "agent.rounds": 1,
    "agent.epochs": 1,
    "agent.update_epochs": 1,
    "agent.seeds": 1,
}
TEST_SESSIONS, VALIDATION_SESSIONS, SASREC_EPOCHS = 8, 4, 1


def shrinking(cfg: DictConfig) -> list[str]:
    """Overrides that make everything small; what is small already stays."""
    return [*_numbers(cfg), *(_sessions(cfg) if cfg.recipe == "re2llm" else _users(cfg))]


def _numbers(cfg: DictConfig) -> Iterator[str]:
    for key, most in AT_MOST.items():
        if has_key(cfg, key) and ((value := OmegaConf.select(cfg, key)) is None or value > most):
            yield f"{key}={most:g}"


def _users(cfg: DictConfig) -> Iterator[str]:
    e = cfg.evaluation
    if e.only_folds is not None:
        yield "evaluation.only_folds=null"
    for key, share in (("test", 0.25), ("validation", 0.25 if e.validation else 0.0)):
        if e[key] != share:
            yield f"evaluation.{key}={share}"
    for control in ("random_pairs", "best_of_n"):
        if cfg.policy.rounds and e.controls[control]:
            yield f"evaluation.controls.{control}=false"  # as round 1, once more
    if cfg.reward.metric != "soft":
        yield "reward.metric=soft"  # two answers a user: another metric would often give both the same, and no pair
    if cfg.pairs.min_gap > 0:
        yield "pairs.min_gap=0"
    if cfg.knowledge.item_text == "llm":
        yield "knowledge.item_text=attributes"  # items are not sampled


def _sessions(cfg: DictConfig) -> Iterator[str]:
    for key, most in (("test", TEST_SESSIONS), ("validation", VALIDATION_SESSIONS)):
        value = cfg.data.get(key)
        small = isinstance(value, int) and value <= most
        if isinstance(value, int | float) and value and not small:  # a file stays
            yield f"data.{key}={most}"
    if cfg.evaluation.test is None or cfg.evaluation.test > TEST_SESSIONS:
        yield f"evaluation.test={TEST_SESSIONS}"
    if cfg.evaluation.rows.sasrec and cfg.evaluation.sasrec.get("max_epochs") != SASREC_EPOCHS:
        yield f"++evaluation.sasrec.max_epochs={SASREC_EPOCHS}"


def own_folder(cfg: DictConfig) -> DictConfig:
    """The configuration with a run folder of its own, beside that of the whole run; what lies inside it moves along."""
    folder = str(cfg.run.dir).rstrip("/")
    cfg.merge_with(moved(plain(cfg), f"{folder}-dev"))
    return cfg
