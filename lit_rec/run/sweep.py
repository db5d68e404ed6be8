"""A sweep: every combination of several values per key is a run of its own, in a process of its own."""

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from lit_rec import cores
from lit_rec.config import load_config, quoted
from lit_rec.errors import UserError
from lit_rec.run.children import DONE, KEPT, Child, run_children
from lit_rec.run.folder import write_atomic

MOST = 1000  # combinations
NAME = 100  # longest folder name, in characters
KEYS_OF_PLACES = ("run.dir", "run.cache", "run.answers", "logging", "trainer.threads")  # where and how fast, not what
FILES = ("results.json", "config.yaml", "environment.json", "report.html")  # the last one is written last


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        name: Its folder below the sweep's.
        overrides: All overrides, swept or not.
    """

    name: str
    overrides: tuple[str, ...]


def expand(overrides: Sequence[str]) -> list[Combination]:
    """Every combination, in Hydra's order: the last key's values change first.

    Args:
        overrides: Hydra overrides; `key=a,b`, `key=choice(a,b)` and `key=range(1,4)` stand for several values, a quoted
            value and a list for one. Of a key that is given twice the last one counts.

    Raises:
        UserError: One cannot be read or enumerated, none has several values, or there are too many combinations.
    """
    values: dict[str, list[str]] = {}
    swept: list[str] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            key = override.get_key_element()
            several = override.is_sweep_override()
            found = [f"{key}={value}" for value in override.sweep_string_iterator()] if several else [text]
        except HydraException as error:
            raise UserError(
                "an override cannot be swept",
                where=f"override {text!r}",
                why=" ".join(str(error).split())[:300],
                fix="give the values with commas: key=a,b; quote what has a comma of its own: key='a,b'",
            ) from error
        swept = [one for one in swept if one != key] + ([key] if several else [])
        values[key] = list(dict.fromkeys(found))
    if not swept:
        raise UserError(
            "there is nothing to sweep",
            where="sweep",
            fix="give a key several values: key=a,b; `fit` does a single run",
        )
    if math.prod(len(found) for found in values.values()) > MOST:
        raise UserError(f"more than {MOST:,} combinations", where="sweep", fix="give fewer values")
    combinations = []
    for chosen in itertools.product(*values.values()):
        by_key = dict(zip(values, chosen, strict=True))
        combinations.append(Combination(folder_name([by_key[key] for key in sorted(swept)]), chosen))
    return combinations


def folder_name(parts: Sequence[str]) -> str:
    """A name that any file system takes; where characters are lost or cut off, a hash keeps names apart.

    >>> folder_name(["policy.beta=0.1", "seed=2"])
    'policy.beta=0.1,seed=2'
    """
    whole = ",".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", whole)
    # A dot in front hides a folder, a dash looks like an option, and some systems do not tell capitals apart.
    if safe == whole and len(safe) <= NAME and safe[0] not in ".-" and safe == safe.lower():
        return safe
    return f"{safe[: NAME - 9].lstrip('.-')}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Plan:
    """What a sweep does.

    Attributes:
        folder: Of the sweep.
        children: One per combination, in order; a finished one is not started again.
    """

    folder: Path
    children: list[Child]


def make_plan(config: str, overrides: Sequence[str], *, jobs: int = 1, fresh: bool = False) -> Plan:
    """Compose and check every combination; nothing is written.

    Every run keeps its answers in the store of the sweep, unless the configuration names another one: equal questions
    are asked once. Several processes may write to one store (every batch is appended under a lock), but each has read
    it when it started, so runs at work at the same time may ask the same question twice.

    Args:
        config: The experiment's YAML file.
        overrides: Hydra overrides, some with several values.
        jobs: Runs at work at a time; they share the CPU threads, unless trainer.threads says how many each has.
        fresh: Start anew in every run folder.

    Raises:
        UserError: A mistake in any combination; the message says in which.
    """
    combinations = expand(overrides)
    plain = [load(config, one.overrides, one.name) for one in combinations]
    folders = list(dict.fromkeys(str(cfg["run"]["dir"]) for cfg in plain))
    if len(folders) > 1:
        raise UserError(
            "a sweep needs one folder, and run.dir is not the same in all combinations",
            where="config key run.dir",
            why=f"it is {folders[0]} and {folders[1]}",
            fix="name the sweep's folder: run.dir=runs/my_sweep",
        )
    _check_ks(combinations, plain)
    folder = Path(folders[0])
    share = max(1, cores.usable() // jobs)
    children = []
    for one, before in zip(combinations, plain, strict=True):
        more = [f"run.dir={quoted(str(folder / one.name))}"]
        if before["run"]["answers"] == f"{folders[0]}/answers":
            more.append(f"run.answers={quoted(str(folder / 'answers'))}")
        if jobs > 1 and before["trainer"]["threads"] is None:
            more.append(f"trainer.threads={share}")
        given = [text for text in one.overrides if text.split("=")[0].lstrip("+") != "run.dir"]
        arguments = [*given, *more]
        cfg = load(config, arguments, one.name)
        finished = not fresh and is_finished(folder / one.name, cfg)
        command = [sys.executable, "-m", "lit_rec", "fit", "--config", str(config), *arguments]
        command += ["--fresh"] if fresh else []
        children.append(Child(one.name, folder / one.name, command, KEPT if finished else ""))
    return Plan(folder, children)


def _check_ks(combinations: Sequence[Combination], configs: Sequence[dict[str, Any]]) -> None:
    """Refuse runs whose tables have no metric in common, which the report of the sweep could not put side by side."""
    cuts = [{*cfg["evaluation"]["ks"]} for cfg in configs]
    if not set.intersection(*cuts):
        first = cuts[0]
        other = next((n for n, cut in enumerate(cuts) if not cut & first), len(cuts) - 1)
        raise UserError(
            "the runs of this sweep would have no metric in common",
            where="config key evaluation.ks",
            why=f"{sorted(first)} with {combinations[0].name}, {sorted(cuts[other])} with {combinations[other].name}",
            fix="give all of them one cut-off in common",
        )


def load(config: str, overrides: Sequence[str], name: str) -> dict[str, Any]:
    """One combination's configuration as plain values."""
    try:
        return OmegaConf.to_container(load_config(config, list(overrides)), resolve=True)  # type: ignore[return-value]
    except UserError as error:
        where = f"{error.where}, combination {name}" if error.where else f"combination {name}"
        raise UserError(error.what, where=where, why=error.why, fix=error.fix) from error


def is_finished(folder: Path, cfg: dict[str, Any]) -> bool:
    """Whether a run folder holds everything a run leaves, of this configuration."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    try:
        kept = yaml.safe_load((folder / "config.yaml").read_text())
    except (yaml.YAMLError, ValueError):  # the second: it is no text
        return False
    return isinstance(kept, dict) and _what(kept) == _what(cfg)


def _what(cfg: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what changes no result."""
    own = OmegaConf.create(cfg)
    for key in KEYS_OF_PLACES:
        OmegaConf.update(own, key, None, force_add=True)
    return OmegaConf.to_container(own)  # type: ignore[return-value]


def sweep(config: str, overrides: Sequence[str], *, jobs: int = 1, fresh: bool = False) -> int:
    """Run what is left of a sweep, then write the report of all its finished runs.

    Returns:
        0; 2 where a run failed for something the user can mend; 1 where one failed for a defect or was killed.

    Raises:
        UserError: A mistake in the configuration, or another sweep at work in the folder.
        KeyboardInterrupt: Stopped; every child has been stopped before.
    """
    plan = make_plan(config, overrides, jobs=jobs, fresh=fresh)
    plan.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(plan.folder / ".sweep.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another sweep is at work in {plan.folder}",
            where="config key run.dir",
            fix="wait for it to end, or choose another run.dir",
        ) from None
    with lock:
        note = {"config": str(config), "overrides": list(overrides), "runs": _known_runs(plan)}
        write_atomic(plan.folder / "sweep.json", json.dumps(note, indent=1))
        run_children(plan.children, jobs=jobs)
        finished = [child.folder for child in plan.children if child.state in (DONE, KEPT)]
        if finished:
            from lit_rec.run.many_report import report_runs  # polars and torch, which the children needed alone

            report_runs(finished, plan.folder / "report.html", title=plan.folder.name)
    failed = [child for child in plan.children if child.code]
    if not failed:
        return 0
    tell_failures(failed)
    return 2 if all(child.code == 2 for child in failed) else 1


def _known_runs(plan: Plan) -> list[str]:
    """The runs of this sweep, and those that an earlier one with other values left in the same folder."""
    names = [child.name for child in plan.children]
    try:
        earlier = json.loads((plan.folder / "sweep.json").read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = []
    return list(dict.fromkeys([*(name for name in earlier if isinstance(name, str)), *names]))


def tell_failures(failed: Sequence[Child]) -> None:
    """Say which runs failed and what each said last."""
    print(f"error: {len(failed)} of the runs failed; the same command starts them again", file=sys.stderr)
    for child in failed:
        code = f"exit code {child.code}" if child.code and child.code > 0 else f"killed by signal {-(child.code or 0)}"
        print(f"\n  {child.name}: {code}, all it said: {child.log}", file=sys.stderr)
        for line in child.last_lines():
            print(f"    | {line}", file=sys.stderr)
