"""In what the configurations of several runs differ, and in which few words that can be said."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rec.run.folder import differences, other_configuration

PLACES = ("name", "run", "logging", "trainer.threads")  # how a run is called, where it lies, how fast, who is told
# What may be another when a finished run is used: the machine, and what is compared where it is read.
USED = (*PLACES, "trainer", "data", "llm", "encoder", "callbacks")
# How a server is reached: another address or key of the same model changes no answer.
REACHED = tuple(f"llm.server.{key}" for key in ("urls", "key_env", "concurrency", "timeout", "retries", "run_folder"))
FREE = (*PLACES, "seed", "evaluation.only_folds")  # keys in which runs of one setting may differ
NAMES = (".name", ".architecture")  # keys that name a choice which brings other values with it
ABSENT = "not set"
_SHOWN = 32  # characters of a value in a label

Values = tuple[str, ...]


def check_same(made: dict[str, Any], given: dict[str, Any], run: str, file: str) -> None:
    """Refuse an experiment that does not describe a run.

    Args:
        made: The configuration that the run was made with.
        given: The experiment's.
        run: The run folder.
        file: The experiment's file.

    Raises:
        UserError: They differ in more than names and places; the keys are named.
    """
    if found := differences_beyond(made, given, PLACES):
        fix = "leave --config out: --run alone knows how the run was made; or give the overrides it was made with"
        raise other_configuration(Path(run), f"--config {file}", found, fix)


def check_overrides(made: dict[str, Any], given: dict[str, Any], run: str) -> None:
    """Refuse overrides that would make another run of a finished one, which is used as it was made.

    Args:
        made: The configuration that the run was made with.
        given: The same with the overrides.
        run: The run folder.

    Raises:
        UserError: They differ in more than places and the machine; the keys are named.
    """
    if found := differences_beyond(made, given, USED):
        fix = "leave the override out: a run is used as it was made; to have it otherwise, fit another run.dir"
        raise other_configuration(Path(run), "overrides", found, fix)


def differences_beyond(made: Any, given: Any, names: Sequence[str]) -> list[str]:
    """In what two configurations differ, the keys of these names apart.

    >>> differences_beyond({"seed": 1, "run": {"dir": "a"}}, {"seed": 2, "run": {"dir": "b"}}, PLACES)
    ['seed: 1 -> 2']
    """
    return [line for line in differences(made, given) if not free(line.split(":")[0], names)]


def free(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or lies below one.

    >>> free("run.dir", PLACES), free("runs", PLACES)
    (True, False)
    """
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text; a list is one value.

    >>> flat({"seed": 1, "llm": {"name": "tiny", "stop": ["a"]}})
    {'seed': '1', 'llm.name': 'tiny', 'llm.stop': '["a"]'}
    """
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return found


def group_configs(
    configs: Sequence[dict[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, list[str]]], dict[Values, list[int]]]:
    """Put together what differs in the seed alone.

    Returns:
        keys: Few keys, names first, that tell the settings apart: `llm.name`, not every value that a choice of `llm=`
            brings with it; none of them can be left out.
        differing: (key, value per setting) of all keys in which settings differ.
        groups: values of `keys` -> places in `configs`, in the order in which settings come first.
    """
    flats = [flat(config) for config in configs]
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for values in flats for key in values):
        column = [values.get(key, ABSENT) for values in flats]
        if len(set(column)) > 1 and not free(key, FREE):
            columns[key] = column
    keys: list[str] = []
    for key in sorted(columns, key=lambda key: _rank(key, columns[key])):
        if _told(columns, [*keys, key]) > _told(columns, keys):
            keys.append(key)
    for key in list(keys):
        rest = [other for other in keys if other != key]
        keys = rest if _told(columns, rest) == _told(columns, keys) else keys
    keys.sort(key=list(columns).index)
    groups: dict[Values, list[int]] = {}
    for place in range(len(configs)):
        groups.setdefault(tuple(columns[key][place] for key in keys), []).append(place)
    firsts = [places[0] for places in groups.values()]
    return tuple(keys), [(key, [column[n] for n in firsts]) for key, column in columns.items()], groups


def _rank(key: str, column: Sequence[str]) -> int:
    """How little a key says to people: names say most, then values, then paths; a key of another version, nothing."""
    if ABSENT in column:
        return 3
    return 0 if key.endswith(NAMES) else 2 if any("/" in value for value in column) else 1


def _told(columns: dict[str, list[str]], keys: Sequence[str]) -> int:
    """How many settings these keys tell apart."""
    return len(set(zip(*(columns[key] for key in keys), strict=True))) if keys else 1


def label_of(keys: Sequence[str], values: Sequence[str]) -> str:
    """Say a setting in few words: the last part of a key where that is enough.

    >>> label_of(["llm.name", "policy.beta", "agent.lr", "policy.lr"], ["tiny", "0.1", "1", "2"])
    'llm=tiny, beta=0.1, agent.lr=1, policy.lr=2'
    """
    short = []
    for key in keys:
        end = key.split(".")[-1]
        alone = sum(other.split(".")[-1] == end for other in keys) == 1
        named = next((key.removesuffix(name) for name in NAMES if key.endswith(name)), None)
        short.append(named or (end if alone else key))
    cut = [value if len(value) <= _SHOWN else value[: _SHOWN - 1] + "\N{HORIZONTAL ELLIPSIS}" for value in values]
    return ", ".join(f"{name}={value}" for name, value in zip(short, cut, strict=True))


def letter_of(number: int) -> str:
    """A to Z, then AA, AB, ...

    >>> letter_of(0), letter_of(25), letter_of(26), letter_of(27)
    ('A', 'Z', 'AA', 'AB')
    """
    before, last = divmod(number, 26)
    return (letter_of(before - 1) if before else "") + chr(ord("A") + last)
