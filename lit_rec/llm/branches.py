"""The cache of answers being written: those of one prompt branch off it, and share its keys and values.

Attention reads a prompt's keys and values once for all its answers, and they are never copied; each answer has a short
buffer of its own. Both parts go through one softmax, so this is exact. With 4 answers to prompts of 430 tokens it takes
about half of the time that attention over a copy for each takes on a CPU, with 10 a third.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer

from lit_rec.errors import UserError

NAME = "lit_rec_branches"  # among transformers' attention functions


class Branches:
    """Which answer belongs to which prompt.

    Args:
        counts: Answers of each prompt, at least one; rows are answers, those of a prompt side by side.
        real: [prompts, length] bool, false where a prompt is padding.
    """

    def __init__(self, counts: Tensor, real: Tensor) -> None:
        self.counts, self.real = counts, real
        self.most = int(counts.max())
        self.even = bool((counts == self.most).all())
        self.owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        self.slot = torch.arange(len(self.owner), device=counts.device) - first[self.owner]
        self.bias: Tensor | None = None  # what hides padding, added to scores [prompts, heads, queries, length]
        if not bool(real.all()):
            self.bias = torch.zeros(real.shape, device=real.device).masked_fill_(~real, -1e9)[:, None, None]

    def select(self, rows: Tensor) -> tuple["Branches", Tensor]:
        """Keep only these rows.

        Returns:
            What is left, and which prompts still have answers.
        """
        counts = self.owner[rows].bincount(minlength=len(self.counts))
        prompts = counts.nonzero().squeeze(1)
        return Branches(counts[prompts], self.real[prompts]), prompts

    def by_prompt(self, rows: Tensor) -> Tensor:
        """[rows, heads, queries, n] as [prompts * heads, answers * queries, n], zeros where a prompt has fewer."""
        shape = (len(self.counts), self.most)
        if self.even:
            grid = rows.unflatten(0, shape)
        else:
            grid = rows.new_zeros(*shape, *rows.shape[1:])
            grid[self.owner, self.slot] = rows
        return grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def by_answer(self, blocks: Tensor, heads: int) -> Tensor:
        """[prompts * heads, answers * queries, n] as [rows, heads, queries, n]."""
        grid = blocks.unflatten(1, (self.most, -1)).unflatten(0, (-1, heads)).transpose(1, 2)
        return grid.flatten(0, 1) if self.even else grid[self.owner, self.slot]


class BranchedLayer(DynamicLayer):
    """One layer's keys and values: those of the prompts, and a buffer for what each answer adds, which copies no past.

    Scores are computed in float32 on a CPU, as its fused kernels do inside.

    Args:
        keys: Of the prompts, [prompts, heads, length, dim].
        values: As the keys.
        branches: Whose answers the rows are.
        capacity: Tokens the longest answer may have.
    """

    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, branches: Branches, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.branches, self.heads = branches, keys.shape[1]
        precision = torch.float32 if keys.device.type == "cpu" else keys.dtype
        self.prompt_keys = keys.flatten(0, 1).transpose(1, 2).to(precision).contiguous()  # [.., dim, length]
        self.prompt_values = values.flatten(0, 1).contiguous()
        rows = (len(branches.owner), self.heads, capacity)
        self._keys = keys.new_empty(*rows, keys.shape[3], dtype=precision)
        self._values = values.new_empty(*rows, values.shape[3])
        self._show(0)
        self.is_initialized = True

    def _show(self, length: int) -> None:
        self.length = length  # of the answers
        self.keys: Tensor = self._keys[:, :, :length]
        self.values: Tensor = self._values[:, :, :length]

    def get_seq_length(self) -> int:
        """Tokens of prompt and answer so far."""
        return self.prompt_keys.shape[2] + self.length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append one token, [rows, heads, 1, dim], and return what the answers have of their own."""
        place = slice(self.length, self.length + 1)
        self._keys[:, :, place], self._values[:, :, place] = key_states, value_states
        self._show(self.length + 1)
        return self.keys, self.values

    def select(self, rows: Tensor, prompts: Tensor, branches: Branches) -> None:
        """Keep only these rows, of these prompts."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self._show(self.length)
        if len(prompts) < len(self.branches.counts):
            of_prompts = (t.unflatten(0, (-1, self.heads)) for t in (self.prompt_keys, self.prompt_values))
            self.prompt_keys, self.prompt_values = (t[prompts].flatten(0, 1) for t in of_prompts)
        self.branches = branches

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of the newest token: [rows, query heads, 1, dim] to [rows, 1, query heads, dim]."""
        branches = self.branches
        q = (query.squeeze(2).to(self.keys.dtype) * scaling).unflatten(1, (self.heads, -1))  # query heads by key head
        shared = torch.bmm(branches.by_prompt(q), self.prompt_keys).float()
        if branches.bias is not None:
            shared = shared.unflatten(0, (-1, self.heads)).add_(branches.bias).flatten(0, 1)
        common = _read(shared, self.prompt_values)
        top, weight, read = (branches.by_answer(t, self.heads) for t in common)
        own_top, own_weight, own_read = _read((q @ self.keys.transpose(2, 3)).float(), self.values)
        # One softmax over both parts: each was computed against a maximum of its own.
        highest = torch.maximum(top, own_top)
        scale, own_scale = (top - highest).exp(), (own_top - highest).exp()
        out = (read * scale + own_read * own_scale) / (weight * scale + own_weight * own_scale)
        return out.to(query.dtype).flatten(1, 2).unsqueeze(1)


def _read(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax left undivided: the highest score, the sum of the weights, what they read; each [..., queries, n].

    Args:
        scores: [..., queries, keys] float32.
        values: [..., keys, n].
    """
    top = scores.amax(dim=-1, keepdim=True)
    weights = (scores - top).exp_()
    return top, weights.sum(-1, keepdim=True), (weights.to(values.dtype) @ values).float()


_decoding: ContextVar[tuple[Sequence[BranchedLayer], set[int]]] = ContextVar("decoding")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Follows transformers' interface; keys, values and masks are the layers' own."""
    layers, reached = _decoding.get()
    number: Any = module.layer_idx
    reached.add(number)
    return layers[number].attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def attention_by(model: Any, name: str) -> Iterator[None]:
    """Meanwhile the model attends by another one of transformers' attention functions."""
    config = model.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


@contextmanager
def decoding(model: Any, past: DynamicCache, branches: Branches, capacity: int) -> Iterator[list[BranchedLayer]]:
    """Layers for answers that go on from `past`, which is emptied; meanwhile the model's attention works on them.

    Args:
        model: A causal language model, or its PEFT wrapper.
        past: Keys and values of the prompts.
        branches: Whose answers there will be.
        capacity: Tokens the longest answer may have.

    Raises:
        UserError: A layer of the model attends in another way, so that what was computed is wrong.
    """
    layers, reached = list[BranchedLayer](), set[int]()
    while past.layers:
        layer: Any = past.layers.pop(0)
        layers.append(BranchedLayer(layer.keys, layer.values, branches, capacity))
    token = _decoding.set((layers, reached))
    try:
        with attention_by(model, NAME):
            yield layers
    finally:
        _decoding.reset(token)
    if any(layer.length for layer in layers) and len(reached) < len(layers):
        raise UserError(
            f"{len(layers) - len(reached)} of {len(layers)} layers do not attend through transformers' interface",
            where="config key llm",
            why="answers to one prompt share its keys and values, which only that interface can be told",
            fix="choose another model (Llama, Qwen, Mistral, ... do)",
        )
