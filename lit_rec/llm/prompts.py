"""The words the LLM is asked, and the words that describe users and items."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from torch import Tensor

from lit_rec.data.canonical import RatingsData
from lit_rec.errors import UserError

Messages = list[dict[str, str]]
Hints = Sequence[str | None]  # None is the prompt without a hint
TEMPLATES = Path(__file__).with_name("templates.yaml")
# Kinds of templates: their part of the file, the key that names them, and how many it names.
KINDS = {
    "prompt": ("templates", "prompt.template", "one"),
    "ranking": ("ranking", "ranking.templates", "some"),
    "reflection": ("reflection", "reflection.template", "one"),
}
NOT_SHOWN = {"user_id", "zip", "zip_code"}


@functools.cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    return found


def find_template(kind: str, name: str) -> dict[str, str]:
    """The words of a template.

    Args:
        kind: "prompt", "ranking" or "reflection".
        name: Below that part of templates.yaml.

    Raises:
        UserError: There is none of that name.
    """
    section, key, some = KINDS[kind]
    known: dict[str, dict[str, str]] = _file()[section]
    if name not in known:
        raise UserError(
            f"there is no {kind} template {name!r}",
            where=f"config key {key}",
            fix=f"use {some} of {', '.join(known)}, or add yours to {TEMPLATES.name}",
        )
    return known[name]


def user_words(template: str) -> str:
    """What a template asks about a user, its slots in braces."""
    return " ".join(_file()["templates"][template]["user"].split())


@dataclass(frozen=True)
class Prompts:
    """Prompts of one data set with one template.

    Args:
        data: Users, items and their attributes.
        histories: (items [U, H], ratings [U, H]): what the prompt may use, chronological, 0 = padding.
        template: A name in templates.yaml.
        history: At most this many of the last interactions of the history are shown.
        factors: What to consider; empty: the list for the data set's item noun.

    Raises:
        UserError: There is no such template.
    """

    data: RatingsData
    histories: tuple[Tensor, Tensor]
    template: str
    history: int
    factors: str = ""

    def __post_init__(self) -> None:
        words = find_template("prompt", self.template)
        if not self.data.rated and "chosen" not in words:
            raise UserError(
                f"prompt template {self.template!r} has no words for interactions without ratings",
                where="config key prompt.template",
                why="data.rating is null, and nobody is to be told ratings that there are not",
                fix=f"add chosen_system and chosen to it in {TEMPLATES.name}, or use another one",
            )

    def _messages(self, system: str, user: str, **slots: object) -> Messages:
        common = item_slots(self.data.item_noun, self.data.item_attributes)
        if self.factors:
            common["factors"] = " ".join(self.factors.split())
        words = _file()["templates"][self.template]
        return [
            {"role": role, "content": " ".join(words[key].split()).format(**common, **slots)}
            for role, key in (("system", system), ("user", user))
        ]

    def user(self, row: int, hint: str | None = None) -> Messages:
        """The chat messages that ask for the preferences of a user; a hint stands behind the question."""
        slots = {"who": self.who(row), "history": self.history_text(row)}
        if self.data.rated:
            asked = self._messages("system", "user", **slots, stars=f"{self.data.rating_max:g}")
        else:
            asked = self._messages("chosen_system", "chosen", **slots)
        if hint is not None:
            asked[-1]["content"] += f" {_file()['templates'][self.template]['hint'].format(hint=hint)}"
        return asked

    def users(self, rows: Sequence[int], hints: Hints | None = None) -> list[Messages]:
        """The messages of several users, each with its hint."""
        return [self.user(row, hint) for row, hint in zip(rows, hints or [None] * len(rows), strict=True)]

    def item(self, item: int) -> Messages:
        """The chat messages that ask to describe an item."""
        return self._messages("item_system", "item_user", item=self.item_text(item))

    def who(self, row: int) -> str:
        """The user in words, as far as the data set tells."""
        known = {k: v for k, v in self.data.users.row(row, named=True).items() if k not in NOT_SHOWN and v}
        if not known:
            return "A user."
        words = [f"{key.replace('_', ' ')} {value}" for key, value in known.items()]
        return f"A user with {', '.join(words)}."

    def history_text(self, row: int, limit: int | None = None) -> str:
        """`"title", k stars; ...` in time order; of data without ratings the titles alone."""
        return "; ".join(self.rated(row, limit))

    def rated(self, row: int, limit: int | None = None) -> list[str]:
        """`"title", k stars` of every item of the history that is shown; of data without ratings the title alone."""
        items, ratings = (h[row].tolist() for h in self.histories)
        shown = [(i, r) for i, r in zip(items, ratings, strict=True) if i > 0][-(limit or self.history) :]
        titles = self.data.items["title"]
        if not self.data.rated:
            return [f'"{titles[i]}"' for i, _ in shown]
        return [f'"{titles[i]}", {r:g} star{"" if r == 1 else "s"}' for i, r in shown]

    def item_text(self, item: int) -> str:
        """Title, year and attributes of an item: also what `knowledge.item_text: attributes` encodes."""
        return item_text(self.data.items, self.data.item_attributes, item)


def item_slots(noun: str, attributes: Sequence[str]) -> dict[str, str]:
    """The slots of templates.yaml that speak of items and not of one of them.

    For a noun that the file does not know, the words are the names of the items' attributes.

    Args:
        noun: What an item is called.
        attributes: Its attributes.
    """
    file = _file()
    known = [name.replace("_", " ") for name in attributes]
    usual = file["factors"]["item"].replace(" and ", ", ").split(", ")
    own = {
        "apart": ", ".join(known),
        "alike": " and the same ".join(known[:2]),
        "which": ", ".join(f"which {name}" for name in known),
    }
    return {
        "noun": noun,
        "nouns": plural(noun),
        "factors": " ".join((file["factors"].get(noun) or listed([*dict.fromkeys([*known, *usual])])).split()),
        "aspects": file["aspects"].get(noun) or listed(known) or file["aspects"]["item"],
        **(file["hints"].get(noun) or (own if known else file["hints"]["item"])),
    }


def plural(noun: str) -> str:
    """Several of them.

    >>> [plural(noun) for noun in ("movie", "board game", "dish", "story", "toy")]
    ['movies', 'board games', 'dishes', 'stories', 'toys']
    """
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2:-1] not in "aeiou" else f"{noun}s"


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them.

    >>> listed(["kind", "taste", "origin"]), listed(["kind"]), listed([])
    ('kind, taste and origin', 'kind', '')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def item_text(items: pl.DataFrame, attributes: Sequence[str], item: int) -> str:
    """`Title (year): attribute, attribute; attribute` of a row of an items frame."""
    row = items.row(item, named=True)
    year = f" ({row['year']})" if row.get("year") else ""
    known = "; ".join(", ".join(row[name]) for name in attributes if row[name])
    return f"{row['title']}{year}{': ' if known else ''}{known}"
