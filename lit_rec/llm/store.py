"""Every answer an LLM ever gave, kept by content: nothing is paid for twice, and a kill loses one batch at most."""

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from lit_rec import distributed
from lit_rec.errors import FULL, UserError
from lit_rec.run.folder import sync
from lit_rec.texts import whole_text

BLOCK = 1 << 16  # bytes read at a time while looking for the last newline


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: What the LLM said, without special tokens; half a surrogate pair, which nobody can write, becomes U+FFFD.
        tokens: New tokens it took.
        finish: "stop" (the LLM ended) or "length" (it was cut).
    """

    text: str
    tokens: int
    finish: str

    def __post_init__(self) -> None:
        if isinstance(self.text, str):
            object.__setattr__(self, "text", whole_text(self.text))


def answer_key(model: str, prompt: Sequence[Mapping[str, str]], settings: Mapping[str, Any], sample: int) -> str:
    """The content key of an answer.

    Args:
        model: Fingerprint of the weights and of the adapter.
        prompt: Chat messages.
        settings: Everything that shapes the distribution the answer is drawn from, seed included.
        sample: Number of the sample among those drawn for this prompt.
    """
    content = json.dumps([model, list(prompt), dict(settings), sample], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def checksum(key: str, answer: Answer) -> int:
    """What tells an answer from one that a damaged disk has changed."""
    content = f"{key}\0{answer.tokens}\0{answer.finish}\0{answer.text}"
    return zlib.crc32(content.encode("utf-8", "surrogatepass"))


def _answers(line: bytes) -> dict[str, Answer]:
    """The batch of a line.

    Raises:
        ValueError: It holds none, or not the one that was written.
    """
    found = {}
    for key, fields in json.loads(line).items():
        told = fields.pop("crc32", None)  # absent from what the first versions wrote
        answer = Answer(**fields)
        if not (isinstance(answer.text, str) and isinstance(answer.finish, str) and type(answer.tokens) is int):
            raise ValueError("an answer is a text, a number of tokens and how it ended")
        if told is not None and told != checksum(key, answer):
            raise ValueError(f"the checksum of answer {key[:12]} is wrong")
        found[key] = answer
    return found


def _whole_lines(file: BinaryIO) -> int:
    """Length of the file up to its last newline: another run may have been killed while it wrote."""
    end = start = file.seek(0, os.SEEK_END)
    while start > 0:
        start = max(0, end - BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class AnswerStore:
    """An append-only JSON-lines file; one line is one batch, so a batch is there whole or not at all.

    Args:
        folder: Where `answers.jsonl` lives; made when missing.

    Raises:
        UserError: The folder cannot be written, or the file is damaged before its last line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "answers.jsonl"
        self._lock = FileLock(str(self.path) + ".lock")
        self._answers: dict[str, Answer] = {}
        self.generated = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
            sync(self.path.parent)
            with self._lock:
                self._read()
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            if getattr(error, "errno", None) in FULL:
                raise
            raise UserError(
                f"cannot write to {folder}",
                where="config key run.answers",
                why=str(error),
                fix="choose a folder you may write to",
            ) from error

    def _read(self) -> None:
        """Load every whole line; cut a last line that a kill left unfinished."""
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(raw[:whole].split(b"\n")[:-1], 1):
            try:
                self._answers.update(_answers(line))
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    "the answer store is damaged",
                    where=f"{self.path}:{number}",
                    why=str(error)[:200],
                    fix="delete that line; its answers are generated again",
                ) from error

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def lacking(self, keys: Iterable[str]) -> set[str]:
        """Which of these answers are not there, as all processes agree.

        They read the file one after the other, and another run may have written to it meanwhile: process 0 says what is
        lacking, and tells the others what it has and they have not.
        """
        wanted = set(keys)
        found = distributed.agreed({key for key in wanted if key not in self})
        if distributed.size() > 1:
            unknown = set[str]().union(*distributed.gathered({key for key in wanted - found if key not in self}))
            self.learn(distributed.agreed({key: self[key] for key in unknown} if distributed.main() else {}))
        return found

    def learn(self, answers: Mapping[str, Answer]) -> None:
        """Know answers that another process of the run has put on disk."""
        self._answers.update(answers)

    def add(self, batch: Iterable[tuple[str, Answer]]) -> None:
        """Append one batch and have it on disk before returning."""
        answers = dict(batch)
        if not answers:
            return
        fields = {key: {**asdict(answer), "crc32": checksum(key, answer)} for key, answer in answers.items()}
        line = json.dumps(fields, ensure_ascii=True).encode() + b"\n"
        with self._lock, self.path.open("r+b", buffering=0) as file:
            size = _whole_lines(file)
            file.truncate(size)
            try:
                file.seek(size)
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
        self._answers.update(answers)
        self.generated += len(answers)
