"""The sampler against transformers' generate."""

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch

from lit_rec.errors import UserError
from lit_rec.llm.sampler import MIN_SHARED, Sampler, SamplingSettings, check_window, common_prefix
from tests.tiny import tiny_llama

VOCABULARY, STOP = 40, [2]
SHARED = [random.Random(9).randrange(4, VOCABULARY) for _ in range(MIN_SHARED + 3)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(VOCABULARY)


def draw_prompts(lengths: list[int], seed: int = 0, prefix: list[int] | None = None) -> list[list[int]]:
    rng = random.Random(seed)
    return [[*(prefix or []), *(rng.randrange(4, VOCABULARY) for _ in range(n))] for n in lengths]


def seeds(counts: list[int], start: int = 0) -> list[list[int]]:
    """A seed of its own for every answer."""
    drawn = itertools.count(start)
    return [[next(drawn) for _ in range(count)] for count in counts]


def generate_greedily(model: Any, prompt: list[int], new: int, stop: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=stop, pad_token_id=3
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prefix", [[], SHARED], ids=["alone", "shared"])
@pytest.mark.parametrize("counts", [[1] * 6, [1, 3, 1, 2, 1, 4]], ids=["one", "several"])
def test_cold_limit_is_greedy_generation(model: Any, prefix: list[int], counts: list[int]) -> None:
    prompts = draw_prompts([3, 11, 1, 7, 20, 2], prefix=prefix)
    sampler = Sampler(model, SamplingSettings(12, 1e-4, 0.95), STOP)
    sampler.share(prompts)
    assert bool(sampler._prefix[0]) == bool(prefix)
    drawn = sampler.sample(prompts, seeds(counts))
    for prompt, answers, count in zip(prompts, drawn, counts, strict=True):
        assert answers == [generate_greedily(model, prompt, 12, STOP)] * count


def test_rows_that_stop_early_leave_the_others_as_they_were(model: Any) -> None:
    """With many stop tokens most rows end soon and are dropped from the batch, several times."""
    prompts = draw_prompts([5] * 4 + [9] * 8 + [2] * 4, seed=3)
    stop = [2, *range(4, 12)]
    drawn = Sampler(model, SamplingSettings(16, 1e-4, 1.0), stop).sample(prompts, seeds([1] * 16))
    lengths = {len(answers[0]) for answers in drawn}
    assert len(lengths) > 3
    for prompt, answers in zip(prompts, drawn, strict=True):
        assert answers[0] == generate_greedily(model, prompt, 16, stop)


def test_stop_tokens_end_answers_and_stay_in_them(model: Any) -> None:
    stop = [2, 7, 9, 20]
    prompts = draw_prompts([4] * 10)
    drawn = Sampler(model, SamplingSettings(8, 1.5, 1.0), stop).sample(prompts, seeds([5] * 10))
    assert [len(answers) for answers in drawn] == [5] * 10
    whole = [a for answers in drawn for a in answers]
    for answer in whole:
        assert 1 <= len(answer) <= 8
        assert not set(answer[:-1]) & set(stop)
        assert len(answer) == 8 or answer[-1] in stop
    assert {len(a) for a in whole} > {8}


def test_same_seed_same_answers(model: Any) -> None:
    prompts = draw_prompts([4, 8, 6])
    sampler = Sampler(model, SamplingSettings(8), STOP)
    first = sampler.sample(prompts, seeds([4, 4, 4]))
    assert sampler.sample(prompts, seeds([4, 4, 4])) == first
    assert sampler.sample(prompts, seeds([4, 4, 4], start=100)) != first
    assert len({tuple(a) for a in first[0]}) > 1


def test_luck_is_the_answers_own(model: Any) -> None:
    """Neither the rest of the batch nor rows that leave it change an answer."""
    prompts, own = draw_prompts([4, 8, 6]), [[7, 8], [9], [10, 11, 12]]
    sampler = Sampler(model, SamplingSettings(24, 1.3, 0.6), [2, *range(4, 10)])
    together = sampler.sample(prompts, own)
    assert len({len(a) for answers in together for a in answers}) > 2
    for prompt, mine, answers in zip(prompts, own, together, strict=True):
        for seed, answer in zip(mine, answers, strict=True):
            assert sampler.sample([prompt], [[seed]]) == [[answer]]


def test_prefix_that_a_batch_lacks_is_not_used(model: Any) -> None:
    shared, other = draw_prompts([3, 5], prefix=SHARED), draw_prompts([6, 2], seed=4)
    sampler = Sampler(model, SamplingSettings(6, 1e-4), STOP)
    sampler.share(shared)
    drawn = sampler.sample([*shared, *other], seeds([1] * 4))
    assert [a[0] for a in drawn] == [generate_greedily(model, p, 6, STOP) for p in [*shared, *other]]


def test_frequencies_equal_those_of_generate(model: Any) -> None:
    """Second tokens too: the cache behind the first draw must be each row's own."""
    prompt, draws = draw_prompts([7], seed=8)[0], 4000
    settings = SamplingSettings(2, 1.2, 0.8)
    ids = torch.tensor([prompt])
    torch.manual_seed(0)
    theirs = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.2,
        top_p=0.8,
        top_k=0,
        max_new_tokens=2,
        num_return_sequences=draws,
        eos_token_id=STOP,
        pad_token_id=3,
    )[:, len(prompt) :]
    ours = Sampler(model, settings, STOP).sample([prompt], seeds([draws]))[0]
    padded = torch.tensor([[*a, 3][:2] for a in ours])
    for column in range(2):
        a, b = Counter(theirs[:, column].tolist()), Counter(padded[:, column].tolist())
        statistic, cells = 0.0, 0
        for token in a.keys() | b.keys():
            if a[token] + b[token] >= 10:
                statistic += (a[token] - b[token]) ** 2 / (a[token] + b[token])  # two samples of one distribution
                cells += 1
        assert cells > 2
        assert statistic < cells + 5 * (2 * cells) ** 0.5


def test_common_prefix_leaves_a_token_to_each() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == 2
    assert common_prefix([[1, 2, 3], [1, 2]]) == 1
    assert common_prefix([[1, 2], [1, 2]]) == 1
    assert common_prefix([[5], [6]]) == 0


def test_too_long_for_the_model_is_told(model: Any) -> None:
    sampler = Sampler(model, SamplingSettings(512), STOP)
    with pytest.raises(UserError, match="context is 512"):
        sampler.sample(draw_prompts([10]), [[0]])
    check_window(model.config, 512)
    windowed = tiny_llama(VOCABULARY)
    windowed.config.sliding_window = 16
    with pytest.raises(UserError, match="sliding window is 16"):
        check_window(windowed.config, 17)
