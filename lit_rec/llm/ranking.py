"""What the LLM is asked about a session, and how its numbered list is read (Re2LLM, METHODS 2.1 to 2.3)."""

import difflib
import functools
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from lit_rec.llm.prompts import Messages, find_template, plural
from lit_rec.llm.scoring import Question

CLOSE = 0.92  # titles this alike (difflib's ratio) are taken for the same: a typing slip, not another film
NUMERALS = re.compile(r"\b(\d+|[ivx]+)\b")


@dataclass(frozen=True)
class RankingPrompts:
    """Prompts about sessions with one template.

    Args:
        items: Items frame: `title` of every item, row 0 padding.
        noun: What an item is called.
        verb: What was done with it: "watched", "purchased".
        template: A name below `ranking:` in templates.yaml.
        history: At most this many of the session's last items are shown.
        top: Length of the list that is asked for.
        years: Write "Alien (1979)" where the year is known: it tells an LLM much about a film.

    Raises:
        UserError: There is no such template.
    """

    items: pl.DataFrame
    noun: str
    verb: str
    template: str
    history: int = 20
    top: int = 10
    years: bool = False

    def __post_init__(self) -> None:
        find_template("ranking", self.template)

    @functools.cached_property
    def titles(self) -> list[str]:
        """Title of every item, with its year where that is asked for; the id where there is none."""
        titles = [title or item for item, title in self.items.select("item_id", "title").rows()]
        if not self.years or "year" not in self.items.columns:
            return titles
        return [f"{title} ({year})" if year else title for title, year in zip(titles, self.items["year"], strict=True)]

    @property
    def shows_candidates(self) -> bool:
        """Whether the prompt lists the candidates: then their order matters."""
        return "{candidates}" in "".join(find_template("ranking", self.template).values())

    def prompt(self, session: Sequence[int], candidates: Sequence[int], hint: str | None = None) -> Messages:
        """The prompt of a session.

        Args:
            session: Items in time order.
            candidates: Items in the order they are shown.
            hint: A hint from the base, or None.
        """
        return self._fill("session", session, candidates, hint)

    def prior(self, candidates: Sequence[int]) -> Messages:
        """The same question without the session: what the titles alone are worth to the LLM."""
        return self._fill("empty", (), candidates, None)

    def question(self, prompt: Messages, candidates: Sequence[int]) -> Question:
        """Ask for the likelihood of the candidates' titles as the answer to a prompt."""
        words = find_template("ranking", self.template)
        return Question(prompt, words["lead"], words["end"], tuple(self.titles[c] for c in candidates))

    def _fill(self, which: str, session: Sequence[int], candidates: Sequence[int], hint: str | None) -> Messages:
        words = find_template("ranking", self.template)
        slots = {
            "noun": self.noun,
            "nouns": plural(self.noun),
            "verb": self.verb,
            "top": self.top,
            "session": "; ".join(self.titles[i] for i in session[-self.history :]),
            "quoted": ", ".join(f'"{self.titles[i]}"' for i in session[-self.history :]),
            "candidates": "; ".join(self.titles[c] for c in candidates),
            "hint": words["hint"].format(hint=hint) if hint else "",
        }
        content = words[which].format(**slots)
        return [{"role": "text" if words.get("kind") == "text" else "user", "content": content}]


@dataclass(frozen=True)
class ParsedRanking:
    """A ranking read from an answer.

    Attributes:
        order: Positions of the listed candidates, best first; at most `top`.
        lines: Lines that looked like entries.
        unknown: Entries that are no candidate.
        repeated: Entries that were listed before.
    """

    order: list[int]
    lines: int
    unknown: int
    repeated: int

    @property
    def failed(self) -> bool:
        """Whether nothing could be used."""
        return not self.order


ENTRY = re.compile(
    r"^\s*[*_]*(?:\d{1,2}\s*[.)]+(?!\d)\s*|\d{1,2}\s*[:\-]+\s+|[-*•–]+\s+|#\d{1,3}\s+)[*_]*\s*(?P<title>\S.*?)\s*$"
)
INLINE = re.compile(r"(?:^|\s)\d{1,3}[.)]\s+")
BORDER = re.compile(r"\s[-–—]\s|:\s|\s\(")  # where a title may end and a reason begin
BORDERS = 12  # of an entry that are looked at: no title has as many
SMALL = re.compile(r"an?|and|as|at|but|by|for|from|in|into|of|on|or|over|the|to|upon|vs|with|without")

NAME = 4  # letters that a second name has at least


def normalised(title: str) -> str:
    """A title as it is compared: no case, accents, punctuation, leading article or year.

    >>> normalised('**The Matrix** (1999)') == normalised("Matrix, The")
    True
    """
    text = unicodedata.normalize("NFKD", title.casefold())
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"\(\d{4}\)", " ", text).replace("&", " and ")
    words = re.sub(r"[\W_]+", " ", text).split()
    if len(words) > 1:
        words = words[1:] if words[0] in ("the", "a", "an") else words
        words = words[:-1] if words[-1] in ("the", "a", "an") and "," in title else words
    return " ".join(words)


def other_names(title: str) -> list[str]:
    """The names that a title gives in and before brackets, and with an article in front, as `normalised` has them.

    >>> other_names("Postman, The (Postino, Il) (1994)"), other_names("Alien (1979)")
    (['postman', 'postino il', 'il postino'], [])
    """
    names = []
    for part in re.split(r"\s*[()]\s*", title):
        names.append(normalised(part))
        if moved := re.fullmatch(r"(.+), (\w{1,3})", part):
            names.append(normalised(f"{moved[2]} {moved[1]}"))
    letters = {name: sum(map(str.isalpha, name)) for name in names if name != normalised(title)}
    return [name for name, count in letters.items() if count >= NAME]


def parse_ranking(answer: str, titles: Sequence[str], top: int = 10) -> ParsedRanking:
    """Read a ranked list of candidates from an LLM's answer.

    Numbered and bulleted lines are entries; where there is none, a JSON array of texts is, or a list written on one
    line is cut at its numbers, and else every line that names a candidate counts. Titles are matched exactly first,
    then without case, punctuation, article and year, then by likeness; two candidates of the same title are listed in
    turn.

    Args:
        answer: The answer.
        titles: The candidates' titles.
        top: Entries beyond this many candidates are ignored.
    """
    names: dict[str, list[int]] = {}
    for position, title in enumerate(titles):
        for name in filter(None, dict.fromkeys((title.strip(), normalised(title)))):
            names.setdefault(name, []).append(position)
    for position, title in enumerate(titles):  # after all whole titles: those come first
        for name in other_names(title):
            names.setdefault(name, [position])
    order: list[int] = []
    unknown = repeated = 0
    entries = _entries(answer, names)
    for entry in entries:
        if len(order) == top:
            break
        found = _match(entry, names)
        fresh = [p for p in found if p not in order]
        if fresh:
            order.append(fresh[0])
        elif found:
            repeated += 1
        else:
            unknown += 1
    return ParsedRanking(order, len(entries), unknown, repeated)


def _entries(answer: str, names: dict[str, list[int]]) -> list[str]:
    lines = [line for line in answer.splitlines() if line.strip()]
    entries = [found["title"] for line in lines if (found := ENTRY.match(line))]
    if len(entries) < 2 and (listed := _array(answer)):
        return listed
    if len(entries) < 2:
        inline = [part for line in lines for part in INLINE.split(line)[1:]]
        entries = inline if len(inline) > len(entries) else entries
    return entries or [line for line in lines if _match(line, names)]


def _array(answer: str) -> list[str]:
    """The texts of a JSON array in an answer."""
    start, end = answer.find("["), answer.rfind("]")  # searched for as `\[.*\]`, a long answer would take minutes
    try:
        values = json.loads(answer[start : end + 1]) if 0 <= start < end else []
    except (ValueError, RecursionError):
        return []
    return [value for value in values if isinstance(value, str)]


def _match(entry: str, names: dict[str, list[int]]) -> list[int]:
    """Candidates an entry means; what follows the title ("Alien - a classic", "Alien (1979): ...") is ignored.

    The longest part that is a name counts: titles have colons, dashes and brackets of their own.
    """
    entry = entry.strip().strip("*_\"'“”; ")
    borders = [found for found, _ in zip(BORDER.finditer(entry), range(BORDERS), strict=False)]
    for text in (entry, *(entry[: b.start()] for b in reversed(borders) if not _within_title(entry, b))):
        for name in (text.strip(), normalised(text)):
            if name in names:
                return names[name]
    wanted = normalised(entry)
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=CLOSE)
    same_part = close and NUMERALS.findall(close[0]) == NUMERALS.findall(wanted)  # "Rocky II" is not "Rocky III"
    return names[close[0]] if same_part else []


def _within_title(entry: str, border: re.Match[str]) -> bool:
    """Whether a border is a colon with a subtitle behind it: "Alien: Covenant" is another film than "Alien".

    A subtitle has a year behind it, or is written like a title: every word with a capital, but for small ones between.
    So a reason that is written like a title ("Alien: Ridley Scott") costs the entry; the other way round, a candidate
    that nobody named would get its place. What is closed by a mark, a quote or a bracket has its subtitle already.
    """
    if border[0][0] != ":" or entry[: border.start()].endswith(("*", "_", '"', "'", "”", ")")):
        return False
    rest = entry[border.end() :]
    end = BORDER.search(rest)
    words = re.findall(r"\w[\w'’.-]*", rest[: end.start()] if end else rest)
    if not words:
        return False
    if end and re.match(r"\s\(\d{4}\)", rest[end.start() :]):
        return True
    capital = [word[0].isupper() or word[0].isdigit() for word in words]
    between = all(big or SMALL.fullmatch(word) for word, big in zip(words, capital, strict=True))
    return between and capital[0] and capital[-1] and any(word[0].isupper() for word in words)
