"""Texts to vectors: any Hugging Face encoder, mean pooling, long texts in chunks (METHODS: KAR cuts them instead)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from lit_rec import distributed
from lit_rec.errors import UserError
from lit_rec.knowledge.packed import pack
from lit_rec.llm.loading import hub_error, pick_dtype
from lit_rec.threads import side_by_side

ON_CPU = 8000  # bytes of one value of all tokens of a pass there: it stays in the cache, a tenth to a fifth faster


class TextEncoder:
    """Mean-pooled sentence vectors.

    Args:
        source: Folder or hub repository of an encoder.
        device: Where it runs.
        dtype: "auto", "float32", "bfloat16" or "float16".
        batch_size: Most chunks per forward pass; on a CPU long ones are fewer.
        max_tokens: Tokens per chunk, special tokens included.

    Raises:
        UserError: The encoder cannot be loaded.
    """

    def __init__(
        self,
        source: str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int = 32,
        max_tokens: int = 512,
        revision: str | None = None,
    ) -> None:
        extra = {"revision": revision} if revision else {}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)
            self.model = AutoModel.from_pretrained(
                source, dtype=pick_dtype(dtype, device), use_safetensors=True, trust_remote_code=False, **extra
            )
        except UserError:
            raise
        except Exception as error:
            raise hub_error(error, source, "encoder") from error
        self.model = pack(self.model.eval().to(device))
        limit = getattr(self.model.config, "max_position_embeddings", max_tokens)
        self.max_tokens = min(max_tokens, limit)
        self.batch_size = batch_size
        self.width = int(self.model.config.hidden_size)

    def encode(
        self, texts: Sequence[str], *, cut: bool = False, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Encode texts; equal texts are encoded once, batches hold chunks of similar length.

        Args:
            texts: Any number of texts; an empty one becomes the zero vector.
            cut: Keep only the first `max_tokens` tokens of a text.
            progress: Called with the number of texts done since the last call.

        Returns:
            [len(texts), width] float32, on the CPU.
        """
        unique = list(dict.fromkeys(texts))
        index = {text: i for i, text in enumerate(unique)}
        chunks = self._chunks(unique, cut)
        chunks.sort(key=lambda chunk: len(chunk[1]))
        left = [0] * len(unique)
        for owner, _ in chunks:
            left[owner] += 1
        batches = distributed.share(self._batches(chunks))
        pooled = side_by_side(self._pool, batches, wanted=self.model.device.type == "cpu")
        found = [(torch.zeros(0, self.width), torch.zeros(0, 1))]
        for batch, of_batch in zip(batches, pooled, strict=True):
            found.append(of_batch)  # summed at the end: torch's threads would wait here for cores that are at work
            for owner, _ in batch:
                left[owner] -= 1
                if progress is not None and left[owner] == 0:
                    progress(1)
        owners = torch.tensor([owner for batch in batches for owner, _ in batch], dtype=torch.int64)
        vectors, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
        total = torch.zeros(len(unique), self.width).index_add_(0, owners, vectors * weights)
        weight = torch.zeros(len(unique), 1).index_add_(0, owners, weights)
        total, weight = (
            torch.stack(parts).sum(0) for parts in zip(*distributed.gathered((total, weight)), strict=True)
        )
        return (total / weight.clamp(min=1.0))[[index[text] for text in texts]]

    def _chunks(self, texts: Sequence[str], cut: bool) -> list[tuple[int, list[int]]]:
        """(text number, token ids with special tokens) of every chunk."""
        owners = [i for i, text in enumerate(texts) if text.strip()]
        if not owners:
            return []
        found = self.tokenizer(
            [texts[i] for i in owners],
            truncation=True,
            max_length=self.max_tokens,
            return_overflowing_tokens=not cut,
        )
        source = range(len(owners)) if cut else found["overflow_to_sample_mapping"]
        return [(owners[i], ids) for i, ids in zip(source, found["input_ids"], strict=True)]

    def _batches(self, chunks: list[tuple[int, list[int]]]) -> list[list[tuple[int, list[int]]]]:
        """Chunks, the shortest first, as they go through the model together."""
        most = ON_CPU // self.model.dtype.itemsize if self.model.device.type == "cpu" else math.inf
        batches: list[list[tuple[int, list[int]]]] = []
        for chunk in chunks:
            full = not batches or len(batches[-1]) == self.batch_size
            if full or (len(batches[-1]) + 1) * len(chunk[1]) > most:
                batches.append([])
            batches[-1].append(chunk)
        return batches

    @torch.inference_mode()
    def _pool(self, batch: Sequence[tuple[int, list[int]]]) -> tuple[Tensor, Tensor]:
        """Mean over the tokens of each chunk: [chunks, width] and the token counts [chunks, 1]."""
        ids = [tokens for _, tokens in batch]
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in ids], device=self.model.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.model.device)
        mask = torch.arange(width, device=self.model.device) < lengths[:, None]
        hidden = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state.float()
        pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
        return pooled.cpu(), lengths[:, None].float().cpu()
