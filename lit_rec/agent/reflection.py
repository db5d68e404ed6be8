"""Reflection: the LLM is shown where it was wrong, and writes hints for the next time (Re2LLM, METHODS 2.1).

One conversation of three turns per error session: (1) the question and the LLM's own answer, the target hidden: what
may have gone wrong? (2) the target is shown: why was it missed? (3) short imperative hints that do not name it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_rec.llm.prompts import Messages, find_template, item_slots
from lit_rec.llm.ranker import Port
from lit_rec.llm.ranking import INLINE, normalised, other_names
from lit_rec.llm.sampler import SamplingSettings

ENTRY = re.compile(r"^\s*(?:\d{1,2}\s*[.):]|[-*•–]|hint\s*\d*\s*:)\s*(?P<text>.+)$", re.IGNORECASE)
PREFACE = re.compile(r"^\W*(here are|here is|here's|sure|certainly)\b|\b(following|hints?)\W*$", re.IGNORECASE)
WORDS = (3, 40)  # a shorter line says nothing, a longer one is no hint
SUBTITLE = re.compile(r"\s+or:\s|:\s|\s[-–—]\s")
LONG = 6  # letters of a name that is found in spite of its blanks, or without its subtitle
NO_BLANKS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Han


@dataclass(frozen=True)
class Mistake:
    """An error session, or a user whom the LLM's description serves badly.

    Attributes:
        session: Its number.
        titles: What the session holds, or the user rated, in order.
        answer: What was ranked first by mistake, best first.
        target: What came next, or should have come first.
        said: What the LLM said, which may be nothing at all; None: `answer`, as a numbered list.
    """

    session: int
    titles: Sequence[str]
    answer: Sequence[str]
    target: str
    said: str | None = None


class Reflector:
    """Leads the conversations.

    Args:
        llm: Any port.
        template: A name below `reflection:` in templates.yaml.
        noun: What an item is called.
        verb: What was done with it.
        hints: Hints asked for per session.
        attributes: What is known of an item: what hints may speak of, where the file does not know the noun.
        settings: How the LLM is sampled.

    Raises:
        UserError: There is no such template.
    """

    def __init__(
        self,
        llm: Port,
        *,
        template: str,
        noun: str,
        verb: str,
        hints: int,
        settings: SamplingSettings,
        attributes: Sequence[str] = (),
    ) -> None:
        words = find_template("reflection", template)
        self.llm, self.words, self.settings, self.hints = llm, words, settings, hints
        self.common: dict[str, object] = {**item_slots(noun, attributes), "verb": verb, "hints": hints}
        self.example = self.words.get("example", "").format(**self.common)
        self.common["example"] = self.example

    def reflect(
        self, mistakes: Sequence[Mistake], progress: Callable[[int, int], None] | None = None
    ) -> list[Messages]:
        """Hold the conversation about every mistake, all of them turn by turn together.

        Returns:
            The whole conversations; the last message of each holds the hints.
        """
        talks: list[Messages] = [self._open(mistake) for mistake in mistakes]
        for turn in ("mistakes", "reveal", "advise"):
            for talk, mistake in zip(talks, mistakes, strict=True):
                ranked = ", ".join(f'"{title}"' for title in mistake.answer)
                talk.append({"role": "user", "content": self._fill(turn, target=mistake.target, ranked=ranked)})
            given = self.llm.answers(talks, [1] * len(talks), settings=self.settings, progress=progress)
            for talk, answers in zip(talks, given, strict=True):
                talk.append({"role": "assistant", "content": answers[0].text})
        return talks

    def _open(self, mistake: Mistake) -> Messages:
        listed = "\n".join(f"{n}. {title}" for n, title in enumerate(mistake.answer, 1))
        return [
            {"role": "user", "content": self._fill("question", session="; ".join(mistake.titles))},
            {"role": "assistant", "content": listed if mistake.said is None else mistake.said},
        ]

    def same(self, hint: str, known: Sequence[str], progress: Callable[[int, int], None] | None = None) -> bool | None:
        """Ask the LLM whether a hint says the same as one of the known ones.

        Returns:
            Its answer, or None when it is neither 1 nor 0.
        """
        listed = "\n".join(f"- {text}" for text in known)
        prompt = [{"role": "user", "content": self._fill("redundant", hint=hint, known=listed)}]
        settings = SamplingSettings(8, temperature=0.0, top_p=1.0)
        answer = self.llm.answers([prompt], [1], settings=settings, progress=progress)[0][0].text
        found = re.search(r"\b([01]|yes|no)\b", answer.casefold())
        return None if found is None else found[1] in ("1", "yes")

    def _fill(self, key: str, **slots: object) -> str:
        return " ".join(self.words[key].split()).replace(" | ", "\n").format(**self.common, **slots)


def read_hints(answer: str, limit: int) -> list[str]:
    """Read hints from the last answer: one per number or bullet, else one per line or sentence.

    Args:
        answer: What the LLM wrote.
        limit: At most this many are taken.

    Returns:
        Hints without marks and quotes; what comes before a list, and what was cut off behind it, is left out.
    """
    lines = [line for raw in answer.splitlines() if (line := re.sub(r"\*\*|__", "", raw).strip())]
    found = [_unmarked(line) for line in lines if ENTRY.match(line)]
    if len(found) < 2 and (inline := [hint for line in lines for hint in _inline(line)]):
        found = inline
    if not found:
        found = [line for line in lines if not PREFACE.search(line)]
        if len(found) == 1:
            found = re.split(r"(?<=[.!?])\s+", found[0])
    return [clean for text in found if (clean := " ".join(text.strip("*\"'“” ").split()))][:limit]


def _unmarked(line: str) -> str:
    """A line without its marks, of which there may be several: "1. Hint 1: ..."."""
    while match := ENTRY.match(line):
        line = match["text"]
    return line


def _inline(line: str) -> list[str]:
    """The hints of a line that counts them, 1, 2 ...; none where it does not: "part 2. Avoid part 3." is no list."""
    marks = list(INLINE.finditer(line))
    count = next((n for n, mark in enumerate(marks) if int(re.sub(r"\D", "", mark[0])) != n + 1), len(marks))
    ends = [*(mark.start() for mark in marks[1:count]), len(line)]
    return [_unmarked(line[mark.end() : end]) for mark, end in zip(marks, ends, strict=False)] if count > 1 else []


def malformed(hint: str) -> bool:
    """Whether a line is too short or too long to be a hint, or has no letters."""
    words = re.findall(r"[^\W\d_]+", hint)
    return not WORDS[0] <= len(words) <= WORDS[1]


def leaks(hint: str, target: str) -> bool:
    """Whether a hint names the target, or what it is a part of.

    Case, accents, punctuation, article, year, blanks and other names do not hide it; nor does a missing subtitle.

    >>> leaks("Look for films like 'Matrix'.", "The Matrix"), leaks("Prefer alien worlds.", "Aliens")
    (True, False)
    """
    names = [normalised(target), *other_names(target), *_beginnings(target, hint)]
    return any(_named(name, normalised(hint)) for name in names if name)


def _beginnings(title: str, hint: str) -> list[str]:
    """What stands before a title's subtitles, where it has two words or `LONG` letters.

    "Horror: The Movie" would forbid to speak of horror: one word counts only where the hint writes it with a capital.
    """
    capitals = {normalised(word) for word in re.findall(r"[^\W_]+", hint) if word[0].isupper()}
    names = [normalised(title[: border.start()]) for border in SUBTITLE.finditer(title)]
    return [n for n in names if " " in n or NO_BLANKS.search(n) or (len(n) >= LONG and n in capitals)]


def _named(name: str, said: str) -> bool:
    """Whether a text has a name, both as `normalised` has them: as words, or as words that are cut in other places."""
    if f" {name} " in f" {said} ":
        return True
    letters = name.replace(" ", "")
    if NO_BLANKS.search(letters):
        return len(letters) >= 2 and letters in said.replace(" ", "")
    whole = r"(?<!\w)" + r" ?".join(map(re.escape, letters)) + r"(?!\w)"
    return sum(map(str.isalpha, letters)) >= LONG and re.search(whole, said) is not None
