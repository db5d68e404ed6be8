"""Getting models: where they come from, what identifies them, and what is said when they cannot be had."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import Lfm2Config, Lfm2ForCausalLM

from lit_rec.errors import UserError
from lit_rec.llm import loading
from lit_rec.llm.loading import fingerprint, hub_error, load_llm, local_source, pick_dtype
from lit_rec.schema import EncoderConfig, LLMConfig, WheelConfig
from tests.tiny import save_llm

WORDS = [f"w{i}" for i in range(10)]
WHEEL = WheelConfig("pkg", "1.0", "0" * 64, "member")


def response(status: int) -> Any:
    """As much of an answer by the hub as its errors look at, whichever HTTP library is behind them."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llm"), WORDS)


def test_dtype_by_name_or_by_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_dtype("float16", "cpu") is torch.float16
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(loading, "native_bf16", lambda device, native=native: native)
        assert pick_dtype("auto", "cpu") is dtype


@pytest.mark.parametrize("key", ["llm", "encoder"])
def test_exactly_one_source(key: str) -> None:
    kind = LLMConfig if key == "llm" else EncoderConfig
    for cfg in (kind(name="x"), kind(name="x", hub="a/b", wheel=WHEEL)):
        with pytest.raises(UserError, match="exactly one") as caught:
            local_source(cfg, key)
        assert caught.value.where == f"config key {key}"


def test_folders_and_repositories(folder: Path, tmp_path: Path) -> None:
    assert local_source(LLMConfig(name="x", hub=str(folder)), "llm") == str(folder)
    assert local_source(LLMConfig(name="x", hub="owner/name"), "llm") == "owner/name"
    with pytest.raises(UserError, match=r"config\.json is missing") as caught:
        local_source(EncoderConfig(name="x", hub=str(tmp_path)), "encoder")
    assert caught.value.where == "config key encoder.hub"


def test_fingerprint_follows_the_content(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(folder)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint(copy) != fingerprint(folder)
    shutil.copy(folder / "model.safetensors", weights)
    (copy / "notes.md").write_text("not part of the model")
    assert fingerprint(copy) == fingerprint(folder)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert fingerprint(copy) != fingerprint(folder)


def test_fingerprint_follows_what_lies_in_the_middle(tmp_path: Path) -> None:
    """Two merged models differ where their adapters were, at neither end of the file."""
    (tmp_path / "model.safetensors").write_bytes(bytes(64 << 20))
    before = fingerprint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(30 << 20)
        file.write(b"1" * (1 << 20))
    assert fingerprint(tmp_path) != before


def test_fingerprint_of_a_repository_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of it has been fetched yet: a run that was killed in between goes on, and finds its answers."""
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **__: str(snapshot / "config.json"))
    before = fingerprint("owner/name")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert fingerprint("owner/name") == before
    assert fingerprint("owner/other") != before
    snapshot = snapshot.rename(snapshot.with_name("2c3d"))
    assert fingerprint("owner/name") != before


def test_states_that_answers_cannot_share_are_refused(folder: Path, tmp_path: Path) -> None:
    """LFM2's convolutions run through a whole sequence: the answers to one prompt would run into each other."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Lfm2ForCausalLM(Lfm2Config(**shape, **heads, layer_types=["conv", "full_attention"]))
    own = shutil.copytree(folder, tmp_path / "lfm2")
    model.save_pretrained(own)
    with pytest.raises(UserError, match="does not attend in all of its layers") as caught:
        load_llm(LLMConfig(name="x", hub=str(own)), "cpu")
    assert "conv" in caught.value.why


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (GatedRepoError("403 Client Error. Access is restricted", response=response(403)), "gated", "HF_TOKEN"),
        (OSError("You are trying to access a gated repo."), "gated", "accept it at"),
        (RepositoryNotFoundError("401 Client Error", response=response(401)), "no model", "check the name"),
        (OSError("x is not a local folder and is not a valid model identifier"), "no model", "check the name"),
        (OSError("We couldn't connect to 'https://huggingface.co'"), "cannot fetch", "connect"),
        (ValueError("Unrecognized model"), "cannot load", "see the cause"),
    ],
)
def test_what_a_failed_load_means(error: Exception, what: str, fix: str) -> None:
    for key in ("llm", "encoder"):
        told = hub_error(error, "owner/name", key)
        assert what in told.what
        assert fix in told.fix
        assert told.where == f"config key {key}.hub = owner/name"


def test_cause_is_found_behind_other_errors() -> None:
    error = OSError("could not load")
    error.__cause__ = ValueError("no")
    error.__cause__.__context__ = GatedRepoError("no", response=response(403))
    assert "gated" in hub_error(error, "a/b", "llm").what


def test_numbers_in_a_path_are_no_status_codes() -> None:
    told = hub_error(ValueError("weights of layer 403 are damaged"), "/models/run401", "llm")
    assert told.what == "cannot load /models/run401"
    assert "layer 403" in told.why


def test_fingerprint_of_an_unreachable_encoder_names_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("transformers.utils.cached_file", offline)
    with pytest.raises(UserError, match="cannot fetch") as caught:
        fingerprint("owner/name", key="encoder")
    assert caught.value.where == "config key encoder.hub = owner/name"


def test_damaged_weights_are_told(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot load"):
        load_llm(LLMConfig(name="x", hub=str(copy), dtype="float32"), "cpu")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load"):
        load_llm(LLMConfig(name="x", hub=str(copy), dtype="float32"), "cpu")
