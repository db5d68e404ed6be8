"""Sessions somebody else has built, as JSON lines, and the items they speak of."""

import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lit_rec.data.canonical import need_file, stat_of
from lit_rec.data.session_sets import (
    ItemSource,
    ItemTable,
    Parts,
    SessionData,
    Sessions,
    assemble,
    check_choices,
    check_least,
    check_source,
    few_of,
    part_size,
)
from lit_rec.errors import UserError
from lit_rec.texts import whole_text


class TitleFile:
    """Items of which only the title is known: a JSON object {"id": "title"}.

    Args:
        path: The file.
        item_noun: What an item is called.
        verb: What is done with one, past tense.
    """

    def __init__(self, *, path: str, item_noun: str = "item", verb: str = "selected") -> None:
        self.path, self.item_noun, self.verb = Path(path).expanduser(), item_noun, verb

    def describe(self) -> dict[str, Any]:
        """What identifies the source, and the words that prompts say of it."""
        return {**stat_of(self._file()), "item_noun": self.item_noun, "verb": self.verb}

    def _file(self) -> Path:
        return need_file(self.path, "the titles", 'name the file {"id": "title", ...} in data.items.path')

    def load(self) -> ItemTable:
        """Read the file.

        Raises:
            UserError: It is missing or no such object, or an item has no title.
        """
        path = self._file()
        try:
            # Pairs, so that an id that stands there twice does not silently become one.
            pairs = json.loads(path.read_bytes(), object_pairs_hook=tuple)
        except (ValueError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(
                "this is not JSON", where=f"{path}{line}", why=str(error), fix='write {"id": "title", ...}'
            ) from error
        if not isinstance(pairs, tuple) or not pairs:
            raise UserError("this is no JSON object with titles", where=str(path), fix='write {"id": "title", ...}')
        titles = [" ".join(whole_text(title).split()) if isinstance(title, str) else "" for _, title in pairs]
        if "" in titles:
            raise UserError(
                f"item {pairs[titles.index('')][0]!r} has no title",
                where=str(path),
                why=f"{titles.count('')} such items",
                fix="give every item a title",
            )
        return ItemTable(
            pl.DataFrame({"item_id": [whole_text(i) for i, _ in pairs], "title": titles}), (), self.item_noun, self.verb
        )


class _Bad(Exception):
    """A line that holds no usable session."""

    def __init__(self, reason: str, why: str) -> None:
        self.reason, self.why = reason, why


@dataclass
class _File:
    """Usable sessions of one file: item rows of every session with its target last, and its candidates."""

    sessions: list[list[int]] = field(default_factory=list)
    candidates: list[list[int]] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    repeated: int = 0


def _session(line: bytes, row_of: dict[str, int]) -> tuple[list[int], list[int], int]:
    """Session with its target last, candidates without repeats, number of repeats."""
    try:
        found = json.loads(line)
        told, target, shown = found["session"], found["target"], found["candidates"]
        if not (isinstance(told, list) and isinstance(shown, list)):
            raise TypeError
        if any(isinstance(i, bool) or not isinstance(i, (int, str)) for i in (*told, target, *shown)):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        expected = 'expected {"session": [ids], "target": id, "candidates": [ids]}, ids as numbers or text'
        raise _Bad("malformed", expected) from None
    unknown = [str(i) for i in (*told, target, *shown) if str(i) not in row_of]
    if unknown:
        raise _Bad("unknown_item", f"item {unknown[0]} is not described")
    session, candidates = [row_of[str(i)] for i in told], list(dict.fromkeys(row_of[str(i)] for i in shown))
    wanted = row_of[str(target)]
    if not session:
        raise _Bad("empty_session", "nothing comes before the target")
    if len(candidates) < 2:
        raise _Bad("too_few_candidates", "there must be two or more different candidates")
    if wanted not in candidates:
        raise _Bad("target_not_among_candidates", f"target {target} is not among the candidates")
    if wanted in session:
        raise _Bad("target_in_session", f"target {target} stands in the session, which gives it away")
    return [*session, wanted], candidates, len(shown) - len(candidates)


class SessionFiles:
    """Sessions as JSON lines: {"session": [ids], "target": id, "candidates": [ids]}, in the order they are shown.

    Ids are numbers or text and are matched with the items' ids, never by title. A line is bad when it is malformed,
    names an item that is not described, has no session, fewer than two different candidates, no target among them, or
    its target in the session too (negatives are not, so that it would be given away). An item that comes twice among
    the candidates is shown once, where it came first; one that comes twice in the session stays, as it happened twice.
    Both things, and what `overlap` drops, are counted in the report and told in one warning.

    Args:
        root: Folder of the files.
        items: A reader of the items. Those no session speaks of are left out.
        train: File of the training sessions.
        test: File of the test sessions; or their share or number, taken from the training file.
        validation: Share of the sessions of the part that `validation_from` names, or their number, or a file.
        validation_from: "train", or "test": the test sessions are then the others.
        few_shot: Training sessions, drawn at random; None: all of them. The others serve `sequences`.
        on_bad: "refuse": a bad line is an error; "skip": it is left out. A file of bad lines alone is always an error.
        overlap: "drop": training sessions that are validation or test sessions too are left out, and so are
            validation sessions that are test sessions; "keep".
        name: Of the data set; None: the folder's.
        item_noun: What an item is called; None: as the items' reader says.
        verb: What is done with an item, past tense; None: as the items' reader says.
        max_history: Longest history; of longer ones the last items stay.
        seed: Of everything random.
    """

    CHOICES = {"on_bad": ("refuse", "skip"), "overlap": ("drop", "keep"), "validation_from": ("train", "test")}

    def __init__(
        self,
        *,
        root: str,
        items: ItemSource,
        train: str = "train.jsonl",
        test: str | float = "test.jsonl",
        validation: str | float = 0.2,
        validation_from: str = "train",
        few_shot: int | None = None,
        on_bad: str = "refuse",
        overlap: str = "drop",
        name: str | None = None,
        item_noun: str | None = None,
        verb: str | None = None,
        max_history: int = 20,
        seed: int = 0,
    ) -> None:
        self.root, self.items = Path(root).expanduser(), items
        self.train, self.test, self.validation, self.validation_from = train, test, validation, validation_from
        self.few_shot, self.on_bad, self.overlap = few_shot, on_bad, overlap
        self.name, self.item_noun, self.verb = name or self.root.resolve().name, item_noun, verb
        self.max_history, self.seed = max_history, seed
        check_source(items, "items")
        check_choices(vars(self), self.CHOICES)
        check_least(vars(self), {"max_history": 1, "seed": 0})

    def _paths(self) -> dict[str, Path]:
        named = {part: getattr(self, part) for part in ("train", "validation", "test")}
        fix = "data.root names the folder; data.train, data.validation and data.test the files"
        return {
            part: need_file(self.root / name, f"the {part} sessions", fix)
            for part, name in named.items()
            if isinstance(name, str)
        }

    def describe(self) -> dict[str, Any]:
        """What identifies the source."""
        options = {k: v for k, v in vars(self).items() if k not in ("root", "items")}
        files = [stat_of(path) for path in self._paths().values()]
        return {"name": self.name, "files": files, "items": self.items.describe(), **options}

    def load(self) -> SessionData:
        """Read the files.

        Raises:
            UserError: A file is missing, a line is bad and on_bad is refuse, or a part would be empty.
        """
        table = self.items.load()
        twice = table.items.filter(table.items["item_id"].is_duplicated())["item_id"]
        if len(twice):
            raise UserError(
                f"item {twice[0]!r} is described more than once",
                where="config key data.items",
                why=f"so are {twice.n_unique() - 1} others",
                fix="keep one description per item",
            )
        row_of = {item: row for row, item in enumerate(table.items["item_id"].to_list())}
        files = {part: self._read(path, row_of) for part, path in self._paths().items()}
        told = [session for file in files.values() for session in file.sessions]
        shown = [candidates for file in files.values() for candidates in file.candidates]
        rng = np.random.default_rng(self.seed)
        parts, dropped = self._drop_overlap(self._parts(files, rng), told)
        few = few_of(parts["train"], self.few_shot, rng)
        chosen = Parts(parts["train"], few, parts["validation"], parts["test"])
        report = self._report(files, dropped)

        length = np.array([len(session) for session in told])
        used, flat = np.unique(np.concatenate([*told, *shown]), return_inverse=True)
        flat += 1  # item rows; 0 is padding
        n = int(length.sum())
        sessions = Sessions(flat[:n], np.zeros(n, dtype=np.float32), length)
        candidates = np.zeros((len(shown), max(map(len, shown))), dtype=np.int64)
        counts = np.array([len(row) for row in shown])
        candidates[np.arange(candidates.shape[1]) < counts[:, None]] = flat[n:]
        lists, splits, sequences = assemble(sessions, chosen, candidates[chosen.listed], self.max_history, report)
        padding = pl.DataFrame({"item_id": [""], "title": [""]})
        items = pl.concat([padding, table.items[used.tolist()]], how="diagonal").with_columns(
            *(pl.col(a).fill_null([]) for a in table.attributes)
        )
        noun, verb = self.item_noun or table.item_noun, self.verb or table.verb
        return SessionData(self.name, items, table.attributes, noun, verb, lists, splits, sequences, report)

    def _read(self, path: Path, row_of: dict[str, int]) -> _File:
        file = _File()
        for number, line in enumerate(path.read_bytes().rstrip().split(b"\n"), 1):
            file.lines += 1
            try:
                session, candidates, repeated = _session(line, row_of)
            except _Bad as bad:
                if self.on_bad == "refuse":
                    raise UserError(
                        f"bad session ({bad.reason.replace('_', ' ')})",
                        where=f"{path}:{number}",
                        why=bad.why,
                        fix="correct or remove the line, or leave such lines out with data.on_bad=skip",
                    ) from None
                file.bad[bad.reason] += 1
                continue
            file.sessions.append(session)
            file.candidates.append(candidates)
            file.repeated += repeated
        if not file.sessions:
            raise UserError(
                f"all {file.lines} lines are bad",
                where=str(path),
                why=", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in file.bad.items()),
                fix="check that the sessions and the items belong together",
            )
        return file

    def _parts(self, files: dict[str, _File], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Session numbers of each part, in order of the files."""
        parts, at = {}, 0
        for part, file in files.items():
            parts[part] = np.arange(at, at + len(file.sessions))
            at += len(file.sessions)
        for part, source in (("test", "train"), ("validation", self.validation_from)):
            value = getattr(self, part)
            if isinstance(value, str):
                continue
            count = part_size(value, len(parts[source]), part)
            shuffled = rng.permutation(parts[source])
            parts[part], parts[source] = np.sort(shuffled[:count]), np.sort(shuffled[count:])
        return parts

    def _drop_overlap(
        self, parts: dict[str, np.ndarray], told: list[list[int]]
    ) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Leave out sessions that a later part holds too; how many there are in each part."""
        held_out: set[tuple[int, ...]] = set()
        found = {}
        for part in ("test", "validation", "train"):
            mine = [tuple(told[s]) for s in parts[part]]
            new = np.array([session not in held_out for session in mine], dtype=bool)
            held_out.update(mine)
            found[part] = int((~new).sum())
            if self.overlap == "drop":
                parts[part] = parts[part][new]
        if not len(parts["train"]):
            raise UserError(
                "every training session is a validation or test session too",
                where="config key data.train",
                fix="name other files, or set data.overlap=keep",
            )
        return parts, {part: n for part, n in found.items() if n}

    def _report(self, files: dict[str, _File], overlap: dict[str, int]) -> dict[str, Any]:
        """Counts of what was read; what is unusual is told once."""
        bad = sum((file.bad for file in files.values()), Counter())
        repeated = sum(file.repeated for file in files.values())
        kept = "left out" if self.overlap == "drop" else "kept"
        told = [f"{n} bad lines left out ({reason.replace('_', ' ')})" for reason, n in bad.items()]
        told += [f"{repeated} repeated candidates shown once"] * bool(repeated)
        told += [f"{n} {part} sessions that a later part holds too {kept}" for part, n in overlap.items()]
        if told:
            warnings.warn(f"sessions of {self.name}: {'; '.join(told)}", stacklevel=3)
        return {
            "sessions_read": sum(file.lines for file in files.values()),
            "refused": dict(bad),
            "repeated_candidates_dropped": repeated,
            f"overlap_{self.overlap}": overlap,
        }
