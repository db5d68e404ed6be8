"""What is counted of texts, and of the rewards they get."""

from collections.abc import Sequence

import polars as pl


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words divided by all n-grams over the texts: low when a policy collapses to a few phrases.

    >>> distinct_n(["a b c", "a b d"], 2)
    0.75
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def within_user_correlation(table: pl.DataFrame, a: str, b: str, *, user: Sequence[str] = ("user",)) -> float | None:
    """Pearson correlation of two columns after each user's mean is taken off: does the reward pay for length?

    Args:
        table: One line per answer.
        a: A column of numbers.
        b: Another.
        user: The columns that tell whose answer it is, where a user counts anew in every run or split.

    Returns:
        None where it is not defined: fewer than three answers, or one of the columns never differs within a user.
    """
    # As float64 before the mean: that of equal float32 values can be another value than theirs.
    values = [pl.col(column).cast(pl.Float64) for column in (a, b)]
    centred = table.select(value - value.mean().over(*user) for value in values)
    if len(centred) < 3 or not centred[a].std() or not centred[b].std():
        return None
    return float(centred.select(pl.corr(a, b)).item())
