"""Benchmarks on this processor with tiny models: they run, both sides do the same, and they count what they should."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.scoring import TitleScorer
from lit_rec.llm.store import AnswerStore
from lit_rec.policy.sequences import encode_chat
from lit_rec.schema import LLMConfig, LoraConfig
from tests.benchmarks import bench_dpo, bench_gpu, bench_scoring
from tests.benchmarks.bench_growth import NOISE, exponent, medians
from tests.benchmarks.worlds import ENGLISH
from tests.tiny import save_llm


@pytest.fixture
def llm(tmp_path: Path) -> LanguageModel:
    folder = save_llm(tmp_path / "model", ENGLISH)
    return LanguageModel(
        LLMConfig(name="tiny", hub=str(folder), dtype="float32"),
        LoraConfig(),
        AnswerStore(tmp_path / "answers"),
        device="cpu",
        seed=0,
    )


def test_ceilings_are_what_the_processor_does() -> None:
    rate, copying = bench_gpu.ceilings("cpu", size=128, copied=1 << 20)
    assert 1e6 < rate < 1e14
    assert 1e7 < copying < 1e13


@pytest.mark.slow  # TRL's trainer takes longest
def test_tuning_counts_the_products_of_an_update(llm: LanguageModel, tmp_path: Path) -> None:
    """A pass over the reference's answers, one forward and one backward without gradients of frozen weights."""
    rate = 1e9
    (row,) = bench_gpu.tuning(llm, str(tmp_path / "model"), str(tmp_path), rate, 2, 2, words=20)
    assert row.ratio == pytest.approx(row.theirs / row.ours)
    counted = float(row.note.split()[1].rstrip("%")) / 100 * rate * row.ours
    tokens = 0
    for pair in bench_dpo.pairs(4, 20, 5):
        answers = [pair["chosen"][0]["content"], pair["rejected"][0]["content"]]
        tokens += encode_chat(llm.tokenizer, pair["prompt"], answers, 2048).length
    frozen = sum(w.numel() for name, w in llm.model.named_parameters() if "base_layer" in name)
    once = 2 * frozen * tokens
    assert 3 * once < counted < 6 * once  # three times, and what adapters, attention and the head add


def test_sampling_reads_weights_keys_and_values(llm: LanguageModel) -> None:
    (row,) = bench_gpu.sampling(llm, 1e12, 2, 4, (1, 2))
    assert row.ratio == pytest.approx(row.ours / row.theirs)
    assert row.note.startswith("1 prompts at a time")
    weights = sum(p.numel() for p in llm.model.parameters()) * 4
    layers, keys_and_values, heads, head = 2, 2, 2, 8  # of `tiny_llama`
    assert bench_gpu.read_per_token(llm, 3, 5.0) == weights + 3 * 5 * layers * keys_and_values * heads * head * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_rows_without_a_gpu() -> None:
    assert bench_gpu.run() == []


@pytest.mark.parametrize("power", [0.5, 1, 1.5, 2, 3])
@pytest.mark.parametrize("constant", [0, 0.5, 20])
@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (100, 200, 400, 800)])
def test_exponent_is_that_of_the_growth_whatever_the_constant(
    power: float, constant: float, sizes: tuple[int, ...]
) -> None:
    taken = [constant + 3 * (n / sizes[0]) ** power for n in sizes]
    assert exponent(sizes, taken) == pytest.approx(power, abs=0.011)


@pytest.mark.parametrize("power", [1, 1.5, 2])
def test_exponent_bears_noise(power: float) -> None:
    draw = np.random.default_rng(0)
    sizes = np.array([1, 2, 4, 8])
    found = [exponent(sizes, (3 + 3 * sizes**power) * (1 + 0.02 * draw.standard_normal(4))) for _ in range(50)]
    assert np.median(found) == pytest.approx(power, abs=0.05)
    assert np.quantile(np.abs(np.array(found) - power), 0.9) < 0.15


@pytest.mark.parametrize(("power", "seldom", "often"), [(1, 0.0, 0.12), (1.3, 0.88, 1.0), (1.5, 0.95, 1.0)])
def test_growth_is_told_from_a_shared_machines_noise(power: float, seldom: float, often: float) -> None:
    """Times of 8% noise, a fifth of which a quarter short: how often they look like more than linear growth."""
    draw, sizes = np.random.default_rng(0), [5, 10, 20, 40, 80]

    def cost(n: int) -> float:
        fast = 0.75 if draw.random() < 0.2 else 1.0
        return float((0.05 + 1.48 * (n / 80) ** power) * fast * np.exp(0.08 * draw.standard_normal()))

    red = [exponent(sizes, medians(sizes, cost)) > 1 + NOISE for _ in range(50)]
    assert seldom <= np.mean(red) <= often


def test_peers_of_scoring_find_the_same(llm: LanguageModel) -> None:
    asked = [{"role": "user", "content": "the user likes old films"}]  # the model is too small for the titles
    groups = [[replace(q, prompt=asked) for q in group] for group in bench_scoring.questions(2, 0)]
    ours = [values for group in TitleScorer(llm).scores(groups) for values, _ in group]
    with llm.for_sampling():
        for peer in (bench_scoring.naive, bench_scoring.expanded):
            theirs = [peer(llm, q) for group in groups for q in group]
            assert torch.tensor(ours).allclose(torch.tensor(theirs), atol=1e-4), peer


@pytest.mark.slow  # TRL's trainer takes longest
def test_both_sides_of_dpo_compute_the_same(llm: LanguageModel, tmp_path: Path) -> None:
    apart = bench_dpo.apart(llm, str(tmp_path / "model"), str(tmp_path))
    assert apart.keys() == {"reference", "loss", "gradient"}
    assert max(apart.values()) < bench_dpo.ALIKE, apart
