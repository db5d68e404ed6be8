"""What rerankers compute on a CPU by kernels of our own, forward and back, and the attention of a frozen encoder.

Among ten candidates torch's own operations mostly wait for memory, and for each other. The kernels take a few lists at
a time through all of a layer, forward and back, and give the same numbers but for rounding. Where they cannot be used
(no compiler, another device or precision, odd widths) torch's layers compute instead, more slowly.
"""

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_rec.kernels.library import MOST_LAYERS, NUMBERS, SIZE, Experts, Layers, Named, Stack, library

ROWS = 120  # candidates taken at a time: what is made of them stays in the cache


def states(layer: nn.GRU, x: Tensor) -> Tensor:
    """The states of a GRU, as `layer(x)[0]` gives them.

    Args:
        layer: One layer in one direction, batch first, with biases.
        x: [B, C, width].

    Returns:
        [B, C, hidden].
    """
    if not usable(x, layer.input_size, layer.hidden_size):
        return layer(x)[0]
    weights: list[Any] = [layer.weight_ih_l0, layer.bias_ih_l0, layer.weight_hh_l0, layer.bias_hh_l0]
    return _GRU.apply(_learns(x, *weights), x, *weights)  # type: ignore[no-untyped-call]


def usable(x: Tensor, *widths: int, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """Whether kernels can compute with x, and layers of these widths."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if x.device.type != "cpu" or x.dtype not in dtypes or not x.numel() or torch.is_autocast_enabled("cpu"):
        return False
    found = library()
    return found is not None and all(width and width % found.lanes() == 0 for width in widths)


def embed(items: Tensor, item_table: Tensor, values: Tensor, widths: Sequence[int], value_table: Tensor) -> Tensor:
    """Embed items, and beside them the mean of each attribute's values; padding, 0 in either, is zeros.

    `usable` must have said so for the tables' width.

    Args:
        items: [...] ids.
        item_table: [n_items + 1, dim].
        values: [n_items + 1, columns] ids.
        widths: How many of the columns each attribute has.
        value_table: [values + 1, dim].

    Returns:
        [..., (1 + attributes) * dim].
    """
    return _Embedding.apply(items, values, widths, item_table, value_table)  # type: ignore[no-untyped-call]


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Every query reads the keys of its text, all of them; no gradient comes back.

    `usable` must have said so for the type, float32 or bfloat16.

    Args:
        query: [B, heads, T, d], and so are key and value.
        key: See query.
        value: See query.
        lengths: [B] int32: how many keys are no padding, 1 or more; those come first.
        scale: Of query times key.

    Returns:
        [B, T, heads, d].
    """
    q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    kernels, threads, out = _needed(), torch.get_num_threads(), torch.empty_like(q)
    scratch = q.new_empty(threads * kernels.attention_scratch(q.shape[1], q.shape[3]), dtype=torch.float32)
    numbers = q.dtype == torch.bfloat16, scale
    kernels.attention(*q.shape, threads, *numbers, *_at(lengths, q, k, v, out, scratch))
    return out


def mix_experts(x: Tensor, *weights: Tensor) -> Tensor:
    """The outputs of two stacks of experts, Linear-ReLU-Linear-ReLU each, weighed by a gate: softmax(Linear(x)).

    `usable` must have said so for the width of x and that of an output. No gradient comes back to x.

    Args:
        x: [N, width].
        *weights: Of one stack, then of the other: the first layers' [E, hidden, width or more, of which the leading
            columns are read] and [E, hidden], the second ones' [E, out, hidden] and [E, out]. Then of the gate:
            [experts, width] and [experts], in that order of experts.

    Returns:
        [N, out].
    """
    return _Mixture.apply(_learns(*weights), x, *weights)  # type: ignore[no-untyped-call]


def lengths(mask: Tensor) -> Tensor | None:
    """How many places of every row of a bool mask [B, C] are no padding: [B] int32; None where some stand behind it."""
    mask, found = mask.contiguous(), mask.new_empty(len(mask), dtype=torch.int32)
    return found if _needed().lengths_of(*mask.shape, *_at(mask, found)) else None


def score_in_context(x: Tensor, lengths: Tensor, heads: int, *weights: Tensor) -> Tensor:
    """Self-attention, then a perceptron on [attention ; x]: linear layers, ReLU between.

    `usable` must have said so for the width of x and that of a head.

    Args:
        x: [B, C, width].
        lengths: [B] int32: how many candidates are no padding; those come first.
        heads: Of the attention.
        *weights: Weight and bias by turns: of queries, keys and values [3 * width, width], of what attention reads
            [width, width], of the perceptron's hidden layers, at most `MOST_LAYERS`, and of its output [1, hidden].

    Returns:
        Logits [B, C].
    """
    return _Context.apply(_learns(x, *weights), heads, lengths, x, *weights)  # type: ignore[no-untyped-call]


def _learns(*tensors: Tensor) -> bool:
    """Whether there will be a way back, for which has to be kept what is made on the way."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _chunk(candidates: int) -> int:
    """Lists taken at a time: a multiple of five, since products take five rows at once."""
    return max(5, ROWS // candidates // 5 * 5)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items: Tensor, values: Tensor, widths: Sequence[int], *tables: Tensor) -> Tensor:
        items, values, item_table, value_table = (t.contiguous() for t in (items.long(), values.long(), *tables))
        named = _named(widths, items, values, item_table, value_table)
        out = item_table.new_empty(*items.shape, (1 + len(widths)) * item_table.shape[1])
        if not _needed().embed_forward(named, torch.get_num_threads(), *_at(item_table, value_table, out)):
            raise IndexError(f"an item or a value is not among the {len(item_table)} and {len(value_table)} embedded")
        ctx.widths = widths
        ctx.save_for_backward(items, values, *tables)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        items, values, *tables = ctx.saved_tensors
        d_out, d_items, d_values = d_out.contiguous(), *map(torch.zeros_like, tables)
        named = _named(ctx.widths, items, values, *tables)
        _needed().embed_backward(named, torch.get_num_threads(), *_at(d_out, d_items, d_values))
        return None, None, None, d_items, d_values


def _named(widths: Sequence[int], items: Tensor, values: Tensor, item_table: Tensor, value_table: Tensor) -> Named:
    ends = (ctypes.c_int64 * len(widths))(*itertools.accumulate(widths))
    sizes = item_table.shape[1], values.shape[1], len(widths), len(item_table), len(value_table)
    return Named(items.numel(), *sizes, *_at(items, values), ends)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, learns: bool, x: Tensor, *weights: Tensor) -> Tensor:
        x, weights = x.contiguous(), tuple(weight.contiguous() for weight in weights)
        kernels, threads, experts = _needed(), torch.get_num_threads(), _experts(x, weights)
        y = x.new_empty(experts.n, experts.out)
        kept = x.new_empty(kernels.experts_kept(experts, threads, learns))
        scratch = x.new_empty(threads * kernels.experts_scratch(experts))
        kernels.experts_forward(experts, threads, *_at(x, y), learns, *_at(kept, scratch))
        ctx.threads = threads
        ctx.save_for_backward(x, kept, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *weights = ctx.saved_tensors
        kernels, threads, experts, dy = _needed(), ctx.threads, _experts(x, weights), dy.contiguous()
        sums = x.new_zeros(threads, kernels.experts_sums(experts))
        scratch = x.new_empty(threads * kernels.experts_scratch(experts))
        kernels.experts_backward(experts, threads, *_at(x, dy, sums, kept, scratch))
        width, hidden, out = experts.width, experts.hidden, experts.out
        shapes = [(hidden, width), (hidden,), (hidden, out), (out,), (width,), ()]
        counts = [stack.count for stack in experts.stacks]
        parts = sums[0].split([sum(counts) * math.prod(shape) for shape in shapes])
        w1, b1, w2, b2, *gate = [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        stacked = zip(*(part.split(counts) for part in (w1, b1, w2.transpose(1, 2), b2)), strict=True)
        found = [
            [F.pad(w, (0, stack.row - width)), *rest] for (w, *rest), stack in zip(stacked, experts.stacks, strict=True)
        ]
        return None, None, *found[0], *found[1], *gate


def _experts(x: Tensor, weights: Sequence[Tensor]) -> Experts:
    _, out, hidden = weights[2].shape
    stacks = [Stack(len(w1), w1.shape[2], *_at(w1, *rest)) for w1, *rest in (weights[:4], weights[4:8])]
    return Experts(*x.shape, hidden, out, *_at(*weights[8:]), (Stack * 2)(*stacks))


class _GRU(torch.autograd.Function):
    """Of x and a layer's weights, in the order of the kernel's sums."""

    @staticmethod
    def forward(ctx: Any, learns: bool, x: Tensor, *weights: Tensor) -> Tensor:
        x, (w_input, b_input, w_state, b_state) = x.contiguous(), [weight.contiguous() for weight in weights]
        kernels, threads, (lists, candidates, width) = _needed(), torch.get_num_threads(), x.shape
        hidden, chunk = w_state.shape[1], _chunk(candidates)
        sizes = lists, candidates, width, hidden, chunk, threads
        out = x.new_empty(lists, candidates, hidden)
        kept = x.new_empty((lists if learns else threads * chunk) * kernels.gru_kept(candidates, hidden))
        scratch = x.new_empty(threads * kernels.gru_scratch(chunk, candidates, hidden))
        turned = [w_input.t().contiguous(), w_state.t().contiguous()]
        kernels.gru_forward(*sizes, *_at(x, *turned, b_input, b_state, out), learns, *_at(kept, scratch))
        ctx.sizes = sizes
        ctx.save_for_backward(x, kept, w_input, b_input, w_state, b_state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *weights = ctx.saved_tensors
        kernels, (_, candidates, _, hidden, chunk, threads) = _needed(), ctx.sizes
        d_out, dx = d_out.contiguous(), torch.empty_like(x)
        sums = x.new_zeros(threads, _count(weights))
        scratch = x.new_empty(threads * kernels.gru_scratch(chunk, candidates, hidden))
        kernels.gru_backward(*ctx.sizes, *_at(x, weights[0], weights[2], d_out, dx, sums, kept, scratch))
        return None, dx, *_parts(sums[0], weights)  # the kernel leaves those of all threads in the first one's place


class _Context(torch.autograd.Function):
    """Of x and weights in the order of the kernel's gradients."""

    @staticmethod
    def forward(ctx: Any, learns: bool, heads: int, lengths: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        x, weights = x.contiguous(), tuple(weight.contiguous() for weight in weights)
        kernels, threads, (lists, candidates, _) = _needed(), torch.get_num_threads(), x.shape
        layers, chunk = _layers(heads, x, weights), _chunk(candidates)
        logits, ready = x.new_empty(lists, candidates), x.new_empty(kernels.context_ready(layers))
        kept = x.new_empty((lists if learns else threads * chunk) * kernels.context_kept(layers))
        scratch = x.new_empty(threads * kernels.context_scratch(chunk, layers))
        ctx.heads, ctx.sizes = heads, (lists, chunk, threads)
        kernels.context_forward(layers, *ctx.sizes, *_at(x, lengths, ready, logits), learns, *_at(kept, scratch))
        ctx.save_for_backward(x, lengths, ready, kept, *weights)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        x, lengths, ready, kept, *weights = ctx.saved_tensors
        kernels, layers, (_, chunk, threads) = _needed(), _layers(ctx.heads, x, weights), ctx.sizes
        d_logits, dx, grads = d_logits.contiguous(), torch.empty_like(x), x.new_empty(_count(weights))
        sums = x.new_zeros(threads, kernels.context_sums(layers))
        scratch = x.new_empty(threads * kernels.context_scratch(chunk, layers))
        kernels.context_backward(layers, *ctx.sizes, *_at(x, lengths, ready, d_logits, dx, grads, sums, kept, scratch))
        return None, None, None, dx, *_parts(grads, weights)


def _layers(heads: int, x: Tensor, weights: Sequence[Tensor]) -> Layers:
    _, candidates, width = x.shape
    widths = [2 * width, *map(len, weights[4:-2:2])]
    sizes, numbers = SIZE * (MOST_LAYERS + 1), NUMBERS * (MOST_LAYERS + 1)
    each = numbers(*_at(*weights[4::2])), numbers(*_at(*weights[5::2]))
    return Layers(candidates, width, heads, len(widths) - 1, sizes(*widths), *_at(*weights[:4]), *each)


def _needed() -> ctypes.CDLL:
    found = library()
    assert found is not None, "asked of by `usable` before"
    return found


def _at(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _count(weights: Sequence[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _parts(grads: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of weights, which lie one behind the other, in their shapes."""
    parts = grads.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
