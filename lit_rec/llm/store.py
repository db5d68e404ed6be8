"""Every answer an LLM ever gave, kept by content: nothing is paid for twice, and a kill loses one batch at most."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from lit_rec.errors import UserError


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: What the LLM said, without special tokens.
        tokens: New tokens it took.
        finish: "stop" (the LLM ended) or "length" (it was cut).
    """

    text: str
    tokens: int
    finish: str


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


class AnswerStore:
    """An append-only JSON-lines file; one line is one batch, so a batch is there whole or not at all.

    Args:
        folder: Where `answers.jsonl` lives; made when missing.

    Raises:
        UserError: The file is damaged before its last line.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "answers.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(self.path) + ".lock")
        self._answers: dict[str, Answer] = {}
        self.generated = 0
        with self._lock:
            self._read()

    def _read(self) -> None:
        """Load every whole line; cut a last line that a kill left unfinished."""
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(raw[:whole].splitlines(), 1):
            try:
                batch = json.loads(line)
                self._answers.update((key, Answer(**fields)) for key, fields in batch.items())
            except (ValueError, TypeError, AttributeError) as error:
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

    def add(self, batch: Iterable[tuple[str, Answer]]) -> None:
        """Append one batch and have it on disk before returning."""
        answers = dict(batch)
        if not answers:
            return
        fields = {key: asdict(answer) for key, answer in answers.items()}
        line = json.dumps(fields, ensure_ascii=True).encode() + b"\n"
        with self._lock, self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._answers.update(answers)
        self.generated += len(answers)
