"""Vectors that runs share: what one has encoded, another reads."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_rec import distributed
from lit_rec.knowledge.encoder import TextEncoder
from lit_rec.run.folder import publish

LEAST = 64  # texts; fewer are encoded sooner than they are found


class SharedVectors:
    """Encodes with a `TextEncoder`, and keeps whole requests in a folder that several runs use.

    Whole requests, not texts: the last digits of a vector depend on the batch it was in, and a run has to come out the
    same whether it finds something or not. The encoder is only loaded when something is missing.

    Args:
        folder: Where requests are kept; None: nowhere.
        key: Identity of the encoder: whatever its vectors depend on.
        load: Makes the encoder.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any], load: Callable[[], TextEncoder]) -> None:
        self.folder, self.key, self._load = folder, dict(key), load
        self._encoder: TextEncoder | None = None

    @property
    def encoder(self) -> TextEncoder:
        """The encoder itself."""
        if self._encoder is None:
            self._encoder = self._load()
        return self._encoder

    def encode(
        self, texts: Sequence[str], *, cut: bool = False, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """[len(texts), width] vectors, as `TextEncoder.encode` makes them."""
        if self.folder is None or len(texts) < LEAST:
            return self.encoder.encode(texts, cut=cut, progress=progress)
        content = json.dumps([self.key, cut, list(texts)], sort_keys=True)
        file = self.folder / f"{hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()}.safetensors"
        found = distributed.agreed(_read(file))
        if found is None:
            found = self.encoder.encode(texts, cut=cut, progress=progress)
            if distributed.main():
                self.folder.mkdir(parents=True, exist_ok=True)
                work = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                save_file({"vectors": found.contiguous()}, work)
                publish(work, file)
        return found


def _read(file: Path) -> Tensor | None:
    """What is kept there; None where nothing is, or it is damaged: it is made anew, and put in its place."""
    try:
        return load_file(file)["vectors"]
    except (OSError, SafetensorError, KeyError):
        return None
