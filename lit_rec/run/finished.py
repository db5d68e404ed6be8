"""Finished runs as other commands read them: their numbers per user and what made them, without building anything.

results.json has means alone; paired comparisons need the users. So the per-list metrics are read from the stages behind
the table: `rows/ROW/metrics.parquet` of every fold where lists are reranked; where sessions are ranked, the targets'
ranks in `rows/ROW/ranks.safetensors`, of which every metric is a function. What is read has to give the means of
results.json again, else the folder is refused.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_rec.data.splits import sampled
from lit_rec.errors import UserError
from lit_rec.metrics.sessions import random_metrics, rank_metrics, session_frame
from lit_rec.run.cost import cost_parts, stage_seconds
from lit_rec.run.folder import MANIFEST, digest
from lit_rec.run.reranking_story import place
from lit_rec.run.results import FIELDS
from lit_rec.run.round_report import answered_states
from lit_rec.run.statistics import user_table
from lit_rec.run.stories import RERANKING, SESSIONS, Story

SWEEP = "sweep.json"  # in the folder of a sweep: which runs it is made of
STORIES = {story.task: story for story in (RERANKING, SESSIONS)}
TOLERANCE = 5e-6  # between a mean in results.json, which is rounded, and the same mean again
_REWARDS = {"fold": pl.Int64, "user": pl.Int64, "round": pl.Float64, "tokens": pl.Int64, "reward": pl.Float64}


@dataclass(frozen=True)
class FinishedRun:
    """A run that `fit` has finished.

    Attributes:
        path: Its folder.
        config: The composed configuration.
        environment: Versions, machine and cost of the last start.
        results: The lines of results.json.
        frames: Per-list metrics of every row in `results`: row, reranker, seed, fold, split, user, list, metrics.
        population: What a number in `user` means: runs with the same one number the same users, or sessions, alike;
            where `users` names them, their names are the same users.
        ground: What is ranked: with the same one, every row of both runs orders the same candidates.
        cost: `seconds` of all stages together, however often the run was stopped; `answers` and `tokens` of the LLM
            where the stages count them, else None; `parts` of `cost_parts` where an LLM is tuned.
        curve: (place among rounds, or epoch, reward on held-out users or sessions) while the LLM, or agent, learned.
        users: Ids of the users that the numbers in `user` stand for; empty where the run does not tell.
        rewards: fold, user, round (place of the state), tokens and reward of the answers to training users that a
            report shows; without lines where no LLM was tuned.
        size: Users, or sessions, that it had; None where it does not tell.
        flattered: Whether the agent that picks hints was kept by the rewards of the held-out users of the curve.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    results: list[dict[str, Any]]
    frames: pl.DataFrame
    population: str
    ground: str
    cost: dict[str, Any] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    rewards: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_REWARDS))
    flattered: bool = False
    size: int | None = None

    @property
    def story(self) -> Story:
        """The story of its recipe."""
        return STORIES[self.results[0]["task"]]


def run_folders(paths: Sequence[str | Path]) -> list[Path]:
    """The run folders that are meant: a sweep stands for its finished runs; what is named twice counts once.

    Raises:
        UserError: A sweep has no finished run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        named = [path]
        if (path / SWEEP).is_file() and not (path / "results.json").is_file():
            note = _json(path / SWEEP, "a sweep")
            runs = note.get("runs") if isinstance(note, dict) else None
            if not isinstance(runs, list):
                why, fix = "it holds no list of runs", "start the same sweep command again, or name its runs"
                raise UserError("a sweep cannot be read", where=str(path / SWEEP), why=why, fix=fix)
            named = [path / str(name) for name in runs if (path / str(name) / "results.json").is_file()]
            if not named:
                raise UserError(
                    f"no run of the sweep in {path} is finished",
                    where="RUN",
                    fix="start the same sweep command again",
                )
        for one in named:
            found.setdefault(one.resolve(), one)
    return list(found.values())


def read_run(path: str | Path) -> FinishedRun:
    """Read one run.

    Raises:
        UserError: It is no run, it is unfinished, it was written by another version of lit_rec, or its stages and its
            results do not belong together.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no run folder", where="RUN", fix="name a folder that `fit` has written (run.dir)")
    again = "start `fit` with the same configuration again: it reuses what is there"
    missing = [name for name in ("results.json", "config.yaml", "environment.json") if not (path / name).is_file()]
    if missing:
        begun = any((path / name).exists() for name in ("stages", ".lock", "results.json"))
        what = f"{path} holds an unfinished run" if begun else f"{path} is no run folder"
        cure = again if begun else "name a folder that `fit` has written (run.dir)"
        raise UserError(what, where="RUN", why=f"there is no {missing[0]}", fix=cure)
    config, results = _config(path / "config.yaml"), _json(path / "results.json", "the results")
    _check_format(path, config, results)
    try:
        frames = _session_frames(path, config, results) if _sessions(results) else _list_frames(path, config, results)
        population, ground, users = _identity(path, config, _sessions(results))
        cost = _cost(path, _sessions(results))
        rewards = _rewards(path, config, _sessions(results))
    except (OSError, KeyError, SafetensorError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"the metrics of single users are not in {path}",
            where=f"{path / 'stages'}",
            why=" ".join(str(error).split())[:300],
            fix=again,
        ) from error
    run = FinishedRun(
        path,
        config,
        _json(path / "environment.json", "the environment"),
        results,
        frames,
        population,
        ground,
        cost,
        _curve(path, config, _sessions(results)),
        users,
        rewards,
        any(one.get("heldout_flattered") for one in _states(path)),
        _size(path, _sessions(results)),
    )
    _check_means(run, again)
    return run


def _sessions(results: Sequence[dict[str, Any]]) -> bool:
    return results[0]["task"] == SESSIONS.task


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(
            f"{what} cannot be read", where=str(path), why=str(error)[:200], fix="run `fit` again"
        ) from error


def _config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, OSError) as error:  # the second: it is no text
        why, fix = " ".join(str(error).split()), "restore it from a copy, or run `fit` again"
        raise UserError("a configuration cannot be read", where=str(path), why=why, fix=fix) from error
    return config if isinstance(config, dict) else {}


def _check_format(path: Path, config: dict[str, Any], results: Any) -> None:
    """Refuse what another version of lit_rec wrote, or somebody's hand."""
    if results == []:
        raise UserError(
            f"{path} has no results", where=str(path / "results.json"), fix="switch a row on, and fit again"
        )
    lines = results if isinstance(results, list) else []
    fits = lines and all(isinstance(line, dict) and {*FIELDS} <= {*line} for line in lines)
    fits = fits and lines[0]["task"] in STORIES and all(re.fullmatch(r"[\w-]+", str(line["row"])) for line in lines)
    if not fits or not {"recipe", "seed", "evaluation"} <= {*config} or not isinstance(config["evaluation"], dict):
        raise UserError(
            f"{path} was written by another version of lit_rec",
            where=str(path / ("results.json" if not fits else "config.yaml")),
            why="a key that this version writes is not there",
            fix="run `fit` again with this version, in another run.dir",
        )


def _names(results: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(line["row"] for line in results))


def _list_frames(path: Path, config: dict[str, Any], results: Sequence[dict[str, Any]]) -> pl.DataFrame:
    folders = [path / "stages" / f"fold_{fold}" / "rows" for fold in _folds(config)]
    return pl.concat([pl.read_parquet(rows / row / "metrics.parquet") for rows in folders for row in _names(results)])


def _folds(config: dict[str, Any]) -> list[int]:
    evaluation = config["evaluation"]
    return list(evaluation.get("only_folds") or range(int(evaluation.get("folds", 1))))


def _session_frames(path: Path, config: dict[str, Any], results: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """The metrics that the recipe makes of the kept ranks."""
    stages, ks = path / "stages", list(config["evaluation"]["ks"])
    parts = load_file(stages / "sessions" / "parts.safetensors")
    candidates = load_file(stages / "sessions" / "lists.safetensors")["items"]
    parts["test"] = sampled(parts["test"], config["evaluation"].get("test"), config["seed"])
    frames = []
    for row in _names(results):
        for split, number, sessions, metrics in _measured(stages / "rows" / row, row, parts, candidates, ks):
            frames.append(session_frame(row, results[0]["reranker"], split, sessions, metrics, number))
    return pl.concat(frames)


def _measured(
    folder: Path, row: str, parts: dict[str, Tensor], candidates: Tensor, ks: list[int]
) -> Iterator[tuple[str, int, Tensor, dict[str, Tensor]]]:
    """Yield (split, seed, sessions, metrics) of a row; `random` is no stage but the mean over all ranks."""
    size = candidates.shape[1]
    if row == "random":
        for split in ("validation", "test"):
            if len(parts[split]):
                yield split, 0, parts[split], random_metrics(candidates[parts[split]], ks)
        return
    for split, ranks in load_file(folder / "ranks.safetensors").items():
        for seed, drawn in enumerate(ranks):
            means = {name: values.mean(0) for name, values in rank_metrics(drawn, ks, size).items()}
            yield split, seed, parts[split], means


def _identity(path: Path, config: dict[str, Any], sessions: bool) -> tuple[str, str, list[str]]:
    """Whom the user numbers mean, what is ranked, and the users' ids."""
    if sessions:
        content = hashlib.sha256((path / "stages" / "sessions" / "lists.safetensors").read_bytes()).hexdigest()
        return content, content, []
    stage = path / "stages" / "lists"
    key = json.loads((stage / MANIFEST).read_text())["key"]
    users = _json(stage / "users.json", "the users") if (stage / "users.json").is_file() else []
    # A sample of users is drawn by the seed, and numbers its users anew.
    drawn = [key.get("users"), config["seed"]] if key.get("users") is not None and not users else None
    ground = hashlib.sha256((stage / "lists.safetensors").read_bytes()).hexdigest()
    return digest([key["data"], drawn, bool(users)]), ground, users


def _size(path: Path, sessions: bool) -> int | None:
    file = path / "stages" / ("sessions" if sessions else "lists") / MANIFEST
    counts = (_json(file, "a stage's manifest") if file.is_file() else {}).get("counts") or {}
    return counts.get("sessions" if sessions else "users")


def _cost(path: Path, sessions: bool) -> dict[str, Any]:
    """What the stages took: seconds, answers and tokens where counted; part by part where an LLM is tuned."""
    root = path / "stages"
    files = sorted(root.rglob(MANIFEST))
    stages = [{**_json(file, "a stage's manifest"), "name": file.parent.relative_to(root).as_posix()} for file in files]
    counts = [stage.get("counts") or {} for stage in stages]
    counted = [one for one in counts if {"answers", "tokens"} <= {*one}]
    return {
        "seconds": sum(stage_seconds(stage) for stage in stages),
        "answers": sum(one["answers"] for one in counted) or None,
        "tokens": sum(one["tokens"] for one in counted) or None,
        "parts": [] if sessions else cost_parts(stages, root),
    }


def _curve(path: Path, config: dict[str, Any], sessions: bool) -> list[tuple[float, float]]:
    """How the reward of held-out users, or sessions, went; empty where nothing learned."""
    if sessions:
        file = path / "stages" / f"round_{(config.get('agent') or {}).get('rounds')}" / "agent" / "curves.json"
        epochs = _json(file, "the agent's curves") if file.is_file() else []
        points = [(epoch.get("epoch", n) + 1, epoch.get("val/reward")) for n, epoch in enumerate(epochs)]
    else:
        points = [(place(str(one.get("name"))), (one.get("heldout_reward") or {}).get("mean")) for one in _states(path)]
    found = [(at, value) for at, value in points if at is not None and value is not None and math.isfinite(value)]
    return sorted(found, key=lambda point: point[0])


def _states(path: Path) -> list[dict[str, Any]]:
    """The states of the LLM in numbers; none where it was not tuned."""
    file = path / "rounds.json"
    return _json(file, "the rounds") if file.is_file() else []


def _rewards(path: Path, config: dict[str, Any], sessions: bool) -> pl.DataFrame:
    """What the answers of every state were worth, and how long they are; their texts stay where they are."""
    parts = [pl.DataFrame(schema=_REWARDS)]
    names = [] if sessions else answered_states([str(one.get("name")) for one in _states(path)])
    for fold in _folds(config) if names else []:
        for name in names:
            file = path / "stages" / f"fold_{fold}" / name / "rewards" / "rewards.parquet"
            table = pl.read_parquet(file, columns=["user", "split", "tokens", "reward"]).filter(
                pl.col("split") == "train"
            )
            table = table.with_columns(fold=pl.lit(fold), round=pl.lit(place(name)))
            parts.append(table.select(pl.col(column).cast(kind) for column, kind in _REWARDS.items()))
    return pl.concat(parts)


def _check_means(run: FinishedRun, again: str) -> None:
    """The users' metrics have to give the means of results.json."""
    first = run.results[0]
    metric, convention = first["metric"], first["convention"]
    known = user_table(run.frames, [f"{metric}|{convention}"]).group_by("split", "reranker", "row")
    means = {(s, k, r): mean for s, k, r, mean in known.agg(pl.col(f"{metric}|{convention}").mean()).iter_rows()}
    wanted = (metric, convention, run.story.units[0])
    for line in run.results:
        if (line["metric"], line["convention"], line["unit"]) != wanted:
            continue
        mean = means.get((line["split"], line["reranker"], line["row"]))
        if mean is None or abs(mean - (line["mean"] or 0.0)) > TOLERANCE:
            raise UserError(
                f"the results and the stages in {run.path} do not belong together",
                where=f"results.json, row {line['row']}",
                why=f"{metric} on {line['split']} is {line['mean']}, and {mean} by the stages",
                fix=again,
            )
