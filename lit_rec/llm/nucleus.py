"""Drawing a token from a model's logits: exact top-p sampling without sorting, and with luck of the row's own."""

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTH = 16  # branches of the tree a token is drawn from
DRAWS = 4  # per token; at top-p 0.95 one row in 8,000 comes to the last, which sorts


def nucleus_sample(logits: Tensor, temperature: float, top_p: float, luck: Tensor) -> Tensor:
    """Draw one token per row from the top-p set of softmax(logits / temperature).

    Sorting a vocabulary costs as much as the model itself on a CPU. Instead a token is drawn from the whole
    distribution and kept when the tokens more probable than it weigh less than top_p together, which is what being in
    the top-p set means; the others are drawn again, and only what is left before the last draw is sorted. Tokens follow
    the renormalised top-p distribution exactly.

    Args:
        logits: [rows, vocabulary], any float type.
        temperature: Divides the logits; 0 is greedy: the likeliest token, always.
        top_p: Only the smallest set of tokens with at least this probability is drawn from.
        luck: [rows, draws, levels(vocabulary)], uniform in [0, 1): a row's token depends on its own logits and luck.

    Returns:
        [rows] int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p == 1:
        return categorical(probs, luck[:, 0])
    token = torch.zeros(len(probs), dtype=torch.long, device=probs.device)
    rows = torch.arange(len(probs), device=probs.device)
    for draw in range(luck.shape[1]):
        p = probs[rows] if draw else probs
        if draw == luck.shape[1] - 1:
            p = torch.where(p >= _least_probable(p, top_p), p, 0.0)
        drawn = categorical(p, luck[rows, draw])
        token[rows] = drawn
        before = torch.where(p > p.gather(1, drawn[:, None]), p, 0.0).sum(-1)
        rows = rows[before >= top_p]
        if not len(rows):
            break
    return token


def levels(size: int) -> int:
    """How many uniform numbers one draw among `size` takes."""
    count = 1
    while WIDTH**count < size:
        count += 1
    return count


def categorical(weights: Tensor, luck: Tensor) -> Tensor:
    """Draw one column per row, each as often as its weight says, down a tree of sums.

    One cumulative sum over a vocabulary has tens of thousands of borders that all move with every rounding before them:
    where logits differed by 1e-5, one token in 200 came out another. A tree has a few, and costs the same.

    Args:
        weights: [rows, columns], not negative, some positive in every row.
        luck: [rows, levels(columns)], uniform in [0, 1).

    Returns:
        [rows] int64, columns of positive weight.
    """
    rows = torch.arange(len(weights), device=weights.device)
    tree = []
    for _ in range(luck.shape[1]):
        short = -weights.shape[1] % WIDTH
        weights = (F.pad(weights, (0, short)) if short else weights).unflatten(1, (-1, WIDTH))  # padding by 0 copies
        tree.append(weights)
        weights = weights.sum(-1)
    found = torch.zeros_like(rows)
    for u, level in zip(luck.unbind(1), reversed(tree), strict=True):
        borders = level[rows, found].cumsum(-1)
        whole = borders[:, -1]
        below = torch.minimum(u * whole, torch.nextafter(whole, torch.zeros_like(whole)))
        found = found * WIDTH + (borders <= below[:, None]).sum(-1)
    return found


def _least_probable(probs: Tensor, top_p: float) -> Tensor:
    """The probability of the top-p set's least probable token, [rows, 1]."""
    ordered = probs.sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    return ordered.gather(1, (before < top_p).sum(-1, keepdim=True) - 1)
