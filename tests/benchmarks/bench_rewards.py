"""Rewards of N = 10 answers of every training user against N separate evaluations."""

import torch

from lit_rec.data.sessions import SessionDataModule, batch_of
from lit_rec.metrics.ranking import ranking_metrics
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.rewards import answer_rewards
from tests.benchmarks.harness import Row, faster, interleave
from tests.benchmarks.worlds import ITEMS, USERS, lists

LISTS, WIDTH, SAMPLES = 24_000, 384, 10


def run() -> list[Row]:
    """Seconds for all answers."""
    source, splits = lists(LISTS)
    draw = torch.Generator().manual_seed(0)
    users = splits.train
    answers = torch.randn(len(users), SAMPLES, WIDTH, generator=draw)
    items = torch.randn(ITEMS + 1, WIDTH, generator=draw)
    module = RerankerModule(n_items=ITEMS, user_vectors=torch.zeros(USERS, WIDTH), item_vectors=items).eval()
    index = SessionDataModule(source, splits, batch_size=256).index("train")
    counts = source.user[index].bincount(minlength=USERS)[users]
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        given = (answers.flatten(0, 1), users.repeat_interleave(SAMPLES))
        found["ours"] = answer_rewards(module, source, *given).view(-1, SAMPLES)

    @torch.no_grad()
    def peer() -> None:
        """For every sample: put it in as the user's knowledge, and evaluate as one evaluates a model."""
        rewards = []
        for n in range(SAMPLES):
            module.knowledge.user_vectors[users] = answers[:, n]
            total = torch.zeros(USERS)
            for part in index.split(256):
                batch = batch_of(source, part)
                values = ranking_metrics(module(batch), batch["labels"], batch["items"] > 0, (5,), "standard")["ndcg@5"]
                total.index_add_(0, batch["user"], values)
            rewards.append(total[users] / counts)
        found["peer"] = torch.stack(rewards, dim=1)

    ours()
    taken = interleave(ours, peer, repeats=2)
    both = counts > 0
    assert torch.allclose(found["ours"][both], found["peer"][both], atol=1e-4)  # the same rewards
    work = f"rewards of {SAMPLES} answers for {len(users):,} users, {len(index):,} lists"
    return [faster(work, f"{SAMPLES} evaluations", taken, 20)]
