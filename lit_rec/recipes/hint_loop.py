"""The stages of Re2LLM: mistakes, hints, rewards and agents of every round, each built once and kept."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec.agent.environment import Environment, MatrixEnvironment
from lit_rec.agent.filtering import FilterSettings, choose, try_out, written
from lit_rec.agent.hints import Hint, HintBase
from lit_rec.agent.llm_environment import HintEnvironment
from lit_rec.agent.policy import HintPolicy
from lit_rec.agent.reflection import Mistake, Reflector
from lit_rec.config import plain
from lit_rec.llm.ranking import normalised
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.run.progress import console, step

Build = Callable[[Path], Mapping[str, Any] | None]


class HintLoop:
    """Rounds of reflection, and what the agent needs of them.

    Args:
        ground: Sessions, ranker, embeddings, run folder.
    """

    def __init__(self, ground: SessionGround) -> None:
        self.ground, self.cfg, self.run = ground, ground.cfg, ground.run
        _ = ground.scoring
        measured = {"reward": self.cfg.agent.reward, "k": self.cfg.agent.k}
        self.asked = HintEnvironment(ground.ranker, **measured)
        self.asked_whole = HintEnvironment(replace(ground.ranker, shortlist=None), **measured)
        self._bases: dict[int, HintBase] = {0: HintBase()}
        self._boards: dict[str, TensorBoardLogger] = {}

    @cached_property
    def reward_key(self) -> dict[str, Any]:
        """What a reward depends on, besides its hint."""
        return {"reward": self.cfg.agent.reward, "k": self.cfg.agent.k, "llm": self.ground.llm_key}

    @property
    def rounds(self) -> int:
        """How many rounds there are."""
        return int(self.cfg.agent.rounds)

    def board(self, agent: str) -> TensorBoardLogger:
        """TensorBoard of an agent."""
        if agent not in self._boards:
            self._boards[agent] = TensorBoardLogger(
                str(self.run.path), name="tensorboard", version=agent, default_hp_metric=False
            )
        return self._boards[agent]

    # --- reflection ---------------------------------------------------------------------------------------------------

    @cached_property
    def reflector(self) -> Reflector:
        """Leads the conversations."""
        r, data = self.cfg.reflection, self.ground.data
        settings = SamplingSettings(r.max_new_tokens, r.temperature, r.top_p)
        return Reflector(
            self.ground.llm,
            template=r.template,
            noun=data.item_noun,
            verb=data.verb,
            hints=r.hints,
            settings=settings,
        )

    def base(self, number: int) -> HintBase:
        """The hint base after the reflection of round `number`."""
        if number not in self._bases:
            self._bases[number] = self._reflect(number)
        return self._bases[number]

    def _reflect(self, number: int) -> HintBase:
        """Round `number`: errors of the agent so far -> conversations -> hints -> those that help."""
        r, before = self.cfg.reflection, self.base(number - 1)

        def build(work: Path) -> dict[str, Any]:
            sessions, ranks = self._errors(number)
            mistakes = [self._mistake(s) for s in sessions.tolist()]
            with step(f"round {number}: the LLM reflects", 3 * len(mistakes), "answers") as progress:
                talks = self.reflector.reflect(mistakes, progress)
            (work / "conversations.json").write_text(json.dumps(talks, indent=1, ensure_ascii=False))
            hints = written(
                mistakes,
                talks,
                number=number,
                first_id=len(before.hints) + 1,
                limit=r.hints,
                example=self.reflector.example,
                titles={normalised(title or "") for title in self.ground.data.items["title"]},
            )
            self._filter(hints, before, number)
            base = HintBase([*before.hints, *hints])
            base.save(work / "hints.json")
            return {"errors": len(ranks), "conversations": len(talks), "hints": len(hints), **HintBase(hints).fates()}

        key = {"reflection": plain(r), "rounds": self.rounds, "seed": self.cfg.seed, **self.reward_key}
        after = ("scoring", *([f"round_{number - 1}/agent"] if number > 1 else []))
        folder = self.run.run_stage(f"round_{number}/hints", build, key=key, after=after)
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

    def _errors(self, number: int) -> tuple[Tensor, Tensor]:
        """Training sessions that are ranked badly with the choices of the agent so far, a random sample of them.

        Returns:
            The sample's session numbers, and the ranks of all errors.
        """
        r, train = self.cfg.reflection, self.ground.data.splits.train
        actions = torch.zeros(len(train), dtype=torch.long)
        if number > 1:
            actions = self.policy(number - 1).greedy(self.ground.states[train])
        self.asked.set_hints(self.base(number - 1).texts)
        ranks = self.ranks(train, actions, f"round {number}: ranking training sessions")
        errors = train[ranks > r.error_rank]
        drawn = torch.randperm(len(errors), generator=torch.Generator().manual_seed(self.cfg.seed + number))
        return errors[drawn[: r.sessions]].sort().values, ranks[ranks > r.error_rank]

    def ranks(self, sessions: Tensor, actions: Tensor, what: str) -> Tensor:
        """Ranks [n] of the targets when the agent takes these actions."""
        texts: list[str | None] = [None, *self.asked.hints]
        with step(what, len(sessions), "questions") as progress:
            self.asked.progress = progress
            found = self.asked.ask(sessions, [[texts[a]] for a in actions.tolist()])[0].squeeze(1)
            self.asked.progress = None
        return found

    def _mistake(self, session: int) -> Mistake:
        ground, items = self.ground, self.ground.data.lists.items[session]
        scores = ground.ranker.scores(torch.tensor([session]), [[None]])[0][0]
        best = scores.argsort(descending=True, stable=True)[: self.cfg.ranking.top].tolist()
        target = ground.target(session)
        answer = [ground.title(int(items[c])) for c in best if scores[c] > -torch.inf and int(items[c]) != target]
        return Mistake(session, ground.titles(session)[-self.cfg.ranking.history :], answer, ground.title(target))

    def _filter(self, hints: list[Hint], before: HintBase, number: int) -> None:
        """Decide which hints are kept (in place)."""
        r = self.cfg.reflection
        known = {text.casefold() for text in before.texts}
        running = [h for h in hints if not h.fate]
        for place, hint in enumerate(running):
            if hint.text.casefold() in known:
                hint.fate = "repeated"
            elif place >= r.tried:
                hint.fate = "not tried"
        train = self.ground.data.splits.train
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.cfg.seed))[: r.others]
        tried = sum(not h.fate for h in hints)
        with step(f"round {number}: trying hints", tried * (1 + len(drawn)), "questions") as progress:
            self.asked.progress = self.asked_whole.progress = progress
            try_out(hints, self.asked, train[drawn].sort().values, whole=self.asked_whole)
            self.asked.progress = self.asked_whole.progress = None
        room = r.size * number // self.rounds - len(before.kept)  # every round adds its share
        settings = FilterSettings(room, r.tried, r.min_gain, r.similarity, r.ask_redundancy)
        choose(hints, before, settings, encode=self.ground.encoder.encode, reflector=self.reflector)

    def vectors(self, number: int) -> Tensor:
        """[A, d] embeddings of the kept hints."""
        none = self.ground.states.new_zeros(0, self.ground.states.shape[1])
        # One by one: in a batch the last digits would depend on the others, and a hint must keep its embedding.
        return torch.cat([none, *(self.ground.encoder.encode([text]) for text in self.base(number).texts)])

    # --- rewards ------------------------------------------------------------------------------------------------------

    def environment(self, number: int) -> Environment:
        """What the agent of round `number` learns from."""
        texts = self.base(number).texts
        self.asked.set_hints(texts)
        if self.cfg.agent.rewards == "online":
            return self.asked
        found = self.matrix_of(number)
        return MatrixEnvironment(found["gains"], found["sessions"])

    def matrix_of(self, number: int) -> dict[str, Tensor]:
        """Ranks and gains of every hint of a round for the training sessions, then the validation sessions."""
        splits = self.ground.data.splits
        return self.matrix(f"round_{number}/rewards", torch.cat([splits.train, splits.validation]), number)

    def all_ranks(self, sessions: Tensor, number: int) -> Tensor:
        """[n, A + 1] ranks of validation sessions with every action of a round."""
        if self.cfg.agent.rewards == "online":
            return self.matrix("matrix/validation", sessions, number)["ranks"]
        return self.matrix_of(number)["ranks"][len(self.ground.data.splits.train) :]

    def matrix(self, stage: str, sessions: Tensor, number: int) -> dict[str, Tensor]:
        """Ranks and gains [n, A + 1] of every hint for some sessions: 1 + A questions each."""

        def build(work: Path) -> dict[str, Any]:
            self.asked.set_hints(self.base(number).texts)
            total = len(sessions) * (1 + len(self.asked.hints))
            with step(f"{stage}: every hint for {len(sessions)} sessions", total, "questions") as progress:
                self.asked.progress = progress
                ranks, gains = self.asked.ranks(sessions), self.asked.matrix(sessions)
                self.asked.progress = None
            save_file({"ranks": ranks, "gains": gains, "sessions": sessions.contiguous()}, work / "matrix.safetensors")
            mean = float(gains[:, 1:].mean()) if self.asked.hints else 0.0
            return {"sessions": len(sessions), "hints": len(self.asked.hints), "mean gain": mean}

        key = {**self.reward_key, "sessions": len(sessions)}
        folder = self.run.run_stage(stage, build, key=key, after=("sessions", f"round_{number}/hints"))
        return load_file(folder / "matrix.safetensors")

    # --- agents -------------------------------------------------------------------------------------------------------

    def keep_agent(self, stage: str, number: int, build: Build) -> Path:
        """An agent as it was in the best epoch of its round, and its learning curves."""
        _ = self.ground.states
        settings = {k: v for k, v in plain(self.cfg.agent).items() if k != "seeds"}
        rewards = (f"round_{number}/rewards",) if self.cfg.agent.rewards == "matrix" else (f"round_{number}/hints",)
        key = {"agent": settings, "seed": self.cfg.seed}
        return self.run.run_stage(stage, build, key=key, after=("states", *rewards))

    def policy(self, number: int, stage: str = "") -> HintPolicy:
        """The kept policy of a round."""
        return HintPolicy.load(self.run.stage(stage or f"round_{number}/agent"))

    def curves(self, stage: str) -> list[dict[str, Any]]:
        """Learning curves of a kept agent, one dictionary per epoch."""
        return json.loads((self.run.stage(stage) / "curves.json").read_text())
