"""Columns of anybody's tables as the types that readers work with: texts, lists of texts, and seconds."""

from datetime import UTC, datetime

import polars as pl

from lit_rec.errors import UserError

TIMES = "seconds since 1970, or times like 2024-05-31 18:20:00"
LATEST = 95_617_584_000  # seconds from 1970 to 5000
EARLIEST = 31_536_000  # seconds from 1970 to 1971
LONGEST = 2.0**62  # seconds, far behind every clock; what is beyond fits into no whole number


def moment(text: str) -> float | None:
    """Seconds since 1970 of a date and time as ISO 8601 writes it; None: it is none.

    >>> moment("1970-01-02"), moment("1970-01-01 02:00:30+02:00"), moment("yesterday")
    (86400.0, 30.0, None)
    """
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def day(clock: pl.Expr, time_zone: str) -> pl.Expr:
    """The calendar date of seconds since 1970, whole or not, in a time zone (an IANA name)."""
    whole = pl.from_epoch(clock.floor().cast(pl.Int64))
    return whole.dt.replace_time_zone("UTC").dt.convert_time_zone(time_zone).dt.date()


def seconds(column: pl.Series, where: str) -> pl.Series:
    """A column of times as seconds since 1970, with their fractions.

    Args:
        column: Numbers, moments, or text that holds either.
        where: Of the table, for messages.

    Returns:
        Float64; null where there is no time, or none that can be read.

    Raises:
        UserError: The column holds something else, or its numbers are dates written without marks, as in 20240531.
    """
    kind, name = column.dtype, column.name
    if kind in (pl.Date, pl.Datetime):
        return column.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    if kind in (pl.Categorical, pl.Enum):
        column = column.cast(pl.String)
    if column.dtype != pl.String and not kind.is_numeric() and kind != pl.Null:
        raise wrong_type(column, where, f"write {TIMES}")
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        found = text.replace("", None).cast(pl.Float64, strict=False)
        known = {one: moment(one) for one in text.filter(found.is_null() & text.is_not_null()).unique()}
        dates = text.replace_strict(known, default=None, return_dtype=pl.Float64)
    else:
        found = column.cast(pl.Float64, strict=False)
        dates = None
    if _dates_without_marks(found):
        first = int(found.drop_nulls()[0])
        raise UserError(
            f"column {name!r} holds dates like {first}, which would be seconds in 1970",
            where=where,
            why="all its numbers read as a year, a month and a day",
            fix=f"write {str(first)[:4]}-{str(first)[4:6]}-{str(first)[6:]}, or seconds since 1970",
        )
    return (found if dates is None else found.fill_null(dates)).alias(name)


def _dates_without_marks(numbers: pl.Series) -> bool:
    """Whether all numbers, of which there is one, read as 20240531."""
    told = numbers.drop_nulls()
    if told.is_empty() or not told.is_between(19_000_101, 21_001_231).all() or (told != told.floor()).any():
        return False
    return bool(told.unique().cast(pl.Int64).cast(pl.String).str.to_date("%Y%m%d", strict=False).is_not_null().all())


def texts(column: pl.Series, where: str) -> pl.Series:
    """A column of single values as text; whole numbers have no point.

    Raises:
        UserError: It holds lists or the like.
    """
    kind = column.dtype
    if kind == pl.String:
        return column
    if kind.is_nested() or kind in (pl.Duration, pl.Binary, pl.Object):
        raise wrong_type(column, where, "write text or numbers, one value in a row")
    if kind.is_float():
        whole = column.is_finite() & (column == column.floor()) & (column.abs() < 1e15)
        numbers = column.to_frame("v").select(
            pl.when(whole)
            .then(pl.col("v").cast(pl.Int64, strict=False).cast(pl.String))
            .otherwise(pl.when(pl.col("v").is_finite()).then(pl.col("v").cast(pl.String)))
        )
        return numbers.to_series().alias(column.name)
    return column.cast(pl.String)


def text_lists(column: pl.Series, where: str) -> pl.Series:
    """A column of values, or of lists of them, as List[String]; nothing is the empty list.

    Raises:
        UserError: It holds something else.
    """
    if isinstance(column.dtype, pl.List):
        inner = column.dtype.inner
        if inner.is_nested() or inner in (pl.Duration, pl.Binary, pl.Object):
            raise wrong_type(column, where, "write lists of texts")
        return column.cast(pl.List(pl.String)).list.drop_nulls().fill_null([])
    value = pl.col("v")
    return (
        texts(column, where)
        .to_frame("v")
        .select(
            pl.when((value == "") | value.is_null())
            .then(pl.lit([], pl.List(pl.String)))
            .otherwise(pl.concat_list(value))
            .alias(column.name)
        )
        .to_series()
    )


def wrong_type(column: pl.Series, where: str, fix: str) -> UserError:
    """The error for a column that cannot be what it is named for."""
    return UserError(f"column {column.name!r} holds {column.dtype}", where=where, fix=fix)
