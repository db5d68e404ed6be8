"""The frozen LLM as a ranker of session candidates: by the likelihood of their titles, or by the list it writes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_rec.data.session_sets import SessionData
from lit_rec.errors import UserError
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.prompts import Hints, Messages
from lit_rec.llm.ranking import RankingPrompts, parse_ranking
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.llm.scoring import Question, TitleScorer
from lit_rec.llm.store import Answer, AnswerStore

Progress = Callable[[int, int], None]
EMPTY = "(the session is not shown)"  # in the place of a hint: the prompt without the session


class Port(Protocol):
    """Whatever answers chat prompts: a model in process, or a server."""

    store: AnswerStore

    def answers(
        self,
        prompts: Sequence[Messages],
        counts: Sequence[int],
        *,
        settings: SamplingSettings | None = None,
        progress: Progress | None = None,
    ) -> list[list[Answer]]:
        """`counts[i]` answers to every prompt."""
        ...


@dataclass(frozen=True)
class Measure:
    """How likelihoods become a title's score: (log p(title | session) - prior * log p(title)) / tokens ** length.

    Attributes:
        prior: Weight of the title's likelihood without the session; 0: none, negative: known titles are favoured.
        length: 0: the sum over the title's tokens, 1: the mean.
    """

    prior: float = 0.0
    length: float = 0.0

    def scores(self, logps: Tensor, tokens: Tensor, prior: Tensor) -> Tensor:
        """Scores float32 [..., C] of log-likelihoods [..., C], title lengths [C] and priors [C]."""
        return ((logps - self.prior * prior) / tokens**self.length).float()


@dataclass
class Counts:
    """What was asked, and what came of it."""

    questions: int = 0  # (session, hint, rotation) asked for
    lists: int = 0  # answers read as lists
    failed: int = 0  # lists without a single candidate
    short: int = 0  # lists with fewer candidates than asked for
    entries: int = 0
    unknown: int = 0  # entries that are no candidate
    repeated: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Counts and the parse-failure rate."""
        return {**self.__dict__, "parse_failure_rate": self.failed / self.lists if self.lists else None}


@dataclass
class SessionRanker:
    """Ranks candidates with one prompt template.

    Args:
        data: The sessions.
        prompts: The words.
        llm: In process for `likelihood`; any port for `generate`.
        method: "likelihood" or "generate".
        measure: How likelihoods are combined.
        rotations: Orders of the candidates that scores are averaged over, where the prompt shows them.
        seed: Of the order of the candidates.
        max_new_tokens: Longest list.
        batch_tokens: Tokens of a forward pass.
        shortlist: With a hint only so many candidates are scored, the best without it; the others stay below them in
            the order without a hint. None: all.
        numbers: What the order of each session's candidates is drawn by; None: the session's number.
    """

    data: SessionData
    prompts: RankingPrompts
    llm: Any
    method: str = "likelihood"
    measure: Measure = field(default_factory=Measure)
    rotations: int = 1
    seed: int = 0
    max_new_tokens: int = 160
    batch_tokens: int = 2048
    shortlist: int | None = None
    numbers: Sequence[int] | None = None
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        if self.method == "likelihood" and not isinstance(self.llm, LanguageModel):
            raise UserError(
                "ranking by likelihood needs the language model in process",
                where="config key ranking.method",
                why="an OpenAI-compatible server writes answers; it does not score given titles behind a prompt",
                fix="use ranking.method=generate with a server, or remove llm.server",
            )
        if not self.prompts.shows_candidates:
            self.rotations = 1
            if self.method == "generate":
                raise UserError(
                    f"template {self.prompts.template} does not show the candidates, so no list can be asked for",
                    where="config key ranking.templates",
                    fix="use list_v1 for ranking.method=generate",
                )

    @property
    def size(self) -> int:
        """Candidates per session."""
        return self.data.lists.items.shape[1]

    def order(self, session: int) -> list[int]:
        """Positions of a session's candidates in the order they are shown: shuffled by seed."""
        real = (self.data.lists.items[session] > 0).nonzero().squeeze(1)
        number = session if self.numbers is None else self.numbers[session]
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return real[torch.randperm(len(real), generator=drawn)].tolist()

    def shown_place(self, sessions: Tensor) -> Tensor:
        """[n] place of the target in the order shown, as a share of the list: 0 first, towards 1 last."""
        places = []
        for s, target in zip(sessions.tolist(), self.data.lists.target_columns(sessions).tolist(), strict=True):
            order = self.order(s)
            places.append(order.index(target) / len(order))
        return torch.tensor(places)

    def _orders(self, session: int) -> list[list[int]]:
        order = self.order(session)
        turns = [round(r * len(order) / self.rotations) for r in range(self.rotations)]
        return [order[turn:] + order[:turn] for turn in turns]

    def _session(self, session: int) -> list[int]:
        items = self.data.lists.history_items[session]
        return items[items > 0].tolist()

    def scores(self, sessions: Tensor, hints: Sequence[Hints], progress: Progress | None = None) -> list[Tensor]:
        """Score the candidates of sessions, once per hint.

        Args:
            sessions: [n] session numbers.
            hints: For every session the hints to try; None is the prompt without one.
            progress: Called with (questions, tokens).

        Returns:
            For every session [hints, C] float32, higher is better; -inf for padding and for what was not ranked.
        """
        self.counts.questions += self.rotations * sum(map(len, hints))
        if self.method == "generate":
            return self._generated(sessions, hints, progress)
        if self.shortlist is None or all(hint is None for tried in hints for hint in tried):
            return self._measured(sessions, hints, progress)
        plain = torch.cat(self._measured(sessions, [[None]] * len(sessions)))
        short = self._best(plain)
        advised = [[hint for hint in tried if hint is not None] for tried in hints]
        scores = []
        hinted = self._measured(sessions, advised, progress, short)
        for tried, base, chosen, found in zip(hints, plain, short, hinted, strict=True):
            rows = iter(found)
            ranked = [base if h is None else _above(next(rows), base, chosen) for h in tried]
            scores.append(torch.stack(ranked) if ranked else base[None][:0])
        return scores

    def shortlisted(self, sessions: Tensor) -> Tensor:
        """[n, C] which candidates a hint can move at all."""
        if self.shortlist is None or self.method == "generate":
            return self.data.lists.items[sessions] > 0
        return self._best(torch.cat(self._measured(sessions, [[None]] * len(sessions))))

    def _best(self, plain: Tensor) -> Tensor:
        assert self.shortlist is not None
        best = plain.argsort(dim=1, descending=True, stable=True)[:, : self.shortlist]
        return torch.zeros(plain.shape, dtype=torch.bool).scatter(1, best, True) & (plain > -math.inf)

    def _measured(
        self, sessions: Tensor, hints: Sequence[Hints], progress: Progress | None = None, asked: Tensor | None = None
    ) -> list[Tensor]:
        raw = self.likelihoods(sessions, hints, progress, asked)
        prior = self.prior(sessions) if self.measure.prior else torch.zeros(len(sessions), self.size)
        return [self.measure.scores(logps, tokens, p) for (logps, tokens), p in zip(raw, prior, strict=True)]

    def empty_scores(self, sessions: Tensor, progress: Progress | None = None) -> Tensor:
        """[n, C] scores by the same question without the session: what the titles alone are worth to the LLM."""
        if self.method == "generate":
            return torch.cat(self._generated(sessions, [[EMPTY]] * len(sessions), progress))
        prior = self.prior(sessions, progress)
        tokens = torch.stack([tokens for _, tokens in self.likelihoods(sessions, [[None]] * len(sessions))])
        prior[self.data.lists.items[sessions] == 0] = -math.inf
        return (prior / tokens**self.measure.length).float()

    def likelihoods(
        self, sessions: Tensor, hints: Sequence[Hints], progress: Progress | None = None, asked: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Log-likelihoods of the candidates' titles, averaged over the rotations, and their lengths.

        Args:
            sessions: [n] session numbers.
            hints: For every session the hints to try.
            progress: Called with (questions, tokens).
            asked: [n, C] which candidates are asked about; None: all that are real.

        Returns:
            For every session ([hints, C], [C]) float64: logs (-inf where not asked), tokens (1 where not asked).
        """
        scorer = TitleScorer(self.llm, batch_tokens=self.batch_tokens)
        items = self.data.lists.items
        asked = items[sessions] > 0 if asked is None else asked
        groups: list[list[Question]] = []
        for s, tried, real in zip(sessions.tolist(), hints, asked, strict=True):
            candidates = items[s][real].tolist()
            for order in self._orders(s):  # one group per rotation: its prompts begin alike
                shown = items[s][order].tolist()
                prompts = [self.prompts.prompt(self._session(s), shown, hint) for hint in tried]
                groups.append([self.prompts.question(prompt, candidates) for prompt in prompts])
        found = iter(scorer.scores(groups, progress=progress))
        raw = []
        for s, tried, real in zip(sessions.tolist(), hints, asked, strict=True):
            rotated = [next(found) for _ in self._orders(s)]
            logps = torch.full((len(tried), self.size), -math.inf, dtype=torch.float64)
            tokens = torch.ones(self.size, dtype=torch.float64)
            if tried:
                logps[:, real] = torch.tensor([[q[0] for q in group] for group in rotated], dtype=torch.float64).mean(0)
                tokens[real] = torch.tensor(rotated[0][0][1], dtype=torch.float64)
            raw.append((logps, tokens))
        return raw

    def prior(self, sessions: Tensor, progress: Progress | None = None) -> Tensor:
        """[n, C] log-likelihood of every candidate's title without the session; 0 for padding.

        Where the prompt does not show the candidates, a title is asked about once for all sessions.
        """
        scorer = TitleScorer(self.llm, batch_tokens=self.batch_tokens)
        items = self.data.lists.items[sessions]
        values = torch.zeros(items.shape, dtype=torch.float64)
        if self.prompts.shows_candidates:
            groups = []
            for s, row in zip(sessions.tolist(), items, strict=True):
                prompt = self.prompts.prior(self.data.lists.items[s][self.order(s)].tolist())
                groups.append([self.prompts.question(prompt, row[row > 0].tolist())])
            for n, (group, row) in enumerate(zip(scorer.scores(groups, progress=progress), items, strict=True)):
                values[n, row > 0] = torch.tensor(group[0][0], dtype=torch.float64)
            return values
        unique = sorted(set(items[items > 0].tolist()), key=lambda i: (len(self.prompts.titles[i]), i))
        questions = [self.prompts.question(self.prompts.prior(()), [item]) for item in unique]
        known = torch.zeros(len(self.prompts.titles), dtype=torch.float64)
        found = scorer.scores([questions], progress=progress)[0]
        known[unique] = torch.tensor([logps[0] for logps, _ in found], dtype=torch.float64)
        return known[items]

    def _generated(self, sessions: Tensor, hints: Sequence[Hints], progress: Progress | None) -> list[Tensor]:
        items = self.data.lists.items
        asked: list[Messages] = []
        shown: list[tuple[int, int, list[int]]] = []  # (place of the session, of the hint, order) of every prompt
        for n, (s, tried) in enumerate(zip(sessions.tolist(), hints, strict=True)):
            for order in self._orders(s):
                for h, hint in enumerate(tried):
                    candidates = items[s][order].tolist()
                    empty = self.prompts.prior(candidates) if hint is EMPTY else None
                    asked.append(empty or self.prompts.prompt(self._session(s), candidates, hint))
                    shown.append((n, h, order))
        settings = SamplingSettings(self.max_new_tokens, temperature=0.0, top_p=1.0)
        given = self.llm.answers(asked, [1] * len(asked), settings=settings, progress=progress)
        scores = [torch.zeros(len(tried), self.size) for tried in hints]
        for (n, h, order), answers in zip(shown, given, strict=True):
            titles = [self.prompts.titles[i] for i in items[sessions[n]][order].tolist()]
            found = parse_ranking(answers[0].text, titles, self.prompts.top)
            self.counts.lists += 1
            self.counts.failed += found.failed
            self.counts.short += 0 < len(found.order) < self.prompts.top
            self.counts.entries += found.lines
            self.counts.unknown += found.unknown
            self.counts.repeated += found.repeated
            for place, position in enumerate(found.order):
                scores[n][h, order[position]] += (self.prompts.top - place) / self.rotations
        return [torch.where(score > 0, score, -math.inf) for score in scores]


def _above(scores: Tensor, plain: Tensor, chosen: Tensor) -> Tensor:
    """[C] the scores of the chosen candidates, the others below them in their plain order."""
    rest = plain[~chosen & (plain > -math.inf)]
    gap = float(scores[chosen].min() - rest.max()) - 1 if len(rest) else 0.0
    return torch.where(chosen, scores, plain + gap)
