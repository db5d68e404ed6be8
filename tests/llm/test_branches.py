"""Attention of answers that share their prompt, against attention over a copy of it for each."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from lit_rec.errors import UserError
from lit_rec.llm.branches import BranchedLayer, Branches, decoding
from lit_rec.llm.sampler import Sampler, SamplingSettings
from tests.tiny import tiny_llama

HEADS, GROUP, DIM, LENGTH, CAPACITY = 3, 2, 8, 11, 6


class Copies:
    """A copy of its prompt's keys and values for every answer."""

    def __init__(self, keys: Tensor, values: Tensor, real: Tensor) -> None:
        self.keys, self.values, self.seen = keys, values, real

    def attend(self, query: Tensor, new: Tensor) -> Tensor:
        self.keys, self.values = torch.cat([self.keys, new[0]], 2), torch.cat([self.values, new[1]], 2)
        self.seen = F.pad(self.seen, (0, 1), value=True)
        keys, values = (t.repeat_interleave(GROUP, 1) for t in (self.keys, self.values))
        mask = self.seen[:, None, None]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3).transpose(1, 2)

    def select(self, rows: Tensor) -> None:
        self.keys, self.values, self.seen = self.keys[rows], self.values[rows], self.seen[rows]


def check(layer: BranchedLayer, copies: Copies) -> None:
    """Write a token for every row into both, and compare what attention reads."""
    rows = len(copies.seen)
    kind = copies.keys.dtype
    new, query = torch.randn(2, rows, HEADS, 1, DIM).to(kind), 3 * torch.randn(rows, HEADS * GROUP, 1, DIM).to(kind)
    layer.update(new[0], new[1])
    close = {"rtol": 1e-5, "atol": 1e-6} if kind == torch.float32 else {"rtol": 0.0, "atol": 0.02}
    torch.testing.assert_close(layer.attend(query, 0.3), copies.attend(query, new), **close)
    assert layer.get_seq_length() == copies.seen.shape[1]


@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 4, 4], [2, 5, 1]], ids=["one", "even", "ragged"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_attention_over_branches_is_attention_over_copies(counts: list[int], padded: bool, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    real = torch.ones(3, LENGTH, dtype=torch.bool)
    if padded:
        real[0, :4] = real[2, :9] = False
    keys, values = torch.randn(2, 3, HEADS, LENGTH, DIM).to(kind).unbind(0)
    branches = Branches(torch.tensor(counts), real)
    layer, owner = BranchedLayer(keys, values, branches, CAPACITY), branches.owner
    copies = Copies(keys[owner], values[owner], real[owner])
    for _ in range(3):
        check(layer, copies)
    keep = torch.tensor([i for i in range(sum(counts)) if i % 3 != 1])
    left, prompts = branches.select(keep)
    layer.select(keep, prompts, left)
    copies.select(keep)
    assert len(layer.prompt_keys) == HEADS * len(prompts)
    for _ in range(2):
        check(layer, copies)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "phi3", "olmo2", "gemma3_text", "gpt_neox"])
def test_families_of_models_write_what_generate_writes(family: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **sizes, **heads, **ids, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    prompts, counts = [[7, 30, 12], [5, 61, 44, 9, 23, 8, 50], [33, 6, 17, 40, 11]], [[1, 2], [3], [4, 5, 6]]
    drawn = Sampler(model, SamplingSettings(12, 1e-4, 0.95), [2]).sample(prompts, counts)
    for prompt, answers in zip(prompts, drawn, strict=True):
        given = torch.tensor([prompt])
        out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12)
        assert answers == [out[0, len(prompt) :].tolist()] * len(answers)


def test_attention_is_given_back() -> None:
    model, past = tiny_llama(40), DynamicCache()
    model(torch.tensor([[5, 6, 7]]), past_key_values=past, use_cache=True)
    branches = Branches(torch.tensor([2]), torch.ones(1, 3, dtype=torch.bool))

    def broken() -> None:
        with decoding(model, past, branches, 4):
            assert not past.layers
            assert model.config._attn_implementation != "sdpa"
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_attends_in_another_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attention would be over the answer alone, silently."""
    model: Any = tiny_llama(40)
    own = model.model.layers[0].self_attn

    def elsewhere(hidden_states: Tensor, *args: object, **kwargs: Any) -> tuple[Tensor, None]:
        return hidden_states, None

    sampler = Sampler(model, SamplingSettings(5), [2])
    prefill = sampler._prefill

    def then_break(prompts: Any) -> Any:
        done = prefill(prompts)
        monkeypatch.setattr(own, "forward", elsewhere)
        return done

    monkeypatch.setattr(sampler, "_prefill", then_break)
    with pytest.raises(UserError, match="1 of 2 layers do not attend"):
        sampler.sample([[5, 6, 7]], [[1]])
