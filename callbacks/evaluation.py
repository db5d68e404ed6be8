"""After a round: keep the policy, let it write everyone's knowledge, and measure what changed."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import polars as pl
import torch

from callbacks.rounds import RoundCallback, RoundHooks
from lit_rec import distributed
from lit_rec.policy.dpo import DPOPolicy
from lit_rec.policy.sequences import Example, answer_divergence, collate, encode_chat
from lit_rec.recipes.summary import summarise
from lit_rec.run.folder import never
from lit_rec.run.progress import step

KL_ANSWERS = 64  # held-out answers the divergence is estimated on


class RoundEvaluation(RoundHooks):
    """Writes the policy after each round as a PEFT folder, samples the next answers, scores them, and logs the round.

    Args:
        rule: How this policy's pairs were made (names the stage they come from).
    """

    def __init__(self, rule: str = "best_worst") -> None:
        self.rule = rule

    def end_round(self, trainer: L.Trainer, policy: DPOPolicy, rounds: RoundCallback, number: int) -> None:
        """Keep the adapter, regenerate the knowledge, score it, log it."""
        loop, state, before = rounds.loop, rounds.state_of(number), rounds.pairs_from(number)
        if distributed.size() > 1:  # alike to the last bit: its answers are found by the adapter's digest
            policy.llm.load_adapter(distributed.agreed(policy.llm.adapter_state()))
        else:
            policy.llm.mark_adapter()
        fresh = not loop.run.done(loop.name(f"{state}/divergence"))

        def build(work: Path) -> dict[str, Any]:
            policy.llm.save_adapter(work / "adapter")
            (work / "training.json").write_text(json.dumps(policy.epoch_means))
            return {"adapter": policy.llm.adapter, **policy.epoch_means, **rounds.cost(number)}

        loop.keep_policy(state, before, self.rule, policy.cfg, never if rounds.passed(number) else build)
        loop.answers(state)
        loop.rewards(state)
        self._divergence(policy, rounds, number)
        if fresh:
            log_state(loop, state, number)

    def _divergence(self, policy: DPOPolicy, rounds: RoundCallback, number: int) -> float | None:
        """KL(policy || untrained model) per answer, along the policy's own answers to held-out users."""
        loop, state = rounds.loop, rounds.state_of(number)
        held_out = loop.answers(state).filter((pl.col("split") == "validation") & (pl.col("sample") == 0))
        rows = held_out.head(KL_ANSWERS)

        def build(work: Path) -> dict[str, Any]:
            prompts, ends = loop.prompts_of(state, rows["user"].to_list()), set(policy.llm.stop_ids())
            examples = [
                sampled(encode_chat(policy.llm.tokenizer, prompt, [text], policy.cfg.max_length), ends, finish)
                for prompt, text, finish in zip(prompts, rows["text"], rows["finish"], strict=True)
            ]
            found: list[float] = []
            training = policy.training
            policy.eval()
            with torch.no_grad(), step(f"{state}: divergence from the base", len(rows), "answers") as progress:
                for start in range(0, len(examples), 4):
                    batch = {k: v.to(policy.device) for k, v in collate(examples[start : start + 4]).items()}
                    with policy.trainer.precision_plugin.forward_context():
                        gaps = answer_divergence(policy.model, batch, policy.llm.reference("base"))
                    found += gaps.squeeze(1).tolist()
                    progress(len(gaps))
            policy.train(training)
            kl = sum(found) / len(found) if found else None
            (work / "divergence.json").write_text(json.dumps({"kl": kl, "answers": len(found)}))
            return {"kl": kl}

        return loop.keep_divergence(state, never if rounds.passed(number) else build)


def sampled(example: Example, ends: set[int], finish: str) -> Example:
    """An answer's tokens as the LLM drew them: without an end of the turn where it was cut, and with nothing behind it.

    What nobody drew says nothing about how often the policy says it.
    """
    (answer,) = example.answers
    end = next((place for place, token in enumerate(answer) if token in ends), len(answer))
    return Example(example.prompt, [answer[: max(1, end + (finish == "stop"))]])


def log_state(loop: Any, state: str, number: int) -> None:
    """Send what is known of a state to the loggers: rewards, ties, lengths, divergence, and a few pairs to read."""
    kind = state.rpartition("_")[0]
    curves = "round" if state == "zero_shot" or kind == "round" else "hinted" if kind == "hinted" else state
    board = loop.board(curves)
    summary = summarise(loop, state)
    scalars = {**summary, **summary.get("train", {}), "heldout_reward": summary["heldout_reward"]["mean"]}
    numbers = {f"rounds/{name}": value for name, value in scalars.items() if isinstance(value, (int, float))}
    board.scalars(numbers, number)
    rewards = loop.rewards(state)
    for split in ("train", "validation"):
        values = rewards.filter(pl.col("split") == split)["reward"]
        if len(values):
            board.histogram(f"rewards/{split}", values.to_numpy(), number)
    if loop.samples_of(state) > 1:
        gap = pl.col("chosen_reward") - pl.col("rejected_reward")
        for row in loop.pairs(state, "best_worst").sort(gap, descending=True).head(3).iter_rows(named=True):
            text = "\n\n".join(
                f"**{kind}** (reward {row[f'{kind}_reward']:.3f}): {row[kind][0]['content']}"
                for kind in ("chosen", "rejected")
            )
            board.text(f"pairs/user_{row['user_id']}", text, number)
    board.flush()
