"""Which keys a recipe has, and what is meant by one that it has not."""

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_rec.errors import UserError
from lit_rec.schema import Re2LLMConfig, RLRFConfig, UnifiedConfig

SCHEMAS = {"rlrf_schema": RLRFConfig, "re2llm_schema": Re2LLMConfig, "unified_schema": UnifiedConfig}
OPEN = ("data.", "callbacks.", "reranker.args.", "evaluation.sasrec.")  # parts whose keys are the arguments of a class


def known_keys(*schemas: type) -> list[str]:
    """Every dotted key of these schemas, in order."""
    trees: list[Any] = [OmegaConf.to_container(OmegaConf.structured(schema), resolve=False) for schema in schemas]
    return list(dict.fromkeys(key for tree in trees for key in _keys(tree)))


def _keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def unknown_key(key: str, schema: type | None, where: str) -> UserError:
    """What to say to a key that is not there.

    Args:
        key: Dotted; its last part alone where no more is known.
        schema: The recipe's; None: it is not known.
        where: The file.
    """
    known = known_keys(*([schema] if schema else SCHEMAS.values()))
    if key.startswith(OPEN):
        return UserError(f"there is no value {key} to change", where=where, fix=f"add it: +{key}=...")
    if f"{key}." in OPEN:
        return UserError(f"{key} has no such value to change", where=where, fix=f"add every one: +{key}.NAME=...")
    others = [name for name, other in SCHEMAS.items() if schema and key in known_keys(other)]
    if others and schema and key not in known:
        having = " and ".join(name.removesuffix("_schema") for name in others)
        return UserError(f"recipe {_recipe(schema)} has no {key}", where=where, fix=f"leave it out: it is for {having}")
    known = [name for name in known if not f"{key}.".startswith(f"{name}.")]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or difflib.get_close_matches(
        key.split(".")[-1], known, n=1, cutoff=0.6
    )
    fix = f"did you mean '{near[0]}'?" if near else "`python -m lit_rec show-config` lists every key"
    return UserError(f"unknown config key '{key}'", where=where, fix=fix)


def _recipe(schema: type) -> str:
    return str(schema.recipe)  # type: ignore[attr-defined]


def check_keys(cfg: DictConfig, where: str) -> None:
    """Refuse keys that the schema has not, which `+key=value` adds to any part, and parts that `~key` took away.

    Raises:
        UserError: There is one, or `recipe` is not that of the schema.
    """
    schema: Any = OmegaConf.get_type(cfg)
    for prefix, node in _parts(cfg):
        own, held = [one.name for one in fields(OmegaConf.get_type(node))], [str(key) for key in node]  # type: ignore[arg-type]
        if extra := [key for key in held if key not in own]:
            raise unknown_key(f"{prefix}{extra[0]}", schema, where)
        if lost := [key for key in own if key not in held]:
            fix = f"leave ~{prefix}{lost[0]} out"
            raise UserError(f"{prefix}{lost[0]} was taken away", where=where, why="every recipe needs it", fix=fix)
    if cfg.recipe != _recipe(schema):
        named = f"{cfg.recipe}_schema"
        other = f", or begin its defaults with {named}" if named in SCHEMAS else ""
        raise UserError(
            f"recipe: {cfg.recipe} is not possible here",
            where=f"{where}, key recipe",
            why=f"the schema in its defaults list is that of {_recipe(schema)}",
            fix=f"leave recipe out{other}",
        )


def _parts(node: Any, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield ("part.of.", node) of every part that has a schema."""
    if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
        yield prefix, node
        for key in map(str, node):
            yield from _parts(node[key], f"{prefix}{key}.")


def missing_values(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that have to be set, and not those that only refer to one.

    Args:
        node: A configuration as plain values, unresolved.
        prefix: Of its keys.
    """
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        if value == "???":
            yield f"{prefix}{key}"
        yield from missing_values(value, f"{prefix}{key}.")
