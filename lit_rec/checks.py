"""Values of a configuration that are well typed and still make no sense: refused before anything is paid for."""

import difflib
import math
import operator
import re
import zoneinfo
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf

from lit_rec.errors import UserError
from lit_rec.extensions import is_path
from lit_rec.secrets import secrets

OWN = ("reranker.architecture", "reward.metric")  # a user's own is named by its path
# Keys of all recipes; a recipe without a key is not asked for it.
CHOICES = {
    "lists.protocol": ("strict", "kar"),
    "lists.negatives": ("uniform", "popularity", "retrieved"),
    "lists.initial_ranker": (None, "popularity", "bpr"),
    "knowledge.encode": ("answer", "kar", "both"),
    "knowledge.item_text": ("attributes", "llm"),
    "reranker.architecture": ("dlcm", "prm", "setrank", "mir"),
    "reranker.loss": ("default", "bce", "attention", "attention_rank", "list_softmax"),
    "reward.metric": ("ndcg", "map", "soft"),
    "reward.convention": ("standard", "kar"),
    "pairs.rule": ("best_worst", "random"),
    "policy.loss": ("sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "sft"),
    "policy.reference": ("base", "previous"),
    "policy.schedule": ("linear", "constant"),
    "evaluation.selection": ("validation", "last", "test_kar"),
    "llm.quantization": (None, "nf4"),
    "trainer.strategy": ("ddp", "fsdp"),
    "llm.dtype": ("auto", "float32", "bfloat16", "float16"),
    "encoder.dtype": ("auto", "float32", "bfloat16", "float16"),
    "ranking.method": ("likelihood", "generate"),
    "agent.rewards": ("matrix", "online"),
    "agent.reward": ("ndcg", "mrr", "soft"),
    "agent.pick": ("ppo", "full_information", "best_fixed", "random", "none"),
    "trainer.bad_updates": ("stop", "skip"),
    "trainer.precision": ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed"),
}
AT_LEAST = {
    "lists.history": 1,
    "lists.real": 1,
    "lists.size": 2,
    "lists.item_core": 0,
    "policy.lora.alpha": 1,
    "pairs.samples": 2,
    "policy.rounds": 0,
    "policy.epochs": 1,
    "policy.batch_size": 1,
    "policy.accumulate": 1,
    "policy.lora.r": 1,
    "llm.batch_size": 1,
    "llm.max_new_tokens": 1,
    "encoder.batch_size": 1,
    "reward.folds": 1,
    "reward.k": 1,
    "evaluation.folds": 1,
    "evaluation.seeds": 1,
    "reranker.max_epochs": 1,
    "reranker.batch_size": 1,
    "prompt.history": 1,
    "knowledge.item_tokens": 1,
    "encoder.max_tokens": 8,
    "reranker.patience": 0,
    "policy.max_length": 2,
    "ranking.choose_on": 1,
    "ranking.history": 1,
    "ranking.top": 1,
    "ranking.rotations": 1,
    "ranking.max_new_tokens": 1,
    "ranking.batch_tokens": 16,
    "reflection.sessions": 1,
    "reflection.error_rank": 1,
    "reflection.hints": 1,
    "reflection.max_new_tokens": 1,
    "reflection.tried": 1,
    "reflection.others": 0,
    "reflection.size": 1,
    "agent.rounds": 1,
    "agent.epochs": 1,
    "agent.batch_size": 1,
    "agent.update_epochs": 1,
    "agent.minibatches": 1,
    "agent.samples_per_session": 1,
    "agent.hidden": 1,
    "agent.rank": 1,
    "agent.seeds": 1,
    "llm.server.concurrency": 1,
    "llm.server.retries": 0,
}
LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")
METRIC_NAMES = ("ndcg", "map", "hr", "mrr", "click")
# What of `fit_sasrec` evaluation.sasrec may say; the rest is the run's.
SASREC = ("max_length", "dim", "blocks", "heads", "dropout", "lr", "negatives", "batch_size", "max_epochs", "patience")
FIELD = 32  # width of a reranker's embeddings
POSITIONS = 100  # that PRM learns, unless reranker.args.max_length says otherwise
LARGEST_SEED = 2**32 - 1  # of Lightning and NumPy
ENDLESS = ("policy.gradient_clip", "agent.max_grad_norm", "agent.target_kl", "reflection.min_gain")  # inf: no limit
# What a number must be: in words, as a condition, and of which keys. null is for the schema to allow.
RULES: tuple[tuple[str, Callable[[Any], bool], Iterable[str]], ...] = (
    *((f"at least {least}", partial(operator.le, least), (key,)) for key, least in AT_LEAST.items()),
    (
        "a number above 0",
        lambda value: value > 0,
        (
            *("policy.lr", "policy.beta", "reranker.lr", "reranker.temperature", "agent.lr", "agent.clip"),
            *("agent.max_grad_norm", "agent.reward_scale", "reflection.similarity", "llm.server.timeout"),
        ),
    ),
    (
        "a number of at least 0",
        lambda value: value >= 0,
        (
            *("llm.temperature", "reflection.temperature", "policy.weight_decay", "policy.gradient_clip"),
            *("pairs.min_gap", "agent.entropy_coef", "agent.state_noise", "agent.value_coef", "agent.weight_decay"),
        ),
    ),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, ("llm.top_p", "reflection.top_p")),
    (
        "a number from 0 up to but not including 1",
        lambda value: 0 <= value < 1,
        ("policy.lora.dropout", "agent.exploration"),
    ),
    ("a number from 0 up to but not including 0.5", lambda value: 0 <= value < 0.5, ("policy.label_smoothing",)),
    ("a share of a round's updates, from 0 to 1", lambda value: 0 <= value <= 1, ("policy.warmup",)),
    (f"a number from 0 to {LARGEST_SEED}", lambda value: 0 <= value <= LARGEST_SEED, ("seed",)),
    ("at least 1, or null for all", lambda value: value >= 1, ("pairs.users", "pairs.max_pairs")),
    ("at least 1, or null for every rank", lambda value: value >= 1, ("agent.k",)),
    ("at least 2, or null for all candidates", lambda value: value >= 2, ("ranking.shortlist",)),
    ("a number above 0, or null to make all updates", lambda value: value > 0, ("agent.target_kl",)),
    (
        "at least 1, or null for as many as the process may use",
        lambda value: value >= 1,
        ("trainer.threads",),
    ),
    (
        "at least 1, or -1 for every GPU of this machine",
        lambda value: value >= 1 or value == -1,
        ("trainer.devices",),
    ),
)


def check(cfg: DictConfig) -> None:
    """Refuse values that make no sense.

    Raises:
        UserError: With the key, what it may be, and what it is.
    """
    _check_texts(cfg)
    for key, choices in CHOICES.items():
        if has_key(cfg, key) and (value := OmegaConf.select(cfg, key)) not in choices:
            if key in OWN and is_path(value):
                continue
            own = ", or the path of your own: callbacks.mine.NAME" if key in OWN else ""
            raise _bad(key, value, "one of " + ", ".join("null" if c is None else c for c in choices) + own)
    for words, holds, keys in RULES:
        for key in keys:
            if has_key(cfg, key) and (value := OmegaConf.select(cfg, key)) is not None and not holds(value):
                raise _bad(key, value, words)
    if has_key(cfg, "llm.server.urls"):
        _check_server(cfg.llm.server)
    if not cfg.run.dir:
        raise _bad("run.dir", "''", "the name of a folder, such as runs/mine")
    _check_time_zones(cfg)
    if cfg.trainer.strategy == "fsdp" and cfg.llm.quantization is not None:
        raise _bad("llm.quantization", cfg.llm.quantization, "null with trainer.strategy=fsdp, or strategy=ddp")
    if unknown := sorted({*cfg.logging.to} - {*LOGGERS}):
        raise _bad("logging.to", unknown[0], "; ".join(LOGGERS))
    (_check_re2llm if cfg.recipe == "re2llm" else _check_rlrf)(cfg)
    if cfg.recipe == "unified":
        _check_unified(cfg)


def _check_texts(cfg: DictConfig) -> None:
    """Refuse what must not stand in a configuration, which is kept, shown and sent to loggers; and nan."""
    known = secrets()
    for key, name, value in _leaves(cfg):
        if name != "_target_" and re.fullmatch(r"_[a-z]+_", name):
            raise UserError(
                f"{name} is not used here",
                where=f"config key {key}",
                why="a node with a _target_ holds the keyword arguments of its class, and nothing of Hydra's own",
                fix="remove it",
            )
        endless = isinstance(value, float) and not math.isfinite(value) and not key.startswith("callbacks.")
        if endless and (math.isnan(value) or key not in ENDLESS):
            raise _bad(key, value, "a number that is finite")
        if not isinstance(value, str):
            continue
        variable = next((variable for variable, secret in known.items() if secret in value), None)
        if variable or re.search(r"://[^/@\s]*:[^/@\s]*@", value):
            what = f"the secret in the environment variable {variable}" if variable else "a password"
            raise UserError(
                f"{what} stands in the configuration",
                where=f"config key {key}",
                why="configurations are kept in run folders and reports",
                fix="leave it out: keys and passwords are read from environment variables alone",
            )


def check_url(url: str) -> str:
    """A base URL without its trailing slash.

    Raises:
        UserError: It is none, or it would carry a secret into configurations and messages.
    """
    parts, where = urlsplit(url), "config key llm.server.urls"
    if "@" in parts.netloc or parts.query:
        raise UserError(
            "a base URL carries no password and no query",
            where=where,
            fix="give the plain address; the key is read from the environment variable that llm.server.key_env names",
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"{url!r} is no base URL", where=where, fix="write it like http://localhost:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise UserError(f"{url!r} is not the base URL", where=where, fix="leave out /chat/completions")
    return url.rstrip("/")


def _check_server(server: Any) -> None:
    """Refuse what is no address, and what looks like the key itself where its variable is to be named."""
    for url in server.urls:
        check_url(url)
    if server.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", server.key_env):
        raise UserError(
            "this is no name of an environment variable",
            where="config key llm.server.key_env",
            why="configurations are kept in run folders and reports: a key must not stand in them",
            fix="put the key into a variable, and name it: OPENAI_API_KEY; or null, where the server wants none",
        )


def _check_time_zones(cfg: DictConfig) -> None:
    """Refuse a calendar that nobody keeps; where the system knows none at all, that is told when one is used."""
    for key in ("lists.time_zone", "data.time_zone"):
        zone = OmegaConf.select(cfg, key) if has_key(cfg, key) else None
        if isinstance(zone, str) and zone != "UTC":
            known = zoneinfo.available_timezones()  # opens hundreds of files
            if known and zone not in known:
                near = difflib.get_close_matches(zone, known, n=1)
                raise _bad(key, zone, near[0] if near else "UTC, or a place such as Europe/Madrid")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (key, last part of it, value) of every value, and of every part."""
    pairs: Any = enumerate(node) if OmegaConf.is_list(node) else node.items() if OmegaConf.is_dict(node) else ()
    for name, value in pairs:
        yield f"{prefix}{name}", str(name), value
        yield from _leaves(value, f"{prefix}{name}.")


def has_key(cfg: DictConfig, key: str) -> bool:
    """Whether this recipe has the key, and no part of its path is null."""
    node: Any = cfg
    for part in key.split("."):
        if not OmegaConf.is_dict(node) or part not in node:
            return False
        node = node[part]
    return True


def _check_rlrf(cfg: DictConfig) -> None:
    for key in ("evaluation.ks", "evaluation.only_folds"):
        _numbers(cfg, key, int(key == "evaluation.ks"))
    e = cfg.evaluation
    if e.only_folds is not None and (max(e.only_folds) >= e.folds or len({*e.only_folds}) < len(e.only_folds)):
        raise _bad("evaluation.only_folds", list(e.only_folds), f"different numbers from 0 to {e.folds - 1}, or null")
    if not re.fullmatch(rf"({'|'.join(METRIC_NAMES)})@[1-9]\d*", cfg.reranker.metric):
        raise _bad("reranker.metric", cfg.reranker.metric, f"one of {', '.join(METRIC_NAMES)} with a cut-off: ndcg@5")
    for key in ("evaluation.test", "evaluation.validation"):
        if not 0 <= OmegaConf.select(cfg, key) < 1:
            raise _bad(key, OmegaConf.select(cfg, key), "a share of the users, from 0 up to but not including 1")
    if cfg.evaluation.validation == 0 and cfg.evaluation.selection == "validation":
        raise _bad("evaluation.validation", 0, "a share above 0, or evaluation.selection=last")
    if cfg.evaluation.test == cfg.evaluation.validation == 0 and cfg.evaluation.folds == 1:
        raise _bad("evaluation.test", 0, "a share above 0 (or of evaluation.validation): else nothing can be measured")
    if cfg.lists.real > cfg.lists.size:
        raise _bad("lists.real", cfg.lists.real, f"at most lists.size = {cfg.lists.size}")
    _check_reranker(cfg)
    places, learned = cfg.reranker.args.get("max_length", POSITIONS), cfg.reranker.args.get("positions") == "learned"
    if cfg.reranker.architecture == "prm" and learned and isinstance(places, int) and cfg.lists.size > places:
        fix = f"at most {places}, the positions that PRM learns, or more: +reranker.args.max_length={cfg.lists.size}"
        raise _bad("lists.size", cfg.lists.size, fix)
    unknown = set(cfg.evaluation.inputs) - {"answer", "kar", "both"}
    if unknown:
        raise _bad("evaluation.inputs", sorted(unknown)[0], "answer, kar and both")
    _check_smoothing(cfg.policy)
    if cfg.llm.temperature == 0:
        raise _bad("llm.temperature", 0, "a number above 0: equal answers make no preference pair")
    if cfg.llm.server is not None and (cfg.llm.hub is None) == (cfg.llm.wheel is None):
        fix = "the model that the server has: it is trained here, so its weights are needed here too"
        raise _bad("llm.hub", cfg.llm.hub, fix)


def _check_smoothing(policy: Any) -> None:
    """Refuse a loss that is another one by its smoothing, and a smoothing that the loss does not have."""
    if policy.loss == "robust" and policy.label_smoothing == 0:
        raise _bad("policy.label_smoothing", 0.0, "a share above 0, such as 0.1: without it, robust is sigmoid")
    if policy.loss in ("ipo", "hinge", "sft") and policy.label_smoothing > 0:
        raise _bad("policy.label_smoothing", policy.label_smoothing, f"0 with policy.loss={policy.loss}: it has none")


def _check_reranker(cfg: DictConfig) -> None:
    """Refuse widths that no reranker of this architecture can have; other arguments are its own to judge."""
    name, args = cfg.reranker.architecture, cfg.reranker.args
    mlp = args.get("mlp", [1])
    wrong = OmegaConf.is_list(mlp) and (not mlp or any(not isinstance(width, int) or width < 1 for width in mlp))
    if name in ("prm", "setrank", "mir") and wrong:
        raise _bad("reranker.args.mlp", mlp, "one or more widths of at least 1")
    hidden, field = args.get("hidden", FIELD), args.get("field", FIELD)
    if name == "mir" and isinstance(hidden, int) and isinstance(field, int) and (hidden < 1 or hidden % field):
        raise _bad("reranker.args.hidden", hidden, f"a multiple of {field}, the width of an embedding")


def _check_unified(cfg: DictConfig) -> None:
    if cfg.agent.pick == "none":
        return  # RLRF4Rec, and nothing more
    if cfg.policy.rounds < 1:
        raise _bad("policy.rounds", cfg.policy.rounds, "at least 1: hints are written in rounds")
    if cfg.reward.refresh:
        raise _bad("reward.refresh", True, "false: the rewards of hints need one ruler over all rounds")
    if cfg.reflection.size < cfg.policy.rounds:
        raise _bad("reflection.size", cfg.reflection.size, f"at least policy.rounds = {cfg.policy.rounds}")
    if cfg.agent.pick in ("full_information", "best_fixed") and cfg.agent.rewards == "online":
        raise _bad("agent.rewards", "online", f"matrix: agent.pick={cfg.agent.pick} needs every reward")


def _check_re2llm(cfg: DictConfig) -> None:
    _numbers(cfg, "evaluation.ks", 1)
    _numbers(cfg, "ranking.lengths", 0)
    for key in ("ranking.templates", "ranking.priors", "ranking.lengths"):
        if not OmegaConf.select(cfg, key):
            raise _bad(key, [], "one or more values")
    shortlist = cfg.ranking.shortlist
    if shortlist is not None and (cfg.agent.reward == "soft" or cfg.ranking.method == "generate"):
        raise _bad("ranking.shortlist", shortlist, "null: a part of the candidates has no soft reward, and no list")
    if cfg.evaluation.test is not None and cfg.evaluation.test < 1:
        raise _bad("evaluation.test", cfg.evaluation.test, "at least 1, or null for all test sessions")
    if cfg.reflection.size < cfg.agent.rounds:
        raise _bad("reflection.size", cfg.reflection.size, f"at least agent.rounds = {cfg.agent.rounds}")
    if cfg.ranking.method == "generate":
        if cfg.agent.reward == "soft":
            raise _bad("agent.reward", "soft", "ndcg or mrr: a written list has no probabilities")
        if list(cfg.ranking.priors) != [0.0] or list(cfg.ranking.lengths) != [0.0]:
            raise _bad("ranking.priors", list(cfg.ranking.priors), "[0.0], and lengths [0.0]: lists are not scored")
    elif cfg.llm.server is not None:
        raise _bad("ranking.method", "likelihood", "generate: a server writes lists, it does not score given titles")
    rows = cfg.evaluation.rows
    if unknown := sorted(set(cfg.evaluation.sasrec) - set(SASREC)):
        raise _bad("evaluation.sasrec", unknown[0], f"one of {', '.join(SASREC)}")
    if rows.sasrec and OmegaConf.select(cfg, "data.validation") == 0:
        raise _bad("evaluation.rows.sasrec", True, "false, or data.validation above 0: its epoch is chosen there")
    if cfg.agent.rewards == "online" and rows.full_information:
        raise _bad("evaluation.rows.full_information", True, "false, or agent.rewards=matrix: it needs every reward")
    if not cfg.evaluation.matrix and rows.oracle:
        raise _bad("evaluation.rows.oracle", True, "false, or evaluation.matrix=true: it needs every hint's answer")


def _numbers(cfg: DictConfig, key: str, least: int) -> None:
    values = OmegaConf.select(cfg, key)
    if values is not None and (not values or min(values) < least):
        raise _bad(key, values, f"one or more numbers of at least {least}")


def _bad(key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{key}: {value} is not possible", where=f"config key {key}", fix=f"use {allowed}")
