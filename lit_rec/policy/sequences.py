"""A prompt and its answers as ONE sequence: the prompt, which every answer needs, is computed once.

Layout of a row: [padding, prompt | answer 1, padding | answer 2, padding | ...]. Answers see the prompt and
themselves, not each other; their positions restart where the prompt ends. Answers begin at the same columns in every
row, so the columns whose logits are needed are the same for the whole batch and the language-model head runs on
those alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_rec.llm.sampler import check_window


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

    A prompt that leaves no room within `max_length` loses its start.
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
        targets and target_mask [B, K, A]; source [K, A], the place in `columns` that predicts each target.
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
        pieces = [(start - n, 0, example.prompt, 0)]
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
    columns, source = [start - 1], torch.zeros(count, longest, dtype=torch.long)
    for k, width in enumerate(widths):
        first = start + sum(widths[:k])
        source[k, 1:width] = torch.arange(width - 1) + len(columns)
        columns.extend(range(first, first + width - 1))
    return {
        "input_ids": ids,
        "position_ids": position,
        "attention_mask": mask[:, None],
        "columns": torch.tensor(columns),
        "source": source,
        "targets": targets,
        "target_mask": target_mask,
    }


def answer_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log pi(answer | prompt), summed over the answer's tokens.

    Args:
        model: A causal language model (or its PEFT wrapper).
        batch: From `collate`, on the model's device.

    Returns:
        [B, K] float32.
    """
    check_window(model.config, batch["input_ids"].shape[1])  # type: ignore[arg-type]
    out = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=batch["columns"],
        use_cache=False,
    )
    mask = batch["target_mask"]
    row, answer, place = mask.nonzero(as_tuple=True)
    logits = out.logits[row, batch["source"][answer, place]].float()
    token_logps = -F.cross_entropy(logits, batch["targets"][mask], reduction="none")
    logps = token_logps.new_zeros(mask.shape)
    logps[mask] = token_logps
    return logps.sum(-1)
