"""Texts to vectors, against plain loops over one text at a time."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from lit_rec.errors import UserError
from lit_rec.knowledge.encoder import TextEncoder
from lit_rec.knowledge.packed import PackedLinear
from lit_rec.llm.loading import native_bf16
from tests.tiny import save_encoder

WORDS = [f"w{i}" for i in range(30)]
TEXTS = ["w1 w2 w3", "w4", " ".join(WORDS), "w5 w6 w7 w8 w9 w10 w11", "w1 w2 w3", "", "  \n", "unseen words w3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), WORDS)


def make(folder: Path, **options: Any) -> TextEncoder:
    return TextEncoder(str(folder), **{"dtype": "float32", **options})


@torch.no_grad()
def pool_alone(folder: Path, ids: list[int]) -> torch.Tensor:
    """Mean of the last hidden state of one sequence without padding."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[0].mean(0)


def test_equals_plain_mean_pooling(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = make(folder, batch_size=3).encode(TEXTS)
    assert found.shape == (len(TEXTS), 16)
    assert found.dtype == torch.float32
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"]
        expected = pool_alone(folder, ids) if text.strip() else torch.zeros(16)
        torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-6)


def test_long_text_is_the_mean_of_its_chunks_weighted_by_length(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(" ".join(WORDS))["input_ids"]
    chunks = [ids[i : i + 8] for i in range(0, len(ids), 8)]
    assert [len(c) for c in chunks] == [8, 8, 8, 6]
    expected = sum(len(c) * pool_alone(folder, c) for c in chunks) / len(ids)
    encoder = make(folder, max_tokens=8)
    torch.testing.assert_close(encoder.encode([" ".join(WORDS)])[0], expected, rtol=1e-5, atol=1e-6)
    cut = encoder.encode([" ".join(WORDS)], cut=True)[0]
    torch.testing.assert_close(cut, pool_alone(folder, chunks[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cut", [False, True])
def test_batch_size_and_order_change_nothing(folder: Path, cut: bool) -> None:
    texts = TEXTS * 2
    found = [make(folder, batch_size=n, max_tokens=8).encode(texts, cut=cut) for n in (1, 4, 64)]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-6)
    backwards = make(folder, batch_size=4, max_tokens=8).encode(texts[::-1], cut=cut)
    torch.testing.assert_close(found[0], backwards.flip(0), rtol=1e-5, atol=1e-6)


def test_equal_texts_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen, pool = make(folder), [], TextEncoder._pool
    monkeypatch.setattr(encoder, "_pool", lambda ids: (seen.extend(ids), pool(encoder, ids))[1])
    done: list[int] = []
    vectors = encoder.encode(["w1 w2", "w3", "w1 w2", "w1 w2"], progress=done.append)
    assert len(seen) == 2
    assert sum(done) == 2
    assert torch.equal(vectors[0], vectors[2])


def test_nothing_to_encode(folder: Path) -> None:
    assert make(folder).encode([]).shape == (0, 16)
    assert make(folder).encode(["", " "]).abs().sum() == 0


def test_chunks_never_exceed_the_models_positions(folder: Path) -> None:
    encoder = make(folder, max_tokens=5000)
    assert encoder.max_tokens == 64
    assert encoder.encode([" ".join(WORDS * 20)]).isfinite().all()


def test_missing_encoder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        TextEncoder(str(tmp_path / "nothing"))
    assert "encoder" in caught.value.where


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(folder: Path, threads: int) -> None:
    """Nor are they fewer afterwards, for whoever computes then, in a thread begun before or after."""
    texts = [" ".join(WORDS[: 1 + i % 17]) for i in range(40)]
    expected = make(folder, batch_size=3).encode(texts)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = make(folder, batch_size=3).encode(texts)
        assert torch.get_num_threads() == threads
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not native_bf16("cpu"), reason="needs a processor with bfloat16")
def test_packed_layers_compute_what_they_did(folder: Path) -> None:
    """The same vectors, but for the rounding of what was rounded before its GELU and is not now."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 16, dtype=torch.bfloat16)
    plain = nn.Linear(16, 24, dtype=torch.bfloat16)
    assert torch.equal(PackedLinear(plain)(x), plain(x))
    exact = F.gelu(F.linear(x.double(), plain.weight.double(), plain.bias.double()))
    torch.testing.assert_close(PackedLinear(plain, gelu=True)(x).double(), exact, rtol=2**-8, atol=1e-5)

    encoder = make(folder, dtype="bfloat16")
    kinds = Counter(type(layer) for layer in encoder.model.modules())
    assert kinds[PackedLinear] > 0
    assert kinds[nn.Linear] == 0
    torch.testing.assert_close(encoder.encode(TEXTS), make(folder).encode(TEXTS), rtol=0.02, atol=0.02)
