"""What rerankers compute on a CPU by kernels of our own, forward and back, and the attention of a frozen encoder.

Among ten candidates torch's own operations mostly wait for memory, and for each other. The kernels take a few lists at
a time through all of a layer, forward and back, and give the same numbers but for rounding. Where they cannot be used
(no compiler, another device or precision, odd widths) torch's layers compute instead, more slowly. What has a GRU is in
`recurrent`.
"""

import ctypes
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_rec.kernels.calls import addresses, chunk_of, comes_back, needed, numbers_in, parts_of
from lit_rec.kernels.library import MOST_LAYERS, NUMBERS, SIZE, Experts, Layers, Named, Stack


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


def pack(weight: Tensor) -> Tensor:
    """The weights of a linear layer [out, width] as `dense` wants them; `usable` must have said so for out."""
    weight, kernels = weight.contiguous(), needed()
    packed = weight.new_empty(kernels.dense_packed(*weight.shape))
    kernels.dense_pack(*weight.shape, *addresses(weight, packed))
    return packed


def dense(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, gelu: bool) -> Tensor:
    """A linear layer, with GELU behind it where it is wanted; no gradient comes back.

    Args:
        x: [..., width] float32.
        packed: See `pack`.
        bias: [out], contiguous.
        out: Width of what comes out.
        gelu: The exact one, not its approximation by tanh.

    Returns:
        [..., out].
    """
    x = x.contiguous()
    y, at_bias = x.new_empty(*x.shape[:-1], out), 0 if bias is None else bias.data_ptr()
    sizes = x.numel() // x.shape[-1], out, x.shape[-1], torch.get_num_threads()
    needed().dense(*sizes, *addresses(x, packed), at_bias, gelu, *addresses(y))
    return y


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
    kernels, threads, out = needed(), torch.get_num_threads(), torch.empty_like(q)
    scratch = q.new_empty(threads * kernels.attention_scratch(q.shape[1], q.shape[3]), dtype=torch.float32)
    numbers = q.dtype == torch.bfloat16, scale
    kernels.attention(*q.shape, threads, *numbers, *addresses(lengths, q, k, v, out, scratch))
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
    return _Mixture.apply(comes_back(*weights), x, *weights)  # type: ignore[no-untyped-call]


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
    return _Context.apply(comes_back(x, *weights), heads, lengths, x, *weights)  # type: ignore[no-untyped-call]


def bce_in_context(x: Tensor, lengths: Tensor, labels: Tensor, heads: int, *weights: Tensor) -> Tensor:
    """The mean binary cross-entropy of what `score_in_context` gives, whose gradients are made on the way.

    So nothing is kept of a batch but those: a step of PRM waits less for memory.

    Args:
        x: As for `score_in_context`, and so are lengths, heads and weights.
        lengths: See x.
        labels: [B, C] float32; above 1 they count as 1.
        heads: See x.
        *weights: See x.
    """
    return _ContextLoss.apply(heads, lengths, labels, x, *weights)  # type: ignore[no-untyped-call]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, items: Tensor, values: Tensor, widths: Sequence[int], *tables: Tensor) -> Tensor:
        items, values, item_table, value_table = (t.contiguous() for t in (items.long(), values.long(), *tables))
        named = _named(widths, items, values, item_table, value_table)
        out = item_table.new_empty(*items.shape, (1 + len(widths)) * item_table.shape[1])
        if not needed().embed_forward(named, torch.get_num_threads(), *addresses(item_table, value_table, out)):
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
        needed().embed_backward(named, torch.get_num_threads(), *addresses(d_out, d_items, d_values))
        return None, None, None, d_items, d_values


def _named(widths: Sequence[int], items: Tensor, values: Tensor, item_table: Tensor, value_table: Tensor) -> Named:
    ends = (ctypes.c_int64 * len(widths))(*itertools.accumulate(widths))
    sizes = item_table.shape[1], values.shape[1], len(widths), len(item_table), len(value_table)
    return Named(items.numel(), *sizes, *addresses(items, values), ends)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, learns: bool, x: Tensor, *weights: Tensor) -> Tensor:
        x, weights = x.contiguous(), tuple(weight.contiguous() for weight in weights)
        kernels, threads, experts = needed(), torch.get_num_threads(), _experts(x, weights)
        y = x.new_empty(experts.n, experts.out)
        kept = x.new_empty(kernels.experts_kept(experts, threads, learns))
        scratch = x.new_empty(threads * kernels.experts_scratch(experts))
        kernels.experts_forward(experts, threads, *addresses(x, y), learns, *addresses(kept, scratch))
        ctx.threads = threads
        ctx.save_for_backward(x, kept, *weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *weights = ctx.saved_tensors
        kernels, threads, experts, dy = needed(), ctx.threads, _experts(x, weights), dy.contiguous()
        sums = x.new_zeros(threads, kernels.experts_sums(experts))
        scratch = x.new_empty(threads * kernels.experts_scratch(experts))
        kernels.experts_backward(experts, threads, *addresses(x, dy, sums, kept, scratch))
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
    stacks = [Stack(len(w1), w1.shape[2], *addresses(w1, *rest)) for w1, *rest in (weights[:4], weights[4:8])]
    return Experts(*x.shape, hidden, out, *addresses(*weights[8:]), (Stack * 2)(*stacks))


class _Context(torch.autograd.Function):
    """Of x and weights in the order of the kernel's gradients."""

    @staticmethod
    def forward(ctx: Any, learns: bool, heads: int, lengths: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        x, weights = x.contiguous(), tuple(weight.contiguous() for weight in weights)
        kernels, threads, (lists, candidates, _) = needed(), torch.get_num_threads(), x.shape
        layers, chunk = _layers(heads, x, weights), chunk_of(candidates)
        logits, ready = x.new_empty(lists, candidates), x.new_empty(kernels.context_ready(layers))
        kept = x.new_empty((lists if learns else threads * chunk) * kernels.context_kept(layers))
        scratch = x.new_empty(threads * kernels.context_scratch(chunk, layers))
        ctx.heads, ctx.sizes = heads, (lists, chunk, threads)
        kernels.context_forward(
            layers, *ctx.sizes, *addresses(x, lengths, ready, logits), learns, *addresses(kept, scratch)
        )
        ctx.save_for_backward(x, lengths, ready, kept, *weights)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        x, lengths, ready, kept, *weights = ctx.saved_tensors
        kernels, layers, (_, chunk, threads) = needed(), _layers(ctx.heads, x, weights), ctx.sizes
        d_logits, dx, grads = d_logits.contiguous(), torch.empty_like(x), x.new_empty(numbers_in(weights))
        sums = x.new_zeros(threads, kernels.context_sums(layers))
        scratch = x.new_empty(threads * kernels.context_scratch(chunk, layers))
        kernels.context_backward(
            layers, *ctx.sizes, *addresses(x, lengths, ready, d_logits, dx, grads, sums, kept, scratch)
        )
        return None, None, None, dx, *parts_of(grads, [weight.shape for weight in weights])


class _ContextLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: int, lengths: Tensor, labels: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        x, labels, weights = x.contiguous(), labels.contiguous(), tuple(weight.contiguous() for weight in weights)
        kernels, threads, (lists, candidates, _) = needed(), torch.get_num_threads(), x.shape
        layers, chunk = _layers(heads, x, weights), chunk_of(candidates)
        dx, grads, ready = (
            torch.empty_like(x),
            x.new_empty(numbers_in(weights)),
            x.new_empty(kernels.context_ready(layers)),
        )
        sums = x.new_zeros(threads, kernels.context_sums(layers))
        kept = x.new_empty(threads * chunk * kernels.context_kept(layers))
        scratch = x.new_empty(threads * kernels.context_scratch(chunk, layers))
        numbers = addresses(x, lengths, labels, ready, dx, grads, sums, kept, scratch)
        loss = kernels.context_bce(layers, lists, chunk, threads, *numbers)
        ctx.shapes = [weight.shape for weight in weights]
        ctx.save_for_backward(dx, grads)
        return x.new_full((), loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        dx, grads = (saved * d_loss for saved in ctx.saved_tensors)
        return None, None, None, dx, *parts_of(grads, ctx.shapes)


def _layers(heads: int, x: Tensor, weights: Sequence[Tensor]) -> Layers:
    _, candidates, width = x.shape
    widths = [2 * width, *map(len, weights[4:-2:2])]
    sizes, numbers = SIZE * (MOST_LAYERS + 1), NUMBERS * (MOST_LAYERS + 1)
    each = numbers(*addresses(*weights[4::2])), numbers(*addresses(*weights[5::2]))
    return Layers(candidates, width, heads, len(widths) - 1, sizes(*widths), *addresses(*weights[:4]), *each)
