"""Tables as CSV and Parquet, read into the types of RecBole's atomic files."""

from collections.abc import Collection
from pathlib import Path

import polars as pl

from lit_rec.data.files import bad_row, csv_frame, read_bytes
from lit_rec.errors import UserError

TYPES = ("token", "token_seq", "float", "float_seq")


def read_csv(path: Path, separator: str = " ", *, numbers: Collection[str] = ()) -> pl.DataFrame:
    """Read a CSV file with a header; fields may be quoted, and empty lines are left out.

    Args:
        path: The file.
        separator: Between the values of a sequence.
        numbers: Columns that hold numbers. Others are text, unless their name in the header is followed by a type, as
            in `tags:token_seq`.

    Returns:
        token as String, token_seq as List[String], float as Float64, float_seq as List[Float64]; what is empty in a
        column of numbers is null.

    Raises:
        UserError: This is no CSV file, the header names a column twice or an unknown type, or a line is malformed.
    """
    text = csv_frame(path)
    names = [name.strip().partition(":") for name in text.columns]
    kinds = {name: kind or ("float" if name in numbers else "token") for name, _, kind in names}
    twice = len(kinds) < len(names) or any("_duplicated_" in name for name in kinds)  # polars renames them
    if twice or any(kind not in TYPES for kind in kinds.values()):
        raise bad_row(path, -1, ",".join(text.columns), "different names, each alone or like tags:token_seq")
    text.columns = list(kinds)
    return pl.DataFrame({name: typed(path, text[name].fill_null(""), kind, separator) for name, kind in kinds.items()})


def typed(path: Path, column: pl.Series, kind: str, separator: str) -> pl.Series:
    """A column of text as its type.

    Args:
        path: Of the file, for messages.
        column: String.
        kind: One of `TYPES`.
        separator: Between the values of a sequence.

    Raises:
        UserError: A value is no number; its line is named.
    """
    if kind == "token":
        return column
    if kind == "float":
        numbers = column.replace("", None).cast(pl.Float64, strict=False)
        bad = (numbers.is_null() & (column != "")).arg_true()
        if len(bad):
            raise bad_row(path, int(bad[0]), column[int(bad[0])], f"a number as {column.name}")
        return numbers
    parts = column.str.split(separator).list.eval(pl.element().filter(pl.element() != ""))
    if kind == "token_seq":
        return parts
    values = parts.list.eval(pl.element().cast(pl.Float64, strict=False))
    bad = values.list.eval(pl.element().is_null()).list.any().arg_true()
    if len(bad):
        raise bad_row(path, int(bad[0]), column[int(bad[0])], f"numbers as {column.name}")
    return values


def read_parquet(path: Path, *, ids: Collection[str] = (), numbers: Collection[str] = ()) -> pl.DataFrame:
    """Read a Parquet file; columns keep their types, as far as atomic files know them.

    Args:
        path: The file.
        ids: Columns that are ids: whole numbers among them become text.
        numbers: Columns that hold numbers: whole numbers become Float64.

    Raises:
        UserError: This is no Parquet file, or a column of ids holds fractions.
    """
    table = parquet_frame(path)
    columns = []
    for column in table:
        name, kind = column.name, column.dtype
        if isinstance(kind, pl.Array):
            column = column.arr.to_list()
            kind = column.dtype
        if name in numbers and kind.is_numeric():
            column = column.cast(pl.Float64)
        elif name in ids and kind.is_integer():
            column = column.cast(pl.String)
        elif name in ids and kind.is_float():
            raise UserError(
                f"column {name!r} holds {kind}, not ids", where=str(path), fix="write ids as whole numbers or as text"
            )
        elif kind in (pl.Categorical, pl.Enum):
            column = column.cast(pl.String)
        elif isinstance(kind, pl.List) and kind.inner in (pl.Categorical, pl.Enum, pl.String):
            column = column.cast(pl.List(pl.String))
        if column.dtype == pl.String and name not in ids:
            column = column.fill_null("")
        columns.append(column)
    return pl.DataFrame(columns)


def parquet_frame(path: Path) -> pl.DataFrame:
    """A Parquet file as it is.

    Raises:
        UserError: It cannot be read, or is no Parquet file.
    """
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        read_bytes(path)  # says which permission is missing, as polars does not
        raise UserError(
            "this Parquet file cannot be read",
            where=str(path),
            why=" ".join(str(error).split())[:200],
            fix="write it again",
        ) from error
