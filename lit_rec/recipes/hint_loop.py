"""The stages of hints: mistakes, hints, rewards and agents of every round, each built once and kept.

`SessionHints` is about sessions that a frozen LLM ranks (Re2LLM), `UserHints` about users whose preferences an LLM
describes (the unified loop). What follows is the same for both; "session" stands for either.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec.agent.environment import AskedEnvironment, Environment, MatrixEnvironment
from lit_rec.agent.filtering import FilterSettings, choose, try_out, written
from lit_rec.agent.hints import Hint, HintBase
from lit_rec.agent.policy import HintPolicy
from lit_rec.agent.reflection import Mistake, Reflector
from lit_rec.config import plain
from lit_rec.data.canonical import RatingsData
from lit_rec.data.lists import ListSet
from lit_rec.data.session_sets import SessionData
from lit_rec.data.splits import Splits
from lit_rec.llm.ranking import normalised
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.recipes.models import Models, callbacks_key
from lit_rec.run.folder import RunFolder
from lit_rec.run.loggers import Board, make_board
from lit_rec.run.progress import Step, console, step
from lit_rec.run.rates import remember

Build = Callable[[Path], Mapping[str, Any] | None]


class HintLoop(ABC):
    """Rounds of reflection, and what the agent needs of them.

    Args:
        ground: Models and run folder.
        rounds: How many rounds there are.
        prefix: Of the names of all stages.

    Attributes:
        state_stage: Stage in which `states` are kept.
    """

    cfg: DictConfig
    run: RunFolder
    state_stage: str

    def __init__(self, ground: Models, *, rounds: int, prefix: str = "") -> None:
        self.cfg, self.run, self.rounds, self.prefix = ground.cfg, ground.run, rounds, prefix
        self.models: Any = ground
        self._bases: dict[int, HintBase] = {0: HintBase()}
        self._boards: dict[str, Board] = {}

    # --- whom the hints are for ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def states(self) -> Tensor:
        """[S, d] what the agent sees of each session."""

    @property
    @abstractmethod
    def lists(self) -> ListSet:
        """Sessions as lists, one each, as `SessionDataModule` serves them."""

    @property
    @abstractmethod
    def splits(self) -> Splits:
        """Training, validation and test sessions."""

    @property
    @abstractmethod
    def about(self) -> tuple[RatingsData | SessionData, str]:
        """The data set, and what was done with its items: "watched"."""

    @property
    @abstractmethod
    def reward_key(self) -> dict[str, Any]:
        """What a reward depends on, besides its hint and the stages before."""

    @abstractmethod
    def asked(self, number: int) -> AskedEnvironment:
        """Answers what a hint gains in round `number`."""

    def asked_whole(self, number: int) -> AskedEnvironment:
        """The same for a session the LLM got wrong."""
        return self.asked(number)

    @abstractmethod
    def errors(self, number: int) -> tuple[Tensor, int]:
        """Training sessions to reflect on in round `number`, and how many errors there are in all."""

    @abstractmethod
    def mistake(self, session: int, number: int) -> Mistake:
        """What went wrong in a session."""

    @abstractmethod
    def made_from(self, number: int) -> tuple[str, ...]:
        """Visit the stages that the reflection of round `number` rests on, and give their full names."""

    def llm_of(self, number: int) -> AbstractContextManager[None]:
        """The LLM as it is when round `number` begins."""
        return nullcontext()

    def work(self, done: Step) -> tuple[str, int]:
        """What the LLM did in a step, as a plan counts it: the unit, and how many."""
        return "tokens", done.extra

    def cost(self, *steps: Step) -> dict[str, int]:
        """What a stage's manifest says of the LLM's work in it."""
        return {}

    # --- plumbing -----------------------------------------------------------------------------------------------------

    def name(self, stage: str) -> str:
        """A stage's full name."""
        return f"{self.prefix}{stage}"

    def stage(self, name: str, build: Build, key: dict[str, Any], *after: str) -> Path:
        """A stage of the hints; `after` are full names."""
        return self.run.run_stage(self.name(name), build, key=key, after=after)

    def folder(self, stage: str) -> Path:
        """Where a finished stage lies."""
        return self.run.stage(self.name(stage))

    def board(self, agent: str) -> Board:
        """Curves of an agent."""
        if agent not in self._boards:
            self._boards[agent] = make_board(self.cfg, self.run.path, self.name(agent))
        return self._boards[agent]

    # --- reflection ---------------------------------------------------------------------------------------------------

    @cached_property
    def reflector(self) -> Reflector:
        """Leads the conversations."""
        r, (data, verb) = self.cfg.reflection, self.about
        return Reflector(
            self.models.llm,
            template=r.template,
            noun=data.item_noun,
            verb=verb,
            hints=r.hints,
            settings=SamplingSettings(r.max_new_tokens, r.temperature, r.top_p),
            attributes=data.item_attributes,
        )

    def base(self, number: int) -> HintBase:
        """The hint base after the reflection of round `number`."""
        if number not in self._bases:
            self._bases[number] = self._reflect(number)
        return self._bases[number]

    def _reflect(self, number: int) -> HintBase:
        """Round `number`: errors so far -> conversations -> hints -> those that help."""
        r, before = self.cfg.reflection, self.base(number - 1)

        def build(work: Path) -> dict[str, Any]:
            sessions, errors = self.errors(number)
            mistakes = [self.mistake(s, number) for s in sessions.tolist()]
            progress = step(f"round {number}: the LLM reflects", 3 * len(mistakes), "answers")
            with progress as talking, self.llm_of(number):
                talks = self.reflector.reflect(mistakes, talking)
            (work / "conversations.json").write_text(json.dumps(talks, indent=1, ensure_ascii=False))
            hints = written(
                mistakes,
                talks,
                number=number,
                first_id=len(before.hints) + 1,
                limit=r.hints,
                example=self.reflector.example,
                titles={normalised(title or "") for title in self.about[0].items["title"]},
            )
            with self.llm_of(number):
                trying = self._filter(hints, before, number)
            base = HintBase([*before.hints, *hints])
            base.save(work / "hints.json")
            told = {"errors": errors, "conversations": len(talks), "hints": len(hints), **HintBase(hints).fates()}
            return told | self.cost(talking, trying)

        key = {"reflection": plain(r), "rounds": self.rounds, "seed": self.cfg.seed, **self.reward_key}
        folder = self.stage(f"round_{number}/hints", build, key, *self.made_from(number))
        base = HintBase.load(folder / "hints.json")
        if not base.kept:
            told = ", ".join(f"{count} {fate}" for fate, count in base.fates().items())
            console.print(
                f"[yellow]no hint of round {number} was kept[/] ({told or 'no session was an error'}). For more, raise "
                "reflection.sessions, lower reflection.min_gain, or use a larger LLM; what it wrote is in the store, "
                "so --fresh pays for nothing twice",
                highlight=False,
            )
        return base

    def _filter(self, hints: list[Hint], before: HintBase, number: int) -> Step:
        """Decide which hints are kept (in place); returns what was asked for it."""
        r = self.cfg.reflection
        known = {text.casefold() for text in before.texts}
        running = [h for h in hints if not h.fate]
        for place, hint in enumerate(running):
            if hint.text.casefold() in known:
                hint.fate = "repeated"
            elif place >= r.tried:
                hint.fate = "not tried"
        train = self.splits.train
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.cfg.seed))[: r.others]
        tried = sum(not h.fate for h in hints)
        asked, whole = self.asked(number), self.asked_whole(number)
        with step(f"round {number}: trying hints", tried * (1 + len(drawn)), "questions") as progress:
            asked.progress = whole.progress = progress
            try_out(hints, asked, train[drawn].sort().values, whole=whole)
            asked.progress = whole.progress = None
        room = r.size * number // self.rounds - len(before.kept)  # every round adds its share
        settings = FilterSettings(room, r.min_gain, r.similarity, r.ask_redundancy)
        choose(hints, before, settings, encode=self.models.encoder.encode, reflector=self.reflector)
        return progress

    def vectors(self, number: int) -> Tensor:
        """[A, d] embeddings of the kept hints."""
        none = self.states.new_zeros(0, self.states.shape[1])
        # One by one: in a batch the last digits would depend on the others, and a hint must keep its embedding.
        return torch.cat([none, *(self.models.encoder.encode([text]) for text in self.base(number).texts)])

    # --- rewards ------------------------------------------------------------------------------------------------------

    def environment(self, number: int) -> Environment:
        """What the agent of round `number` learns from."""
        asked = self.asked(number)
        asked.set_hints(self.base(number).texts)
        if self.cfg.agent.rewards == "online":
            return asked
        found = self.matrix_of(number)
        return MatrixEnvironment(found["gains"], found["sessions"])

    def matrix_of(self, number: int) -> dict[str, Tensor]:
        """What every hint of a round brings the training sessions, then the validation sessions."""
        known = torch.cat([self.splits.train, self.splits.validation])
        return self.matrix(f"round_{number}/rewards", known, number)

    def matrix(self, stage: str, sessions: Tensor, number: int) -> dict[str, Tensor]:
        """What every hint brings some sessions, 1 + A questions each: `AskedEnvironment.table`, and `sessions`."""

        def build(work: Path) -> dict[str, Any]:
            asked = self.asked(number)
            asked.set_hints(self.base(number).texts)
            total = len(sessions) * (1 + len(asked.hints))
            name = self.name(stage)
            with step(f"{name}: every hint for {len(sessions)} sessions", total, "questions") as progress:
                asked.progress = progress
                found = asked.table(sessions)
                asked.progress = None
            remember(self.cfg, *self.work(progress), progress.seconds)
            save_file({**found, "sessions": sessions.contiguous()}, work / "matrix.safetensors")
            mean = float(found["gains"][:, 1:].mean()) if asked.hints else 0.0
            return {"sessions": len(sessions), "hints": len(asked.hints), "mean gain": mean} | self.cost(progress)

        _ = self.base(number)
        key = {**self.reward_key, "sessions": len(sessions)}
        folder = self.stage(stage, build, key, self.name(f"round_{number}/hints"))
        return load_file(folder / "matrix.safetensors")

    # --- agents -------------------------------------------------------------------------------------------------------

    def keep_agent(self, stage: str, number: int, build: Build) -> Path:
        """An agent as it was in the best epoch of its round, and its learning curves."""
        _ = self.states
        source = "rewards" if self.cfg.agent.rewards == "matrix" else "hints"
        return self.stage(stage, build, self.agent_key, self.state_stage, self.name(f"round_{number}/{source}"))

    @property
    def agent_key(self) -> dict[str, Any]:
        """How an agent is trained on its rewards."""
        settings = {k: v for k, v in plain(self.cfg.agent).items() if k != "seeds"}
        return {"agent": settings, "seed": self.cfg.seed, **callbacks_key(self.cfg)}

    def policy(self, number: int, stage: str = "") -> HintPolicy:
        """The kept policy of a round."""
        return HintPolicy.load(self.folder(stage or f"round_{number}/agent"))

    def curves(self, stage: str) -> list[dict[str, Any]]:
        """Learning curves of a kept agent, one dictionary per epoch."""
        return json.loads((self.folder(stage) / "curves.json").read_text())
