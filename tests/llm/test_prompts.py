"""The words of the prompts."""

from dataclasses import replace

import polars as pl
import pytest
import torch

from lit_rec.data.canonical import RatingsData
from lit_rec.errors import UserError
from lit_rec.llm.prompts import Prompts, _file, item_slots

ITEMS = torch.tensor([[1, 2, 3], [3, 0, 0], [0, 0, 0]])
RATINGS = torch.tensor([[5.0, 1.0, 3.5], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def make_data(noun: str = "movie") -> RatingsData:
    return RatingsData(
        name="three",
        interactions=pl.DataFrame(),
        users=pl.DataFrame(
            {
                "user_id": ["a", "b", "c"],
                "gender": ["female", "", ""],
                "age": ["25-34", "18", ""],
                "zip": ["1", "2", ""],
            }
        ),
        items=pl.DataFrame(
            {
                "item_id": ["", "10", "20", "30"],
                "title": ["", "Alien", "Brazil {1985}", "Clue"],
                "genres": [[], ["horror", "space"], [], ["comedy"]],
                "year": [None, 1979, 1985, None],
            },
            schema_overrides={"genres": pl.List(pl.String), "year": pl.Int32},
        ),
        item_attributes=("genres",),
        rating_max=5.0,
        positive_above=3.0,
        item_noun=noun,
    )


def make_prompts(noun: str = "movie", **options: object) -> Prompts:
    return Prompts(make_data(noun), (ITEMS, RATINGS), **{"template": "short_v1", "history": 2, **options})


def test_user_prompt_shows_the_last_of_the_history_in_time_order() -> None:
    system, user = make_prompts().user(0)
    assert (system["role"], user["role"]) == ("system", "user")
    assert '"Brazil {1985}", 1 star; "Clue", 3.5 stars' in user["content"]
    assert "Alien" not in user["content"]
    assert "Ratings out of 5:" in user["content"]
    assert user["content"].startswith("A user with gender female, age 25-34.")
    assert '"Alien", 5 stars' in make_prompts(history=30).user(0)[1]["content"]


def test_unknown_attributes_and_the_zip_code_are_left_out() -> None:
    prompts = make_prompts()
    assert prompts.who(1) == "A user with age 18."
    assert prompts.who(2) == "A user."
    assert prompts.history_text(2) == ""
    assert prompts.history_text(0, limit=3).count("star") == 3


def test_a_hint_stands_behind_the_question() -> None:
    prompts = make_prompts()
    system, plain = prompts.user(0)
    hinted = {"role": "user", "content": plain["content"] + " Hint: Say {x} first."}
    assert prompts.user(0, "Say {x} first.") == [system, hinted]
    assert prompts.users([0, 1], ["a", None]) == [prompts.user(0, "a"), prompts.user(1)]
    assert prompts.users([0, 1]) == [prompts.user(0), prompts.user(1)]
    assert all(template["hint"].count("{hint}") == 1 for template in _file()["templates"].values())


def test_rated_items_one_by_one() -> None:
    prompts = make_prompts()
    assert prompts.rated(0, 3) == ['"Alien", 5 stars', '"Brazil {1985}", 1 star', '"Clue", 3.5 stars']
    assert "; ".join(prompts.rated(0)) == prompts.history_text(0)


def test_data_without_ratings_tell_the_titles_alone() -> None:
    for template in _file()["templates"]:
        told = make_prompts(template=template)
        prompts = replace(told, data=replace(told.data, rated=False))
        assert prompts.history_text(0) == "; ".join(prompts.rated(0))
        assert prompts.rated(0, 2) == ['"Brazil {1985}"', '"Clue"']
        words = " ".join(message["content"] for message in prompts.user(0))
        assert 'hose, in order: "' in words
        assert not any(word in words.casefold() for word in ("star", "rat", "dislikes"))


def test_every_template_fills_every_slot() -> None:
    for template in _file()["templates"]:
        for noun in ("movie", "book", "item"):
            prompts = make_prompts(noun, template=template)
            for message in [*prompts.user(0), *prompts.item(1)]:
                assert noun in message["content"]
                assert "{" not in message["content"].replace("{1985}", "")
    assert prompts.users([1, 0]) == [prompts.user(1), prompts.user(0)]


def test_factors_follow_the_noun_or_the_configuration() -> None:
    text = make_prompts("book", template="preferences_v1").user(0)[0]["content"]
    assert "writing style" in text
    text = make_prompts("gadget", template="preferences_v1").user(0)[0]["content"]
    assert "brand" in text
    text = make_prompts(template="preferences_v1", factors="colour  and\n size").user(0)[0]["content"]
    assert "colour and size." in text


def test_slots_of_a_noun() -> None:
    """Nouns of the file have its words; of others the attributes are named; without any, general words."""
    assert item_slots("movie", ["brand"])["aspects"] == "genres, themes and moods"
    assert item_slots("movie", []) == item_slots("movie", ["brand"])
    tea = item_slots("tea", ["kind", "tea_region"])
    assert (tea["noun"], tea["nouns"], tea["aspects"]) == ("tea", "teas", "kind and tea region")
    assert tea["factors"] == "kind, tea region, brand, style, theme, quality, price and purpose"
    assert {*tea} == {*item_slots("tea", [])} == {*item_slots("book", [])}
    assert item_slots("tea", [])["apart"] == "kind, style"


def test_items_in_words() -> None:
    prompts = make_prompts()
    assert prompts.item_text(1) == "Alien (1979): horror, space"
    assert prompts.item_text(2) == "Brazil {1985} (1985)"
    assert prompts.item_text(3) == "Clue: comedy"
    assert "Alien (1979): horror, space" in prompts.item(1)[1]["content"]


def test_unknown_template_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="no_such") as caught:
        make_prompts(template="no_such")
    assert "short_v1" in caught.value.fix
