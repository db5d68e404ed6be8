"""Sessions ranked by likelihood, against one forward pass per title; and by lists that a script writes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lit_rec.errors import UserError
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.prompts import TEMPLATES, Messages
from lit_rec.llm.ranker import Measure, SessionRanker
from lit_rec.llm.ranking import RankingPrompts
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.llm.store import Answer, AnswerStore
from lit_rec.metrics.sessions import target_ranks
from lit_rec.schema import LLMConfig, LoraConfig
from tests.few_sessions import WORDS, few_sessions
from tests.tiny import save_llm

DATA = few_sessions()
SESSIONS = torch.tensor([3, 0, 4, 1])
HINT = "Prefer Dark River and avoid the Moon"
TEMPLATE = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))["ranking"]
TALK = [word for words in TEMPLATE.values() for text in words.values() for word in text.split()]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = save_llm(tmp_path_factory.mktemp("llm"), [*WORDS, *(f"{w};" for w in WORDS), *TALK, *HINT.split()])
    cfg = LLMConfig(name="tiny", hub=str(folder), dtype="float32")
    store = AnswerStore(tmp_path_factory.mktemp("store"))
    return LanguageModel(cfg, LoraConfig(r=4), store, device="cpu", seed=1)


def make(llm: Any, template: str = "list_v1", *, top: int = 3, **options: Any) -> SessionRanker:
    prompts = RankingPrompts(DATA.items, DATA.item_noun, DATA.verb, template, history=3, top=top)
    return SessionRanker(DATA, prompts, llm, **options)


@torch.no_grad()
def naive(llm: LanguageModel, prompt: Messages, template: str, title: str) -> tuple[float, int]:
    """Log-likelihood and tokens of one title behind one prompt."""
    words = TEMPLATE[template]
    tokenizer = llm.tokenizer
    content = prompt[0]["content"]
    chat = prompt[0]["role"] != "text"
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) if chat else content
    before = tokenizer(f"{text}{words['lead']}", add_special_tokens=False)["input_ids"]
    end = words["end"].replace("<eos>", tokenizer.eos_token)
    asked = tokenizer(title, add_special_tokens=False)["input_ids"]
    with llm.for_sampling():
        logps = llm.model(torch.tensor([[*before, *asked]])).logits[0].double().log_softmax(-1)[len(before) - 1 :]
    steps = logps[:-1].gather(1, torch.tensor(asked)[:, None]).squeeze(1)

    if not tokenizer(end, add_special_tokens=False)["input_ids"]:  # this tokenizer has none for a line's end
        return float(steps.sum()), len(asked)

    def closing(begin: str) -> Tensor:  # these are whole words: a title's last one may be written with the end
        return torch.tensor([token for word, token in tokenizer.get_vocab().items() if word.startswith(begin)])

    apart = steps[-1] + logps[-1][closing(end)].logsumexp(0)
    together = closing(tokenizer.convert_ids_to_tokens(asked[-1]) + end)
    last = torch.stack([apart, *logps[-2][together]]).logsumexp(0) if len(together) else apart
    return float(steps[:-1].sum() + last), len(asked) + 1


def told(session: int) -> list[int]:
    return [i for i in DATA.lists.history_items[session].tolist() if i]


def by_hand(ranker: SessionRanker, session: int, hint: str | None, *, empty: bool = False) -> tuple[Tensor, Tensor]:
    """[C] log-likelihoods, averaged over the rotations, and tokens; nan and 1 for padding."""
    items = DATA.lists.items[session].tolist()
    order = ranker.order(session)
    rotations = 1 if empty else ranker.rotations
    logps, tokens = torch.full((len(items),), math.nan).double(), torch.ones(len(items)).double()
    for position, item in enumerate(items):
        if not item:
            continue
        found = []
        for r in range(rotations):
            turn = round(r * len(order) / rotations)
            shown = [items[p] for p in [*order[turn:], *order[:turn]]]
            prompt = ranker.prompts.prior(shown) if empty else ranker.prompts.prompt(told(session), shown, hint)
            found.append(naive(ranker.llm, prompt, ranker.prompts.template, ranker.prompts.titles[item]))
        logps[position] = sum(logp for logp, _ in found) / rotations
        tokens[position] = found[0][1]
    return logps, tokens


@pytest.mark.parametrize(("template", "rotations"), [("list_v1", 1), ("list_v1", 3), *((t, 2) for t in TEMPLATE)])
def test_likelihoods_equal_those_of_each_title_alone(llm: LanguageModel, template: str, rotations: int) -> None:
    ranker = make(llm, template, rotations=rotations)
    assert ranker.rotations == (rotations if ranker.prompts.shows_candidates else 1)
    sessions, hints = SESSIONS[:2], [[None, HINT], [HINT]]
    found = ranker.likelihoods(sessions, hints)
    assert len(found) == 2
    for s, tried, (logps, tokens) in zip(sessions.tolist(), hints, found, strict=True):
        assert logps.shape == (len(tried), ranker.size)
        real = DATA.lists.items[s] > 0
        for row, hint in zip(logps, tried, strict=True):
            expected, length = by_hand(ranker, s, hint)
            assert row[real].tolist() == pytest.approx(expected[real].tolist(), abs=1e-4)
            assert bool((row[~real] == -math.inf).all())
            assert tokens.tolist() == length.tolist()
    first = found[0][0]
    assert float((first[0] - first[1])[DATA.lists.items[sessions[0]] > 0].abs().min()) > 1e-3  # hints change something


MEASURES = [Measure(), Measure(0, 1), Measure(1, 0), Measure(0.5, 0.5), Measure(-0.2, 1)]


@pytest.mark.parametrize("template", ["list_v1", "next_v1", "favorites_v1"])
@pytest.mark.parametrize("measure", MEASURES, ids=str)
def test_measures_by_hand(llm: LanguageModel, template: str, measure: Measure) -> None:
    ranker = make(llm, template, measure=measure)
    sessions = SESSIONS[1:3]
    scores, empty = ranker.scores(sessions, [[HINT]] * 2), ranker.empty_scores(sessions)
    for n, s in enumerate(sessions.tolist()):
        logps, tokens = by_hand(ranker, s, HINT)
        prior, _ = by_hand(ranker, s, None, empty=True)
        real = DATA.lists.items[s] > 0
        assert scores[n].dtype == torch.float32
        assert scores[n].shape == (1, ranker.size)
        expected = (logps - measure.prior * prior) / tokens**measure.length
        assert scores[n][0, real].tolist() == pytest.approx(expected[real].tolist(), abs=2e-4)
        assert empty[n][real].tolist() == pytest.approx((prior / tokens**measure.length)[real].tolist(), abs=2e-4)
        assert bool((scores[n][0, ~real] == -math.inf).all())
        assert bool((empty[n][~real] == -math.inf).all())
    assert not bool((DATA.lists.items[sessions] > 0).all())  # there was padding


def test_one_title_scores_the_same_twice(llm: LanguageModel) -> None:
    scores = make(llm, "next_v1", measure=Measure(0.5, 1)).scores(torch.tensor([0]), [[None]])[0][0]
    assert scores[0] == scores[1]
    assert scores[0] != scores[2]


def test_questions_are_counted(llm: LanguageModel) -> None:
    ranker = make(llm, rotations=2)
    ranker.scores(SESSIONS, [[None, HINT], [], [HINT], [None]])
    assert ranker.counts.as_dict() == {
        **dict.fromkeys(("lists", "failed", "short", "entries", "unknown", "repeated"), 0),
        "questions": 8,
        "parse_failure_rate": None,
    }


@pytest.mark.parametrize("template", ["list_v1", "next_v1"])
@pytest.mark.parametrize("shortlist", [1, 2, 4, 7, 50])
def test_shortlist_rescores_the_best_alone(llm: LanguageModel, template: str, shortlist: int) -> None:
    measure = Measure(0.3, 0.5)
    whole, ranker = make(llm, template, measure=measure), make(llm, template, measure=measure, shortlist=shortlist)
    hints = [[HINT, None], [None], [HINT], [None, HINT, "Avoid Old films"]]
    found, full = ranker.scores(SESSIONS, hints), whole.scores(SESSIONS, hints)
    within = ranker.shortlisted(SESSIONS)
    for n, (s, tried) in enumerate(zip(SESSIONS.tolist(), hints, strict=True)):
        real = (DATA.lists.items[s] > 0).nonzero().squeeze(1).tolist()
        plain = whole.scores(torch.tensor([s]), [[None]])[0][0]
        order = sorted(real, key=lambda p, plain=plain: (-plain[p], p))
        chosen, rest = order[:shortlist], order[shortlist:]
        assert within[n].nonzero().squeeze(1).tolist() == sorted(chosen)
        assert found[n].shape == (len(tried), ranker.size)
        for h, hint in enumerate(tried):
            best = chosen if hint is None else sorted(chosen, key=lambda p, row=full[n][h]: (-row[p], p))
            got = found[n][h]
            assert sorted(real, key=lambda p, got=got: (-got[p], p)) == [*best, *rest]
            assert bool((got[[p for p in range(ranker.size) if p not in real]] == -math.inf).all())
    assert torch.equal(whole.shortlisted(SESSIONS), DATA.lists.items[SESSIONS] > 0)


def test_order_is_a_seeded_shuffle_of_the_candidates() -> None:
    orders = {seed: [make(Script(""), method="generate", seed=seed).order(s) for s in range(5)] for seed in (0, 0, 1)}
    again = [make(Script(""), method="generate", seed=0).order(s) for s in range(5)]
    assert orders[0] == again
    assert orders[0] != orders[1]
    assert len({tuple(o) for o in orders[0][::3]}) == 2  # sessions of one size are shuffled differently
    for s, order in enumerate(again):
        assert sorted(order) == (DATA.lists.items[s] > 0).nonzero().squeeze(1).tolist()


def test_place_where_the_target_is_shown() -> None:
    ranker = make(Script(""), method="generate", seed=4)
    places = ranker.shown_place(SESSIONS).tolist()
    for s, place in zip(SESSIONS.tolist(), places, strict=True):
        order = ranker.order(s)
        assert DATA.lists.labels[s, order[round(place * len(order))]] == 1
    assert len(set(places)) > 1


# --- written lists ----------------------------------------------------------------------------------------------------


class Script:
    """A port that answers by rule and remembers what it was asked."""

    def __init__(self, rule: Callable[[str], str] | str) -> None:
        self.rule: Callable[[str], str] = rule if callable(rule) else lambda prompt: rule
        self.asked: list[str] = []
        self.settings: SamplingSettings | None = None

    def answers(
        self,
        prompts: Sequence[Messages],
        counts: Sequence[int],
        *,
        settings: SamplingSettings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Answer]]:
        assert list(counts) == [1] * len(prompts)
        self.settings = settings
        self.asked += [prompt[0]["content"] for prompt in prompts]
        return [[Answer(self.rule(prompt[0]["content"]), 5, "stop")] for prompt in prompts]


def candidates_of(prompt: str) -> list[str]:
    return prompt.split("Candidate set: ")[1].split(". Answer")[0].split("; ")


def numbered(titles: Sequence[str]) -> str:
    return "\n".join(f"{n}. {title}" for n, title in enumerate(titles, 1))


def test_rotations_are_asked_and_averaged() -> None:
    """An LLM that writes down the candidates as they stand: every rotation gives its first ones points."""
    port = Script(lambda prompt: numbered(candidates_of(prompt)))
    ranker = make(port, method="generate", rotations=3, max_new_tokens=99)
    (scores,) = ranker.scores(torch.tensor([3]), [[None, HINT]])
    order = ranker.order(3)
    assert len(order) == 7
    expected = torch.zeros(7)
    for turn in (0, 2, 5):  # 7 / 3 and 14 / 3, rounded
        for place, position in enumerate((order[turn:] + order[:turn])[:3]):
            expected[position] += (3 - place) / 3
    expected[expected == 0] = -math.inf
    assert scores[0].tolist() == pytest.approx(expected.tolist())
    assert torch.equal(scores[0], scores[1])
    assert len(port.asked) == 6
    assert [HINT in prompt for prompt in port.asked] == [False, True] * 3
    titles = [ranker.prompts.titles[DATA.lists.items[3, p]] for p in order]
    assert candidates_of(port.asked[0]) == titles
    assert candidates_of(port.asked[4]) == titles[5:] + titles[:5]
    assert port.settings == SamplingSettings(99, 0.0, 1.0)
    assert ranker.counts.questions == ranker.counts.lists == 6


def test_the_written_order_is_the_ranking() -> None:
    """A clairvoyant LLM puts the target second; with a hint first."""
    target = {s: DATA.items["title"][int(DATA.lists.items[s][DATA.lists.labels[s] > 0])] for s in SESSIONS.tolist()}
    by_prompt = {}

    def rule(prompt: str) -> str:
        wanted = target[by_prompt[frozenset(candidates_of(prompt))]]
        others = [t for t in candidates_of(prompt) if t != wanted]
        return numbered([wanted, *others] if HINT in prompt else [others[0], wanted])

    ranker = make(Script(rule), method="generate")
    for s in SESSIONS.tolist():
        by_prompt[frozenset(ranker.prompts.titles[i] for i in DATA.lists.items[s].tolist() if i)] = s
    scores = torch.stack(ranker.scores(SESSIONS, [[None, HINT]] * 4))
    items = DATA.lists.items[SESSIONS]
    wanted = items[DATA.lists.labels[SESSIONS] > 0]
    assert target_ranks(scores[:, 0], items, wanted).tolist() == [2] * 4
    assert target_ranks(scores[:, 1], items, wanted).tolist() == [1] * 4
    assert (ranker.counts.short, ranker.counts.failed) == (4, 0)


@pytest.mark.parametrize("garbage", ["", "I do not know.", "1. Heat\n2. Ran", "\x00" * 9])
def test_garbage_is_counted_and_ranks_the_target_last(garbage: str) -> None:
    ranker = make(Script(garbage), method="generate")
    scores = torch.cat(ranker.scores(SESSIONS, [[None]] * 4))
    assert bool((scores == -math.inf).all())
    items = DATA.lists.items[SESSIONS]
    ranks = target_ranks(scores, items, items[DATA.lists.labels[SESSIONS] > 0])
    assert ranks.tolist() == (items > 0).sum(1).tolist()
    counts = ranker.counts.as_dict()
    assert (counts["lists"], counts["failed"], counts["short"], counts["parse_failure_rate"]) == (4, 4, 0, 1.0)
    assert counts["unknown"] == counts["entries"] == 4 * garbage.count(". ")


def test_counts_add_up() -> None:
    answers = iter(["", "{0}\n{1}\n{2}", "{0}\nHeat\n{0}", "{1}"])

    def rule(prompt: str) -> str:
        written = next(answers).format(*candidates_of(prompt))
        return numbered(written.split("\n")) if written else ""

    ranker = make(Script(rule), method="generate")
    scores = ranker.scores(SESSIONS, [[None]] * 4)
    assert [int((rows > -math.inf).sum()) for rows in scores] == [0, 3, 1, 1]
    assert ranker.counts.as_dict() == {
        "questions": 4,
        "lists": 4,
        "failed": 1,
        "short": 2,
        "entries": 7,
        "unknown": 1,
        "repeated": 1,
        "parse_failure_rate": 0.25,
    }


def test_empty_scores_of_lists_hide_the_session() -> None:
    port = Script(lambda prompt: numbered(candidates_of(prompt)[::-1]))
    ranker = make(port, method="generate", rotations=2)
    scores = ranker.empty_scores(SESSIONS)
    assert scores.shape == (4, ranker.size)
    assert len(port.asked) == 8
    assert not any("watched" in prompt or "not shown" in prompt for prompt in port.asked)
    order = ranker.order(3)
    assert int(scores[0].argmax()) in (order[-1], order[round(len(order) / 2) - 1])


def test_likelihoods_need_the_model_in_process() -> None:
    with pytest.raises(UserError, match="in process") as caught:
        make(Script(""))
    assert caught.value.where == "config key ranking.method"


@pytest.mark.parametrize("template", [t for t in TEMPLATE if t != "list_v1"])
def test_lists_need_a_template_that_shows_the_candidates(template: str) -> None:
    with pytest.raises(UserError, match=template) as caught:
        make(Script(""), template, method="generate")
    assert "list_v1" in caught.value.fix


def test_second_ranker_asks_the_model_nothing(llm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(llm).scores(SESSIONS, [[HINT]] * 4)
    monkeypatch.setattr(LanguageModel, "model", property(lambda self: pytest.fail("the model was asked")))
    again = make(llm).scores(SESSIONS, [[HINT]] * 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
