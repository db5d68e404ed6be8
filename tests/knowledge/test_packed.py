"""What a packed encoder's attention is asked for, against torch's own."""

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, FalconConfig, FalconModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lit_rec.kernels import layers as kernels
from lit_rec.kernels.library import library
from lit_rec.knowledge.packed import NAME, DenseLinear, attention, pack

TEXTS, HEADS, TOKENS, WIDTH = 3, 2, 9, 16
LENGTHS = torch.tensor([9, 4, 1])
PADDED = (torch.arange(TOKENS) < LENGTHS[:, None])[:, None, None].expand(-1, 1, TOKENS, -1)
HOLE = PADDED.clone()
HOLE[0, :, :, 3] = False
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(TEXTS, 1, -1, -1)


@pytest.mark.parametrize(
    ("mask", "causal", "others", "ours"),
    [
        (None, False, {}, True),
        (PADDED, False, {}, True),
        (PADDED, True, {}, True),  # a mask says it all, as torch has it
        (None, True, {}, False),
        (HOLE, False, {}, False),
        (PADDED.flip(3), False, {}, False),
        (CAUSAL, True, {}, False),
        (torch.where(PADDED, 0.5, -1.0), False, {}, False),
        (None, False, {"position_bias": torch.ones(1, HEADS, TOKENS, TOKENS).tril()}, False),
        (None, False, {"groups": 2}, False),
    ],
)
def test_the_kernel_reads_where_all_is_read_and_torch_elsewhere(
    mask: Tensor | None, causal: bool, others: dict[str, Tensor | int], ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, groups = nn.Module(), int(others.get("groups", 1))
    others = {name: value for name, value in others.items() if name != "groups"}
    module.is_causal, module.num_key_value_groups = causal, groups
    q = torch.randn(TEXTS, HEADS, TOKENS, WIDTH)
    k, v = torch.randn(2, TEXTS, HEADS // groups, TOKENS, WIDTH)
    asked = []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *given: asked.append(given) or attend(*given))
    found, _ = attention(module, q, k, v, mask, scaling=0.4, **others)
    expected, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=0.4, **others)
    assert bool(asked) == (ours and library() is not None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_who_learns_gets_gradients() -> None:
    module = nn.Module()
    module.is_causal = False
    q = torch.randn(3, 1, HEADS, TOKENS, WIDTH, requires_grad=True)
    attention(module, *q, None)[0].sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}


def test_a_packed_encoder_attends_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, intermediate_size=32)).eval()
    calls, attend = [], kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *given: calls.append(given) or attend(*given))
    asked = {"input_ids": torch.randint(0, 11, (TEXTS, TOKENS)), "attention_mask": PADDED[:, 0, 0].long()}
    with torch.inference_mode():
        expected = model(**asked).last_hidden_state
        assert not calls
        assert pack(model).config._attn_implementation == NAME
        found = model(**asked).last_hidden_state
    assert len(calls) == (library() is not None)  # one layer
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel"])
def test_a_packed_encoder_gives_the_same_whoever_made_the_processor(
    maker: str, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("lit_rec.knowledge.packed.maker", lambda: maker)
    model = BertModel(BertConfig(**SMALL, intermediate_size=48, hidden_act=act)).eval()
    asked = {"input_ids": torch.randint(0, 11, (TEXTS, TOKENS)), "attention_mask": PADDED[:, 0, 0].long()}
    with torch.inference_mode():
        expected = model(**asked).last_hidden_state
        found = pack(model)(**asked).last_hidden_state
    ours = any(isinstance(part, DenseLinear) for part in model.modules())
    assert ours == (maker == "AuthenticAMD" and library() is not None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_dense_layer_refuses_what_it_cannot_read() -> None:
    if library() is None:
        pytest.skip("no kernels")
    layer = DenseLinear(nn.Linear(8, 16))
    for x in (torch.ones(2, 9), torch.ones(2, 8, dtype=torch.float64)):
        with pytest.raises(ValueError, match="this layer reads"):
            layer(x)


def test_a_model_that_attends_in_its_own_way_is_left_as_it_is() -> None:
    """Falcon asks for `sdpa` by name, and would take another's mask for numbers to add."""
    model = FalconModel(FalconConfig(**SMALL, alibi=False)).eval()
    assert pack(model).config._attn_implementation == "sdpa"
