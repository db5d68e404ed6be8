"""Scoring 50 titles per session with what they share computed once, against a forward pass per title."""

import random
import tempfile
from collections.abc import Callable
from functools import cache

import torch

from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.scoring import Question, TitleScorer
from tests.benchmarks.harness import Row, now
from tests.benchmarks.worlds import smollm

CANDIDATES, HISTORY, TARGET, ALIKE = 50, 10, 5.0, 1e-3
ADJECTIVES = [
    "Dark",
    "Eternal",
    "Last",
    "Lost",
    "Secret",
    "Silent",
    "Golden",
    "Broken",
    "Hidden",
    "Little",
    "Wild",
    "American",
]
NOUNS = [
    "Kingdom",
    "Sunshine",
    "Summer",
    "Mind",
    "Crusade",
    "Soldier",
    "Garden",
    "Story",
    "Knight",
    "Return",
    "River",
    "Beauty",
]
SHAPES = ("The {a} {n}", "{a} {n} of the {b}", "{n}", "{n}: The {a} {b}", "{a} {n} 2", "Mr. {b} and the {a} {n}")


def title(draw: random.Random) -> str:
    """A title about as long as those of films."""
    return draw.choice(SHAPES).format(a=draw.choice(ADJECTIVES), n=draw.choice(NOUNS), b=draw.choice(NOUNS))


def questions(sessions: int, hints: int) -> list[list[Question]]:
    """Sessions whose prompt shows the candidates, each without a hint and with some."""
    draw, groups = random.Random(0), []
    for _ in range(sessions):
        titles = tuple(dict.fromkeys(title(draw) for _ in range(3 * CANDIDATES)))[: CANDIDATES + HISTORY]
        told, shown = "; ".join(titles[CANDIDATES:]), titles[:CANDIDATES]
        advice = ["", *(f" Hint: prefer {w.lower()} films." for w in ADJECTIVES[:hints])]
        asked = f"I watched the following movies in order: {told}. Recommend one of: {'; '.join(shown)}."
        groups.append([Question([{"role": "user", "content": asked + hint}], "1. ", "\n", shown) for hint in advice])
    return groups


def closes(llm: LanguageModel, end: str) -> Callable[[str], list[int]] | None:
    """Tokens that begin with some text and the end; None: the tokenizer does not know the end."""
    vocabulary, ids = llm.tokenizer.get_vocab(), llm.tokenizer(end, add_special_tokens=False)["input_ids"]
    asked = "".join(llm.tokenizer.convert_ids_to_tokens(ids))
    return cache(lambda before: [i for t, i in vocabulary.items() if t.startswith(before + asked)]) if ids else None


@torch.inference_mode()
def naive(llm: LanguageModel, q: Question, closing: Callable[[str], list[int]] | None) -> list[float]:
    """Every title behind the whole prompt, one after the other; its end in whatever tokens."""
    prompt = [*llm.tokenize(q.prompt), *llm.tokenizer(q.lead.rstrip(), add_special_tokens=False)["input_ids"]]
    found = []
    for text in q.titles:
        asked = llm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        # Logits of the asked positions alone: the head over the whole prompt would flatter the other side.
        logits = llm.model(torch.tensor([[*prompt, *asked]]), logits_to_keep=len(asked) + 1).logits[0]
        logps = logits.float().log_softmax(-1)
        steps = logps[:-1].gather(1, torch.tensor(asked)[:, None]).squeeze(1)
        if closing is None:
            found.append(float(steps.sum()))
            continue
        last = llm.tokenizer.convert_ids_to_tokens(asked[-1])
        split, merged = steps[-1] + logps[-1, closing("")].logsumexp(0), logps[-2, closing(last)].logsumexp(0)
        found.append(float(steps[:-1].sum() + torch.logaddexp(split, merged)))
    return found


def run(full: bool = False) -> list[Row]:
    """Seconds for all titles of some sessions, and how far both ways are apart."""
    sessions = 100 if full else 2
    words = [f"{w}{end}" for w in [*ADJECTIVES, *NOUNS] for end in ("", ";", ".")]
    with tempfile.TemporaryDirectory() as store:
        llm, _ = smollm(store, words)
        groups = questions(sessions, 0)
        with llm.for_sampling():
            closing = closes(llm, groups[0][0].end)
            naive(llm, Question(groups[0][0].prompt, "1. ", "\n", ("Up",)), closing)  # loads the weights
        scorer = TitleScorer(llm, batch_tokens=2048)
        started = now()
        found = scorer.scores(groups)
        shared = now() - started
        started = now()
        with llm.for_sampling():
            expected = [[naive(llm, q, closing) for q in group] for group in groups]
        alone = now() - started
    ours = torch.tensor([values for group in found for values, _ in group])
    theirs = torch.tensor([values for group in expected for values in group])
    apart = float((ours - theirs).abs().max())
    assert apart < ALIKE, apart
    work = f"likelihood of {CANDIDATES} titles for {sessions} sessions, SmolLM2-135M"
    note = f"log-likelihoods at most {apart:.0e} apart"
    return [Row(work, "one forward pass per title", shared, alone, "s", alone / shared, TARGET, note)]
