"""Text encoding against sentence-transformers at its best batch size."""

import os

os.environ.setdefault("USE_TF", "0")

from collections.abc import Callable

import torch

from lit_rec.config import load_config
from lit_rec.knowledge.encoder import TextEncoder
from lit_rec.llm.loading import local_source
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.worlds import native, text

SIZES, DEFAULT = (8, 16, 32), 32


def library(source: str) -> tuple[str, Callable[[list[str], int], torch.Tensor]]:
    """Sentence-transformers where it is installed, else what its `encode` does, written out.

    That is: texts sorted by their length in characters, the longest first; tokenized and padded batch by batch; mean
    pooling over the mask; put back in order.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ModuleNotFoundError:
        return "sentence-transformers' way of encoding", written_out(source)
    word = Transformer(source, max_seq_length=512, model_kwargs={"dtype": native()})
    model = SentenceTransformer(modules=[word, Pooling(word.get_embedding_dimension())], device="cpu")
    return (
        "sentence-transformers",
        lambda texts, size: model.encode(texts, batch_size=size, show_progress_bar=False, convert_to_tensor=True),
    )


def written_out(source: str) -> Callable[[list[str], int], torch.Tensor]:
    """Encodes as the library does."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source, dtype=native()).eval()

    @torch.inference_mode()
    def encode(texts: list[str], size: int) -> torch.Tensor:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        found = []
        for start in range(0, len(order), size):
            chosen = [texts[i] for i in order[start : start + size]]
            batch = tokenizer(chosen, padding=True, truncation=True, max_length=512, return_tensors="pt")
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].expand(hidden.shape).float()
            found += list((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9))
        back = sorted(range(len(order)), key=order.__getitem__)
        return torch.stack([found[i] for i in back])

    return encode


def run(full: bool = False) -> list[Row]:
    """Seconds for texts of 50 to 400 tokens; both sides mean-pool the same model in the same type."""
    many = 6000 if full else 96
    # Shuffled, as texts come: sorting them is a part of the work.
    texts = [text(40 + 280 * (n * 37 % many) // many, n) for n in range(many)]
    source = local_source(load_config("configs/quickstart.yaml", []).encoder, "encoder", None)
    ours = TextEncoder(source, dtype=native())
    peer, theirs = library(source)
    both = ours.encode(texts[:8]), theirs(texts[:8], 8).cpu().float()
    apart, alike = float((both[0] - both[1]).abs().max()), float(torch.cosine_similarity(*both).min())
    assert alike > 0.999, alike  # the same vectors, but for rounding, of which float32 has next to none
    assert apart < 1e-3 or native() != "float32", apart
    calls = [lambda size=size: theirs(texts, size) for size in SIZES]  # type: ignore[misc]
    mine, *others = interleave(lambda: ours.encode(texts), *calls, repeats=3 if full else 5)
    best, usual = min(others), others[SIZES.index(DEFAULT)]
    work = f"encoding {many} texts of 50 to 400 tokens, MiniLM, {native()}"
    note = ", ".join(f"{size} at a time: {t:.1f} s" for size, t in zip(SIZES, others, strict=True))
    note += "; both spend their time in the same matrix products"
    return [
        Row(work, f"{peer}, best batch size", mine, best, "s", best / mine, 1.2, note),
        Row(work, f"{peer}, its usual batch size ({DEFAULT})", mine, usual, "s", usual / mine, 1.2),
    ]
