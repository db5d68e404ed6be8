"""The shared-prompt sequence gives the same log-probabilities as every answer on its own."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy

from callbacks.evaluation import sampled
from lit_rec.errors import UserError
from lit_rec.policy.sequences import Example, _TargetLogps, answer_divergence, answer_logps, collate, encode_chat
from tests.tiny import tiny_llama, word_tokenizer

WORDS = [f"w{i}" for i in range(40)]


def alone(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    """log pi(answer | prompt) from one plain sequence, no mask, no padding."""
    ids = torch.tensor([prompt + answer])
    logps = model(ids).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("answers", [1, 2, 3])
def test_equals_plain_sequences(answers: int) -> None:
    model, rng = tiny_llama(50), random.Random(answers)
    draw = lambda least, most: [rng.randrange(4, 50) for _ in range(rng.randint(least, most))]  # noqa: E731
    examples = [Example(draw(1, 20), [draw(1, 9) for _ in range(answers)]) for _ in range(7)]
    with torch.no_grad():
        found = answer_logps(model, collate(examples))
        expected = torch.tensor([[alone(model, e.prompt, a) for a in e.answers] for e in examples])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_divergence_is_that_of_every_place_of_an_answer() -> None:
    """Against plain sequences and PyTorch's categorical distributions; the reference is the same model, disturbed."""
    model, rng = tiny_llama(50), random.Random(5)
    draw = lambda least, most: [rng.randrange(4, 50) for _ in range(rng.randint(least, most))]  # noqa: E731
    examples = [Example(draw(1, 12), [draw(1, 6)]) for _ in range(5)]
    weight = model.lm_head.weight
    usual, other = weight.detach().clone(), weight.detach() + 0.3 * torch.randn(weight.shape)

    @contextmanager
    def reference() -> Iterator[None]:
        weight.data = other
        yield
        weight.data = usual

    def logits(example: Example) -> Tensor:
        ids, start = torch.tensor([[*example.prompt, *example.answers[0]]]), len(example.prompt) - 1
        return model(ids).logits[0, start:-1]

    with torch.no_grad():
        found = answer_divergence(model, collate(examples), reference()).squeeze(1)
        policy = [Categorical(logits=logits(one)) for one in examples]
        with reference():
            base = [Categorical(logits=logits(one)) for one in examples]
    expected = torch.stack([kl_divergence(p, q).sum() for p, q in zip(policy, base, strict=True)])
    assert (expected > 0.01).all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rejected_answer_does_not_see_the_chosen_one() -> None:
    model = tiny_llama(50)
    with torch.no_grad():
        a = answer_logps(model, collate([Example([5, 6, 7], [[8, 9], [10, 11]])]))
        b = answer_logps(model, collate([Example([5, 6, 7], [[20, 21, 22], [10, 11]])]))
    assert a[0, 1].item() == pytest.approx(b[0, 1].item(), abs=1e-6)
    assert a[0, 0].item() != pytest.approx(b[0, 0].item(), abs=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_ways_to_attend_give_the_same_gradients(checkpointing: bool) -> None:
    """Gradient checkpointing works by the mask alone; eager attention is the oracle of both."""
    model, rng = tiny_llama(50).train(), random.Random(3)
    draw = lambda many: [rng.randrange(4, 50) for _ in range(many)]  # noqa: E731
    batch = collate([Example(draw(n), [draw(4), draw(6)]) for n in (9, 14, 14)])
    model.set_attn_implementation("eager")
    additive = torch.zeros(batch["attention_mask"].shape).masked_fill(~batch["attention_mask"], -1e9)
    expected = answer_logps(model, batch | {"attention_mask": additive})
    expected.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = answer_logps(model, batch)
    assert model.config._attn_implementation == "sdpa"
    found.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_logits_are_computed_on_answers_only() -> None:
    batch = collate([Example(list(range(4, 24)), [[5, 6, 7], [8, 9]]), Example([4], [[5], [6, 7]])])
    assert batch["columns"].tolist() == [0, 19, 20, 21, 23]


def test_encode_chat_cuts_where_the_answer_begins_and_keeps_the_prompts_end() -> None:
    tokenizer = word_tokenizer(WORDS)
    messages = [{"role": "user", "content": "w1 w2 w3 w4"}]
    whole = encode_chat(tokenizer, messages, ["w5 w6", "w7"], 100)
    assert tokenizer.decode(whole.answers[0]) == "w5 w6 <|im_end|>"
    assert tokenizer.decode(whole.prompt).endswith("<|im_end|> <|im_start|>assistant") or len(whole.prompt) > 4
    short = encode_chat(tokenizer, messages, ["w5 w6", "w7"], 6)
    assert short.prompt == whole.prompt[-3:]


def test_answers_side_by_side_do_not_use_up_the_context() -> None:
    model = tiny_llama(50)
    model.config.max_position_embeddings = 12
    answers = [[5, 6, 7, 8], [9, 10, 11, 12]]
    with torch.no_grad():
        found = answer_logps(model, collate([Example(list(range(4, 12)), answers)]))  # positions 0 to 11, 16 columns
    assert found[0, 1].item() == pytest.approx(alone(model, list(range(4, 12)), answers[1]), abs=1e-5)
    with pytest.raises(UserError, match="13 tokens"):
        answer_logps(model, collate([Example(list(range(4, 13)), answers)]))


@pytest.mark.parametrize(("finish", "kept"), [("stop", "w5 w6 <|im_end|>"), ("length", "w5 w6")])
def test_of_an_answer_what_was_drawn_counts(finish: str, kept: str) -> None:
    """A template ends every answer; one that was cut had no end, and nobody drew what stands behind an end."""
    tokenizer = word_tokenizer(WORDS)
    whole = encode_chat(tokenizer, [{"role": "user", "content": "w1"}], ["w5 w6"], 100)
    whole = Example(whole.prompt, [[*whole.answers[0], *tokenizer("w7")["input_ids"]]])
    found = sampled(whole, {tokenizer.eos_token_id}, finish)
    assert tokenizer.decode(found.answers[0]) == kept
    assert found.prompt == whole.prompt


def test_sliding_window_is_refused() -> None:
    model = tiny_llama(50)
    model.config.sliding_window = 4
    with pytest.raises(UserError, match="sliding window"):
        answer_logps(model, collate([Example([4, 5, 6, 7], [[5], [6]])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_written_over_the_logits_is_that_of_cross_entropy(dtype: torch.dtype) -> None:
    """Also where logits come out of a cap, as some models have it, or out of another precision."""
    torch.manual_seed(0)
    hidden, targets, weight = torch.randn(7, 5), torch.randint(0, 50, (7,)), torch.randn(7)
    head = (3 * torch.randn(5, 50)).requires_grad_()
    found = []
    for ours in (True, False):
        logits = (4 * torch.tanh((hidden @ head).to(dtype) / 4)).float()
        logps = _TargetLogps.apply(logits, targets) if ours else -cross_entropy(logits, targets, reduction="none")
        found.append((logps.detach(), *torch.autograd.grad((logps * weight).sum(), head)))
    torch.testing.assert_close(found[0], found[1])


def test_logits_that_something_else_needs_are_not_written_over() -> None:
    logits = torch.randn(3, 9, requires_grad=True).exp()  # whose own gradient is made from what it gave
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _TargetLogps.apply(logits, torch.tensor([1, 2, 3])).sum().backward()
