"""Conversations with a scripted LLM, and hints read from whatever it writes."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rec.agent.filtering import written
from lit_rec.agent.reflection import Mistake, Reflector, leaks, malformed, read_hints
from lit_rec.errors import UserError
from lit_rec.llm.prompts import Messages
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.llm.store import Answer


class Script:
    """A port that answers by rule and remembers what it was asked."""

    def __init__(self, rule: Callable[[Messages], str]) -> None:
        self.rule, self.asked, self.settings = rule, [], []

    def answers(
        self,
        prompts: Sequence[Messages],
        counts: Sequence[int],
        *,
        settings: SamplingSettings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Answer]]:
        assert list(counts) == [1] * len(prompts)
        self.asked.append(copy.deepcopy(list(prompts)))
        self.settings.append(settings)
        if progress is not None:
            progress(len(prompts), 7 * len(prompts))
        return [[Answer(self.rule(prompt), 7, "stop")] for prompt in prompts]


MISTAKES = [
    Mistake(4, ["Alien", "Heat {x} | Ran"], ["Up", "Ran"], "The Matrix {0}"),
    Mistake(9, ["Amélie"], ["Ran", "Up", "Jaws"], "千と千尋"),
]
SETTINGS = SamplingSettings(64, 0.7, 0.9)


def make(rule: Callable[[Messages], str] | str, **options: Any) -> tuple[Reflector, Script]:
    port = Script(rule if callable(rule) else lambda prompt: rule)
    given = {"template": "reflect_v1", "noun": "movie", "verb": "watched", "hints": 3, "settings": SETTINGS, **options}
    return Reflector(port, **given), port


def talk_of(prompt: Messages) -> str:
    return "\n".join(message["content"] for message in prompt)


def test_three_turns_with_the_target_hidden_in_the_first() -> None:
    reflector, port = make(lambda prompt: f"answer to turn {len(prompt) // 2}")
    done: list[tuple[int, int]] = []
    talks = reflector.reflect(MISTAKES, lambda n, tokens: done.append((n, tokens)))
    assert done == [(2, 14)] * 3
    assert port.settings == [SETTINGS] * 3
    assert [[len(p) for p in turn] for turn in port.asked] == [[3, 3], [5, 5], [7, 7]]
    for n, mistake in enumerate(MISTAKES):
        first, second, third = (turn[n] for turn in port.asked)
        assert mistake.target not in talk_of(first)
        assert mistake.target in second[-1]["content"]
        assert mistake.target in third[-1]["content"]  # not to be named
        assert first[0]["content"].count("; ".join(mistake.titles)) == 1
        assert first[1] == {
            "role": "assistant",
            "content": "\n".join(f"{k + 1}. {title}" for k, title in enumerate(mistake.answer)),
        }
        assert "mistakes" in first[-1]["content"]
        assert "3 hints" in third[-1]["content"]
        for before, after in ((first, second), (second, third)):  # a conversation only grows
            assert after[: len(before)] == before
        assert second[3] == {"role": "assistant", "content": "answer to turn 1"}
        assert talks[n] == [*third, {"role": "assistant", "content": "answer to turn 3"}]
        assert [m["role"] for m in talks[n]] == ["user", "assistant"] * 4
        assert MISTAKES[1 - n].target not in talk_of(talks[n])


def test_a_description_is_reflected_on_in_its_own_words() -> None:
    mistake = Mistake(3, ['"Alien", 5 stars'], ["Up", "Ran {x}"], "The Matrix", said="Likes robots; hates {braces}.")
    reflector, port = make(lambda prompt: f"answer to turn {len(prompt) // 2}", template="describe_v1", verb="rated")
    talk = reflector.reflect([mistake])[0]
    assert '"Alien", 5 stars' in talk[0]["content"]
    assert talk[1] == {"role": "assistant", "content": "Likes robots; hates {braces}."}
    first = port.asked[0][0]
    assert '"Up", "Ran {x}"' in first[-1]["content"]
    assert "The Matrix" not in talk_of(first)
    assert "The Matrix" in talk[4]["content"]
    assert "3 hints" in talk[6]["content"]
    assert reflector.example in talk[6]["content"]


def test_an_empty_description_stays_empty() -> None:
    talk = make("x", template="describe_v1")[0].reflect([Mistake(3, ["Alien"], ["Up"], "Ran", said="")])[0]
    assert talk[1] == {"role": "assistant", "content": ""}


def test_nothing_to_reflect_on() -> None:
    assert make("x")[0].reflect([]) == []


def test_words_of_the_data_set() -> None:
    reflector, _ = make("x", noun="video game", verb="purchased", hints=1)
    talk = talk_of(reflector.reflect(MISTAKES[:1])[0])
    assert "I purchased the following video games in order" in talk
    assert "movie" not in talk
    assert "watched" not in talk


@pytest.mark.parametrize("noun", ["movie", "book"])
def test_the_words_of_stories_are_those_of_stored_answers(noun: str) -> None:
    """Word for word: a changed wording would ask again for every conversation that was stored."""
    advice = {"reflect_v1": "", "describe_v1": ""}
    for template in advice:
        talk = make("x", template=template, noun=noun)[0].reflect(MISTAKES[1:])[0]
        advice[template] = talk[6]["content"].replace("千と千尋", "T")
    assert advice["reflect_v1"] == (
        "What should be done better next time, for other people too? Write 3 hints, one sentence each, numbered. A "
        f"hint says which {noun}s to recommend to whom, by genre, mood, age or fame, like "
        f'"Prefer well-known {noun}s of the same kind and the same years." Do not name "T" or other titles.'
    )
    assert advice["describe_v1"] == (
        "How should such descriptions be written, for other people too? Write 3 hints, one sentence each, numbered. A "
        f'hint says what a description must tell, like "Say which genres, which years and how famous {noun}s the user '
        'likes best, and which the user dislikes." Do not name "T" or other titles.'
    )


@pytest.mark.parametrize(
    ("attributes", "by", "same", "say"),
    [
        (
            ["kind", "notes", "tea_region"],
            "kind, notes, tea region",
            "kind and the same notes",
            "kind, which notes, which tea region",
        ),
        (["brand"], "brand", "brand", "brand"),
        ([], "kind, style", "kind", "kinds"),
    ],
)
def test_other_items_are_told_apart_by_their_attributes(attributes: list[str], by: str, same: str, say: str) -> None:
    talks = {}
    for template in ("reflect_v1", "describe_v1"):
        reflector, _ = make("x", template=template, noun="tea", verb="drank", attributes=attributes)
        talks[template] = talk_of(reflector.reflect(MISTAKES[:1])[0])
        assert reflector.example in talks[template]
        for word in ("genre", "mood", "years", "movie", "watched"):
            assert word not in talks[template]
    assert f"which teas to recommend to whom, by {by} or fame, like" in talks["reflect_v1"]
    assert f'"Prefer well-known teas of the same {same}."' in talks["reflect_v1"]
    assert f'"Say which {say} and how famous teas the user likes best,' in talks["describe_v1"]


def test_unknown_template_is_told() -> None:
    with pytest.raises(UserError, match="no reflection template 'best'") as caught:
        make("x", template="best")
    assert caught.value.where == "config key reflection.template"
    assert "reflect_v1" in caught.value.fix


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1", True),
        ("0", False),
        ("1.", True),
        (" Answer: 0", False),
        ("Yes, it does.", True),
        ("NO", False),
        ("", None),
        ("I cannot say.", None),
        ("10", None),
        ("2", None),
        ("nothing", None),
        ("\ud800", None),
    ],
)
def test_same(answer: str, expected: bool | None) -> None:
    reflector, port = make(answer)
    assert reflector.same("Prefer {old} | films.", ["Avoid sequels.", "Look for {x} | y."]) is expected
    ((prompt,),) = port.asked
    (message,) = prompt
    assert '"Prefer {old} | films."' in message["content"]
    assert "\n- Avoid sequels.\n- Look for {x} | y.\n" in message["content"]
    assert port.settings[0].temperature == 0


WANTED = ["Prefer dark films.", "Avoid sequels.", "Look for one director."]
SHAPES = {
    "numbered": "1. {0}\n2. {1}\n3. {2}",
    "parenthesis": "1) {0}\n2) {1}\n3) {2}",
    "no blank": "1.{0}\n2.{1}\n3.{2}",
    "bullets": "- {0}\n* {1}\n• {2}",
    "hint n": "Hint 1: {0}\nHint 2: {1}\nhint 3 : {2}",
    "numbered hint n": "1. Hint 1: {0}\n2. Hint: {1}\n3. Hint 3: {2}",
    "bold": "1. **{0}**\n2. **{1}**\n3. **{2}**",
    "bold number": "**1. {0}**\n**2. {1}**\n**3. {2}**",
    "bold hint n": "**Hint 1:** {0}\n**Hint 2**: {1}\n- **Hint 3:** {2}",
    "quotes": "1. \"{0}\"\n2. “{1}”\n3. '{2}'",
    "talk around": "Sure, here are three hints:\n\n1. {0}\n2. {1}\n3. {2}\n\nI hope this helps!",
    "blank lines": "\n\n  1. {0}\n\n\t2.   {1}  \n\n3. {2}\n\n",
    "bare lines": "{0}\n{1}\n{2}",
    "preface and bare lines": "Here are the hints:\n{0}\n{1}\n{2}",
    "one line": "{0} {1} {2}",
    "numbered on one line": "1. {0} 2. {1} 3. {2}",
    "numbered on one line, in bold": "**1.** {0} **2.** {1} **3.** {2}",
    "numbered behind words": "Here are three hints: 1) {0} 2) {1} 3) {2}",
    "numbered on one line behind a preface": "Sure!\n1. {0} 2. {1} 3. {2}",
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_hints_in_many_shapes(shape: str) -> None:
    assert read_hints(SHAPES[shape].format(*WANTED), 3) == WANTED
    assert read_hints(SHAPES[shape].format(*WANTED), 2) == WANTED[:2]


@pytest.mark.parametrize(
    ("answer", "hints"),
    [
        ("Prefer part 2. Avoid part 3. Then stop.", ["Prefer part 2.", "Avoid part 3.", "Then stop."]),
        ("1. Prefer films before 1990. Like part 1.", ["Prefer films before 1990. Like part 1."]),
        ("1. Watch part 1. Then look for 3. part", ["Watch part 1. Then look for 3. part"]),
    ],
)
def test_numbers_that_end_a_sentence_are_no_list(answer: str, hints: list[str]) -> None:
    assert read_hints(answer, 5) == hints


@pytest.mark.parametrize("answer", ["", "  \n \t\n", "Sure!", "**", "1.\n2.\n", '1. ""\n2. **', "Here are my hints:"])
def test_answers_without_hints(answer: str) -> None:
    assert [text for text in read_hints(answer, 3) if not malformed(text)] == []


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["1. ", "- ", "\n", "Hint 2: ", "**", '"', "x y", "."])).map("".join)
)
def test_any_answer(answer: str) -> None:
    found = read_hints(answer, 3)
    assert len(found) <= 3
    for text in found:
        assert text == " ".join(text.split())
        assert text
        assert leaks(text, "Alien") == ("alien" in text.casefold())
        malformed(text)  # whatever was written, it has an answer


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("Prefer dark films.", False),
        ("Prefer films.", True),
        ("", True),
        ("1 2 3 4 5", True),
        ("... !!! ???", True),
        ("a_b c", False),
        ("Bevorzuge düstere Filme.", False),
        ("word " * 40, False),
        ("word " * 41, True),
    ],
)
def test_malformed(text: str, bad: bool) -> None:
    assert malformed(text) is bad


@pytest.mark.parametrize(
    ("text", "target", "named"),
    [
        ("Look for films like The Matrix.", "The Matrix", True),
        ("look for THE MATRIX again", "Matrix, The", True),
        ("Think of “Amelie”, always.", "Amélie", True),
        ("Prefer Matrix.", "The Matrix (1999)", True),
        ("Prefer the Matrix (1999) too.", "The Matrix", True),
        ("Recommend Fast and Furious.", "Fast & Furious", True),
        ("Recommend Spider Man's kind.", "Spider-Man", True),
        ("Up", "Up", True),
        ("Recommend Seven to fans of dark thrillers.", "Seven (Se7en) (1995)", True),
        ("Recommend Il Postino.", "Postman, The (Postino, Il) (1994)", True),
        ("Prefer films of (1994).", "Postman, The (Postino, Il) (1994)", False),
        ("Prefer alien worlds.", "Aliens", False),
        ("Prefer aliens.", "Alien", False),
        ("Prefer upbeat films.", "Up", False),
        ("Prefer dark films.", "The Matrix", False),
        ("Prefer dark films.", "", False),
        ("", "Up", False),
        ("推荐 千と千尋 类", "千と千尋", True),
        ("像千と千尋一样的电影", "千と千尋", True),
        ("喜欢流浪地球这样的片子", "流浪 地球", True),
        ("喜欢地球的片子", "流浪地球", False),
        ("Prefer films like Spiderman.", "Spider-Man (2002)", True),
        ("Prefer films like Spider Man.", "Spiderman", True),
        ("Think of Schindlers List.", "Schindler's List (1993)", True),
        ("Prefer Terminator 2 to others.", "Terminator 2: Judgment Day (1991)", True),
        ("Recommend star wars films.", "Star Wars: Episode IV - A New Hope (1977)", True),
        ("Recommend starwars films.", "Star Wars: Episode IV - A New Hope (1977)", True),
        ("Recommend the Lord of the Rings films.", "Lord of the Rings: The Fellowship of the Ring, The", True),
        ("Like Dr Strangelove.", "Dr. Strangelove or: How I Learned to Stop Worrying and Love the Bomb", True),
        ("Recommend Batman films.", "Batman: Mask of the Phantasm", True),
        ("Recommend minecraft and Minecraft's kind.", "Minecraft - PlayStation 4", True),
        ("Prefer horror with a twist.", "The Horror: A Comedy", False),
        ("Prefer alien settings.", "Aliens", False),
        ("Prefer alien worlds.", "Alien: Resurrection", False),
        ("Prefer films of 2001.", "2001: A Space Odyssey", False),
        ("Prefer upbeat or uplifting films.", "Up: A Story", False),
        ("Prefer terminators of the 2000s.", "Terminator 2: Judgment Day", False),
        ("Prefer stars of wars.", "Star Wars: Episode IV - A New Hope", False),
        ("Tell a story of toys to kids.", "Toy Story", False),
        ("Prefer films with a heat wave in them.", "Heatwave 2", False),
    ],
)
def test_leaks(text: str, target: str, named: bool) -> None:
    assert leaks(text, target) is named


def test_words_of_a_preface_within_a_hint_are_no_preface() -> None:
    hints = [
        "Make sure the era is the same.",
        "Prefer the following kind of film: quiet dramas.",
        "Avoid sequels to old films.",
    ]
    assert read_hints("\n".join(hints), 5) == hints
    assert read_hints("\n".join(["Sure, here are my hints:", *hints]), 5) == hints


@pytest.mark.parametrize("garbage", ["", "\n\n", "???", "\x00\ud800", "no", "{" * 500, "1. 2. 3.\n4. 5."])
def test_garbage_gives_no_hint(garbage: str) -> None:
    talks = make(garbage)[0].reflect(MISTAKES)
    hints = written(MISTAKES, talks, number=0, first_id=0, limit=3)
    assert {h.fate for h in hints} <= {"malformed"}
