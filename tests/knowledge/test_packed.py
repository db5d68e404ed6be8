"""What a packed encoder's attention is asked for, against torch's own."""

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lit_rec.kernels import layers as kernels
from lit_rec.kernels.library import library
from lit_rec.knowledge.packed import attention

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
    module, groups = nn.Module(), int(others.pop("groups", 1))
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
