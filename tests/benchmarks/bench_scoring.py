"""Scoring 50 titles per session as a tree of tokens, against a pass per title and one batch behind a cached prompt."""

import random
import statistics
import tempfile
from dataclasses import replace

import torch
from transformers import DynamicCache

from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.scoring import END_OF_TURN, Question, TitleScorer
from tests.benchmarks.harness import Row, now
from tests.benchmarks.worlds import smollm, smollm_name

CANDIDATES, HISTORY, TARGET, ALIKE = 50, 10, 5.0, 1e-3
REPEATS = 3  # each with sessions of its own, for the store must not answer
EVERY = 5  # a pass per title is timed on every fifth of the first sessions' titles: all of a prompt's take as long
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


def questions(sessions: int, hints: int, seed: int = 0) -> list[list[Question]]:
    """Sessions whose prompt shows the candidates, each without a hint and with some."""
    draw, groups = random.Random(seed), []
    for _ in range(sessions):
        titles = tuple(dict.fromkeys(title(draw) for _ in range(3 * CANDIDATES)))[: CANDIDATES + HISTORY]
        told, shown = "; ".join(titles[CANDIDATES:]), titles[:CANDIDATES]
        advice = ["", *(f" Hint: prefer {w.lower()} films." for w in ADJECTIVES[:hints])]
        asked = f"I watched the following movies in order: {told}. Recommend one of: {'; '.join(shown)}."
        prompts = [[{"role": "user", "content": asked + hint}] for hint in advice]
        groups.append([Question(prompt, "1. ", END_OF_TURN, shown) for prompt in prompts])
    return groups


def tokens(llm: LanguageModel, q: Question) -> tuple[list[int], list[list[int]]]:
    """Tokens of the prompt, and of every title with the end of the turn behind it."""
    prompt = [*llm.tokenize(q.prompt), *llm.tokenizer(q.lead.rstrip(), add_special_tokens=False)["input_ids"]]
    titles = llm.tokenizer([f" {text}" for text in q.titles], add_special_tokens=False)["input_ids"]
    return prompt, [[*title, llm.tokenizer.eos_token_id] for title in titles]  # type: ignore[list-item]


@torch.inference_mode()
def naive(llm: LanguageModel, q: Question) -> list[float]:
    """Every title behind the whole prompt, one after the other."""
    prompt, titles = tokens(llm, q)
    found = []
    for asked in titles:
        # Logits of the asked positions alone: the head over the whole prompt would flatter the other side.
        logits = llm.model(torch.tensor([[*prompt, *asked]]), logits_to_keep=len(asked) + 1).logits[0, :-1]
        found.append(float(logits.float().log_softmax(-1).gather(1, torch.tensor(asked)[:, None]).sum()))
    return found


@torch.inference_mode()
def expanded(llm: LanguageModel, q: Question) -> list[float]:
    """All titles as one batch, padded on the right, behind keys and values of the prompt, copied for each of them."""
    prompt, titles = tokens(llm, q)
    cache = DynamicCache(config=llm.model.config)
    first = llm.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits
    first = first.expand(len(titles), -1, -1)
    cache.batch_repeat_interleave(len(titles))
    width = max(map(len, titles))
    asked = torch.tensor([title + [0] * (width - len(title)) for title in titles])
    asked_for = torch.arange(width) < torch.tensor([[len(title)] for title in titles])
    # What stands behind a title is seen by nothing before it, so no mask is needed.
    logits = torch.cat([first, llm.model(asked[:, :-1], past_key_values=cache).logits], dim=1)
    logps = logits.float().log_softmax(-1).gather(2, asked[..., None]).squeeze(2)
    return (logps * asked_for).sum(1).tolist()


def run(full: bool = False) -> list[Row]:
    """Seconds for all titles of some sessions, and how far both ways are apart."""
    sessions = 100 if full else 2
    words = [f"{w}{end}" for w in [*ADJECTIVES, *NOUNS] for end in ("", ";", ".")]
    with tempfile.TemporaryDirectory() as store:
        llm, _ = smollm(store, words)
        with llm.for_sampling():
            naive(llm, Question(questions(1, 0)[0][0].prompt, "1. ", END_OF_TURN, ("Up",)))  # loads the weights
        scorer = TitleScorer(llm, batch_tokens=2048)
        shared, copied, alone, apart = [], [], 0.0, 0.0
        for turn in range(REPEATS):
            groups = questions(sessions, 0, seed=turn)
            started = now()
            found = [values for group in scorer.scores(groups) for values, _ in group]
            shared.append(now() - started)
            peers = ((expanded, 1), (naive, EVERY)) if turn == 0 else ((expanded, 1),)
            for peer, every in peers:
                asked = [replace(q, titles=q.titles[::every]) for group in groups for q in group]
                started = now()
                with llm.for_sampling():
                    theirs = [peer(llm, q) for q in asked]
                taken = (now() - started) * every
                if peer is naive:
                    alone = taken
                else:
                    copied.append(taken)
                both = torch.tensor([values[::every] for values in found]), torch.tensor(theirs)
                apart = max(apart, float((both[0] - both[1]).abs().max()))
    assert apart < ALIKE, apart
    ours, batch = statistics.median(shared), statistics.median(copied)
    work = f"likelihood of {CANDIDATES} titles for {sessions} sessions, {smollm_name()}"
    note = f"log-likelihoods at most {apart:.0e} apart"
    timed = f"{note}; peer's time extrapolated: every fifth title timed once, x {EVERY}"
    return [
        Row(work, "one forward pass per title", ours, alone, "s", alone / ours, TARGET, timed),
        Row(work, "titles as one batch behind one cached prompt", ours, batch, "s", batch / ours, 1.0, note),
    ]
