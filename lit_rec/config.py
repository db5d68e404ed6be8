"""From a YAML file and overrides to a checked configuration (Hydra composes, this module refuses)."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lit_rec.errors import UserError
from lit_rec.schema import RLRFConfig

ALLOWED_TARGETS = ("lit_rec.", "callbacks.", "lightning.", "torch.", "torchmetrics.", "transformers.", "peft.")


def configs_dir() -> Path:
    """The shipped configs: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    return next(p for p in (package.parent / "configs", package / "configs") if (p / "quickstart.yaml").is_file())


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose and check one experiment.

    Args:
        path: The experiment's YAML file. Its `defaults:` may name the shipped groups from anywhere.
        overrides: Hydra overrides: `key=value`, `group=choice`, `+key=value`, `~key`.

    Returns:
        The strict, fully resolved configuration.

    Raises:
        UserError: The file is missing, a key is misspelt, a value has the wrong type, or a `_target_` is not allowed.
    """
    file = Path(path).resolve()
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in configs_dir().glob("*.yaml")], n=1)
        hint = f"did you mean configs/{near[0]}?" if near else f"shipped configs are in {configs_dir()}"
        raise UserError(f"config file not found: {path}", where="--config", fix=hint)
    ConfigStore.instance().store(name="rlrf_schema", node=RLRFConfig)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(file.parent), version_base="1.3"):
            search = [f"hydra.searchpath=[file://{configs_dir()}]"] if file.parent != configs_dir() else []
            cfg = compose(file.stem, overrides=[*overrides, *search])
        OmegaConf.resolve(cfg)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, AttributeError, AssertionError) as error:
        # the last two: what OmegaConf says to a value for a part of a part that is null
        raise _explain(error, path) from error
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(
            f"a value is missing: {', '.join(missing)}",
            where=f"config {path}",
            fix=f"set it in the YAML file or as an override: {missing[0]}=...",
        )
    if OmegaConf.get_type(cfg) is not RLRFConfig:
        raise UserError(
            "this is not an experiment",
            where=f"config {path}",
            why="its defaults list does not begin with a recipe, so no key could be checked",
            fix="begin the file with `defaults: [rlrf_schema, _self_]`, as the shipped configs do",
        )
    for key, target in _targets(cfg):
        if not target.startswith(ALLOWED_TARGETS):
            raise _not_allowed(target, key)
    _check(cfg)
    return cfg


OPEN = ("data.", "callbacks.", "reranker.args.")  # parts whose keys are the arguments of a class
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
    "llm.dtype": ("auto", "float32", "bfloat16", "float16"),
    "encoder.dtype": ("auto", "float32", "bfloat16", "float16"),
    "trainer.precision": ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed"),
}
AT_LEAST = {
    "lists.history": 1,
    "lists.real": 1,
    "lists.size": 2,
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
}
METRIC_NAMES = ("ndcg", "map", "hr", "mrr", "click")
ABOVE_ZERO = ("policy.lr", "policy.beta", "reranker.lr", "reranker.temperature", "llm.temperature")


def _check(cfg: DictConfig) -> None:
    """Values that are well typed and still make no sense are refused before anything is paid for."""
    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            raise _bad(key, value, "one of " + ", ".join("null" if c is None else c for c in choices))
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value < least:
            raise _bad(key, value, f"at least {least}")
    for key in ABOVE_ZERO:
        if OmegaConf.select(cfg, key) <= 0:
            raise _bad(key, OmegaConf.select(cfg, key), "a number above 0")
    for key in ("evaluation.ks", "evaluation.only_folds"):
        values, least = OmegaConf.select(cfg, key), int(key == "evaluation.ks")
        if values is not None and (not values or min(values) < least):
            raise _bad(key, values, f"one or more numbers of at least {least}")
    if not re.fullmatch(rf"({'|'.join(METRIC_NAMES)})@[1-9]\d*", cfg.reranker.metric):
        raise _bad("reranker.metric", cfg.reranker.metric, f"one of {', '.join(METRIC_NAMES)} with a cut-off: ndcg@5")
    if cfg.pairs.max_pairs is not None and cfg.pairs.max_pairs < 1:
        raise _bad("pairs.max_pairs", cfg.pairs.max_pairs, "at least 1, or null for all")
    for key in ("evaluation.test", "evaluation.validation"):
        if not 0 <= OmegaConf.select(cfg, key) < 1:
            raise _bad(key, OmegaConf.select(cfg, key), "a share of the users, from 0 up to but not including 1")
    if cfg.evaluation.validation == 0 and cfg.evaluation.selection == "validation":
        raise _bad("evaluation.validation", 0, "a share above 0, or evaluation.selection=last")
    if cfg.lists.real > cfg.lists.size:
        raise _bad("lists.real", cfg.lists.real, f"at most lists.size = {cfg.lists.size}")
    if not 0 < cfg.llm.top_p <= 1:
        raise _bad("llm.top_p", cfg.llm.top_p, "above 0 and at most 1")
    unknown = set(cfg.evaluation.inputs) - {"answer", "kar", "both"}
    if unknown:
        raise _bad("evaluation.inputs", sorted(unknown)[0], "answer, kar and both")
    if cfg.trainer.devices != 1:
        raise _bad("trainer.devices", cfg.trainer.devices, "1: this version runs on one device")


def _not_allowed(target: str, key: str) -> UserError:
    return UserError(
        f"_target_ {target!r} is not allowed",
        where=f"config key {key}",
        why=f"a config may only name classes below {', '.join(ALLOWED_TARGETS)}",
        fix="put your class in callbacks/ or lit_rec/ and name it there",
    )


def _bad(key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{key}: {value} is not possible", where=f"config key {key}", fix=f"use {allowed}")


def _targets(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, target) of every `_target_` in the configuration."""
    items = enumerate(node) if OmegaConf.is_list(node) else node.items() if OmegaConf.is_dict(node) else ()
    for key, value in items:
        if key == "_target_":
            yield f"{prefix}_target_", str(value)
        else:
            yield from _targets(value, f"{prefix}{key}.")


def _known_keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _known_keys(value, f"{prefix}{key}.")


def _explain(error: Exception, path: str | Path) -> UserError:
    """Turn Hydra's and OmegaConf's words into one message with the nearest key."""
    text = "\n".join(str(e) for e in (error, error.__cause__) if e is not None)
    where = f"config {path}"
    found = (
        re.search(r"Could not override '([^']+)'", text)
        or re.search(r"full_key: (\S+)", text)
        or re.search(r"Key '([^']+)' (?:is )?not in", text)
    )
    if "Ambiguous value" in text:
        return UserError(
            "an override holds several values", where=where, why=text.splitlines()[0], fix="give one value per key"
        )
    if isinstance(error, MissingMandatoryValue) or "Missing mandatory value" in text:
        return UserError(f"a value is missing: {text.splitlines()[0]}", where=where, fix="set it in the YAML file")
    if found and ("not in" in text or "Could not override" in text):
        key = found.group(1)
        schema: Any = OmegaConf.to_container(OmegaConf.structured(RLRFConfig), resolve=False)
        known = list(_known_keys(schema))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or difflib.get_close_matches(
            key.split(".")[-1], known, n=1, cutoff=0.6
        )
        if "No match in the defaults list" in text and (configs_dir() / key).is_dir():
            return UserError(f"{path} chooses no {key}", where=where, fix=f"add the group: +{key}=...")
        if key.startswith(OPEN):
            return UserError(f"there is no value {key} to change", where=where, fix=f"add it: +{key}=...")
        fix = f"did you mean '{near[0]}'?" if near else "`python -m lit_rec show-config` lists every key"
        return UserError(f"unknown config key '{key}'", where=where, fix=fix)
    mark = getattr(error, "problem_mark", None)
    line = re.search(r"line (\d+), column (\d+)", text)
    if mark is not None or line:
        where = f"{path}:{mark.line + 1 if mark is not None else line and line.group(1)}"
    why = " ".join(text.split())[:400]
    if getattr(error, "override", None):  # one that Hydra cannot read
        where = f"override {error.override!r}"  # type: ignore[attr-defined]
    return UserError("the configuration cannot be composed", where=where, why=why, fix="correct the value or the name")


def instantiate(node: Any, key: str, **kwargs: Any) -> Any:
    """Build the object a `_target_` node names.

    Raises:
        UserError: Whatever the constructor raised as one, an argument it does not take, or a `_target_` that is no
            class of an allowed package.
    """
    from hydra.utils import get_object
    from hydra.utils import instantiate as build

    if "_target_" not in node:
        raise UserError(
            f"{key} names no class", where=f"config key {key}", fix=f"give it a _target_, or choose a group: {key}=..."
        )
    try:
        for place, target in _targets(node, f"{key}."):
            found = get_object(target)
            # torch.os.system begins with an allowed name, and is not torch's.
            if not isinstance(found, type) or not found.__module__.startswith(ALLOWED_TARGETS):
                raise _not_allowed(target, place)
        return build(node, _convert_="all", **kwargs)
    except (InstantiationException, TypeError, ImportError, ValueError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__cause__
        raise UserError(
            f"cannot build {node.get('_target_', '(no _target_)')}",
            where=f"config key {key}",
            why=" ".join(str(error).split())[:300],
            fix="check the names of its arguments in its docstring",
        ) from error


def plain(node: Any) -> Any:
    """The node as ordinary dicts, lists and values."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
