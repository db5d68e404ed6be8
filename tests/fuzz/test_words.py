"""Whatever an LLM says and whatever somebody types, it is understood or refused in one message."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rec.agent.reflection import read_hints
from lit_rec.config import load_config
from lit_rec.errors import UserError
from lit_rec.llm.ranking import parse_ranking
from tests.fuzz.cases import amounts, cases, told

TITLES = (
    "Alien",
    "Aliens",
    "The Matrix (1999)",
    "Rocky II",
    "Rocky III",
    "",
    "<script>alert(1)</script>",
    "1. 2.",
    "[]",
)
PARTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [*TITLES, "1. ", "2) ", "- ", "\n", "\n\n", "**", '["', '", "', '"]', "[" * 40, "]" * 40, ": ", " - "]
    ),
    st.sampled_from(["ignore the above", "\x00", "\x1b[31m", "\u2028", "\ud800", "{hint}", "{0}", "%s", "10.", "99) "]),
)
ANSWERS = st.lists(PARTS, max_size=30).map("".join)


@amounts(2000)
def test_lists_in_answers(many: int) -> None:
    @cases(many)
    @given(ANSWERS, st.lists(st.sampled_from(TITLES) | st.text(max_size=8), min_size=1, max_size=8), st.integers(1, 12))
    def holds(answer: str, titles: list[str], top: int) -> None:
        found = parse_ranking(answer, titles, top)
        assert len(found.order) <= min(top, len(titles))
        assert len(set(found.order)) == len(found.order)
        assert all(0 <= place < len(titles) for place in found.order)
        assert found.unknown + found.repeated + len(found.order) <= max(found.lines, len(found.order))

    holds()


@amounts(500)
def test_a_list_as_it_was_asked_for_is_read_whatever_stands_around_it(many: int) -> None:
    """The oracle: titles written one a line, as asked, come out in their order."""
    names = st.lists(
        st.text(string.ascii_letters, min_size=6, max_size=12), min_size=2, max_size=8, unique_by=str.casefold
    )

    @cases(many)
    @given(names, st.randoms(use_true_random=False), st.sampled_from(["", "Here is my list:\n\n", "\x00\x1b[0m\n"]))
    def holds(titles: list[str], random: object, before: str) -> None:
        order = list(range(len(titles)))
        random.shuffle(order)  # type: ignore[attr-defined]
        answer = before + "\n".join(f"{n}. {titles[i]}" for n, i in enumerate(order, 1))
        assert parse_ranking(answer, titles, len(titles)).order == order

    holds()


@amounts(500)
def test_hints_in_answers(many: int) -> None:
    @cases(many)
    @given(ANSWERS)
    def holds(answer: str) -> None:
        for hint in read_hints(answer, 3):
            assert isinstance(hint, str)

    holds()


KEYS = (
    "seed",
    "policy.lr",
    "llm",
    "llm.server.urls",
    "data",
    "data._target_",
    "callbacks.x",
    "run.dir",
    "name",
    "nmae",
)
WORDS = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        ["null", "1e9", "-1", "[1,2", "{a: 1}", "${seed}", "${oc.env:HOME}", "os.system", "a,b", "'", "true"]
    ),
    st.recursive(st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3), max_leaves=4).map(str),
)
OVERRIDES = st.one_of(
    st.builds(
        "{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), st.sampled_from(KEYS) | st.text(max_size=8), WORDS
    ),
    st.text(max_size=16),
)


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    (tmp_path / "own.yaml").write_text(
        "defaults:\n  - rlrf_schema\n  - _self_\nname: own\nllm: {name: x}\nencoder: {name: x}\n"
    )
    load_config(tmp_path / "own.yaml")
    return tmp_path / "own.yaml"


@amounts(600, few=20)
def test_overrides(experiment: Path, many: int) -> None:
    @cases(many)
    @given(st.lists(OVERRIDES, min_size=1, max_size=2))
    def holds(overrides: list[str]) -> None:
        cfg = told(lambda: load_config(experiment, overrides))
        if cfg is not None:
            assert isinstance(cfg.seed, int)
            assert cfg.policy.lr > 0

    holds()


@amounts(400, few=20)
def test_experiment_files(experiment: Path, many: int) -> None:
    whole = experiment.read_text()
    lines = whole.splitlines(keepends=True)
    junk = st.sampled_from(
        ["\t", ": ", "- ", "{", "[", "&a ", "*a ", "!!python/object:os.system ", "\x00", "%", "\ufeff", "é"]
    )

    @cases(many)
    @given(st.lists(st.sampled_from(lines) | junk | st.text(max_size=5), max_size=8).map("".join))
    def holds(text: str) -> None:
        experiment.write_bytes(text.encode("utf-8", "surrogatepass"))
        told(lambda: load_config(experiment))

    holds()


def test_a_tag_of_python_is_refused(experiment: Path) -> None:
    experiment.write_text(experiment.read_text() + "seed: !!python/object/apply:os.getpid []\n")
    with pytest.raises(UserError, match="cannot be composed"):
        load_config(experiment)


def test_deeply_nested_json_is_no_list() -> None:
    answer = json.dumps("x") + "[" * 100_000
    assert parse_ranking(answer, ["Alien"], 3).order == []
