"""What the Re2LLM recipe stands on: sessions, the frozen LLM as their ranker, embeddings, and the run folder."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec.config import instantiate, plain
from lit_rec.data.session_sets import SessionData
from lit_rec.data.splits import sampled
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.prompts import item_text
from lit_rec.llm.ranker import Measure, SessionRanker
from lit_rec.llm.ranking import RankingPrompts
from lit_rec.metrics.sessions import rank_metrics, target_ranks
from lit_rec.recipes.models import Models, sharded
from lit_rec.run.progress import step
from lit_rec.schema import LoraConfig

if TYPE_CHECKING:
    from lit_rec.llm.server import ServerModel


class SessionGround(Models):
    """Sessions, ranker and embeddings of a run; each part is made when it is first needed."""

    # --- sessions -----------------------------------------------------------------------------------------------------

    @cached_property
    def _source(self) -> Any:
        return instantiate(self.cfg.data, "data")

    @cached_property
    def data(self) -> SessionData:
        """The sessions."""
        return self._source.load()

    def keep_sessions(self) -> Path:
        """The sessions as a stage that others depend on."""

        def build(work: Path) -> dict[str, Any]:
            data, splits = self.data, self.data.splits
            data.lists.save(work / "lists")
            parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
            save_file({k: v.contiguous() for k, v in parts.items()}, work / "parts.safetensors")
            data.items.with_row_index("row").write_parquet(work / "items.parquet")
            return data.report

        return self.run.run_stage("sessions", build, key={"data": self._source.describe()})

    @cached_property
    def test(self) -> Tensor:
        """The test sessions, or a sample of them."""
        return sampled(self.data.splits.test, self.cfg.evaluation.test, self.cfg.seed)

    def part(self, split: str) -> Tensor:
        """Session numbers of "train", "validation" or "test"."""
        return self.test if split == "test" else getattr(self.data.splits, split)

    def titles(self, session: int) -> list[str]:
        """Titles of a session, its target left out."""
        items = self.data.lists.history_items[session]
        return [self.title(i) for i in items[items > 0].tolist()]

    def title(self, item: int) -> str:
        """Title of an item; its id where there is none."""
        return self.data.items["title"][item] or self.data.items["item_id"][item]

    def target(self, session: int) -> int:
        """The item that came next."""
        return int(self.data.lists.targets(torch.tensor([session])))

    # --- the LLM ------------------------------------------------------------------------------------------------------

    @cached_property
    def llm(self) -> "LanguageModel | ServerModel":
        """The frozen LLM: in process, or behind a server."""
        c = self.cfg.llm
        if c.server is None:
            return LanguageModel(
                c,
                LoraConfig(),
                self.store,
                device=self.device,
                seed=self.cfg.seed,
                cache=self.cache,
                sharded=sharded(self.cfg),
            )
        from lit_rec.llm.server import ServerModel  # takes a second to import

        server = ServerModel.configured(c.server, c, self.store, seed=self.cfg.seed)
        server.check()
        return server

    def _ranker(self, template: str, measure: Measure) -> SessionRanker:
        r = self.cfg.ranking
        d = self.data
        prompts = RankingPrompts(d.items, d.item_noun, d.verb, template, history=r.history, top=r.top, years=r.years)
        return SessionRanker(
            self.data,
            prompts,
            self.llm,
            method=r.method,
            measure=measure,
            rotations=r.rotations,
            seed=self.cfg.seed,
            max_new_tokens=r.max_new_tokens,
            batch_tokens=r.batch_tokens,
            shortlist=r.shortlist,
        )

    @cached_property
    def ranker(self) -> SessionRanker:
        """The ranker of the whole run: template and measure as chosen on known sessions."""
        chosen = next(line for line in self.scoring if line["chosen"])
        return self._ranker(chosen["template"], Measure(chosen["prior"], chosen["length"]))

    @cached_property
    def scoring(self) -> list[dict[str, Any]]:
        """Every template with every measure, on known sessions without a hint; one is chosen (METHODS 2.6).

        The sessions are those of validation, then those of training, as many as are asked for: nothing is trained here.

        Returns:
            template, prior, length, ndcg (uncut), ndcg@10, hr@10, sessions, chosen.
        """
        r = self.cfg.ranking
        grid = len(r.templates) * len(r.priors) * len(r.lengths)

        def build(work: Path) -> dict[str, Any]:
            known = torch.cat([self.data.splits.validation, self.data.splits.train])
            sessions = known[: r.choose_on if grid > 1 else 0]
            lines = [line for template in r.templates for line in self._try_template(template, sessions)]
            best = max(range(len(lines)), key=lambda n: (lines[n]["ndcg"], -n))
            for n, line in enumerate(lines):
                line["chosen"] = n == best
            (work / "scoring.json").write_text(json.dumps(lines, indent=1))
            return {"tried": grid, "sessions": len(sessions), "chosen": lines[best]["template"]}

        key = {"ranking": {k: v for k, v in plain(r).items() if k != "batch_tokens"}, "llm": self.llm_key}
        self.keep_sessions()
        folder = self.run.run_stage("scoring", build, key=key | {"seed": self.cfg.seed}, after=("sessions",))
        return json.loads((folder / "scoring.json").read_text())

    def _try_template(self, template: str, sessions: Tensor) -> list[dict[str, Any]]:
        r = self.cfg.ranking
        ranker = self._ranker(template, Measure())
        measures = [Measure(prior, length) for prior in r.priors for length in r.lengths]
        common: dict[str, Any] = {"template": template, "sessions": len(sessions)}
        if not len(sessions):
            return [{**common, "prior": m.prior, "length": m.length, "ndcg": 0.0} for m in measures]
        candidates = self.data.lists.items[sessions]
        target = self.data.lists.targets(sessions)
        scored: list[Tensor] = []
        with step(f"ranking known sessions with {template}", len(sessions), "questions") as progress:
            if r.method == "generate":
                scored = [torch.cat(ranker.scores(sessions, [[None]] * len(sessions), progress))]
            else:
                raw = ranker.likelihoods(sessions, [[None]] * len(sessions), progress)
                prior = ranker.prior(sessions) if any(r.priors) else torch.zeros(candidates.shape)
                logps = torch.stack([one[0] for one, _ in raw])
                tokens = torch.stack([length for _, length in raw])
                scored = [m.scores(logps, tokens, prior) for m in measures]
        lines = []
        for measure, scores in zip(measures, scored, strict=True):
            ranks = target_ranks(scores, candidates, target, seed=self.cfg.seed)
            found = rank_metrics(ranks, [10], ranker.size)
            ndcg = float((1 / torch.log2(ranks.double() + 1)).mean())
            means = {k: round(float(found[k].mean()), 5) for k in ("ndcg@10", "hr@10")}
            lines.append({**common, "prior": measure.prior, "length": measure.length, "ndcg": round(ndcg, 6), **means})
        return lines

    # --- embeddings ---------------------------------------------------------------------------------------------------

    @cached_property
    def states(self) -> Tensor:
        """[S, d] state of every session: the mean embedding of its items' texts."""

        def build(work: Path) -> dict[str, Any]:
            history = self.data.lists.history_items
            items = len(history[history > 0].unique())
            with step("encoding items of the sessions", items, "texts") as progress:
                save_file({"states": self.mean_vectors(history, progress)}, work / "states.safetensors")
            return {"items": items}

        self.keep_sessions()
        folder = self.run.run_stage("states", build, key={"encoder": self.encoder_key}, after=("sessions",))
        return load_file(folder / "states.safetensors")["states"]

    def mean_vectors(self, history: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
        """[n, d] mean embedding of the texts of items [n, H], 0 = padding."""
        items = history[history > 0].unique()
        texts = [item_text(self.data.items, self.data.item_attributes, i) for i in items.tolist()]
        vectors = self.encoder.encode(texts, progress=progress)
        known = torch.zeros(len(self.data.items), vectors.shape[1])
        known[items] = vectors
        real = (history > 0).float()
        states = torch.stack([(known[row] * m[:, None]).sum(0) for row, m in zip(history, real, strict=True)])
        return states / real.sum(1, keepdim=True).clamp(min=1)
