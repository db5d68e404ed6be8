"""Data and models of the sizes that the benchmarks speak of, made on the spot: nothing is fetched."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lit_rec.data.assets import cache_dir
from lit_rec.data.lists import ListSet
from lit_rec.data.splits import Splits
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.loading import native_bf16
from lit_rec.llm.store import AnswerStore
from lit_rec.schema import LLMConfig, LoraConfig
from tests.tiny import word_tokenizer

FETCHED = cache_dir() / "models" / "SmolLM2-135M-Instruct.Q4_1"
WORDS = [f"word{i}" for i in range(2000)]
USERS, ITEMS, RATINGS = 6040, 3706, 1_000_209  # MovieLens-1M
LISTS_PER_USER = 35  # of MovieLens-1M under KAR's protocol
GENRE = torch.tensor(
    [[0], *([1 + item % 18] for item in range(ITEMS))]
)  # the first genre of every item, as KAR reads it


def native() -> str:
    """The type both sides compute in: bfloat16 where the processor does, as `dtype: auto` has it."""
    return "bfloat16" if native_bf16("cpu") else "float32"


def fetched() -> bool:
    """Whether the quickstart's model is at hand; `python -m tests.benchmarks` fetches it where it can."""
    return (FETCHED / "config.json").is_file()


def smollm_name() -> str:
    """What rows call the model they are measured with."""
    return "SmolLM2-135M" if fetched() else "random weights in SmolLM2-135M's shape"


def smollm(
    store: str | Path, words: Sequence[str] = WORDS, *, device: str = "cpu", dtype: str = "float32"
) -> tuple[LanguageModel, str]:
    """The quickstart's model where it is in the cache, else one of its size with random weights; and its folder."""
    folder = FETCHED if fetched() else _random_model(Path(store) / "random", words)
    config = LLMConfig(name="bench", hub=str(folder), dtype=dtype)
    return LanguageModel(config, LoraConfig(), AnswerStore(store), device=device, seed=0), str(folder)


def _random_model(folder: Path, words: Sequence[str]) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder


ENGLISH = """
the user likes quiet dramas about families and old comedies but rarely finishes films with much violence
""".split()  # noqa: SIM905 - a sentence reads better


def text(words: int, seed: int) -> str:
    """English of about 1.3 tokens per word, different for every seed."""
    draw = np.random.default_rng(seed)
    return " ".join(ENGLISH[i] for i in draw.integers(0, len(ENGLISH), words))


def lists(count: int, size: int = 10, users: int = USERS, seed: int = 0) -> tuple[ListSet, Splits]:
    """Candidate lists of so many of MovieLens-1M's users: popular items oftener, two to five positives each."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, ITEMS + 1) ** 0.8
    items = 1 + draw.choice(ITEMS, (count, size), p=weights / weights.sum())
    labels = (draw.random((count, size)) < 0.35).astype(np.float32)
    user = np.sort(draw.integers(0, users, count))
    made = ListSet(
        torch.from_numpy(user),
        torch.from_numpy(items),
        torch.from_numpy(labels),
        torch.from_numpy(1 + draw.integers(0, ITEMS, (users, 20))),
        torch.from_numpy(draw.integers(1, 6, (users, 20)).astype(np.float32)),
    )
    everybody, held = torch.arange(users), users // 20
    return made, Splits(everybody[: -2 * held], everybody[-2 * held : -held], everybody[-held:])


def ml1m_files(folder: Path) -> Path:
    """Files of MovieLens-1M's layout and size."""
    draw = np.random.default_rng(0)
    keys = draw.choice(USERS * ITEMS, RATINGS, replace=False)
    users, items = keys // ITEMS + 1, keys % ITEMS + 1
    stars, times = draw.integers(1, 6, RATINGS), draw.integers(956_703_932, 1_046_454_590, RATINGS)
    order = np.argsort(users, kind="stable")
    rows = np.stack([users, items, stars, times], axis=1)[order]
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows.tolist()))
    films = (f"{i}::Film number {i}, The ({1920 + i % 80})::Drama|Comedy\n" for i in range(1, ITEMS + 1))
    (folder / "movies.dat").write_text("".join(films), encoding="latin-1")
    (folder / "users.dat").write_text("".join(f"{u}::F::25::12::55117\n" for u in range(1, USERS + 1)))
    return folder
