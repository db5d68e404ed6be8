"""Titles as a tree of tokens: what they begin with alike is there, and worked through, once."""

from collections.abc import Sequence

import numpy as np
import torch

from lit_rec.llm.closing import Closing


class TitleTree:
    """The tokens of several titles as a tree; its root, node 0, is the last token of the prompt.

    Args:
        titles: Tokens of each title.
        closing: The text that closes titles; None: nothing, or a token that the titles hold already.

    Attributes:
        tokens: [nodes] token of each node; where nothing closes titles, leaves are left out: nothing is asked of them.
        parent: [nodes] number of the node before it; parents come before children.
        depth: [nodes] tokens from the root.
        steps: [steps, 2] (node, token): at `node` the LLM goes on with `token`.
        paths: For every title the numbers of its steps.
        sums: [sums, 2] (node, set of tokens): at `node` the LLM goes on with any of them.
        ends: For every title, where titles are closed: the sum behind it, and the one that stands for its last token
            and the end written as one, or None.
    """

    def __init__(self, titles: Sequence[Sequence[int]], closing: Closing | None = None) -> None:
        self.tokens, self.parent, self.depth = [-1], [-1], [0]
        nodes: dict[tuple[int, int], int] = {}
        steps: dict[tuple[int, int], int] = {}
        sums: dict[tuple[int, int], int] = {}
        self.paths: list[list[int]] = []
        self.ends: list[tuple[int, int | None]] = []
        for title in titles:
            node, path, merged = 0, [], None
            for place, token in enumerate(title):
                path.append(steps.setdefault((node, token), len(steps)))
                if place + 1 == len(title):
                    if closing is None:
                        break
                    if (number := closing.merged(token)) is not None:
                        merged = sums.setdefault((node, number), len(sums))
                node = self._node(nodes, node, token)
            self.paths.append(path)
            if closing is not None:
                self.ends.append((sums.setdefault((node, closing.following), len(sums)), merged))
        self.steps = torch.tensor(list(steps), dtype=torch.long).reshape(-1, 2)
        self.sums = torch.tensor(list(sums), dtype=torch.long).reshape(-1, 2)
        self.sees = torch.eye(len(self.tokens), dtype=torch.bool)  # [nodes, nodes]: itself and its ancestors
        for node in range(1, len(self.tokens)):
            self.sees[node] |= self.sees[self.parent[node]]

    def _node(self, nodes: dict[tuple[int, int], int], parent: int, token: int) -> int:
        """The node of a token behind another."""
        if (parent, token) not in nodes:
            nodes[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parent.append(parent)
            self.depth.append(self.depth[parent] + 1)
        return nodes[parent, token]

    def logps(self, steps: Sequence[float], sums: Sequence[float]) -> list[float]:
        """The titles' log-likelihoods from those of the steps and sums."""
        whole = [sum(steps[s] for s in path) for path in self.paths]
        for n, (behind, merged) in enumerate(self.ends):
            whole[n] += sums[behind]
            if merged is not None:
                whole[n] = float(np.logaddexp(whole[n], sum(steps[s] for s in self.paths[n][:-1]) + sums[merged]))
        return whole

    @property
    def lengths(self) -> list[int]:
        """Tokens of every title; its end, which may be a part of the last, is one."""
        return [len(path) + bool(self.ends) for path in self.paths]
