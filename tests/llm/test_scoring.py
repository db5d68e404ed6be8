"""Likelihoods of titles, against forwarding every prompt with every title on its own."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lit_rec.errors import UserError
from lit_rec.llm.closing import Beginnings, Closing
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.scoring import Question, TitleScorer, question_key
from lit_rec.llm.store import AnswerStore, answer_key
from lit_rec.llm.title_tree import TitleTree
from lit_rec.schema import LLMConfig, LoraConfig
from tests.tiny import CHAT, SPECIAL, tiny_llama

Groups = list[list[Question]]
END = "<|im_end|>"


def byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, but for merges: titles that begin alike share tokens, and no letter is unknown."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token=END, pad_token="<pad>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHAT
    return fast


def tiny_gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Learned positions instead of rotary ones."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, eos_token_id=2, bos_token_id=None, **shape)).eval()


def tiny_qwen2(vocabulary: int) -> Qwen2ForCausalLM:
    """Biases, tied embeddings, grouped queries."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).eval()


BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2}


def blank_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, behind a blank that it puts before whatever it is given, as those of Llama 2 do."""
    letters = [chr(n) for n in range(33, 127)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "\u2581", "\n", *letters, "\u2581A"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "A")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token=END, pad_token="<pad>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHAT
    return fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, build in BUILDERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        tokenizer = byte_tokenizer()
        build(len(tokenizer)).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def make(folder: Path, store: Path, **options: Any) -> LanguageModel:
    cfg = LLMConfig(name="tiny", hub=str(folder), **{"dtype": "float32", **options})
    return LanguageModel(cfg, LoraConfig(r=4), AnswerStore(store), device="cpu", seed=1)


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return make(folders["llama"], tmp_path_factory.mktemp("store"))


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def plain(text: str) -> list[dict[str, str]]:
    return [{"role": "text", "content": text}]


def tokens_of(llm: LanguageModel, q: Question, title: str) -> tuple[list[int], list[int]]:
    """Prompt and title in tokens; how words are glued is written out here a second time."""
    tokenizer = llm.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    if q.prompt[0]["role"] == "text":
        prompt = tokenizer(q.prompt[0]["content"])["input_ids"]
    else:
        text = tokenizer.apply_chat_template(q.prompt, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    blank = " " if q.lead != q.lead.rstrip(" ") else ""
    return [*prompt, *ids(q.lead.rstrip(" "))], ids(blank + title)


def closes(llm: LanguageModel, end: str) -> Callable[[bytes], list[int]]:
    """Tokens that begin with some bytes and an end, or are the bytes with the end's first token, by looking at all."""
    letters = {letter: code for code, letter in bytes_to_unicode().items()}
    special = set(llm.tokenizer.all_special_ids)
    texts = {i: bytes(letters[c] for c in t) for t, i in llm.tokenizer.get_vocab().items() if i not in special}
    first = llm.tokenizer(end, add_special_tokens=False)["input_ids"][0]
    asked = end.encode()

    def find(before: bytes) -> list[int]:
        found = {i for i, text in texts.items() if text.startswith(before + asked)}
        return sorted(found | {i for i, text in texts.items() if first in texts and text == before + texts[first]})

    return lambda before: sorted({*find(before), *([first] if not before else [])})


@torch.no_grad()
def alone(llm: LanguageModel, q: Question, title: str) -> tuple[float, int, int]:
    """One title behind its prompt in a forward pass of its own: log-likelihood, length, tokens worked through."""
    prompt, asked = tokens_of(llm, q, title)
    if q.end == "<eos>":
        asked = [*asked, llm.tokenizer.eos_token_id]
    logits = llm.model(torch.tensor([[*prompt, *asked]])).logits[0].double()
    logps = logits.log_softmax(-1)[len(prompt) - 1 :]
    steps = [float(logps[n, token]) for n, token in enumerate(asked)]
    if q.end in ("", "<eos>"):
        return sum(steps), len(asked), len(prompt) + len(asked)
    closing = closes(llm, q.end)
    chance = math.exp(steps[-1]) * float(logps[-1].exp()[closing(b"")].sum())
    letters = {letter: code for code, letter in bytes_to_unicode().items()}
    last = bytes(letters[c] for c in llm.tokenizer.convert_ids_to_tokens(asked[-1]))
    chance += float(logps[-2].exp()[closing(last)].sum())
    return sum(steps[:-1]) + math.log(chance), len(asked) + 1, len(prompt) + len(asked) + 1


def naive(llm: LanguageModel, groups: Groups) -> tuple[list[list[list[float]]], list[list[list[int]]], int]:
    """Every title on its own: log-likelihoods, lengths, tokens worked through."""
    with llm.for_sampling():
        known = {(id(q), title): alone(llm, q, title) for group in groups for q in group for title in q.titles}
    worked = sum(known[id(q), title][2] for group in groups for q in group for title in q.titles)
    logps = [[[known[id(q), t][0] for t in q.titles] for q in group] for group in groups]
    return logps, [[[known[id(q), t][1] for t in q.titles] for q in group] for group in groups], worked


def assert_like_naive(llm: LanguageModel, groups: Groups, tolerance: float = 1e-4, **options: Any) -> float:
    """Scores and lengths equal those of the naive way; returns how much less was worked through."""
    scorer = TitleScorer(llm, **options)
    found = scorer.scores(groups)
    logps, lengths, worked = naive(llm, groups)
    assert [len(g) for g in found] == [len(g) for g in groups]
    for got, want, length in zip(found, logps, lengths, strict=True):
        assert [tokens for _, tokens in got] == length
        for (values, _), expected in zip(got, want, strict=True):
            assert values == pytest.approx(expected, abs=tolerance, rel=1e-6)
    return worked / max(scorer.computed, 1)


FILMS = (
    "Alien",
    "Aliens",
    "Alien 3",
    "Amélie",
    "千と千尋",
    "Up",
    "M",
    "Up",
    "Das Boot: The Director's Cut",
    "Toy Story 2",
)
HINTS = ("", " Hint: prefer old films.", " Hint: avoid sequels and horror.", " Hint: prefer new films.")


def session(n: int, titles: Sequence[str] = FILMS, *, lead: str = "1. ", end: str = "\n") -> list[Question]:
    """A session of n films with every hint."""
    told = "I watched " + "; ".join(FILMS[k % len(FILMS)] for k in range(n)) + ". What next?"
    return [Question(chat(told + hint), lead, end, tuple(titles)) for hint in HINTS]


@pytest.mark.parametrize("name", list(BUILDERS))
def test_equals_scoring_each_title_on_its_own(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    groups = [session(1), session(7), session(3)[:1], session(12)[::-1]]
    assert assert_like_naive(make(folders[name], tmp_path), groups) > 3


CASES: dict[str, Groups] = {
    "one title": [[Question(chat("a"), "", "", ("Alien",))]],
    "single tokens": [[Question(chat("a"), "", "", ("M", "Q", "Z"))]],
    "identical titles": [[Question(chat("a"), "1. ", "\n", ("Heat", "Heat", "Heat 2"))]],
    "title within title": [[Question(chat("a"), "", "", ("Saw", "Saw II", "Saw III"))]],
    "accents": [[Question(plain("a"), " ", ";", ("Amélie", "Amelie", "Ame\u0301lie", "Ça", "Ägypten"))]],
    "no shared prefix": [[Question(plain(t), " ", ";", FILMS) for t in ("x", "Qyz abc", "", "\n\n")][:2]],
    "the same question twice": [[Question(chat("a"), "", END, FILMS)] * 2, [Question(chat("a"), "", END, FILMS)]],
    "one question inside another": [[Question(plain("a" * n), "", "", ("b", "aa")) for n in (1, 2, 9)]],
    "several leads": [[Question(chat("a"), lead, END, FILMS) for lead in ("", " ", "1. ", "1.", "** ")]],
    "several ends": [[Question(chat("a"), "", end, FILMS) for end in ("", ";", "\n", END, "ab", "<eos>")]],
    "other titles per question": [[Question(chat("a b"), "", ";", FILMS[n : n + 3]) for n in range(5)]],
    "system message": [
        [Question([{"role": "system", "content": "Be brief."}, *chat(t)], "", "", FILMS) for t in "xyz"]
    ],
    "no question": [[], [Question(chat("a"), "", "", ("Up",))], []],
}


@pytest.mark.parametrize("case", list(CASES))
def test_cases(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    assert_like_naive(make(folders["llama"], tmp_path), CASES[case])


@pytest.mark.parametrize(("lead", "end"), [("", '"'), ("1. ", "\n"), (" ", ";")])
def test_tokenizers_that_put_a_blank_before_a_text(tmp_path: Path, lead: str, end: str) -> None:
    """A title is read as what stands behind its prompt: as the tokenizer reads the two as one text."""
    tokenizer = blank_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    llm = make(tmp_path / "model", tmp_path / "store")
    titles = ("Alien", "Aliens", "Up")
    said = 'My favorite films are "Heat", "' if not lead else "I watched Heat;" if lead == " " else "I watched Heat:"
    (scores,) = TitleScorer(llm).scores([[Question(plain(said), lead, end, titles)]])[0]
    begun = tokenizer(said + lead.rstrip(" "))["input_ids"]
    for title, logp, count in zip(titles, *scores, strict=True):
        whole = tokenizer(f"{said}{lead}{title}{end}")["input_ids"]
        assert whole[: len(begun)] == begun
        asked = whole[len(begun) :]
        assert count == len(asked)
        with torch.no_grad(), llm.for_sampling():
            logps = llm.model(torch.tensor([whole])).logits[0].log_softmax(-1)[len(begun) - 1 : -1]
        assert logp == pytest.approx(float(logps.gather(1, torch.tensor(asked)[:, None]).sum()), abs=1e-4)


QUOTE = [(")", '"'), (')"', ","), ("!", '"'), ('"', ","), ("\u00a9", '"')]  # the last byte of an e with an accent


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has read lists of titles in quotes, and whose tokenizer writes a bracket and a quote as one."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("merging"), byte_tokenizer(QUOTE)
    model = tiny_llama(len(tokenizer))
    read = tokenizer('"Up (2009)", "Heat (1995)", "Up (2009)", "Heat (1995)", "Up (2009)", ')["input_ids"]
    assert tokenizer.convert_tokens_to_ids(')",') in read
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.tensor([read]), labels=torch.tensor([read])).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("end", ['"', '",', '"x'])
def test_ends_that_are_written_with_a_title_as_one_token(merging: Path, tmp_path: Path, end: str) -> None:
    titles = ("Up (2009)", "Up!", "Up", "Amélie", 'Up (2009)" x', ")", "Heat (1995)")
    asked = [
        [Question(plain(f'My favorite films are {told}, "'), "", end, titles) for told in ('"Heat (1995)"', '"Up"')]
    ]
    assert_like_naive(make(merging, tmp_path), asked)


def test_a_title_is_not_charged_for_how_its_end_is_cut_into_tokens(merging: Path, tmp_path: Path) -> None:
    """The model always closes a title with one token: it would nearly never write the bracket alone."""
    llm, prompt, title = make(merging, tmp_path), plain('"Up (2009)", "Heat (1995)", "'), ("Up (2009)",)
    (((closed,), _),) = TitleScorer(llm).scores([[Question(prompt, "", '"', title)]])[0]
    (((begun,), _),) = TitleScorer(llm).scores([[Question(prompt, "", "", ("Up (2009",))]])[0]
    (((bracket,), _),) = TitleScorer(llm).scores([[Question(prompt, "", "", title)]])[0]
    assert begun - 0.1 < closed < begun
    assert bracket < begun - 3  # what it would be charged at least


def test_what_closes_a_title_whose_tokens_end_within_a_letter() -> None:
    known = Beginnings(tokenizer := byte_tokenizer(QUOTE))
    ids = tokenizer.convert_tokens_to_ids
    closing = Closing(known, ids(['"']))
    assert known.sets[closing.following].tolist() == sorted(ids(['"', '",']))
    for last, merged in ((")", [')"', ')",']), ("!", ['!"']), ("\u00a9", ['\u00a9"'])):
        assert known.sets[closing.merged(ids(last))].tolist() == sorted(ids(merged))
    assert closing.merged(ids("p")) is None
    assert Closing(known, ids([END])).merged(ids(")")) is None  # special tokens are no text


def test_a_scorer_that_is_done_lets_go_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    llm = make(folders["llama"], tmp_path)
    TitleScorer(llm).scores([session(1)])
    known = weakref.ref(llm)
    del llm
    gc.collect()
    assert known() is None


def test_nothing_to_score(folders: dict[str, Path], tmp_path: Path) -> None:
    scorer = TitleScorer(make(folders["llama"], tmp_path))
    assert scorer.scores([]) == []
    assert scorer.scores([[]]) == [[]]
    assert scorer.scores([[Question(chat("a"), "", "", ())]]) == [[([], [])]]


def test_a_prompt_without_a_token_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """There is nothing the first token of a title could follow."""
    with pytest.raises(UserError, match="empty"):
        TitleScorer(make(folders["llama"], tmp_path)).scores([[Question(plain(""), "", "", ("Up",))]])


def test_a_trained_adapter_is_part_of_the_scores(folders: dict[str, Path], tmp_path: Path) -> None:
    llm = make(folders["llama"], tmp_path)
    groups = [session(4)]
    base = TitleScorer(llm).scores(groups)
    for name, parameter in llm.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    llm.mark_adapter()
    assert_like_naive(llm, groups, tolerance=1e-3)
    assert abs(TitleScorer(llm).scores(groups)[0][0][0][0] - base[0][0][0][0]) > 0.01


@pytest.mark.parametrize("batch_tokens", [1, 40, 80, 10**6])
def test_size_of_the_batches_changes_nothing(folders: dict[str, Path], tmp_path: Path, batch_tokens: int) -> None:
    groups = [session(1), session(9), [], session(5)[:2]]
    whole = TitleScorer(make(folders["llama"], tmp_path / "whole")).scores(groups)
    scorer = TitleScorer(make(folders["llama"], tmp_path / "other"), batch_tokens=batch_tokens)
    for got, want in zip(scorer.scores(groups), whole, strict=True):
        assert [tokens for _, tokens in got] == [tokens for _, tokens in want]
        for (values, _), (expected, _) in zip(got, want, strict=True):
            assert values == pytest.approx(expected, abs=1e-4)
    lines = (tmp_path / "other" / "answers.jsonl").read_bytes().count(b"\n")
    assert lines == {1: 10, 10**6: 1}.get(batch_tokens, lines)  # one batch is one line
    assert 1 <= lines <= 10


def test_second_request_computes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    groups = [session(2), session(6)]
    seen: list[tuple[int, int]] = []
    first = TitleScorer(make(folders["llama"], tmp_path), batch_tokens=80)
    found = first.scores(groups, progress=lambda n, tokens: seen.append((n, tokens)))
    assert seen[0] == (0, 0)
    assert len(seen) > 2
    assert sum(n for n, _ in seen) == 8
    assert sum(tokens for _, tokens in seen) == first.computed > 0
    llm = make(folders["llama"], tmp_path)
    again, seen = TitleScorer(llm), []
    assert again.scores(groups, progress=lambda n, tokens: seen.append((n, tokens))) == found
    assert (again.computed, seen) == (0, [(8, 0)])
    assert "_loaded" not in vars(llm)  # not even the weights


def test_progress_reaches_the_end_where_questions_repeat(folders: dict[str, Path], tmp_path: Path) -> None:
    seen: list[int] = []
    groups = [session(2)[:1] * 3, session(2)[:2]]
    TitleScorer(make(folders["llama"], tmp_path)).scores(groups, progress=lambda n, tokens: seen.append(n))
    assert sum(seen) == 5


@pytest.mark.parametrize("batch_tokens", [1, 80])
def test_killed_and_resumed_gives_the_same_scores(folders: dict[str, Path], tmp_path: Path, batch_tokens: int) -> None:
    groups = [session(2), session(6), session(4)]
    undisturbed = TitleScorer(make(folders["llama"], tmp_path / "whole"), batch_tokens=batch_tokens)
    whole = undisturbed.scores(groups)
    calls: list[int] = []

    def dies(questions: int, tokens: int) -> None:
        calls.append(questions)
        if len(calls) == 3:
            raise KeyboardInterrupt

    killed = TitleScorer(make(folders["llama"], tmp_path / "killed"), batch_tokens=batch_tokens)
    with pytest.raises(KeyboardInterrupt):
        killed.scores(groups, progress=dies)
    llm = make(folders["llama"], tmp_path / "killed")
    assert 0 < len(llm.store) < 12
    resumed = TitleScorer(llm, batch_tokens=batch_tokens)
    assert resumed.scores(groups) == whole
    assert killed.computed + resumed.computed == undisturbed.computed


def test_scores_do_not_leave_the_model_in_another_mode(folders: dict[str, Path], tmp_path: Path) -> None:
    llm = make(folders["llama"], tmp_path)
    llm.model.train()

    def dies(questions: int, tokens: int) -> None:
        if tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TitleScorer(llm).scores([session(1)], progress=dies)
    assert llm.model.training


def test_key_tells_apart_what_changes_scores() -> None:
    base = Question(chat("a"), "1. ", "\n", ("Up", "M"))
    others = [
        Question(chat("b"), "1. ", "\n", ("Up", "M")),
        Question(plain("a"), "1. ", "\n", ("Up", "M")),
        Question(chat("a"), "1.", "\n", ("Up", "M")),
        Question(chat("a"), "1. ", "", ("Up", "M")),
        Question(chat("a"), "1. ", "<eos>", ("Up", "M")),
        Question(chat("a"), "1. ", "\n", ("M", "Up")),
    ]
    keys = {question_key("m", base), question_key("n", base), *(question_key("m", q) for q in others)}
    assert len(keys) == 2 + len(others)
    assert question_key("m", Question(chat("a"), "1. ", "\n", ("Up", "M"))) == question_key("m", base)


@pytest.mark.parametrize(("end", "same"), [("", True), ("<eos>", True), ("\n", False), ('"', False)])
def test_scores_of_the_first_versions_are_those_of_titles_without_a_text_behind(end: str, same: bool) -> None:
    """They asked for the first token of a text alone."""
    q = Question(chat("a"), "", end, ("Up",))
    before = answer_key("m", q.prompt, {"score": q.titles, "lead": q.lead, "end": q.end}, 0)
    assert (question_key("m", q) == before) is same


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("shared", [True, False])
def test_too_long_for_the_model_is_told(folders: dict[str, Path], tmp_path: Path, name: str, shared: bool) -> None:
    """Both where the shared prefix alone is too long and where the rest makes it so."""
    long = "x" * 505 if shared else "y" * 3
    prompts = [long, long] if shared else ["a" + "x" * 505, "b" + "x" * 505]
    with pytest.raises(UserError, match="context is 512"):
        TitleScorer(make(folders[name], tmp_path)).scores([[Question(chat(p), "", "", FILMS) for p in prompts]])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_many_titles_side_by_side_do_not_use_up_the_context(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """What counts is the longest prompt with one title, however many titles a row holds and whoever else is in it."""
    titles = tuple(f"{chr(97 + k)}{'film' * 5} {k}" for k in range(26))
    groups = [[Question(chat("x" * n), "", ";", titles)] for n in (300, 3)]
    assert sum(map(len, titles)) > 512
    assert_like_naive(make(folders[name], tmp_path), groups)


def test_three_times_less_work_for_fifty_candidates(folders: dict[str, Path], tmp_path: Path) -> None:
    """Without hints, where prompts of different sessions share next to nothing."""
    titles = tuple(f"{'The ' * (k % 3 == 0)}Film of the Year {k}" for k in range(50))
    groups = [session(n, titles)[:1] for n in (6, 10)]
    assert assert_like_naive(make(folders["llama"], tmp_path), groups) >= 3


# --- the tree ---------------------------------------------------------------------------------------------------------


def walk(tree: TitleTree, path: list[int]) -> Iterator[tuple[int, int]]:
    for step in path:
        node, token = tree.steps[step].tolist()
        yield node, token


def ancestors(tree: TitleTree, node: int) -> list[int]:
    found = [node]
    while node:
        node = tree.parent[node]
        found.append(node)
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=12))
def test_tree_holds_every_title(titles: list[list[int]]) -> None:
    tree = TitleTree(titles)
    assert len(tree.paths) == len(titles)
    for title, path in zip(titles, tree.paths, strict=True):
        assert [token for _, token in walk(tree, path)] == title
        for place, (node, _) in enumerate(walk(tree, path)):
            line = ancestors(tree, node)[::-1]
            assert [tree.tokens[n] for n in line[1:]] == title[:place]  # the node stands for what came before
            assert tree.depth[node] == place
            assert tree.sees[node].nonzero().squeeze(1).tolist() == sorted(line)
    inner = {tuple(title[:n]) for title in titles for n in range(1, len(title))}
    assert len(tree.tokens) == 1 + len(inner)  # every beginning once, and no leaf
    assert all(parent < node for node, parent in enumerate(tree.parent) if node)
    asked = {(tuple(title[:n]), title[n]) for title in titles for n in range(len(title))}
    assert tuple(tree.steps.shape) == (len(asked), 2)
    assert tree.steps.dtype == torch.long


def test_a_tree_of_titles_that_are_closed() -> None:
    tokenizer = byte_tokenizer(QUOTE)
    bracket, quote, x = tokenizer.convert_tokens_to_ids([")", '"', "x"])
    closing = Closing(Beginnings(tokenizer), [quote])
    tree = TitleTree([[x, bracket], [x], [x, bracket], [], [x, quote]], closing)
    assert tree.tokens == [-1, x, bracket, quote]  # what stands behind a title is asked for at its last token
    assert tree.lengths == [3, 2, 3, 1, 3]
    assert tree.sums.tolist() == [[1, closing.merged(bracket)], [2, 0], [1, 0], [0, 0], [3, 0]]
    assert tree.ends == [(1, 0), (2, None), (1, 0), (3, None), (4, None)]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.text("ab é本", min_size=1, max_size=6), min_size=1, max_size=6),
    st.lists(st.text("xy", max_size=4), min_size=1, max_size=3),
    st.sampled_from(["", " ", "1. "]),
    st.sampled_from(["", ";"]),
)
def test_any_titles_and_prompts(
    llama: LanguageModel, titles: list[str], prompts: list[str], lead: str, end: str
) -> None:
    assert_like_naive(llama, [[Question(chat(p), lead, end, tuple(titles)) for p in prompts]])


def test_probabilities_of_all_tokens_sum_to_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """Every ASCII letter, digit and sign as a title: what is left of 1 belongs to the other bytes."""
    letters = tuple(chr(c) for c in range(33, 127))
    q = Question(chat("a"), "", "", letters)
    llm = make(folders["llama"], tmp_path)
    ((logps, tokens),) = TitleScorer(llm).scores([[q]])[0]
    assert set(tokens) == {1}
    prompt, _ = tokens_of(llm, q, "a")
    with torch.no_grad(), llm.for_sampling():
        exact = llm.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    ids = [llm.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in letters]
    assert sum(map(math.exp, logps)) == pytest.approx(float(exact[ids].sum()), abs=1e-6)
