"""Where every value of a configuration comes from: a default, a line of a YAML file, or the command line."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lit_rec.config import RUN, composing, configs_dir, experiment_file, run_file

DEFAULT, COMMAND_LINE = "schema default", "command line"
NOT_GROUPS = ("__pycache__",)


def groups() -> dict[str, list[str]]:
    """The shipped config groups and their choices."""
    folders = sorted(p for p in configs_dir().iterdir() if p.is_dir() and p.name not in NOT_GROUPS)
    return {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in folders}


def origins(
    cfg: DictConfig, overrides: Sequence[str], *, config: str | Path | None = None, run: str | Path | None = None
) -> list[tuple[str, Any, str]]:
    """Every key of a configuration that has been loaded, with its value and where that comes from.

    Args:
        cfg: The configuration.
        overrides: The overrides it was loaded with.
        config: The experiment's file, or
        run: the run folder.

    Returns:
        (dotted key, value, origin): "schema default", FILE:LINE, or "command line"; where a group's file was chosen on
        the command line, that is said too.
    """
    file = experiment_file(config) if config is not None else run_file(str(run))
    found: dict[str, str] = {}
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    places = (file.parent, configs_dir())
    chosen = {o.key_or_group for o in parsed if any((p / o.key_or_group).is_dir() for p in places)}
    with composing(file.parent, overrides) as wanted:
        loader = GlobalHydra.instance().config_loader()
        name = file.stem if run is None else RUN
        composed = loader.compute_defaults_list(name, wanted, RunMode.RUN).defaults
    for one in composed:
        path = next((p for place in places if (p := place / f"{one.config_path}.yaml").is_file()), None)
        if path is None or (one.package or "").startswith("hydra"):
            continue  # a schema, or Hydra's own
        how = f" ({one.config_path.replace('/', '=')} on the command line)" if one.package in chosen else ""
        prefix = f"{one.package}." if one.package else ""
        for key, line in _lines(yaml.compose(path.read_text())):
            if not key.startswith("defaults"):
                found[f"{prefix}{key}"] = f"{_shown(path)}:{line}{how}"
    if run is not None:
        kept: Any = ConfigStore.instance().load(f"{RUN}.yaml").node
        found.update((f"{part}.{key}", "--run") for part in kept if part != "defaults" for key in kept[part])
    for override in parsed:
        if override.key_or_group not in chosen and not override.is_delete():
            given = {override.key_or_group: override.value()}
            found.update((key, COMMAND_LINE) for key, _ in _leaves(given))
    return [(key, value, found.get(key, DEFAULT)) for key, value in _leaves(OmegaConf.to_container(cfg))]


def render_origins(lines: Sequence[tuple[str, Any, str]]) -> str:
    """One line per key: `key: value  # origin`."""
    told = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value, _ in lines]
    width = min(60, max(map(len, told)))
    return "\n".join(f"{text:<{width}}  # {origin}" for text, (_, _, origin) in zip(told, lines, strict=True)) + "\n"


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is no dictionary, or an empty one."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield (dotted key, line) of every value in a YAML file that is no mapping."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _lines(value, f"{name}.")
        else:
            yield name, key.start_mark.line + 1


def _shown(path: Path) -> str:
    """A path as a person here would write it."""
    near = os.path.relpath(path)
    return str(path) if near.startswith("..") else near
