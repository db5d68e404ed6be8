"""Self-attention within short lists."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rec.kernels import calls
from lit_rec.kernels import layers as kernels
from lit_rec.kernels.library import MOST_LAYERS
from lit_rec.rerankers.features import whole
from lit_rec.rerankers.losses import bce


def self_attention(layer: nn.MultiheadAttention, x: Tensor, mask: Tensor) -> Tensor:
    """What `layer(x, x, x, key_padding_mask=~mask)` gives, as plain matrix products.

    Fused kernels are made for long sequences: attention among ten candidates, forward and backward, takes about half as
    long without them on two cores, a step of PRM a tenth to a sixth less. A list that is padding alone gives numbers
    that mean nothing, but are finite.

    Args:
        layer: batch first, with its input projection in one matrix.
        x: [B, C, width].
        mask: [B, C] bool, true where there is a candidate.

    Returns:
        [B, C, width].
    """
    return layer.out_proj(_attended(layer, x, mask))


def score_in_context(layer: nn.MultiheadAttention, mlp: nn.Sequential, x: Tensor, mask: Tensor) -> Tensor:
    """What `mlp(torch.cat([self_attention(layer, x, mask), x], dim=-1))` gives, without its last dimension: [B, C].

    The attention's output projection and the perceptron's first layer are two matrices in a row: their product is made
    first, so that candidates go through one. A step of PRM takes a twentieth to a fifth less.

    Args:
        layer: As for `self_attention`.
        mlp: Begins with a linear layer of twice the width.
        x: [B, C, width].
        mask: [B, C] bool, true where there is a candidate.
    """
    lengths = calls.lengths_of(mask) if _for_kernels(layer, mlp, x) else None
    if lengths is not None:
        return kernels.score_in_context(x, lengths, layer.num_heads, *_weights(layer, mlp))
    of_context, of_x = mlp[0].weight.chunk(2, dim=1)  # type: ignore[operator]
    of_read = of_context @ layer.out_proj.weight
    bias = F.linear(layer.out_proj.bias, of_context, mlp[0].bias)  # type: ignore[arg-type]
    read = _attended(layer, x, mask).flatten(0, 1)
    outputs = F.linear(x.flatten(0, 1), of_x, bias).addmm_(read, of_read.t())
    return mlp[1:](outputs).view(mask.shape)


def bce_in_context(layer: nn.MultiheadAttention, mlp: nn.Sequential, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """`bce` of what `score_in_context` gives: the same loss and gradients in one pass, where there are kernels.

    Args:
        layer: As for `score_in_context`, and so are mlp, x and mask.
        mlp: See layer.
        x: See layer.
        mask: See layer.
        labels: [B, C].
    """
    learns = torch.is_grad_enabled() and labels.dtype == x.dtype
    lengths = calls.lengths_of(mask) if learns and _for_kernels(layer, mlp, x) else None
    if lengths is None:
        return bce(score_in_context(layer, mlp, x, mask), labels, mask)
    return kernels.bce_in_context(x, lengths, labels, layer.num_heads, *_weights(layer, mlp))


def _weights(layer: nn.MultiheadAttention, mlp: nn.Sequential) -> list[Tensor]:
    """Those of both, in the kernels' order."""
    linear = [part for part in mlp if isinstance(part, nn.Linear)]
    read = [tensor for part in (layer.out_proj, *linear) for tensor in (part.weight, part.bias)]
    return [layer.in_proj_weight, layer.in_proj_bias, *read]


def _for_kernels(layer: nn.MultiheadAttention, mlp: nn.Sequential, x: Tensor) -> bool:
    """Whether nothing is asked that kernels do not do: dropout, deep perceptrons."""
    width = x.shape[-1]
    if len(mlp) > 3 * MOST_LAYERS or not calls.usable(x, width, width // layer.num_heads):
        return False
    dropped = [layer.dropout, *(part.p for part in mlp if isinstance(part, nn.Dropout))]
    return not (layer.training and any(dropped))


def _attended(layer: nn.MultiheadAttention, x: Tensor, mask: Tensor) -> Tensor:
    """The values that attention reads, heads side by side, not projected yet."""
    heads = layer.num_heads
    projected = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).unflatten(-1, (3, heads, -1))
    q, k, v = projected.permute(2, 0, 3, 1, 4).flatten(1, 2).unbind(0)  # [B * heads, C, width of a head] each
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if not whole(mask):
        padding = ~mask.repeat_interleave(heads, dim=0).unsqueeze(1)
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1), layer.dropout, layer.training)
    return (weights @ v).unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
