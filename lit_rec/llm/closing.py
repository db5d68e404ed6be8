"""What closes a title: the text behind it, in whatever tokens the LLM may write the two.

A tokenizer cuts texts at borders of its own. Behind "Alien (1979" SmolLM2 writes the bracket and the quote that closes
the title as one token, `)"` or `)",`: asked for `)` and then for `"`, it would deny nearly every title it means. So a
title is closed by every token that begins with its end, and by every one that begins with its last token and the end.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor


class Beginnings:
    """Sets of a vocabulary's tokens by what they begin with; each is looked for once.

    Texts are compared as the vocabulary writes them, byte for byte, so that halves of letters are told apart as well.

    Args:
        tokenizer: Of the language model. Special tokens are no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.token: dict[str, int] = tokenizer.get_vocab()
        self.text = {token: text for text, token in self.token.items()}
        special = set(tokenizer.all_special_ids)
        self._sorted = sorted((text, token) for text, token in self.token.items() if token not in special)
        self._number: dict[tuple[int, ...], int] = {}
        self.sets: list[Tensor] = []

    def tokens(self, text: str) -> list[int]:
        """Tokens that begin with a text."""
        start = bisect_left(self._sorted, (text, -1))
        return [token for _, token in takewhile(lambda one: one[0].startswith(text), self._sorted[start:])]

    def number(self, tokens: Sequence[int]) -> int:
        """Number of a set of tokens in `sets`."""
        key = tuple(sorted(set(tokens)))
        if key not in self._number:
            self._number[key] = len(self.sets)
            self.sets.append(torch.tensor(key))
        return self._number[key]


@dataclass
class Closing:
    """One text that closes titles.

    Args:
        known: The vocabulary.
        tokens: The text's own tokens, one at least. The first of them closes a title, even where the text is longer.
    """

    known: Beginnings
    tokens: Sequence[int]
    _merged: dict[int, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        words = [self.known.text[token] for token in self.tokens]
        self._first, self._whole = words[0], "".join(words)
        self.following = self.known.number([self.tokens[0], *self.known.tokens(self._whole)])

    def merged(self, last: int) -> int | None:
        """The set of tokens that begin with a title's last token and go on with its end; None: there are none."""
        if last not in self._merged:
            before = self.known.text[last]
            found = self.known.tokens(before + self._whole)
            if before + self._first in self.known.token:
                found.append(self.known.token[before + self._first])
            self._merged[last] = self.known.number(found) if found else None
        return self._merged[last]


def sum_logps(logits: Tensor, total: Tensor, sums: Tensor, sets: Sequence[Tensor]) -> Tensor:
    """Logs of the summed probabilities of sets of tokens.

    Args:
        logits: [nodes, vocabulary].
        total: [nodes] their logsumexp.
        sums: [n, 2] long: (node, number of a set), on the CPU.
        sets: The sets' tokens.

    Returns:
        [n] natural logs, on the logits' device.
    """
    found = total.new_empty(len(sums))
    for number in sums[:, 1].unique().tolist():
        here = (sums[:, 1] == number).nonzero().squeeze(1)
        node = sums[here, 0].to(logits.device)
        values = logits[node[:, None], sets[number].to(logits.device)].logsumexp(1)
        found[here.to(logits.device)] = values - total[node]
    return found
