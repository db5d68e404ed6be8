"""A frozen encoder on a CPU: linear layers as its processor wants them, attention by a kernel of our own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rec.kernels import calls
from lit_rec.kernels import layers as kernels
from lit_rec.kernels.library import AMD, maker
from lit_rec.llm.loading import native_bf16

NAME = "lit_rec_texts"
TYPES = (torch.float32, torch.bfloat16)
ROWS = 2000  # for which oneDNN chooses the layout; it computes other numbers of rows as well


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 whose weights lie in oneDNN's blocks already, with a GELU behind it if there is one.

    `nn.Linear` has them rearranged at every call, which takes an eighth of an encoder's time. The operators are those
    that `torch.compile` puts in the place of a frozen linear layer.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.then, self.exactly = ("gelu", "none") if gelu else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.then, [], self.exactly)


class DenseLinear(nn.Module):
    """A linear layer in float32 by a kernel of our own, with a GELU behind it if there is one.

    For AMD's processors: torch's library, MKL, is Intel's, and the kernel took a quarter to a third less time on them.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.weight, self.out, self.width = kernels.pack(linear.weight.detach()), *linear.weight.shape
        self.bias = None if linear.bias is None else linear.bias.detach().contiguous()
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., out]."""
        if x.dtype != self.weight.dtype or x.shape[-1] != self.width:
            raise ValueError(f"this layer reads [..., {self.width}] of {self.weight.dtype}, not {x.shape} of {x.dtype}")
        return kernels.dense(x, self.weight, self.bias, self.out, self.gelu)


def packed(linear: nn.Linear) -> type[PackedLinear] | type[DenseLinear] | None:
    """What is faster than a frozen linear layer, if anything is."""
    weight = linear.weight
    if weight.dtype is torch.bfloat16 and weight.is_cpu and native_bf16("cpu"):
        return PackedLinear
    return DenseLinear if calls.usable(weight, linear.out_features) and maker() == AMD else None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface; what the kernel does not do, such as a mask of other things than padding, torch does."""
    lengths = None
    plain = others.get("position_bias") is None and others.get("softcap") is None and not others.get("dropout")
    plain &= not (torch.is_grad_enabled() and query.requires_grad)
    alike = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    if plain and alike and calls.usable(query, dtypes=TYPES):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        lengths = _lengths(query, attention_mask, causal)
    if lengths is None:
        given = {"scaling": scaling, "is_causal": is_causal, **others}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    return kernels.attend(query, key, value, lengths, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _lengths(query: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """How many tokens each text has [B], int32; None where a query does not read all of its text's, those first."""
    texts, _, tokens, _ = query.shape
    if mask is None:
        return None if causal else torch.full((texts,), tokens, dtype=torch.int32, device=query.device)
    if mask.dtype != torch.bool or mask.shape != (texts, 1, tokens, tokens):
        return None
    alike = mask[..., 0].all() and (mask == mask[:, :, :1]).all()
    return calls.lengths_of(mask[:, 0, 0]) if alike else None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def pack(model: PreTrainedModel) -> PreTrainedModel:
    """Make a frozen model on a CPU faster, in place. Where there is a matrix unit, torch's attention has its use."""
    unit = model.dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and not unit:
        model.set_attn_implementation(NAME)  # which leaves a model as it is that does not attend by the interface
    _pack_linear(model)
    return model


def _pack_linear(model: nn.Module) -> None:
    for name, child in model.named_children():
        if type(child) is not nn.Linear:
            _pack_linear(child)
        elif kind := packed(child):
            behind = getattr(model, "intermediate_act_fn", None) if name == "dense" else None  # as BERT names them
            gelu = getattr(behind, "act", None) is F.gelu
            setattr(model, name, kind(child, gelu))
            if gelu:
                model.intermediate_act_fn = nn.Identity()
