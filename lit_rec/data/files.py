"""Text files as they lie on a disk: strictly UTF-8, and with lines that a person finds again."""

import codecs
import contextlib
import csv
import functools
import io
from array import array
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from lit_rec.errors import UserError

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
LONGEST_FIELD = 2**31 - 1


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        UserError: It cannot be read: a permission, a broken disk.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path.name} cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            fix="allow yourself to read this file",
        ) from error


def utf8(path: Path) -> bytes:
    """A text file's bytes, which are UTF-8, without a byte order mark.

    Raises:
        UserError: It cannot be read, or is not UTF-8: bytes replaced by guesses would make one user of two.
    """
    raw = read_bytes(path)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in raw[:2]:
        raise UserError("this file is UTF-16, not UTF-8", where=f"{path}:1", fix="save it as UTF-8")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            "this file is not UTF-8",
            where=f"{path}:{line}",
            why=f"byte 0x{raw[error.start]:02x} in {raw[max(error.start - 20, 0) : error.start + 20]!r}",
            fix="save it as UTF-8",
        ) from None
    return raw


def csv_frame(path: Path) -> pl.DataFrame:
    """A CSV file with a header, every column as text; records that hold nothing are left out.

    Raises:
        UserError: It cannot be read, is not UTF-8, is split by something else than commas, or a record has too many
            fields or an open quote; the line is named.
    """
    raw = utf8(path).lstrip(b"\r\n")
    _check_separator(path, raw.partition(b"\n")[0].decode())
    try:
        table = pl.read_csv(raw, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        where, why = _fault(path)
        raise UserError(
            "this CSV file cannot be read",
            where=where,
            why=why or "it is empty",
            fix="write a header and lines with as many fields, split by commas; quote texts that hold commas",
        ) from error
    empty = table.select(pl.all_horizontal(pl.all().fill_null("") == "").alias("e"))["e"]
    return table.filter(~empty) if empty.any() else table


def _records(path: Path, *, strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The line that each record of a CSV file begins in, and its fields; records that hold nothing are left out."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(utf8(path).decode(), newline=""), strict=strict)
    line = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _Broken(line + 1) from error
        if any(fields):
            yield line + 1, fields
        line = reader.line_num


class _Broken(Exception):
    """The record that begins in a line has no end."""

    def __init__(self, line: int) -> None:
        self.line = line


def _check_separator(path: Path, header: str) -> None:
    """Refuse a header that other marks than commas split."""
    found = [name for mark, name in SEPARATORS.items() if mark in header and "," not in header]
    if found:
        raise UserError(
            f"the columns are split by {found[0]}, not by commas",
            where=place(path, -1),
            why=f"the header is {header[:100]!r}",
            fix="save the file as CSV with commas, and points in its numbers",
        )


def _fault(path: Path) -> tuple[str, str]:
    """Where and why a CSV file cannot be read: the first record with too many fields, or without an end."""
    wanted = 0
    try:
        for line, fields in _records(path, strict=True):
            wanted = wanted or len(fields)
            if len(fields) > wanted:
                return f"{path}:{line}", f"{len(fields)} fields, and the header has {wanted}"
    except _Broken as broken:
        return f"{path}:{broken.line}", "a quote is opened and never closed, or not followed by a comma"
    return str(path), "" if not wanted else "its quotes and commas do not fit together"


def csv_line(path: Path, row: int) -> int:
    """The line of a CSV file that a row of its table, from 0, begins in; -1 is the header."""
    found = path.stat()
    lines = _lines(path, found.st_mtime_ns, found.st_size)
    return lines[row + 1] if row + 1 < len(lines) else row + 2


@functools.lru_cache(maxsize=4)
def _lines(path: Path, modified: int, size: int) -> "array[int]":
    """Of the header and every row; read again when the file has changed."""
    lines = array("q")
    with contextlib.suppress(_Broken):  # what polars takes for whole
        lines.extend(line for line, _ in _records(path))
    return lines


def place(path: Path, row: int) -> str:
    """How a person finds a row of a table, counted from 0: a line of a text file stands below a header."""
    if path.suffix == ".parquet":
        return f"{path}, row {row + 1}"
    return f"{path}:{csv_line(path, row) if path.suffix == '.csv' else row + 2}"


def bad_row(path: Path, row: int, shown: str, expected: str) -> UserError:
    """The error for a row of a table, from 0, that is not as the format says."""
    text = shown if len(shown) <= 120 else shown[:117] + "..."
    return UserError(
        f"malformed {'row' if path.suffix == '.parquet' else 'line'}: {text!r}",
        where=place(path, row),
        why=f"expected {expected}",
        fix="correct or remove it",
    )
