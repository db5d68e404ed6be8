"""Rewards to preference pairs, and the DataModule that serves a round's pairs."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import polars as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lit_rec import distributed
from lit_rec.policy.sequences import Example, collate, encode_chat

NOISE = 1e-5  # one text encoded in two batches gets soft rewards up to some 4e-7 apart, which is no preference


def make_pairs(
    rewards: pl.DataFrame,
    *,
    rule: str = "best_worst",
    min_gap: float = 0.0,
    max_pairs: int | None = None,
    seed: int = 0,
) -> tuple[pl.DataFrame, dict[str, float]]:
    """One pair per user: the best answer against the worst (RLRF4Rec section 1.1).

    Args:
        rewards: user, sample, text, reward: every scored answer of every user.
        rule: "best_worst", or "random": two different answers of the same users in random order (the control that keeps
            everything but the reward).
        min_gap: A pair needs a larger reward gap; answers of equal reward, up to `NOISE`, never make a pair.
        max_pairs: Keep only so many, the widest gaps first.
        seed: For "random".

    Returns:
        (pairs, counts): user, chosen, rejected, chosen_reward, rejected_reward, by user; and users, tie_rate (share of
        users whose answers are worth the same), with `min_gap` above 0 small_gap_rate (share of users whose rewards
        differ by no more), unique_in_user_rate (different answers of a user), reward_mean, reward_spread (mean over
        users of best - worst).
    """
    ordered = rewards.sort("user", "reward", "sample", descending=[False, True, False])
    ends = ordered.group_by("user", maintain_order=True).agg(
        pl.col("text").first().alias("chosen"),
        pl.col("text").last().alias("rejected"),
        pl.col("reward").first().alias("chosen_reward"),
        pl.col("reward").last().alias("rejected_reward"),
        pl.col("text").n_unique().alias("unique"),
        pl.len().alias("answers"),
    )
    gap = pl.col("chosen_reward") - pl.col("rejected_reward")
    counts: dict[str, float] = {
        "users": len(ends),
        "reward_mean": _mean(rewards["reward"]),
        "reward_spread": _mean(ends.select(gap.alias("gap"))["gap"]),
        "unique_in_user_rate": float(ends["unique"].sum()) / max(float(ends["answers"].sum()), 1.0),
    }
    # Equal rewards carry no preference, and equal texts no difference.
    told_apart = ends.filter((gap > NOISE) & (pl.col("chosen") != pl.col("rejected")))
    kept = told_apart.filter(gap > min_gap)
    counts["tie_rate"] = 1 - len(told_apart) / max(len(ends), 1)
    if min_gap > 0:
        counts["small_gap_rate"] = (len(told_apart) - len(kept)) / max(len(ends), 1)
    if max_pairs is not None and len(kept) > max_pairs:
        kept = kept.sort(gap.alias("gap"), "user", descending=[True, False]).head(max_pairs).sort("user")
    pairs = kept.select("user", "chosen", "rejected", "chosen_reward", "rejected_reward")
    if rule == "random":
        pairs = _random_pairs(rewards, pairs["user"], seed)
    counts["pairs"] = len(pairs)
    return pairs, counts


def _mean(values: pl.Series) -> float:
    mean = values.mean()
    return float(mean) if isinstance(mean, (int, float)) else 0.0


def _random_pairs(rewards: pl.DataFrame, users: pl.Series, seed: int) -> pl.DataFrame:
    """For the same users, two different texts drawn without looking at their rewards."""
    shuffled = (
        rewards.filter(pl.col("user").is_in(users.implode()))
        .sort("user", "sample")
        .unique(["user", "text"], keep="first", maintain_order=True)
        .sample(fraction=1.0, shuffle=True, seed=seed)
    )
    picked = shuffled.group_by("user", maintain_order=True).agg(
        pl.col("text").get(0).alias("chosen"),
        pl.col("text").get(1).alias("rejected"),
        pl.col("reward").get(0).alias("chosen_reward"),
        pl.col("reward").get(1).alias("rejected_reward"),
    )
    return picked.sort("user")


def conversational(
    pairs: pl.DataFrame, prompts: Sequence[list[dict[str, str]]], user_ids: Sequence[str]
) -> pl.DataFrame:
    """The pairs in TRL's conversational preference form, which any preference trainer reads.

    Returns:
        prompt, chosen, rejected (lists of {role, content}), chosen_reward, rejected_reward, user_id.
    """
    message = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))

    def answer(texts: pl.Series) -> list[list[dict[str, str]]]:
        return [[{"role": "assistant", "content": text}] for text in texts]

    return pl.DataFrame(
        {
            "prompt": pl.Series(list(prompts), dtype=message),
            "chosen": pl.Series(answer(pairs["chosen"]), dtype=message),
            "rejected": pl.Series(answer(pairs["rejected"]), dtype=message),
            "chosen_reward": pairs["chosen_reward"],
            "rejected_reward": pairs["rejected_reward"],
            "user_id": pl.Series(list(user_ids), dtype=pl.String),
        }
    )


class PairBatches(Sampler[list[int]]):
    """Batches of pairs of similar length, in a new random order every epoch.

    Args:
        lengths: Tokens of each pair.
        batch_size: Pairs per batch; the last one may be smaller, none is dropped.
        seed: Of the order, together with the epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = 16 * self.batch_size  # sorted within windows: similar lengths together, and still a random order
        for start in range(0, len(order), window):
            order[start : start + window] = sorted(order[start : start + window], key=lambda i: self.lengths[i])
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        for b in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[b]


class PreferenceDataModule(L.LightningDataModule):
    """Serves the preference pairs of the present round; the Trainer asks again after every epoch.

    Args:
        tokenizer: Of the policy; it has a chat template.
        batch_size: Pairs per batch.
        accumulate: Batches per optimiser update; with several processes they share its pairs.
        max_length: Tokens of prompt and answer.
        seed: Of the batch order.
    """

    def __init__(self, tokenizer: Any, *, batch_size: int, accumulate: int, max_length: int, seed: int) -> None:
        super().__init__()
        self.tokenizer, self.batch_size, self.accumulate = tokenizer, batch_size, accumulate
        self.max_length, self.seed = max_length, seed
        self.examples: list[Example] = []
        self.ref_logps = torch.zeros(0, 2)

    def encode(self, table: pl.DataFrame) -> list[Example]:
        """Tokenize pairs in the conversational form."""
        rows = zip(table["prompt"].to_list(), table["chosen"].to_list(), table["rejected"].to_list(), strict=True)
        return [encode_chat(self.tokenizer, p, [c[0]["content"], r[0]["content"]], self.max_length) for p, c, r in rows]

    def set_round(self, examples: list[Example], ref_logps: Tensor) -> None:
        """Serve these pairs from now on.

        Args:
            examples: The encoded pairs.
            ref_logps: [pairs, 2], log-probabilities of chosen and rejected under the reference policy.
        """
        self.examples, self.ref_logps = examples, ref_logps

    @property
    def updates_per_epoch(self) -> int:
        """Optimiser updates in one epoch of the present round."""
        return math.ceil(math.ceil(len(self.examples) / self.batch_size) / self.accumulate)

    @property
    def batches_per_update(self) -> int:
        """Batches of one process in a whole update: the processes share its pairs."""
        return math.ceil(self.accumulate / distributed.size())

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the present round in the order of the present epoch."""
        sampler = PairBatches([e.length for e in self.examples], self.batch_size, self.seed)
        sampler.set_epoch(self.trainer.current_epoch if self.trainer else 0)
        batches = list(sampler)
        starts = range(0, len(batches), self.accumulate)
        updates = [[i for batch in batches[n : n + self.accumulate] for i in batch] for n in starts]
        items = [batch for update in updates for batch in self._mine(update)]
        return DataLoader(items, batch_size=None, shuffle=False, collate_fn=self._collate)  # type: ignore[arg-type]

    def _mine(self, update: list[int]) -> list[tuple[list[int], float]]:
        """This process's share of an update's pairs in batches, as many as every other process has, with their weights.

        A batch's summed loss is multiplied by its weight, so that an update is the mean over its pairs whatever the
        number of processes: Lightning divides every batch by `batches_per_update`, the short last update of an epoch
        too, and DDP takes the mean over the processes. Who has no pair left goes along with one that weighs nothing.
        Shares are stretches, so that batches are those of one process wherever `accumulate` divides evenly: what
        is computed together, and so its rounding, is the same.
        """
        here = distributed.place()
        size = here.size
        weight = self.batches_per_update * size / len(update)
        share = update[len(update) * here.rank // size : len(update) * (here.rank + 1) // size]
        count = math.ceil(math.ceil(len(update) / size) / self.batch_size)
        cuts = [share[n * self.batch_size : (n + 1) * self.batch_size] for n in range(count)]
        return [(cut, weight) if cut else (update[:1], 0.0) for cut in cuts]

    def _collate(self, item: tuple[list[int], float]) -> dict[str, Tensor]:
        rows, weight = item
        batch = collate([self.examples[i] for i in rows])
        batch["ref_logps"] = self.ref_logps[rows]
        batch["weight"] = torch.tensor(weight)
        return batch
