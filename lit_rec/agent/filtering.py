"""Which hints enter the base: they must not leak, must help, and must say something new (METHODS 2.1, step 4)."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rec.agent.environment import AskedEnvironment
from lit_rec.agent.hints import KEPT, Hint, HintBase
from lit_rec.agent.reflection import Mistake, Reflector, leaks, malformed, read_hints
from lit_rec.llm.prompts import Messages
from lit_rec.llm.ranking import normalised


@dataclass(frozen=True)
class FilterSettings:
    """What a hint must achieve.

    Attributes:
        room: Hints that may be kept in this round.
        min_gain: Smallest mean reward gain on other sessions; a hint must be above it.
        similarity: A hint whose embedding is this near (cosine) to a kept one is the same hint.
        ask: Also ask the LLM whether it is the same.
    """

    room: int = 20
    min_gain: float = 0.0
    similarity: float = 0.9
    ask: bool = True


def written(
    mistakes: Sequence[Mistake],
    talks: Sequence[Messages],
    *,
    number: int,
    first_id: int,
    limit: int,
    example: str = "",
    titles: Collection[str] = (),
) -> list[Hint]:
    """The hints of some conversations, with the fate of those that can be refused at sight.

    Args:
        mistakes: The error sessions.
        talks: Their conversations.
        number: Of the round.
        first_id: Id of the first hint.
        limit: Hints per conversation.
        example: The hint that the conversation shows as an example; copies of it are nothing the LLM found out.
        titles: Of all items, as `normalised` writes them: a title alone is no advice.
    """
    found: list[Hint] = []
    seen: set[str] = set()
    for mistake, talk in zip(mistakes, talks, strict=True):
        for text in read_hints(talk[-1]["content"], limit):
            hint = Hint(first_id + len(found), text, number, mistake.session, list(mistake.titles), mistake.target)
            if malformed(text):
                hint.fate = "malformed"
            elif leaks(text, mistake.target):
                hint.fate = "leaks the target"
            elif normalised(text) in titles:
                hint.fate = "only a title"
            elif text.casefold().rstrip(".") == example.casefold().rstrip(".") != "":
                hint.fate = "copied from the prompt"
            elif text.casefold() in seen:
                hint.fate = "repeated"
            else:  # what leaks here may be a good hint where it was written again
                seen.add(text.casefold())
            found.append(hint)
    return found


def try_out(hints: Sequence[Hint], environment: AskedEnvironment, others: Tensor, *, whole: AskedEnvironment) -> None:
    """Measure every hint that is still in the running on its own session and on others.

    All hints are tried on the same other sessions, so that their gains can be compared.

    Args:
        hints: Hints; gains and ranks are written into them.
        environment: Asks the LLM.
        others: [m] session numbers; a hint's own session is left out.
        whole: Asks the LLM about all candidates: on the hint's own session, where the target was ranked so low that a
            shortlist would not hold it.
    """
    running = [hint for hint in hints if not hint.fate]
    if not running:
        return
    own: dict[int, list[Hint]] = {}
    for hint in running:
        own.setdefault(hint.session, []).append(hint)
    texts = [hint.text for hint in running]
    gains = environment.gains(others, [texts] * len(others)) if len(others) else torch.zeros(0, len(texts))
    for session, mine in own.items():
        trial = whole.trial(session, [hint.text for hint in mine])
        for place, hint in enumerate(mine):
            hint.gain_source = trial.gains[place]
            if trial.ranks:
                hint.rank_before, hint.rank_after = trial.ranks[0], trial.ranks[place + 1]
    for column, hint in enumerate(running):
        rest = gains[others != hint.session, column]
        hint.others = len(rest)
        hint.gain_others = float(rest.mean()) if len(rest) else None


def choose(
    hints: Sequence[Hint],
    base: HintBase,
    settings: FilterSettings,
    *,
    encode: Callable[[Sequence[str]], Tensor],
    reflector: Reflector,
) -> None:
    """Decide every hint's fate, the most useful first.

    Args:
        hints: Tried hints; fates are written into them.
        base: What is kept already.
        settings: What a hint must achieve.
        encode: Texts -> embeddings [n, d].
        reflector: Asks the LLM about redundancy.
    """
    for hint in hints:
        if hint.fate:
            continue
        if not hint.helped_source:
            hint.fate = "does not help where it was written"
        elif hint.gain_others is not None and hint.gain_others <= settings.min_gain:
            hint.fate = "does not help others"
    useful = sorted(
        (h for h in hints if not h.fate), key=lambda h: (-(h.gain_others or 0.0), -(h.gain_source or 0.0), h.id)
    )
    kept = list(base.kept)
    room = settings.room
    for hint in useful:
        if room == 0:
            hint.fate = "the base is full"
            continue
        hint.fate = _same(hint, kept, settings, encode, reflector) or KEPT
        if hint.fate == KEPT:
            kept.append(hint)
            room -= 1


def _same(
    hint: Hint,
    kept: Sequence[Hint],
    settings: FilterSettings,
    encode: Callable[[Sequence[str]], Tensor],
    reflector: Reflector,
) -> str | None:
    """The fate of a hint that says what a kept one says, or None."""
    if not kept:
        return None
    vectors = torch.nn.functional.normalize(encode([hint.text, *(k.text for k in kept)]), dim=-1)
    cosine, place = (vectors[1:] @ vectors[0]).max(0)
    if float(cosine) >= settings.similarity:
        return f"same as hint {kept[int(place)].id} (cosine {float(cosine):.2f})"
    if settings.ask and reflector.same(hint.text, [k.text for k in kept]):
        return "same as a kept hint, says the LLM"
    return None
