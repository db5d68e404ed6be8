"""Text encoding against sentence-transformers at its best batch size."""

import os
import tempfile

os.environ.setdefault("USE_TF", "0")

from lit_rec.config import load_config
from lit_rec.knowledge.encoder import TextEncoder
from lit_rec.llm.loading import local_source
from tests.benchmarks.harness import Row, faster, interleave
from tests.benchmarks.worlds import text

TEXTS, SIZES = 400, (16, 32, 64)


def run() -> list[Row]:
    """Seconds for texts of 50 to 400 tokens; both sides mean-pool the same model in float32."""
    from sentence_transformers import SentenceTransformer, models

    texts = [text(40 + 280 * n // TEXTS, n) for n in range(TEXTS)]
    with tempfile.TemporaryDirectory() as _:
        cfg = load_config("configs/quickstart.yaml", []).encoder
        source = local_source(cfg, "encoder", None)
    ours = TextEncoder(source, dtype="float32")
    word = models.Transformer(source, max_seq_length=512)
    theirs = SentenceTransformer(modules=[word, models.Pooling(word.get_word_embedding_dimension())], device="cpu")
    mine, other = ours.encode(texts[:8]), theirs.encode(texts[:8], convert_to_tensor=True)
    assert float((mine - other.cpu()).abs().max()) < 1e-3  # the same vectors
    taken = interleave(
        lambda: ours.encode(texts),
        *(lambda size=size: theirs.encode(texts, batch_size=size, show_progress_bar=False) for size in SIZES),
        repeats=2,
    )
    work = f"encoding {TEXTS} texts of 50 to 400 tokens, MiniLM"
    return [faster(work, "sentence-transformers, best of 3 batch sizes", taken, 1.2)]
