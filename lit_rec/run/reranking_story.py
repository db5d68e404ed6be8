"""The rows of the RLRF4Rec recipe: their order, what each has to beat, and what comes of it in words (METHODS 1.9)."""

import math
import re
from collections.abc import Mapping, Sequence

from lit_rec.run.headline import Comparison, Headline, claim, describe_difference, limit

VARIANTS = ("both", "kar")  # how the answer reaches the reranker: with the history's vector, or as KAR does
_FAMILIES = (
    "no_knowledge",
    "item_only",
    "history_only",
    "shuffled",
    "zero_shot",
    "best_of_n",
    "random_pairs",
    "hinted",
    "round",
)
_CONTROLS = ("no_knowledge", "item_only", "history_only", "shuffled")


def split_name(row: str) -> tuple[str, str]:
    """Split a row's name into its base and its variant.

    >>> split_name("round_2_both"), split_name("history_only")
    (('round_2', 'both'), ('history_only', ''))
    """
    for variant in VARIANTS:
        if row.endswith(f"_{variant}"):
            return row.removesuffix(f"_{variant}"), variant
    return row, ""


def family(row: str) -> str:
    """Return the kind of a row: `round` for `round_2_both`, `other` for what has no fixed place."""
    return next((name for name in _FAMILIES if row.startswith(name)), "other")


def round_number(row: str) -> int | None:
    """Return k of `round_k` (any variant), else None."""
    match = re.fullmatch(r"round_(\d+)", split_name(row)[0])
    return int(match[1]) if match else None


def row_order(row: str) -> tuple[int, int, str, int]:
    """Sort key: controls first, then the zero-shot LLM, then round after round; variants after their base."""
    base, variant = split_name(row)
    place = [*_FAMILIES, "other"].index(family(row))
    return place, round_number(row) or 0, base, VARIANTS.index(variant) + 1 if variant else 0


def wanted(row: str) -> Sequence[str]:
    """Return the rows that `row` must beat."""
    kind, (_, variant) = family(row), split_name(row)
    same = f"_{variant}" if variant else ""
    return {
        "no_knowledge": [],
        "item_only": ["no_knowledge"],
        "history_only": ["item_only"],
        "random_pairs": ["history_only", f"zero_shot{same}"],
        "best_of_n": ["history_only", f"zero_shot{same}"],
        "round": ["history_only", f"zero_shot{same}", f"random_pairs{same}"],
    }.get(kind, ["history_only"])


def sentences(mine: Sequence[Comparison], means: Mapping[str, float], name: str, headline: Headline) -> list[str]:
    """Did DPO help, by how much and how sure, and does any text beat the raw history?

    The last round is judged, never the best one: picking the best on test users would flatter it.
    """
    return _dpo_lines(mine, name, headline) + _text_lines(mine, name, headline)


def _dpo_lines(mine: Sequence[Comparison], reranker: str, headline: Headline) -> list[str]:
    lines = []
    last = max((round_number(c.row) or 0 for c in mine), default=0)
    for c in mine:
        if not last or round_number(c.row) != last:
            continue
        name = f"with {reranker}, {c.row} against {c.against} is"
        if family(c.against) == "zero_shot":
            words = ("DPO helped", "DPO hurt", "Whether DPO helps is not shown")
        elif family(c.against) == "random_pairs":
            words = (
                "The reward, not just more training, made the difference",
                "Pairs chosen by the reward did worse than random pairs",
                "Pairs chosen by the reward are not shown to be better than random pairs",
            )
        else:
            continue
        lines.append(f"{claim(c, words)}: {name} {describe_difference(c)} in {headline.full_label()}.{limit(c)}")
    return lines


def _text_lines(mine: Sequence[Comparison], reranker: str, headline: Headline) -> list[str]:
    texts = [c for c in mine if c.against == "history_only" and family(c.row) not in _CONTROLS]
    if not texts:
        return []
    name = f"with {reranker}: in {headline.full_label()}"
    winners = [c for c in texts if c.sure and c.difference.mean > 0]
    if winners:
        listed = "; ".join(f"{c.row} {describe_difference(c)}" for c in winners)
        return [f"Better than the raw history (history_only) {name}, {listed}."]
    known = [c for c in texts if math.isfinite(c.difference.mean)]
    if not known:
        return [f"No LLM text could be compared with the raw history (history_only) {name}."]
    best = max(known, key=lambda c: c.difference.mean)
    worse = sum(c.sure and c.difference.mean < 0 for c in texts)
    closing = f" {worse} of {len(texts)} are clearly worse than it." if worse else ""
    return [
        f"No LLM text is shown to beat the raw history (history_only) {name}, the nearest is {best.row}, "
        f"{describe_difference(best)}.{closing}"
    ]
