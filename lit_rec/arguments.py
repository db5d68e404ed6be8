"""Whether the arguments that a configuration gives a class are ones that it takes, of the types that it says."""

import difflib
import inspect
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_rec.errors import UserError

NAMES = {
    str: "a text (digits in quotes)",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
}


def check_arguments(kind: type, given: Mapping[str, Any], key: str) -> None:
    """Refuse arguments that a class does not take, lacks, or takes as something else.

    Args:
        kind: The class.
        given: Name -> plain value; `_target_` among them, and nodes with one, are left alone.
        key: Of the node in the configuration.

    Raises:
        UserError: With the key of the argument.
    """
    known, any_name = parameters(kind)
    for name, value in given.items():
        if name == "_target_":
            continue
        if name not in known:
            if any_name:
                continue
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean '{key}.{near[0]}'?" if near else f"it takes {', '.join(known) or 'none'}"
            raise UserError(f"unknown config key '{key}.{name}'", where=f"config key {key}.{name}", fix=fix)
        wanted = known[name].annotation
        nested = isinstance(value, Mapping) and "_target_" in value
        if not nested and not fits(value, wanted):
            shown = "null" if value is None else value
            raise UserError(
                f"{key}.{name}: {shown} is not possible", where=f"config key {key}.{name}", fix=f"use {words(wanted)}"
            )
    if lost := [one for one, told in known.items() if told.default is told.empty and one not in given]:
        raise UserError(
            f"a value is missing: {key}.{lost[0]}", where=f"config key {key}", fix=f"add it: +{key}.{lost[0]}=..."
        )


def parameters(kind: type) -> tuple[dict[str, inspect.Parameter], bool]:
    """What a class may be given by name, its hints resolved, and whether it takes any name.

    `**more` of a class hands on to the one above, so that one's are looked at too.
    """
    found: dict[str, inspect.Parameter] = {}
    for one in kind.__mro__:
        if "__init__" not in vars(one):
            continue
        if one is object:
            return found, False
        init: Any = vars(one)["__init__"]
        try:
            hints = get_type_hints(init)
        except (NameError, TypeError):  # imported for type checkers alone
            hints = {}
        told = list(inspect.signature(init).parameters.values())[1:]
        named = [p for p in told if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found |= {p.name: p.replace(annotation=hints.get(p.name, Any)) for p in named if p.name not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in told):
            return found, False
    return found, True


def fits(value: Any, wanted: Any) -> bool:
    """Whether a plain value is of an annotated type; one that is none of a configuration's fits anything.

    >>> fits(3, float), fits(True, int), fits(3.0, int), fits(["a"], Sequence[str] | None), fits(float("nan"), float)
    (True, False, False, True, False)
    """
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (Sequence, list) and inner:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value) and _different(value)
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted) if wanted in NAMES else True


def _different(values: Sequence[Any]) -> bool:
    """No text twice: names of columns are told apart by them."""
    texts = [value for value in values if isinstance(value, str)]
    return len(texts) == len({*texts})


def words(wanted: Any) -> str:
    """A type as a person says it.

    >>> words(int | None), words(Sequence[str]), words(str | float)
    ('a whole number or null', 'a list of different texts', 'a text (digits in quotes) or a number')
    """
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return " or ".join(words(one) for one in inner)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Sequence, list) and inner:
        return "a list of different texts" if inner[0] is str else "a list"
    return NAMES.get(wanted, getattr(wanted, "__name__", str(wanted)))
