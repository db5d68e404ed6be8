"""Scoring 50 titles per session with what they share computed once, against a forward pass per title.

python -m tests.benchmarks.bench_scoring [sessions [hints]]
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from lit_rec.data.assets import cache_dir
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.scoring import Question, TitleScorer
from lit_rec.llm.store import AnswerStore
from lit_rec.schema import LLMConfig, LoraConfig

MODEL = "SmolLM2-135M-Instruct.Q4_1"
CANDIDATES, HISTORY, TARGET, ALIKE = 50, 10, 3.0, 1e-3
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


@torch.inference_mode()
def naive(llm: LanguageModel, q: Question) -> list[float]:
    """Every title behind the whole prompt, one after the other."""
    prompt = [*llm.tokenize(q.prompt), *llm.tokenizer(q.lead.rstrip(), add_special_tokens=False)["input_ids"]]
    stop = llm.tokenizer(q.end, add_special_tokens=False)["input_ids"][:1]
    found = []
    for text in q.titles:
        asked = [*llm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"], *stop]
        # Logits of the asked positions alone: the head over the whole prompt would flatter the other side.
        logits = llm.model(torch.tensor([[*prompt, *asked]]), logits_to_keep=len(asked) + 1).logits[0, :-1]
        found.append(float(logits.float().log_softmax(-1).gather(1, torch.tensor(asked)[:, None]).sum()))
    return found


def build(store: str) -> LanguageModel:
    """The quickstart's model where it is in the cache, else one of its size with random weights."""
    folder = cache_dir() / "models" / MODEL
    if not (folder / "config.json").is_file():
        folder = _random_model(Path(store) / "random")
    print(f"model {folder.name}, {torch.get_num_threads()} threads", flush=True)
    return LanguageModel(
        LLMConfig(name="bench", hub=str(folder), dtype="float32"),
        LoraConfig(),
        AnswerStore(store),
        device="cpu",
        seed=0,
    )


def _random_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import word_tokenizer

    words = [f"{w}{end}" for w in [*ADJECTIVES, *NOUNS] for end in ("", ";", ".")]
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder


def main(sessions: int = 2, hints: int = 0) -> int:
    """0 if sharing is TARGET times as fast and both ways agree."""
    with tempfile.TemporaryDirectory() as store:
        llm = build(store)
        groups = questions(sessions, hints)
        with llm.for_sampling():
            naive(llm, Question(groups[0][0].prompt, "1. ", "\n", ("Up",)))  # loads the weights
        scorer = TitleScorer(llm, batch_tokens=2048)
        started = time.perf_counter()
        found = scorer.scores(groups)
        shared = time.perf_counter() - started
        started = time.perf_counter()
        with llm.for_sampling():
            expected = [[naive(llm, q) for q in group] for group in groups]
        alone = time.perf_counter() - started
    ours = torch.tensor([values for group in found for values, _ in group])
    theirs = torch.tensor([values for group in expected for values in group])
    apart = float((ours - theirs).abs().max())
    print(
        f"{ours.numel()} titles: alone {alone:.1f} s, shared {shared:.1f} s ({scorer.computed} tokens), ratio "
        f"{alone / shared:.1f} (target {TARGET}), largest difference {apart:.1e} (target {ALIKE:.0e})",
        flush=True,
    )
    return int(alone < TARGET * shared or apart > ALIKE)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
