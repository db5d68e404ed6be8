"""What a run is going to do: its parts in order, which are finished, and what the LLM has to write at most.

A plan is made from the configuration and the number of users or sessions; no model is loaded for it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_rec import distributed
from lit_rec.run.folder import MANIFEST, RunFolder, write_atomic
from lit_rec.run.plan_parts import Sizes, Work, reranking_parts, session_parts
from lit_rec.run.progress import console
from lit_rec.run.rates import rates

FINISHED, BEGUN, AHEAD = "finished", "begun", "ahead"


@dataclass(frozen=True)
class Part:
    """One part of a recipe.

    Attributes:
        name: For people; the parts of several folds have the same one.
        stages: The stages it leaves, in order, and what the LLM has to do for each.
        finished: Those that are there already.
    """

    name: str
    stages: Mapping[str, Work]
    finished: Collection[str] = field(default=())

    @property
    def state(self) -> str:
        """FINISHED, BEGUN or AHEAD."""
        return AHEAD if not self.finished else FINISHED if len(self.finished) == len(self.stages) else BEGUN

    @property
    def left(self) -> Work:
        """What the LLM still has to do for it, at most."""
        return sum((work for stage, work in self.stages.items() if stage not in self.finished), Work())


def make_plan(cfg: DictConfig, sizes: Sizes, finished: Collection[str] = ()) -> list[Part]:
    """The parts of a run in order.

    Args:
        cfg: The configuration.
        sizes: Users of fold 0, or sessions.
        finished: Names of the stages that are there already.
    """
    if cfg.recipe == "re2llm":
        made = session_parts(cfg, sizes)
    else:
        e = cfg.evaluation
        if e.folds > 1:  # folds differ by a user; the largest training part counts
            users = sizes.train + sizes.validation + sizes.test
            smallest = users // e.folds
            sizes = replace(sizes, train=users - sizes.validation - smallest, test=smallest)
        folds = range(e.folds) if e.only_folds is None else e.only_folds
        made = [part for fold in folds for part in reranking_parts(cfg, sizes, f"fold_{fold}/")]
    return [Part(name, stages, tuple(s for s in stages if s in finished)) for name, stages in made]


# --- how it is told ---------------------------------------------------------------------------------------------------

_COLUMNS = (("answers", "LLM answers"), ("tokens", "tokens"), ("titles", "titles scored"))


def by_name(parts: list[Part]) -> list[Part]:
    """The parts with those of all folds taken together."""
    found: dict[str, Part] = {}
    for part in parts:
        one = found.get(part.name, Part(part.name, {}))
        done = tuple(dict.fromkeys([*one.finished, *part.finished]))
        found[part.name] = Part(part.name, {**one.stages, **part.stages}, done)
    return list(found.values())


def total(parts: list[Part]) -> Work:
    """What is left for the LLM in all parts, at most; a stage of several folds counts once."""
    return sum((part.left for part in by_name(parts)), Work())


def render_plan(cfg: DictConfig, parts: list[Part]) -> RenderableType:
    """The plan for people."""
    parts, left = by_name(parts), total(parts)
    used = [(key, label) for key, label in _COLUMNS if any(getattr(part.left, key) for part in parts)]
    table = Table(title="Plan; what is finished is reused", title_justify="left")
    table.add_column("part")
    table.add_column("")
    for _, label in used:
        table.add_column(f"{label}, at most", justify="right")
    for part in parts:
        some = f"{len(part.finished)} of {len(part.stages)} stages are finished"
        said = {FINISHED: "finished", BEGUN: some, AHEAD: ""}[part.state]
        table.add_row(part.name, said, *(f"{n:,}" if (n := getattr(part.left, key)) else "" for key, _ in used))
    return Group(
        table,
        Text("\n".join([in_words(left, rates(cfg)), *(f"{what}: {where}" for what, where in places(cfg).items())])),
    )


def seconds_left(left: Work, known: Mapping[str, float]) -> float | None:
    """How long the LLM needs at most, at the rates of the last time; None where one is not known."""
    asked = {"tokens": left.tokens, "titles": left.titles}
    if any(count and not known.get(unit) for unit, count in asked.items()):
        return None
    return sum(count / known[unit] for unit, count in asked.items() if count)


def in_words(left: Work, known: Mapping[str, float]) -> str:
    """What is left for the LLM, how long that takes, and that it is an upper bound."""
    written = f"{left.answers:,} answers of {left.tokens:,} tokens to write" if left.answers else ""
    scored = f"{left.titles:,} titles to score" if left.titles else ""
    if not (written or scored):
        return "The LLM has nothing left to do."
    return (
        f"For the LLM at most {' and '.join(filter(None, (written, scored)))}: an upper bound. "
        "Answers end sooner, fewer hints are kept, and what is in the store is not asked again.\n"
        f"{_how_long(seconds_left(left, known), known)}"
    )


def _how_long(seconds: float | None, known: Mapping[str, float]) -> str:
    if seconds is None:
        return "How long that takes is told once this LLM has worked here; each step shows its time left."
    minutes = seconds / 60
    took = f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    at = " and ".join(f"{rate:,.0f} {unit}/s" for unit, rate in known.items())
    return f"At the {at} of the last time that is {took} at most; training comes on top."


def places(cfg: DictConfig) -> dict[str, str]:
    """Where everything goes."""
    folder = Path(cfg.run.dir)
    known = {"Run folder": str(folder), "LLM answers": str(cfg.run.answers), "Report": str(folder / "report.html")}
    if "tensorboard" in cfg.logging.to and (cfg.recipe == "re2llm" or cfg.policy.rounds):
        known["Curves"] = str(folder / "tensorboard")
    return known


class PlannedRun(RunFolder):
    """A run folder that keeps its configuration from the start, and tells the plan once the data is known.

    Args:
        cfg: The configuration.
        fresh: As of `RunFolder`.
    """

    def __init__(self, cfg: DictConfig, *, fresh: bool = False) -> None:
        super().__init__(cfg.run.dir, fresh=fresh)
        self._cfg, self._told = cfg, False
        # A finished run's own stays until another one is finished, an unfinished one's until something is made anew: a
        # start that is refused leaves it as it was.
        self._kept = not distributed.main() or (self.path / "results.json").is_file()
        if self._kept or ((self.path / "config.yaml").is_file() and not fresh):
            return
        try:
            self._keep()
        except BaseException:
            self.close()
            raise

    def _keep(self) -> None:
        write_atomic(self.path / "config.yaml", OmegaConf.to_yaml(self._cfg))
        self._kept = True

    def run_stage(self, name: str, *arguments: Any, **settings: Any) -> Path:
        """Run or reuse a stage, as `RunFolder` does."""
        folder = super().run_stage(name, *arguments, **settings)
        if not self._kept and not self.log[-1]["reused"]:
            self._keep()
        if distributed.main() and not self._told and (name == "sessions" or name.endswith("/split")):
            self._told = True
            counts = self.log[-1]["counts"]
            train, validation, test = (int(counts[part]) for part in ("train", "validation", "test"))
            sizes = Sizes(train, validation, test, int(counts.get("candidates", 0)), int(counts.get("items", 0)))
            self._tell(make_plan(self._cfg, sizes, self.finished()))
        return folder

    def finished(self) -> set[str]:
        """Names of the stages that are there."""
        stages = self.path / "stages"
        return {str(path.parent.relative_to(stages)) for path in stages.rglob(MANIFEST)}

    def _tell(self, parts: list[Part]) -> None:
        console.aside(render_plan(self._cfg, parts))
        left = seconds_left(total(parts), rates(self._cfg))
        told = [{"name": part.name, "state": part.state, "at_most": vars(part.left)} for part in by_name(parts)]
        console.emit("plan", parts=told, at_most=vars(total(parts)), seconds_at_most=left, places=places(self._cfg))
