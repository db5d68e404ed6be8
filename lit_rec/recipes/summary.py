"""What a state of the LLM amounts to, in numbers."""

import json
from typing import Any

import numpy as np
import polars as pl

from lit_rec.metrics.texts import distinct_n, within_user_correlation
from lit_rec.policy.pairs import make_pairs
from lit_rec.recipes.loop import Loop
from lit_rec.run.statistics import mean_over_users


def summarise(loop: Loop, state: str) -> dict[str, Any]:
    """A state in numbers, from its stages alone: a resumed run tells the same as an undisturbed one."""
    rewards = loop.rewards(state)
    train, held_out = (rewards.filter(pl.col("split") == name) for name in ("train", "validation"))
    judged = mean_over_users(held_out.filter(pl.col("sample") == 0)["reward"].to_numpy().astype("float64"))
    answers = loop.answers(state)
    first = answers.filter(pl.col("sample") == 0)["text"]
    found: dict[str, Any] = {
        "name": state,
        "heldout_reward": {"mean": judged.mean, "ci95": [judged.low, judged.high], "n": judged.n},
        # Sample 0 as with held-out users: in some states a part of the users have more answers, and would count more.
        "train_reward_mean": train.filter(pl.col("sample") == 0)["reward"].mean(),
        "answer_tokens_mean": answers["tokens"].mean(),
        "cut_rate": len(answers.filter(pl.col("finish") == "length")) / max(len(answers), 1),
        "unique_answer_rate": first.n_unique() / max(len(first), 1),
        "distinct_2": distinct_n(first.to_list(), 2),
        "reward_length_correlation": within_user_correlation(train, "reward", "tokens"),
    }
    if state != "zero_shot" and not loop.cfg.reward.refresh:  # a refreshed judge measures with another ruler
        gain = mean_over_users(_gains(loop, held_out))
        found["heldout_gain"] = {"mean": gain.mean, "ci95": [gain.low, gain.high], "n": gain.n}
    if loop.flattered(state):
        found["heldout_flattered"] = True
    if loop.samples_of(state) > 1:
        wanted, paired = loop.cfg.pairs, rewards.filter(pl.col("user").is_in(loop.paired))
        found.update(make_pairs(paired, min_gap=wanted.min_gap, max_pairs=wanted.max_pairs)[1])
    policy = loop.run.stage(loop.name(f"{state}/policy"))
    if state != "zero_shot" and (policy / "training.json").is_file():
        found["train"] = json.loads((policy / "training.json").read_text())
        found["train"] |= json.loads((loop.run.stage(loop.name(f"{state}/divergence")) / "divergence.json").read_text())
    return found


def _gains(loop: Loop, held_out: pl.DataFrame) -> np.ndarray:
    """Per held-out user, the reward of this state's knowledge minus that of the untrained model's."""
    first = loop.rewards("zero_shot").filter((pl.col("split") == "validation") & (pl.col("sample") == 0))
    both = held_out.filter(pl.col("sample") == 0).join(first, on="user", suffix="_before")
    return (both["reward"] - both["reward_before"]).to_numpy().astype("float64")
