"""GRUs over the candidates of short lists, and DLCM, which scores by one: kernels, forward and back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_rec.kernels.calls import addresses, chunk_of, comes_back, needed, numbers_in, parts_of, usable
from lit_rec.kernels.library import Dlcm, Norm

FINAL, STATES = 1, 2  # which norms went by the batch, as the kernel says


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
    return _GRU.apply(comes_back(x, *weights), x, *weights)  # type: ignore[no-untyped-call]


def score_against_final(
    x: Tensor,
    lengths: Tensor,
    gru: nn.GRU,
    norms: tuple[nn.BatchNorm1d, nn.BatchNorm1d],
    final: nn.Linear,
    score: nn.Linear,
) -> Tensor:
    """Score every state of a GRU against the last one: score(tanh(final(norm(last state))) * norm(state)).

    `usable` must have said so for the widths of x and of a state. Where there is only one row to normalise by, the
    running statistics are taken, and left.

    Args:
        x: [B, C, width].
        lengths: [B] int32: how many candidates are no padding; those come first.
        gru: One layer in one direction, batch first, with biases.
        norms: Of the last states and of all; they have weights, running statistics and a momentum.
        final: [hidden, hidden].
        score: [1, hidden].

    Returns:
        Logits [B, C]; those of padding mean nothing.
    """
    of_gru: list[Any] = [gru.weight_ih_l0, gru.bias_ih_l0, gru.weight_hh_l0, gru.bias_hh_l0]
    of_norms = [(norm.weight, norm.bias) for norm in norms]
    weights = [*of_gru, *of_norms[0], final.weight, final.bias, *of_norms[1], score.weight, score.bias]
    return _Dlcm.apply(comes_back(x, *weights), norms, lengths, x, *weights)  # type: ignore[no-untyped-call]


class _GRU(torch.autograd.Function):
    """Of x and a layer's weights, in the order of the kernel's sums."""

    @staticmethod
    def forward(ctx: Any, learns: bool, x: Tensor, *weights: Tensor) -> Tensor:
        x, (w_input, b_input, w_state, b_state) = x.contiguous(), [weight.contiguous() for weight in weights]
        kernels, threads, (lists, candidates, width) = needed(), torch.get_num_threads(), x.shape
        hidden, chunk = w_state.shape[1], chunk_of(candidates)
        sizes = lists, candidates, width, hidden, chunk, threads
        out = x.new_empty(lists, candidates, hidden)
        kept = x.new_empty((lists if learns else threads * chunk) * kernels.gru_kept(candidates, hidden))
        scratch = x.new_empty(threads * kernels.gru_scratch(chunk, candidates, hidden))
        turned = [w_input.t().contiguous(), w_state.t().contiguous()]
        kernels.gru_forward(*sizes, *addresses(x, *turned, b_input, b_state, out), learns, *addresses(kept, scratch))
        ctx.sizes = sizes
        ctx.save_for_backward(x, kept, w_input, b_input, w_state, b_state)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *weights = ctx.saved_tensors
        kernels, (_, candidates, _, hidden, chunk, threads) = needed(), ctx.sizes
        d_out, dx = d_out.contiguous(), torch.empty_like(x)
        sums = x.new_zeros(threads, numbers_in(weights))
        scratch = x.new_empty(threads * kernels.gru_scratch(chunk, candidates, hidden))
        kernels.gru_backward(*ctx.sizes, *addresses(x, weights[0], weights[2], d_out, dx, sums, kept, scratch))
        # The kernel leaves those of all threads in the first one's place.
        return None, dx, *parts_of(sums[0], [weight.shape for weight in weights])


class _Dlcm(torch.autograd.Function):
    """Of x and weights in the order of the kernel's sums."""

    @staticmethod
    def forward(
        ctx: Any, learns: bool, norms: tuple[nn.BatchNorm1d, ...], lengths: Tensor, x: Tensor, *weights: Tensor
    ) -> Tensor:
        x, weights = x.contiguous(), tuple(weight.contiguous() for weight in weights)
        kernels, threads, (lists, candidates, _) = needed(), torch.get_num_threads(), x.shape
        dlcm, chunk, training = _dlcm(norms, x, weights), chunk_of(candidates), norms[0].training
        logits, ready = x.new_empty(lists, candidates), x.new_empty(kernels.dlcm_ready(dlcm))
        kept = x.new_empty((lists if learns or training else threads * chunk) * kernels.dlcm_kept(dlcm))
        scratch = x.new_empty(threads * kernels.dlcm_scratch(chunk, dlcm))
        ctx.norms, ctx.sizes = norms, (lists, chunk, threads)
        by_batch = kernels.dlcm_forward(
            dlcm, *ctx.sizes, *addresses(x, lengths, ready, logits), training, learns, *addresses(kept, scratch)
        )
        for norm, bit in zip(norms, (FINAL, STATES), strict=True):
            if by_batch & bit:
                norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        ctx.save_for_backward(x, lengths, ready, kept, *weights)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        x, lengths, ready, kept, *weights = ctx.saved_tensors
        kernels, dlcm, (_, chunk, threads) = needed(), _dlcm(ctx.norms, x, weights), ctx.sizes
        d_logits, dx, sums = d_logits.contiguous(), torch.empty_like(x), x.new_zeros(threads, numbers_in(weights))
        scratch = x.new_empty(threads * kernels.dlcm_scratch(chunk, dlcm))
        kernels.dlcm_backward(dlcm, *ctx.sizes, *addresses(x, lengths, ready, d_logits, dx, sums, kept, scratch))
        return None, None, None, dx, *parts_of(sums[0], [weight.shape for weight in weights])


def _dlcm(norms: Sequence[nn.BatchNorm1d], x: Tensor, weights: Sequence[Tensor]) -> Dlcm:
    _, candidates, width = x.shape
    scales, of_gru = (weights[4:6], weights[8:10]), weights[:4]
    of_norms = [
        Norm(*addresses(*scale, norm.running_mean, norm.running_var), norm.momentum, norm.eps)  # type: ignore[arg-type]
        for norm, scale in zip(norms, scales, strict=True)
    ]
    return Dlcm(candidates, width, len(weights[5]), *addresses(*of_gru, *weights[6:8], *weights[10:]), *of_norms)
