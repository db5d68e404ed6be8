"""A prompt and its answers as ONE sequence: the prompt, which every answer needs, is computed once.

Layout of a row: [prompt, padding | answer 1, padding | answer 2, padding | ...]. Answers see the prompt and
themselves, not each other; their positions restart where the prompt ends. Answers begin at the same columns in every
row, so the columns whose logits are needed are nearly the same for the whole batch (prompts end in several) and the
language-model head runs on those alone. Prompts are plainly causal, so that attention skips what lies ahead of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from lit_rec.llm.branches import attention_by
from lit_rec.llm.sampler import check_window, head_at

_SHARED = "lit_rec_shared_prompt"  # our attention's name among those of transformers
_layout: ContextVar["_Layout"] = ContextVar("layout")


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of its answers (one for plain likelihoods, [chosen, rejected] for a pair)."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.prompt) + sum(map(len, self.answers))


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]], answers: Sequence[str], max_length: int) -> Example:
    """Tokenize a chat prompt with answers, the way TRL does: the whole dialogue, cut where the prompt ends.

    A prompt that leaves no room within `max_length` loses its start. An answer that was cut is given the end of a turn
    like any other, as TRL does.
    """
    chat = {"tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **chat)
    bodies = []
    for answer in answers:
        whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], **chat)
        bodies.append(whole[len(prompt) :][:max_length])
    room = max(max_length - max(map(len, bodies)), 1)
    return Example(prompt[-room:], bodies)


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pad examples with equally many answers into one batch.

    Returns:
        input_ids, position_ids [B, T]; attention_mask [B, 1, T, T] bool; columns [S], whose logits are needed;
        targets and target_mask [B, K, A]; source [B, K, A], the place in `columns` that predicts each target;
        prompt_width [], the columns of the prompts.
    """
    rows, count = len(examples), len(examples[0].answers)
    start = max(len(e.prompt) for e in examples)
    widths = [max(len(e.answers[k]) for e in examples) for k in range(count)]
    total, longest = start + sum(widths), max(widths)
    ids = torch.zeros(rows, total, dtype=torch.long)
    position = torch.zeros(rows, total, dtype=torch.long)
    part = torch.full((rows, total), -1)  # -1 padding, 0 prompt, k answer k
    targets = torch.zeros(rows, count, longest, dtype=torch.long)
    target_mask = torch.zeros(rows, count, longest, dtype=torch.bool)
    for b, example in enumerate(examples):
        n = len(example.prompt)
        pieces = [(0, 0, example.prompt, 0)]
        for k, answer in enumerate(example.answers):
            pieces.append((start + sum(widths[:k]), n, answer, k + 1))
            targets[b, k, : len(answer)] = torch.tensor(answer)
            target_mask[b, k, : len(answer)] = True
        for column, first, tokens, number in pieces:
            span = slice(column, column + len(tokens))
            ids[b, span] = torch.tensor(list(tokens), dtype=torch.long)
            position[b, span] = torch.arange(first, first + len(tokens))
            part[b, span] = number
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    visible = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    mask = causal & visible & (part >= 0)[:, None, :]
    mask |= torch.eye(total, dtype=torch.bool)  # padding sees itself, so that its softmax is defined
    columns = sorted({len(e.prompt) - 1 for e in examples})  # where prompts end, and what follows is an answer's start
    source = torch.zeros(rows, count, longest, dtype=torch.long)
    source[:, :, 0] = torch.tensor([columns.index(len(e.prompt) - 1) for e in examples])[:, None]
    for k, width in enumerate(widths):
        first = start + sum(widths[:k])
        source[:, k, 1:width] = torch.arange(width - 1) + len(columns)
        columns.extend(range(first, first + width - 1))
    return {
        "input_ids": ids,
        "position_ids": position,
        "attention_mask": mask[:, None],
        "columns": torch.tensor(columns),
        "source": source,
        "targets": targets,
        "target_mask": target_mask,
        "prompt_width": torch.tensor(start),
    }


class _Layout:
    """The columns of the prompts, and the answers' mask as numbers to add: made once, kept once for all layers."""

    def __init__(self, width: int, mask: Tensor) -> None:
        self.width, self._mask = width, mask[:, :, width:]
        self._added: dict[torch.dtype, Tensor] = {}

    def added(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, T - width, T]: 0 where an answer sees a key, minus infinity elsewhere."""
        if dtype not in self._added:
            zeros = torch.zeros(self._mask.shape, dtype=dtype, device=self._mask.device)
            self._added[dtype] = zeros.masked_fill_(~self._mask, -torch.inf)
        return self._added[dtype]


def _shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of rows laid out as above: prompts among themselves, causally; answers over everything, by the mask.

    A kernel that is given a mask computes all pairs, one that is told "causal" half of them (and on a GPU it is the
    fast one). The prompt's queries need no key of an answer either.

    Args:
        module: The attention layer.
        query: [B, heads, T, d].
        key: [B, key heads, T, d], and so is value.
        value: See key.
        attention_mask: [B, 1, T, T] bool; the layout holds what is needed of it.
        dropout: Of the attention weights.
        scaling: Of the scores.

    Returns:
        [B, T, heads, d], and no weights.
    """
    layout, groups = _layout.get(), query.shape[1] // key.shape[1]
    width = layout.width
    grouped = query.device.type == "cpu"  # its kernel takes fewer key heads as they are; a GPU's with a mask does not
    if not grouped:
        key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
    prompt = attend(query[:, :, :width], key[:, :, :width], value[:, :, :width], is_causal=True)
    answers = attend(query[:, :, width:], key, value, attn_mask=layout.added(query.dtype))
    return torch.cat([prompt, answers], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_SHARED, _shared_prompt_attention)


@contextmanager
def _attention(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[None]:
    """The model attends by `_shared_prompt_attention` meanwhile, where that is its usual attention in two parts.

    With gradient checkpointing layers run again in the backward pass, outside of this context: the mask does it all.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if config._attn_implementation != "sdpa" or any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        yield
        return
    token = _layout.set(_Layout(int(batch["prompt_width"]), batch["attention_mask"]))
    try:
        with attention_by(model, _SHARED):
            yield
    finally:
        _layout.reset(token)


class _TargetLogps(torch.autograd.Function):
    """log softmax(logits)[targets], whose gradient is written over the logits: they are the largest tensor of a step.

    PyTorch's keeps a log softmax beside them and makes two gradients of that size. Autograd itself would refuse if the
    logits were needed by anything else.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """[N, V] and [N] to [N]."""
        total = logits.logsumexp(-1)
        ctx.save_for_backward(logits, targets, total)
        return logits.gather(1, targets[:, None]).squeeze(1) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """d/d logits = (one-hot - softmax) grad."""
        logits, targets, total = ctx.saved_tensors
        softmax = logits.sub_(total[:, None]).exp_()
        gradient = softmax.mul_(-grad[:, None])
        return gradient.scatter_add_(1, targets[:, None], grad[:, None]), None


def answer_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log pi(answer | prompt), summed over the answer's tokens.

    Args:
        model: A causal language model (or its PEFT wrapper).
        batch: From `collate`, on the model's device.

    Returns:
        [B, K] float32.
    """
    mask = batch["target_mask"]
    logps: Tensor = _TargetLogps.apply(_answer_logits(model, batch), batch["targets"][mask])  # type: ignore[no-untyped-call]
    return _sum_by_answer(logps, mask)


def answer_divergence(model: nn.Module, batch: dict[str, Tensor], reference: AbstractContextManager[None]) -> Tensor:
    """KL(pi || reference) of the next token, over the whole vocabulary, summed over the places of an answer.

    Unlike the difference of the answer's log-probabilities it is never negative, and no token's luck is in it.

    Args:
        model: As for `answer_logps`, without gradients.
        batch: Likewise.
        reference: Makes the model the reference meanwhile.

    Returns:
        [B, K] float32.
    """
    ours = _answer_logits(model, batch).log_softmax(-1)
    with reference:
        theirs = _answer_logits(model, batch).log_softmax(-1)
    return _sum_by_answer(F.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1), batch["target_mask"])


def _answer_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[N, V] float32: what predicts each token of the answers, N in all."""
    check_window(model.config, int(batch["position_ids"].max()) + 1)  # type: ignore[arg-type]
    mask = batch["target_mask"]
    places = mask.nonzero()[:, 0], batch["columns"][batch["source"][mask]]  # row and column that predict each target
    with head_at(model, places), _attention(model, batch):
        logits: Tensor = model(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            use_cache=False,
        ).logits[0]
    return logits.float()


def _sum_by_answer(values: Tensor, mask: Tensor) -> Tensor:
    """[N] values of the tokens that `mask` [B, K, A] marks, summed over each answer: [B, K]."""
    spread = values.new_zeros(mask.shape)
    spread[mask] = values
    return spread.sum(-1)
