"""Rewards of N = 10 answers of every training user against N separate evaluations."""

import torch
from torch.utils.data import DataLoader

from lit_rec.metrics.ranking import ranking_metrics
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.rewards import answer_rewards
from lit_rec.threads import one_thread
from tests.benchmarks.bench_reranker import PerCandidate, PerSample
from tests.benchmarks.harness import Row, interleave
from tests.benchmarks.worlds import GENRE, ITEMS, LISTS_PER_USER, USERS, lists

WIDTH, SAMPLES, PEER_SAMPLES = 384, 10, 1  # the peer's evaluations are alike: it is timed on one and multiplied


def run(full: bool = False) -> list[Row]:
    """Seconds for all answers."""
    people = USERS if full else 150
    source, splits = lists(people * LISTS_PER_USER, users=people)
    draw = torch.Generator().manual_seed(0)
    users = splits.train
    answers = torch.randn(len(users), SAMPLES, WIDTH, generator=draw)
    items = torch.randn(ITEMS + 1, WIDTH, generator=draw)
    vectors = {"user_vectors": torch.zeros(people, WIDTH), "item_vectors": items}
    module = RerankerModule(n_items=ITEMS, attributes=GENRE, **vectors).eval()
    peer_module = PerCandidate(module).eval()
    index = source.of_users(users)
    counts = source.user[index].bincount(minlength=people)[users]
    found: dict[str, torch.Tensor] = {}

    told = []  # one set of files per evaluation, read before the clock starts
    for n in range(PEER_SAMPLES):
        known = torch.zeros(people, WIDTH)
        known[users] = answers[:, n]
        told.append(PerSample(source, index, known, items))

    def ours() -> None:
        given = (answers.flatten(0, 1), users.repeat_interleave(SAMPLES))
        found["ours"] = answer_rewards(module, source, *given).view(-1, SAMPLES)

    @torch.no_grad()
    def peer() -> None:
        """For every sample: put it in as the user's knowledge, and evaluate as one evaluates a model."""
        rewards = []
        for data in told:
            total = torch.zeros(people)
            for batch in DataLoader(data, 256):
                logits = peer_module(batch)
                whole = torch.ones_like(logits, dtype=torch.bool)
                values = ranking_metrics(logits, batch["labels"], whole, (5,), "standard")["ndcg@5"]
                total.index_add_(0, batch["user"], values)
            rewards.append(total[users] / counts)
        found["peer"] = torch.stack(rewards, dim=1)

    def peer_in_one_thread() -> None:
        with one_thread():
            peer()

    ours()
    mine, *others = interleave(ours, peer, peer_in_one_thread, repeats=2)
    theirs = min(others) * SAMPLES / PEER_SAMPLES
    both = counts > 0
    apart = float((found["ours"][both][:, :PEER_SAMPLES] - found["peer"][both]).abs().mean())
    assert apart < 1e-4, apart  # the same rewards
    work = f"rewards of {SAMPLES} answers for {len(users):,} users, {len(index):,} lists"
    note = f"peer's time extrapolated: {PEER_SAMPLES} of {SAMPLES} answers timed, x {SAMPLES // PEER_SAMPLES}; "
    note += f"mean difference of rewards {apart:.0e}"
    peer_name = f"{SAMPLES} evaluations, list by list, adaptor per candidate, one thread or all"
    return [Row(work, peer_name, mine, theirs, "s", theirs / mine, 20, note)]
