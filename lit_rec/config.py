"""From a YAML file and overrides to a checked configuration (Hydra composes, this module refuses)."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lit_rec.arguments import check_arguments
from lit_rec.checks import check
from lit_rec.errors import UserError
from lit_rec.keys import SCHEMAS, check_keys, missing_values, unknown_key

RUN = "lit_rec_run"  # name of the configuration that a run folder's own file is composed below
# What a configuration may have built. Below torch and Lightning as a whole are classes that start processes.
ALLOWED_TARGETS = ("lit_rec.", "callbacks.", "lightning.pytorch.callbacks.", "torchmetrics.")
# What Hydra and OmegaConf raise over what a user wrote.
MISTAKES = (
    *(HydraException, OmegaConfBaseException, yaml.YAMLError),
    *(AttributeError, AssertionError),  # what OmegaConf says to a value for a part of a part that is null
    *(ValueError, TypeError, RecursionError),  # and both to a file that is YAML and nothing else
)


class SchemaNode(ConfigNode):
    """A schema in Hydra's store, made into nodes when a file names it.

    Hydra copies its whole store for every composing: with all schemas made, that took as long as the rest of it.
    """

    def __init__(self, name: str, schema: type) -> None:
        self.name, self.schema = f"{name}.yaml", schema
        self.group = self.package = self.provider = None

    @cached_property
    def node(self) -> DictConfig:  # type: ignore[override]
        """The schema's keys, types and defaults."""
        nodes: DictConfig = OmegaConf.structured(self.schema)
        return nodes


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
    file = experiment_file(path)
    return _load(file.parent, file.stem, overrides, path)


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a run folder was made with, checked as strictly as an experiment.

    `run.dir` is the folder, wherever it has been moved, and so are the answers that it holds.

    Args:
        folder: The run folder.
        overrides: As of `load_config`.

    Raises:
        UserError: There is no configuration of a run, or what `load_config` refuses.
    """
    file = run_file(folder)
    return _load(file.parent, RUN, overrides, file)


def experiment_file(path: str | Path) -> Path:
    """An experiment's file; a shipped one is found from anywhere, by `quickstart` or `configs/quickstart.yaml`.

    Raises:
        UserError: It is not there, or not called FILE.yaml.
    """
    file = Path(path).resolve()
    if not file.is_file():
        shipped = configs_dir() / f"{file.name.removesuffix('.yaml')}.yaml"
        if str(Path(path).parent) in (".", "configs") and shipped.is_file():
            return shipped
        near = difflib.get_close_matches(file.name, [p.name for p in configs_dir().glob("*.yaml")], n=1)
        hint = f"did you mean configs/{near[0]}?" if near else f"shipped configs are in {configs_dir()}"
        raise UserError(f"config file not found: {path}", where="--config", fix=hint)
    if file.suffix != ".yaml" or file.stem.endswith(".yaml"):  # Hydra would read the file that is called so
        stem = file.name.split(".")[0] or "mine"
        fix = f"rename it, to {stem}.yaml say, or name the .yaml file that is meant"
        raise UserError(f"{file.name} is not called FILE.yaml", where="--config", why="no other name is read", fix=fix)
    return file


def run_file(folder: str | Path) -> Path:
    """The file of a run folder's configuration; prepares Hydra for composing it as RUN.

    Raises:
        UserError: It is not there, or is no configuration of a run.
    """
    file = Path(folder).resolve() / "config.yaml"
    if not file.is_file():
        below = sorted(p.parent.name for p in file.parent.glob("*/config.yaml"))
        fix = f"name one of the runs below it: {', '.join(below[:5])}" if below else "run `fit --config FILE` first"
        why = "it holds no config.yaml, which `fit` writes" if file.parent.is_dir() else "there is no such folder"
        raise UserError(f"{folder} is no run folder", where="--run", why=why, fix=fix)
    try:
        kept = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError) as error:  # the second: it is no text
        raise _explain(error, file) from error
    schema = f"{kept.get('recipe')}_schema" if isinstance(kept, dict) else ""
    if schema not in SCHEMAS:
        raise UserError(
            "this is no configuration of a run",
            where=f"config {file}",
            why="its key recipe is none of " + ", ".join(name.removesuffix("_schema") for name in SCHEMAS),
            fix="name a folder that `fit` has written, or use --config",
        )
    # Composed over the file, so that the folder may have been moved; below overrides.
    node = {"defaults": [schema, file.stem, "_self_"], **moved(kept, str(folder))}
    ConfigStore.instance().store(name=RUN, node=node)
    return file


def moved(cfg: Mapping[str, Any], folder: str) -> dict[str, dict[str, str]]:
    """What changes in a resolved configuration when its run folder is another one: all that lies in it moves along."""
    before = str((cfg.get("run") or {}).get("dir", folder))
    lies = re.compile(rf"(^|:){re.escape(before)}(?=/|$)")
    changed = {
        part: {
            key: lies.sub(lambda found: f"{found[1]}{folder}", value)
            for key, value in (cfg.get(part) or {}).items()
            if isinstance(value, str) and lies.search(value)
        }
        for part in ("run", "logging")
    }
    changed["run"]["dir"] = folder
    return {part: values for part, values in changed.items() if values}


def quoted(text: str) -> str:
    """A text as Hydra reads it back, whatever is in it."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    return "'" + re.sub(r"(\\+)$", lambda found: found[1] * 2, escaped) + "'"


@contextmanager
def composing(folder: Path, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Let Hydra compose files of a folder, with the shipped groups; gives the overrides that it needs.

    Raises:
        HydraException: The folder cannot be searched.
    """
    ConfigStore.instance().repo.update({f"{name}.yaml": SchemaNode(name, schema) for name, schema in SCHEMAS.items()})
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        shipped = quoted(f"file://{configs_dir()}")
        yield [*overrides, *([f"hydra.searchpath=[{shipped}]"] if folder != configs_dir() else [])]


def _load(folder: Path, name: str, overrides: Sequence[str], path: str | Path) -> DictConfig:
    """Compose and check a configuration; `path` is what messages call it."""
    try:
        with composing(folder, overrides) as wanted:
            cfg = compose(name, overrides=wanted)
        missing = sorted(missing_values(OmegaConf.to_container(cfg, resolve=False)))
        OmegaConf.resolve(cfg)
    except MISTAKES as error:
        schema = next((SCHEMAS[one] for one in _order(folder, name) if one in SCHEMAS), None)
        raise _explain(error, path, schema) from error
    if missing:
        raise UserError(
            f"a value is missing: {', '.join(missing)}",
            where=f"config {path}",
            fix=f"set it in the YAML file or as an override: {missing[0]}=...",
        )
    if OmegaConf.get_type(cfg) not in SCHEMAS.values():
        raise UserError(
            "this is not an experiment",
            where=f"config {path}",
            why="its defaults list does not begin with a recipe, so no key could be checked",
            fix=f"begin the file with `defaults: [SCHEMA, _self_]`, SCHEMA being one of {', '.join(SCHEMAS)}",
        )
    order = [] if _begins_with_schema(folder / f"{name}.yaml") else _order(folder, name)
    if order and order[0] not in SCHEMAS:
        first = next(one for one in order if one in SCHEMAS)
        raise UserError(
            f"{first} is not the first of the defaults list",
            where=f"config {path}",
            why="a schema sets every key to its default again, whatever stands before it",
            fix=f"begin the list with it: `defaults: [{first}, ..., _self_]`",
        )
    check_keys(cfg, f"config {path}")
    for key, target in _targets(cfg):
        if not target.startswith(ALLOWED_TARGETS):
            raise _not_allowed(target, key)
    check(cfg)
    return cfg


def _begins_with_schema(file: Path) -> bool:
    """Whether a file's own list shows that nothing stands before a schema: its order need not be looked at then."""
    kept = yaml.safe_load(file.read_bytes()) if file.is_file() else None
    defaults = kept.get("defaults") if isinstance(kept, dict) else None
    return isinstance(defaults, list) and bool(defaults) and str(defaults[0]) in SCHEMAS


def _order(folder: Path, name: str) -> list[str]:
    """What a configuration is composed of, in order; nothing where the list cannot be made, which composing tells."""
    try:
        with composing(folder, []) as search:
            found = GlobalHydra.instance().config_loader().compute_defaults_list(name, search, RunMode.RUN).defaults
    except MISTAKES:
        return []
    return [one.config_path for one in found if one.config_path and not (one.package or "").startswith("hydra")]


def _not_allowed(target: str, key: str) -> UserError:
    return UserError(
        f"_target_ {target!r} is not allowed",
        where=f"config key {key}",
        why=f"a config may only name classes below {', '.join(ALLOWED_TARGETS)}",
        fix="put your class in callbacks/ or lit_rec/ and name it there",
    )


def _targets(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, target) of every `_target_` in the configuration."""
    items = enumerate(node) if OmegaConf.is_list(node) else node.items() if OmegaConf.is_dict(node) else ()
    for key, value in items:
        if key == "_target_":
            yield f"{prefix}_target_", str(value)
        else:
            yield from _targets(value, f"{prefix}{key}.")


def _explain(error: Exception, path: str | Path, schema: type | None = None) -> UserError:
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
        if "No match in the defaults list" in text and (configs_dir() / key).is_dir():
            return UserError(f"{path} chooses no {key}", where=where, fix=f"add the group: +{key}=...")
        return unknown_key(key, schema, where)
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
            inner = place.removesuffix("._target_")
            check_arguments(found, plain(_at(node, inner.removeprefix(key).lstrip("."))) | kwargs, inner)
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


def _at(node: Any, key: str) -> Any:
    """What lies below a node under a dotted key, which may hold places of a list."""
    for part in filter(None, key.split(".")):
        node = node[int(part)] if OmegaConf.is_list(node) else node[part]
    return node


def plain(node: Any) -> Any:
    """The node as ordinary dicts, lists and values."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
