"""Drawing several answers per prompt: what prompts and answers share is computed once.

A batch runs in three steps. The tokens all prompts begin with (system message, instruction) were computed once for the
whole request. The rest of each prompt is computed once, however many answers it needs. Then its answers branch off,
and all are written together, token by token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from lit_rec.errors import UserError
from lit_rec.llm.branches import BranchedLayer, Branches, decoding
from lit_rec.llm.nucleus import DRAWS, levels, nucleus_sample

MIN_SHARED = 16  # a shorter common prefix is not worth a forward pass of its own


@dataclass(frozen=True)
class SamplingSettings:
    """The distribution answers are drawn from.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: Divides the logits; 0 is greedy: the likeliest token, always.
        top_p: Only the smallest set of tokens with at least this probability is drawn from.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 0.95


def check_window(config: PretrainedConfig, length: int) -> None:
    """Refuse a sequence that is longer than the model's context, or than its sliding window.

    Explicit attention masks would undo a sliding window.

    Raises:
        UserError: `length` tokens are too many.
    """
    text = config.get_text_config()
    limits = {
        "context": getattr(text, "max_position_embeddings", None),
        "sliding window": getattr(text, "sliding_window", None),
    }
    for name, limit in limits.items():
        if limit is not None and limit < length:
            raise UserError(
                f"prompt and answer take {length} tokens, the model's {name} is {limit}",
                where="config key llm",
                fix="show less (prompt.history, ranking.history), ask for less (max_new_tokens), or another model",
            )


@contextmanager
def head_at(model: Any, places: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Meanwhile the language-model head works on these places alone: logits are [1, places, vocabulary].

    Picking from its output instead would compute, and for a backward pass keep, all of it.

    Args:
        model: A causal language model, or its PEFT wrapper.
        places: Rows and columns, on the model's device.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][places][None],))
    try:
        yield
    finally:
        hook.remove()


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens all prompts begin with, at least one token left over for each."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(len(p) for p in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


class Sampler:
    """Samples from one model.

    Args:
        model: A causal language model in eval mode (a PEFT model is fine).
        settings: The distribution.
        stop_ids: Tokens that end an answer.

    """

    def __init__(self, model: Any, settings: SamplingSettings, stop_ids: Sequence[int]) -> None:
        self.model, self.settings = model, settings
        self.stop = torch.tensor(sorted(set(stop_ids)), device=model.device)
        self._prefix: tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]] = ((), [])

    @torch.inference_mode()
    def share(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute what all these prompts begin with; every later batch that begins so uses it."""
        length = common_prefix(prompts)
        if length < MIN_SHARED or len(prompts) == 1:
            self._prefix = ((), [])
            return
        tokens = tuple(prompts[0][:length])
        if tokens != self._prefix[0]:
            ids = torch.tensor([tokens], device=self.model.device)
            cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
            self._prefix = (tokens, [(layer.keys, layer.values) for layer in cache.layers])

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """Draw `len(seeds[i])` answers to `prompts[i]`.

        Args:
            prompts: Token ids.
            seeds: One for each answer, at least one per prompt. An answer has its own luck, whatever else is in the
                batch: models that differ by rounding write the same, but where a draw falls on the very border.

        Returns:
            For each prompt its answers as token ids, the stop token included where the model stopped.

        Raises:
            UserError: The model's sliding window is shorter than prompt and answer.
        """
        device = self.model.device
        logits, past, mask, position = self._prefill(prompts)
        counts = [len(own) for own in seeds]
        luck = self._luck([seed for own in seeds for seed in own], levels(logits.shape[1]))
        branches = Branches(torch.tensor(counts, device=device), mask)
        logits, position = logits[branches.owner], position[branches.owner]
        with decoding(self.model, past, branches, self.settings.max_new_tokens) as layers:
            written = self._write(layers, branches, logits, position, luck)
        return _split(written.tolist(), counts, set(self.stop.tolist()))

    def _write(
        self, layers: Sequence[BranchedLayer], branches: Branches, logits: Tensor, position: Tensor, luck: Tensor
    ) -> Tensor:
        """Write all answers, token by token: [answers, max_new_tokens], -1 behind the end of each."""
        device, cache = logits.device, Cache(layers=list(layers))
        rows = torch.arange(len(logits), device=device)
        written = torch.full((len(rows), self.settings.max_new_tokens), -1, dtype=torch.long, device=device)
        for step in range(self.settings.max_new_tokens):
            token = nucleus_sample(logits, self.settings.temperature, self.settings.top_p, luck[rows, step])
            written[rows, step] = token
            going = ~torch.isin(token, self.stop)
            if step + 1 == self.settings.max_new_tokens or not going.any():
                break
            # Finished rows still cost a full step: drop them once they are a quarter of the batch.
            if int(going.sum()) <= 0.75 * len(going):
                keep = going.nonzero().squeeze(1)
                rows, token, position = rows[keep], token[keep], position[keep]
                branches, prompts = branches.select(keep)
                for layer in layers:
                    layer.select(keep, prompts, branches)
            out = self.model(token[:, None], position_ids=position[:, None], past_key_values=cache, use_cache=True)
            logits, position = out.logits[:, -1], position + 1
        return written

    def _luck(self, seeds: Sequence[int], depth: int) -> Tensor:
        """Uniform numbers [answers, max_new_tokens, draws, depth], the same on every device."""
        shape = (self.settings.max_new_tokens, DRAWS, depth)
        drawn = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(drawn).to(self.model.device)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """Compute the prompts, left-padded behind the shared prefix.

        Returns:
            Last logits [prompts, vocabulary], cache, key mask [prompts, prefix + length] and next position [prompts].
        """
        prefix, past = self._prefix
        if not prefix or any(tuple(p[: len(prefix)]) != prefix or len(p) <= len(prefix) for p in prompts):
            prefix, past = (), []
        rests = [list(p[len(prefix) :]) for p in prompts]
        width, device = max(map(len, rests)), self.model.device
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rests], device=device)
        real = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rests], device=device)
        mask = torch.cat([real.new_ones(len(rests), len(prefix)), real], dim=1)
        position = (mask.long().cumsum(1) - 1).clamp(min=0)
        check_window(self.model.config, len(prefix) + width + self.settings.max_new_tokens)
        cache = DynamicCache()
        for number, (keys, values) in enumerate(past):
            cache.update(keys.expand(len(rests), -1, -1, -1), values.expand(len(rests), -1, -1, -1), number)
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        seen = torch.cat([causal.new_ones(width, len(prefix)), causal], dim=1)
        full = mask[:, None, :] & seen[None]
        # A padded query sees nothing; let it see itself, so that its softmax is defined. Nobody reads it.
        full[:, torch.arange(width), len(prefix) + torch.arange(width)] = True
        rows = torch.arange(len(rests), device=device)
        # Not logits_to_keep: the head would multiply a copy of its weights for every prompt.
        with head_at(self.model, (rows, torch.full_like(rows, width - 1))):
            out = self.model(
                ids,
                attention_mask=full[:, None],
                position_ids=position[:, len(prefix) :],
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits[0], cache, mask, position[:, -1] + 1


def _split(written: list[list[int]], counts: Sequence[int], stop: set[int]) -> list[list[list[int]]]:
    """Cut each row behind its stop token and hand the rows back to their prompts."""

    def cut(row: list[int]) -> Iterator[int]:
        for token in row:
            if token < 0:
                return
            yield token
            if token in stop:
                return

    answers = iter([list(cut(row)) for row in written])
    return [[next(answers) for _ in range(count)] for count in counts]
