"""The policy network: how well a hint suits a session, from the two texts' embeddings."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_rec.errors import UserError

NEVER = -1e9  # logit of what cannot be chosen: its probability is exactly 0, and 0 * log 0 stays a number
BLOCK = 64  # hints scored at a time


def mlp(inputs: int, hidden: int, outputs: int, *, gain: float) -> nn.Sequential:
    """Two tanh layers and a linear one, orthogonal weights, zero biases (METHODS 2.2).

    Args:
        inputs: width of the input.
        hidden: width of both hidden layers.
        outputs: width of the output.
        gain: of the last layer; small for a policy that starts near uniform.
    """
    layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)]
    for layer, g in zip(layers, (math.sqrt(2), math.sqrt(2), gain), strict=True):
        nn.init.orthogonal_(layer.weight, g)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Centring(nn.Module):
    """Takes from text embeddings what all of them share.

    Embeddings of texts of one kind point into nearly one direction: their common mean is most of each vector, and
    what tells them apart is small beside it. The mean is fitted once and kept, so that a vector means the same for
    ever after; each row is then scaled to length sqrt(d), whatever the encoder's scale.

    Args:
        dim: d, width of the vectors.
    """

    mean: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))

    def fit(self, vectors: Tensor) -> None:
        """Take the mean of these vectors [N, d]; of a single one nothing can be told, and none is taken."""
        if len(vectors) > 1:
            self.mean.copy_(vectors.mean(0))

    def forward(self, vectors: Tensor) -> Tensor:
        """Centre and scale [N, d]; a vector equal to the mean becomes zero."""
        return F.normalize(vectors - self.mean, dim=-1) * math.sqrt(vectors.shape[-1])


class HintPolicy(nn.Module):
    """pi(hint | session), for a base of hints that may grow (METHODS 2.6).

    With x the session's state and h a hint's embedding, both centred, a hint's logit is

        q(x) . k(h) / sqrt(rank)  +  affinity * (x . h) / d  +  bias . h / sqrt(d)

    with q a tanh tower, k linear. The first term learns which hints suit which sessions; the second says, with one
    number, whether hints work best for the sessions they resemble; the third how good a hint is for everybody. A new
    hint is scored by its own embedding with what was learnt from the others, and does not touch the others' logits.
    "No hint", action 0, has no text: its k and bias are learnt. All starts near zero, so the first policy is near
    uniform.

    Args:
        dim: d, width of the embeddings.
        hidden: width of the tower's two layers.
        rank: width of q and k.
    """

    hints: Tensor
    alive: Tensor

    def __init__(self, dim: int, *, hidden: int = 64, rank: int = 32) -> None:
        super().__init__()
        self.shape = {"dim": dim, "hidden": hidden, "rank": rank}
        self.rank = rank
        self.center_states, self.center_hints = Centring(dim), Centring(dim)
        self.query = mlp(dim, hidden, rank, gain=0.01)
        self.key = nn.Linear(dim, rank, bias=False)
        nn.init.orthogonal_(self.key.weight)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.affinity = nn.Parameter(torch.zeros(()))
        self.no_hint_key = nn.Parameter(torch.randn(rank))
        self.no_hint_bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("hints", torch.zeros(0, dim))
        self.register_buffer("alive", torch.zeros(0, dtype=torch.bool))

    @property
    def n_actions(self) -> int:
        """Actions, "no hint" included, whether alive or not."""
        return len(self.hints) + 1

    def has_base(self, vectors: Tensor, alive: Tensor) -> bool:
        """Whether the present base is this one: vectors [A, d], alive [A]."""
        return torch.equal(vectors.to(self.hints), self.hints) and torch.equal(alive.to(self.alive), self.alive)

    def set_hints(self, vectors: Tensor, alive: Tensor) -> None:
        """Replace the base by a later one, in which every hint keeps its row.

        Args:
            vectors: [A, d] embeddings of all hints; the first rows are those of the present base.
            alive: [A] bool, False for hints that must not be chosen.

        Raises:
            ValueError: when a present hint is missing or has another embedding, or the shapes do not fit.
        """
        vectors, alive = vectors.to(self.hints), alive.to(self.alive)
        known = len(self.hints)
        if vectors.ndim != 2 or vectors.shape[1] != self.shape["dim"] or alive.shape != vectors.shape[:1]:
            raise ValueError(f"hints {tuple(vectors.shape)} with alive {tuple(alive.shape)} do not fit {self.shape}")
        if not torch.equal(vectors[:known], self.hints):
            raise ValueError(f"a base only grows: its first {known} hints must stay as they are")
        if not known:
            self.center_hints.fit(vectors)
        self.hints, self.alive = vectors.clone(), alive.clone()

    def forward(self, states: Tensor) -> Tensor:
        """Score every action.

        Args:
            states: [B, d] raw embeddings.

        Returns:
            Logits [B, A + 1]; column 0 is "no hint"; hints that are not alive have `NEVER`.
        """
        x = self.center_states(states)
        q = self.query(x) / math.sqrt(self.rank)
        no_hint = q @ self.no_hint_key + self.no_hint_bias
        # In padded blocks of one size a hint's logit comes from the same operations whatever else is in the base.
        padding = -len(self.hints) % BLOCK
        blocks = F.pad(self.hints, (0, 0, 0, padding)).split(BLOCK) if len(self.hints) else ()
        logits = torch.cat([no_hint.unsqueeze(1), *(self._score(x, q, block) for block in blocks)], dim=1)
        dead = torch.cat([self.alive.new_zeros(1), ~self.alive])
        return logits[:, : self.n_actions].masked_fill(dead, NEVER)

    def _score(self, x: Tensor, q: Tensor, hints: Tensor) -> Tensor:
        """Logits [B, BLOCK] of a block of hints [BLOCK, d]."""
        h = self.center_hints(hints)
        dim = h.shape[1]
        return q @ self.key(h).T + self.affinity * (x @ h.T) / dim + h @ self.bias / math.sqrt(dim)

    def log_probs(self, states: Tensor, exploration: float = 0.0) -> Tensor:
        """Log-probabilities of the actions.

        Args:
            states: [B, d].
            exploration: this share of choices is uniform over the actions that are alive. It is a part of the policy
                itself, so that its log-probability is that of the choice (METHODS 2.2).

        Returns:
            [B, A + 1]; about `NEVER` for hints that are not alive.
        """
        logp = F.log_softmax(self(states), dim=-1)
        if not exploration:
            return logp
        uniform = math.log(exploration / (1 + int(self.alive.sum())))
        chance = torch.where(torch.cat([self.alive.new_ones(1), self.alive]), uniform, NEVER)
        return torch.logaddexp(logp + math.log1p(-exploration), chance)

    @torch.no_grad()
    def greedy(self, states: Tensor) -> Tensor:
        """The action [B] with the largest logit."""
        return self(states).argmax(-1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take a base of any size: it is part of the state."""
        for name in ("hints", "alive"):
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save(self, folder: Path) -> None:
        """Write `policy.safetensors` (weights, statistics and hints) and `policy.json` (shape)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / "policy.safetensors"
        )
        (folder / "policy.json").write_text(json.dumps(self.shape))

    @classmethod
    def load(cls, folder: Path) -> "HintPolicy":
        """Read what `save` wrote, in evaluation mode.

        Raises:
            UserError: when there is no policy.
        """
        if not (folder / "policy.json").is_file():
            raise UserError("There is no saved hint policy here.", where=str(folder))
        policy = cls(**json.loads((folder / "policy.json").read_text()))
        policy.load_state_dict(load_file(folder / "policy.safetensors"))
        return policy.eval()
