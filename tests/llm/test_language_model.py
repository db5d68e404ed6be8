"""The language model of a run: answers are paid for once, and sampling leaves no trace in the weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lit_rec.errors import UserError
from lit_rec.llm import loading
from lit_rec.llm.language_model import BASE, LanguageModel, _batches
from lit_rec.llm.sampler import Sampler, SamplingSettings
from lit_rec.llm.store import AnswerStore
from lit_rec.schema import LLMConfig, LoraConfig
from tests.tiny import save_llm

WORDS = [f"w{i}" for i in range(40)]
PROMPTS = [[{"role": "user", "content": " ".join(WORDS[: 3 + i])}] for i in range(5)]
COUNTS = [1, 3, 2, 1, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llm"), WORDS)


def make(folder: Path, store: Path, *, seed: int = 1, **options: Any) -> LanguageModel:
    settings = {"dtype": "float32", "batch_size": 4, "max_new_tokens": 6, **options}
    cfg = LLMConfig(name="tiny", hub=str(folder), **settings)
    return LanguageModel(cfg, LoraConfig(r=4), AnswerStore(store), device="cpu", seed=seed)


def test_configured_values_arrive(folder: Path, tmp_path: Path) -> None:
    cfg = LLMConfig(name="tiny", hub=str(folder), dtype="float32", temperature=0.7, top_p=0.4, max_new_tokens=5)
    lora = LoraConfig(r=4, alpha=12, dropout=0.25)
    llm = LanguageModel(cfg, lora, AnswerStore(tmp_path), device="cpu", seed=1)
    assert llm.settings == SamplingSettings(max_new_tokens=5, temperature=0.7, top_p=0.4)
    arrived: Any = llm.model.peft_config["default"]
    assert (arrived.r, arrived.lora_alpha, arrived.lora_dropout) == (4, 12, 0.25)


def move_adapter(llm: LanguageModel, scale: float = 0.3) -> None:
    """Move the adapter away from zero, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in llm.model.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    llm.mark_adapter()


def texts(answers: list[list[Any]]) -> list[list[str]]:
    return [[a.text for a in one] for one in answers]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([[5, 9, 11, 6]])).logits


def test_second_request_asks_the_model_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, int]] = []
    first = make(folder, tmp_path).answers(PROMPTS, COUNTS, progress=lambda n, tokens: done.append((n, tokens)))
    assert [len(a) for a in first] == COUNTS
    assert sum(n for n, _ in done) == sum(COUNTS)
    assert sum(tokens for _, tokens in done) == sum(a.tokens for one in first for a in one)

    def never(*_: Any) -> None:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(Sampler, "sample", never)
    again = make(folder, tmp_path)
    assert again.answers(PROMPTS, COUNTS) == first
    assert again.answers(PROMPTS[::-1], [1] * 5) == [one[:1] for one in first[::-1]]
    assert again.store.generated == 0
    assert "_loaded" not in vars(again)  # not even the weights
    for other in ({"temperature": 0.5}, {"top_p": 0.5}, {"max_new_tokens": 5}, {"seed": 2}):
        with pytest.raises(AssertionError, match="asked"):
            make(folder, tmp_path, **other).answers(PROMPTS, COUNTS)


def test_a_run_killed_between_batches_draws_the_same_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(folder, tmp_path / "whole").answers(PROMPTS, COUNTS)
    add, calls = AnswerStore.add, []

    def dies(store: AnswerStore, batch: Any) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(batch)
        add(store, batch)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerStore, "add", dies)
        with pytest.raises(KeyboardInterrupt):
            make(folder, tmp_path / "killed").answers(PROMPTS, COUNTS)
    resumed = make(folder, tmp_path / "killed")
    kept = len(resumed.store)
    assert kept > 0
    assert resumed.answers(PROMPTS, COUNTS) == whole
    assert resumed.store.generated == sum(COUNTS) - kept


def test_equal_prompts_share_their_answers(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path)
    answers = llm.answers([PROMPTS[0], PROMPTS[1], PROMPTS[0]], [2, 1, 3])
    assert answers[0] == answers[2][:2]
    assert len(llm.store) == llm.store.generated == 4


def test_cold_answers_are_those_of_generate(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path, temperature=1e-4, max_new_tokens=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, (answer,) in zip(PROMPTS, llm.answers(PROMPTS, [1] * 5), strict=True):
        ids = torch.tensor([llm.tokenize(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        new = out[0, ids.shape[1] :]
        assert answer.text == llm.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert answer.tokens == len(new)
        assert answer.finish == ("stop" if new[-1] == 2 else "length")


def test_untrained_adapter_changes_nothing(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert llm.adapter == BASE
    torch.testing.assert_close(logits(llm.model), logits(plain))


def test_merged_sampling_is_the_adapters_and_leaves_no_trace(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path, temperature=1e-4)
    base = texts(llm.answers(PROMPTS, COUNTS))
    move_adapter(llm)
    before = {name: t.clone() for name, t in llm.model.state_dict().items()}
    expected = logits(llm.model)
    llm.model.train()
    tuned = texts(llm.answers(PROMPTS, COUNTS))
    assert llm.model.training
    llm.model.eval()
    assert tuned != base
    after = llm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(llm.model), expected)
    for prompt, answers in zip(PROMPTS, tuned, strict=True):  # as the unmerged model says
        ids = torch.tensor([llm.tokenize(prompt)])
        out = llm.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
        assert answers[0] == llm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_weights_are_put_back_when_sampling_fails(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(folder, tmp_path)
    move_adapter(llm)
    expected = logits(llm.model)

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Sampler, "sample", fails)
    with pytest.raises(RuntimeError, match="memory"):
        llm.answers(PROMPTS, COUNTS)
    assert torch.equal(logits(llm.model), expected)


def test_adapter_is_named_by_its_weights(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path)
    untrained = {name: t.clone() for name, t in llm.adapter_state().items()}
    move_adapter(llm)
    moved, state = llm.adapter, {name: t.clone() for name, t in llm.adapter_state().items()}
    move_adapter(llm, 0.31)
    assert len({BASE, moved, llm.adapter}) == 3
    llm.load_adapter(state)
    assert llm.adapter == moved
    llm.reset_adapter()
    assert llm.adapter == BASE
    assert all(torch.equal(t, untrained[name]) for name, t in llm.adapter_state().items())
    other = make(folder, tmp_path / "other")
    other.load_adapter(state)
    assert other.adapter == moved  # the same in another process


def test_adapter_starts_from_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    one = make(folder, tmp_path).adapter_state()
    torch.manual_seed(6)
    two = make(folder, tmp_path).adapter_state()
    other = make(folder, tmp_path, seed=2).adapter_state()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_reference_is_the_base_or_the_present_adapter(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path)
    base = logits(llm.model)
    move_adapter(llm)
    with llm.reference("base"):
        torch.testing.assert_close(logits(llm.model), base)
    with llm.reference("previous"):
        assert not torch.allclose(logits(llm.model), base)


def test_an_adapter_is_worn_for_a_while(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path / "store")
    base = logits(llm.model)
    move_adapter(llm)
    llm.save_adapter(tmp_path / "first")
    name, first = llm.adapter, logits(llm.model)
    with llm.wearing(tmp_path / "first"):  # it is the present one
        assert llm.adapter == name
    move_adapter(llm, scale=0.6)
    later, second = llm.adapter, logits(llm.model)
    assert later != name
    with llm.wearing(tmp_path / "first"):
        assert llm.adapter == name
        torch.testing.assert_close(logits(llm.model), first)
    assert llm.adapter == later
    torch.testing.assert_close(logits(llm.model), second)
    with llm.wearing(None), llm.for_sampling():
        torch.testing.assert_close(logits(llm.model), base)
    assert llm.adapter == later


def test_saved_adapter_loads_with_peft(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path / "store")
    move_adapter(llm)
    llm.save_adapter(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(llm.model))
    assert not list((tmp_path / "adapter").glob("*.bin"))


def test_nf4_quantisation_loads_samples_and_trains(folder: Path, tmp_path: Path) -> None:
    # 4-bit blocks hold 64 weights: a hidden size of 32 would leave some layers too small to say anything
    wide = save_llm(tmp_path / "llm", WORDS, hidden=64)
    llm = make(wide, tmp_path / "store", quantization="nf4")
    kinds = {type(m).__name__ for m in llm.model.modules()}
    assert "Linear4bit" in kinds
    base = llm.answers(PROMPTS, COUNTS)
    move_adapter(llm)
    before = {name: t.clone() for name, t in llm.model.state_dict().items()}
    tuned = llm.answers(PROMPTS, COUNTS)
    assert texts(tuned) != texts(base)
    assert all(torch.equal(before[name], t) for name, t in llm.model.state_dict().items())
    llm.model(torch.tensor([[5, 9, 11]])).logits.square().mean().backward()
    grads = [p.grad for name, p in llm.model.named_parameters() if "lora_B" in name]
    assert grads
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert make(folder, tmp_path, quantization="nf4").fingerprint != make(folder, tmp_path).fingerprint


def test_what_the_weights_compute_in_is_part_of_their_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of two machines may share a store: "auto" is not the same on both."""
    plain, names = {kind: make(folder, tmp_path, dtype=kind).fingerprint for kind in ("float32", "bfloat16")}, {}
    for native, kind in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(loading, "native_bf16", lambda device, native=native: native)
        names[kind] = make(folder, tmp_path, dtype="auto").fingerprint
    assert names == plain
    assert len(set(plain.values())) == 2


def test_batches_never_split_a_prompt() -> None:
    batches = list(_batches([0, 1, 2, 3], [2, 2, 3, 9], 4))
    assert batches == [[0, 1], [2], [3]]
    assert list(_batches([], [], 4)) == []


def test_model_without_a_chat_template_is_told(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path / "store")
    llm.model.get_base_model().save_pretrained(tmp_path / "bare")
    tokenizer = llm.tokenizer
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path / "bare")
    tokenizer.chat_template = kept
    bare = make(tmp_path / "bare", tmp_path / "store")
    with pytest.raises(UserError, match="no chat template"):
        bare.answers(PROMPTS, COUNTS)


def test_other_settings_than_the_models_own(folder: Path, tmp_path: Path) -> None:
    llm = make(folder, tmp_path)
    short = llm.answers(PROMPTS, [1] * 5, settings=replace(llm.settings, max_new_tokens=2))
    assert all(one[0].tokens <= 2 for one in short)
    assert any(one[0].tokens > 2 for one in llm.answers(PROMPTS, [1] * 5))
