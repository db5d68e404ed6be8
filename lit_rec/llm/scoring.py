"""How likely an LLM finds each candidate's title, given a prompt: what prompts and titles share is computed once.

One session is asked with many hints, so its prompts begin alike: that prefix is computed once. Behind it every prompt
is one row: the rest of the prompt, then the titles as a tree of tokens (titles that begin alike share those nodes too).
A tree token sees its ancestors, the rest of its prompt and the prefix, and stands at the position it would have in its
title alone, so the scores are those of scoring each (prompt + title) on its own. A text behind a title counts in all
the tokens that may write it (`closing`).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lit_rec import distributed
from lit_rec.errors import UserError
from lit_rec.llm.closing import Beginnings, Closing, sum_logps
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.prompts import TEMPLATES, Messages
from lit_rec.llm.sampler import check_window, common_prefix, head_at
from lit_rec.llm.store import Answer, answer_key
from lit_rec.llm.title_tree import TitleTree

END_OF_TURN = "<eos>"
TREES = 512  # kept at a time


@dataclass(frozen=True)
class Question:
    """A prompt and the titles whose likelihood is asked for.

    Attributes:
        prompt: Chat messages; or one message of role "text", which is continued as it stands.
        lead: What stands between the prompt and a title ("1. ").
        end: What follows a title, so that "Alien" is not credited with "Aliens": a text, in whatever tokens; "<eos>" is
            the model's own end of a turn; empty: nothing.
        titles: The candidates' titles.
    """

    prompt: Messages
    lead: str
    end: str
    titles: tuple[str, ...]


@dataclass
class _Row:
    """One question in tokens: `prefix` is what its group shares, `rest` what follows it in the prompt."""

    key: str
    prefix: tuple[int, ...]
    rest: list[int]
    tree: TitleTree

    @property
    def width(self) -> int:
        return len(self.rest) + len(self.tree.tokens) - 1

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest title: what the model's context must hold."""
        return len(self.prefix) + len(self.rest) + max(self.tree.depth)


class TitleScorer:
    """Log-likelihoods of candidate titles, from the store where it has them.

    Args:
        llm: The language model, in process.
        batch_tokens: Tokens of one forward pass, about.
    """

    def __init__(self, llm: LanguageModel, *, batch_tokens: int = 4096) -> None:
        self.llm, self.batch_tokens = llm, batch_tokens
        self.computed = 0  # tokens the model worked through
        self._trees: dict[tuple[tuple[str, ...], str, str], TitleTree] = {}
        self._closings: dict[str, Closing | None] = {}

    def scores(
        self, groups: Sequence[Sequence[Question]], *, progress: Callable[[int, int], None] | None = None
    ) -> list[list[tuple[list[float], list[int]]]]:
        """Score every title of every question.

        Batches are cut from the whole request, not from what is missing, so that a run that was killed goes on with the
        same batches as an undisturbed one.

        Args:
            groups: Questions that begin alike belong into one group (a session with its hints).
            progress: Called with (questions, tokens computed) after each batch; stored questions come with 0 tokens.

        Returns:
            For every group and question: the natural log-likelihood of each title, and its length in tokens.

        Raises:
            UserError: A prompt is empty, or with a title longer than the model's context.
        """
        name, store = f"{self.llm.fingerprint}/{self.llm.adapter}", self.llm.store
        keys = [[question_key(name, q) for q in group] for group in groups]
        lacking = store.lacking(key for row in keys for key in row)
        if progress is not None:
            progress(sum(map(len, keys)) - len(lacking), 0)
        if lacking:
            training = self.llm.model.training
            self.llm.model.eval()
            try:
                with self.llm.for_sampling(), torch.inference_mode():
                    todo = _first(_batches(groups, self.batch_tokens), keys, lacking)
                    found = [self._work(groups, keys, batch, progress) for batch in self.llm.share(todo)]
            finally:
                self.llm.model.train(training)
            for answers in distributed.gathered({key: answer for batch in found for key, answer in batch.items()}):
                store.learn(answers)
        return [[_read(store[key]) for key in row] for row in keys]

    def _work(
        self,
        groups: Sequence[Sequence[Question]],
        keys: list[list[str]],
        batch: list[tuple[int, int]],
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Answer]:
        """Score a batch, and put it into the store as one line."""
        rows: dict[str, _Row] = {}
        for g in sorted({g for g, _ in batch}):
            todo = [i for h, i in batch if h == g]
            prompts = [self._prompt(groups[g][i]) for i in todo]
            shared = common_prefix(prompts) if prompts else 0
            for i, prompt in zip(todo, prompts, strict=True):
                q = groups[g][i]
                rows[keys[g][i]] = _Row(
                    keys[g][i], tuple(prompt[:shared]), prompt[shared:], self._tree(q.titles, q.lead, q.end)
                )
        before = self.computed
        found = self._forward(list(rows.values()))
        self.llm.keep(found)
        if progress is not None:
            progress(len(found), self.computed - before)
        return found

    def _prompt(self, q: Question) -> list[int]:
        """Token ids up to where a title begins."""
        tokenizer = self.llm.tokenizer
        if q.prompt[0]["role"] == "text":
            ids = list(tokenizer(q.prompt[0]["content"])["input_ids"])
        else:
            ids = list(self.llm.tokenize(q.prompt))
        lead = q.lead.rstrip(" ")  # a blank belongs to the title's first token
        ids += self._going_on([lead])[0] if lead else []
        if not ids:
            raise UserError(
                "a prompt is empty, so a title's first token follows nothing",
                where="config key ranking.templates",
                fix=f"put words into `session` and `empty` of the template in {TEMPLATES.name}",
            )
        return ids

    def _tree(self, titles: tuple[str, ...], lead: str, end: str) -> TitleTree:
        """The tree of some titles; a session's hints, which come one after the other, share it."""
        if (titles, lead, end) not in self._trees:
            if len(self._trees) >= TREES:
                self._trees.clear()
            gap = " " if lead.endswith(" ") else ""
            ids = self._going_on([f"{gap}{title}" for title in titles])
            if end == END_OF_TURN:
                eos = self.llm.tokenizer.eos_token_id
                tree = TitleTree([[*title, *([] if eos is None else [eos])] for title in ids])
            else:
                tree = TitleTree(ids, self._closing(end))
            self._trees[titles, lead, end] = tree
        return self._trees[titles, lead, end]

    @cached_property
    def _beginnings(self) -> Beginnings:
        return Beginnings(self.llm.tokenizer)

    def _closing(self, end: str) -> Closing | None:
        """What closes titles with a text; None: nothing, or a text of which the tokenizer knows nothing."""
        if end not in self._closings:
            tokens = self._going_on([end])[0] if end else []
            self._closings[end] = Closing(self._beginnings, tokens) if tokens else None
        return self._closings[end]

    @cached_property
    def _before(self) -> str:
        """What to tokenize a text behind so that it is read as one that goes on.

        Some tokenizers (Llama 2, Mistral) put a blank before whatever they are given, a line break included, and none
        behind it; the others are given the text alone.
        """
        alone, told, behind = (self._ids([text])[0] for text in ("a", "\n", "\na"))
        return "" if told + alone == behind else "\n"

    def _going_on(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that stand behind another."""
        skipped = len(self._ids([self._before])[0]) if self._before else 0
        return [ids[skipped:] for ids in self._ids([self._before + text for text in texts])]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.llm.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _forward(self, rows: list[_Row]) -> dict[str, Answer]:
        """Score the rows of a batch."""
        model, device = self.llm.model, self.llm.model.device
        check_window(model.config, max(row.length for row in rows))
        shared = list(dict.fromkeys(row.prefix for row in rows))
        cache, past = self._prefill(shared)
        owner = torch.tensor([shared.index(row.prefix) for row in rows], device=device)
        if cache is not None:
            cache.batch_select_indices(owner)
        ids, position, sees, heads = _collate(rows)
        mask = torch.cat([past[owner][:, None, :].expand(-1, ids.shape[1], -1), sees.to(device)], dim=2)
        with head_at(model, (heads[0].to(device), heads[1].to(device))):
            logits = model(
                ids.to(device),
                attention_mask=mask[:, None],
                position_ids=position.to(device),
                past_key_values=cache,
                use_cache=cache is not None,
            ).logits[0]
        self.computed += sum(row.width for row in rows) + sum(map(len, shared))
        return self._answers(rows, logits.float())

    def _answers(self, rows: list[_Row], logits: Tensor) -> dict[str, Answer]:
        """Titles' scores from the logits [nodes, vocabulary] of all rows."""
        first = torch.tensor([0, *(len(row.tree.tokens) for row in rows)]).cumsum(0)
        steps, sums = (
            torch.cat([part + first.new_tensor([first[r], 0]) for r, part in enumerate(parts)])
            for parts in ([row.tree.steps for row in rows], [row.tree.sums for row in rows])
        )
        node, token = steps.to(logits.device).unbind(1)
        total = logits.logsumexp(-1)
        stepped = (logits[node, token] - total[node]).cpu().split([len(row.tree.steps) for row in rows])
        sets = self._beginnings.sets if len(sums) else []
        summed = sum_logps(logits, total, sums, sets).cpu().split([len(row.tree.sums) for row in rows])
        return {
            row.key: Answer(_written(row.tree, one.tolist(), other.tolist()), row.width, "scores")
            for row, one, other in zip(rows, stepped, summed, strict=True)
        }

    def _prefill(self, prefixes: list[tuple[int, ...]]) -> tuple[DynamicCache | None, Tensor]:
        """Keys and values of every prefix, left-padded, and which of them are real [prefixes, length]."""
        width, device = max(map(len, prefixes)), self.llm.model.device
        real = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prefixes], device=device)
        if width == 0:
            return None, real.reshape(len(prefixes), 0).bool()
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prefixes], device=device)
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        # A padded query sees nothing; let it see itself, so that its softmax is defined. Nobody reads it.
        mask = (real[:, None, :] & causal) | torch.eye(width, dtype=torch.bool, device=device)
        cache, nowhere = DynamicCache(), torch.zeros(0, dtype=torch.long, device=device)
        with head_at(self.llm.model, (nowhere, nowhere)):  # only the keys and values are wanted
            self.llm.model(
                ids,
                attention_mask=mask[:, None],
                position_ids=(real.long().cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            )
        return cache, real


def question_key(model: str, q: Question) -> str:
    """The content key of a question's scores."""
    settings: dict[str, Any] = {"score": q.titles, "lead": q.lead, "end": q.end}
    if q.end not in ("", END_OF_TURN):
        settings["closed"] = "in any tokens"  # the first versions asked for the end's first token alone
    return answer_key(model, q.prompt, settings, 0)


def _written(tree: TitleTree, steps: list[float], sums: list[float]) -> str:
    """[log-likelihoods, tokens] of the titles as JSON; seven digits, so that a stored score equals a fresh one."""
    logps = [float(f"{logp:.7g}") for logp in tree.logps(steps, sums)]
    return json.dumps([logps, tree.lengths], separators=(",", ":"))


def _read(answer: Answer) -> tuple[list[float], list[int]]:
    logps, tokens = json.loads(answer.text)
    return logps, tokens


def _first(
    batches: Iterable[list[tuple[int, int]]], keys: list[list[str]], lacking: set[str]
) -> list[list[tuple[int, int]]]:
    """What is lacking of the batches, each question where it comes first; batches with nothing left drop out."""
    left = set(lacking)
    found = []
    for batch in batches:
        todo = []
        for g, i in batch:
            if keys[g][i] in left:
                left.remove(keys[g][i])
                todo.append((g, i))
        if todo:
            found.append(todo)
    return found


def _batches(groups: Sequence[Sequence[Question]], tokens: int) -> Iterator[list[tuple[int, int]]]:
    """(group, question) pairs of every batch, of about as many tokens; questions of one group stand together."""
    batch: list[tuple[int, int]] = []
    size = 0
    for g, group in enumerate(groups):
        prefix = len(commonprefix([_text(q) for q in group]))
        for i, q in enumerate(group):
            cost = (len(_text(q)) - prefix + sum(map(len, q.titles))) // 4 + (prefix // 4 if i == 0 else 0)
            if batch and size + cost > tokens:
                yield batch
                batch, size = [], prefix // 4 if i else 0
            batch.append((g, i))
            size += cost
    if batch:
        yield batch


def _text(q: Question) -> str:
    return "\n".join(message["content"] for message in q.prompt)


def _collate(rows: Sequence[_Row]) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Pad rows of (rest of the prompt, tree without its root) on the right.

    Returns:
        ids [R, W]; positions [R, W]; sees [R, W, W] bool; (row, column) of every tree node, the root being the last
        token of the prompt.
    """
    width = max(row.width for row in rows)
    ids, position = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    head_rows, head_columns = [], []
    for r, row in enumerate(rows):
        n, tree, start = len(row.rest), row.tree, len(row.prefix)
        ids[r, : row.width] = torch.tensor([*row.rest, *tree.tokens[1:]])
        position[r, : row.width] = torch.tensor(
            [*range(start, start + n), *(start + n - 1 + depth for depth in tree.depth[1:])]
        )
        sees[r, :n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
        sees[r, n : row.width, :n] = True
        sees[r, n : row.width, n : row.width] = tree.sees[1:, 1:]
        head_rows.append(torch.full((len(tree.tokens),), r))
        head_columns.append(torch.arange(n - 1, n - 1 + len(tree.tokens)))
    return ids, position, sees, (torch.cat(head_rows), torch.cat(head_columns))
