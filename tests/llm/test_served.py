"""Trained here, sampled on servers: each state of the model is asked for by its own name, and adapters follow it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lit_rec.errors import UserError
from lit_rec.llm.served import ServedLanguageModel
from lit_rec.llm.store import AnswerStore
from lit_rec.schema import LLMConfig, LoraConfig, ServerConfig
from tests.llm.stub_server import StubServer, serving, vllm_lora
from tests.tiny import save_llm

WORDS = [f"w{i}" for i in range(20)]
PROMPTS = [[{"role": "user", "content": word}] for word in WORDS[:4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llm"), WORDS)


def make(folder: Path, run: Path, *stubs: StubServer) -> ServedLanguageModel:
    cfg = LLMConfig(name="tiny", hub=str(folder), dtype="float32", max_new_tokens=6)
    server = ServerConfig(model="m", urls=[stub.url for stub in stubs], key_env=None, retries=0, timeout=10.0)
    store = AnswerStore(run / "answers")
    return ServedLanguageModel(cfg, LoraConfig(r=4), store, device="cpu", seed=1, server=server, run=run)


def train(llm: ServedLanguageModel, seed: int) -> None:
    """Move the adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in llm.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    llm.mark_adapter()


def asked(stub: StubServer) -> set[str]:
    found = {body["model"] for body in stub.asked}
    stub.asked.clear()
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([[5, 9, 11, 6]])).logits


def test_each_round_is_served_under_its_own_name_and_asked_for_once(folder: Path, tmp_path: Path) -> None:
    with serving() as one, serving() as two:
        one.lora = two.lora = vllm_lora
        llm = make(folder, tmp_path, one, two)
        llm.check()
        base = llm.answers(PROMPTS, [3] * 4)
        assert asked(one) | asked(two) == {"m"}
        names = []
        for seed in (1, 2):
            train(llm, seed)
            names.append(llm.served_name)
            assert llm.answers(PROMPTS, [3] * 4) is not base
            assert asked(one) | asked(two) == {names[-1]}
            assert one.models == two.models == ("m", names[-1])  # the round before is forgotten
        assert len(set(names)) == 2
        loads = [body["lora_path"] for call, body in one.adapters if call == "load"]
        assert loads == [str(tmp_path / "adapters" / name.removeprefix("m-")) for name in names]
        with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), loads[-1])
        assert torch.allclose(logits(with_adapter), logits(llm.model), atol=1e-5)
        calls = len(one.adapters)
        again = make(folder, tmp_path, one, two)  # a restart that has all answers
        train(again, 2)
        assert again.answers(PROMPTS, [3] * 4) == llm.answers(PROMPTS, [3] * 4)
        assert asked(one) | asked(two) == set()
        assert len(one.adapters) == calls
    assert len(llm.store) == 36
    assert not list(tmp_path.rglob("*.tmp"))


def test_servers_that_load_no_adapters_get_a_merged_model_to_start_with(folder: Path, tmp_path: Path) -> None:
    with serving() as stub:
        llm = make(folder, tmp_path, stub)
        train(llm, 1)
        with pytest.raises(UserError, match="cannot load adapters while serving") as caught:
            llm.answers(PROMPTS, [1] * 4)
        merged = tmp_path / "merged" / llm.adapter
        assert f"vllm serve {merged} --served-model-name {llm.served_name}" in caught.value.fix
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged)), logits(llm.model), atol=1e-4)
        assert (merged / "tokenizer.json").is_file()
        stub.models = (llm.served_name,)
        assert [len(one) for one in llm.answers(PROMPTS, [1] * 4)] == [1] * 4
        assert asked(stub) == {llm.served_name}
