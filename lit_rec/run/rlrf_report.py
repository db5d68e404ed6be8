"""What a run of RLRF4Rec, with hints or without, tells beside its rows: rounds, hints, cost, and the report page."""

import json
from dataclasses import asdict
from typing import Any

import polars as pl
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from lit_rec.recipes.loop import Loop
from lit_rec.recipes.summary import summarise
from lit_rec.recipes.unified import UnifiedLoop
from lit_rec.run.cost import TRAINING, Part, cost_parts, stage_seconds
from lit_rec.run.folder import RunFolder
from lit_rec.run.hint_report import HintStory
from lit_rec.run.report import write_report
from lit_rec.run.reranking_story import place, state_name
from lit_rec.run.results import with_interval
from lit_rec.run.round_report import FLATTERED, answered_states, signed


def report(
    cfg: DictConfig,
    run: RunFolder,
    rows: list[dict[str, Any]],
    frames: pl.DataFrame,
    loop: Loop,
    environment: dict[str, Any],
    rounds: list[dict[str, Any]],
    told: dict[str, Any],
) -> None:
    """Write report.html: the rows of all splits, the rounds and examples of the first one.

    Args:
        cfg: The configuration.
        run: The run folder.
        rows: The lines of results.json.
        frames: Per-list metrics of every row and fold.
        loop: The first split.
        environment: Versions, machine and cost.
        rounds: Of `round_summaries`.
        told: `headline`, `comparisons`, `hints` and `cost`, as `write_report` takes them.
    """
    shown = answered_states([state for _, state in loop.states()])
    rewards, pairs = [], []
    for number, state in loop.states():
        if state in shown:
            rewards.append(_named(loop, loop.rewards(state).filter(pl.col("split") == "train"), state))
        if loop.samples_of(state) > 1:
            text = {name: pl.col(name).list.last().struct.field("content") for name in ("prompt", "chosen", "rejected")}
            columns: list[Any] = [pl.lit(number + 1).alias("round"), "user_id", "chosen_reward", "rejected_reward"]
            pairs.append(loop.pairs(state, cfg.pairs.rule).with_columns(**text).select(*columns, *text))
    write_report(
        run.path / "report.html",
        rows=rows,
        frames=frames,
        rounds=rounds,
        rewards=pl.concat(rewards) if rewards else None,
        pairs=pl.concat(pairs) if pairs else None,
        stages=run.log,
        config_yaml=OmegaConf.to_yaml(cfg),
        environment=environment,
        **told,
    )


def _named(loop: Loop, rewards: pl.DataFrame, state: str) -> pl.DataFrame:
    """Rewards with the state's place among the rounds and the users' own ids."""
    ids = loop.ground.data.users.select("user_id").with_row_index("user").cast({"user": rewards["user"].dtype})
    at = pl.lit(place(state), pl.Float64).alias("round")
    return rewards.join(ids, on="user", maintain_order="left").with_columns(at)


def run_cost(run: RunFolder) -> list[Part]:
    """What the parts of a run cost, all folds together."""
    return cost_parts(run.log, run.path / "stages")


def hint_story(loop: Loop) -> HintStory | None:
    """What there is to tell of the hints of a split; None where the recipe has none.

    Which hint a test user gets is told; what it brings there is not known, for test users have no rewards.
    """
    if not isinstance(loop, UnifiedLoop):
        return None
    hints, cfg, last = loop.hints, loop.cfg, loop.hints.rounds
    base, test = hints.base(last), hints.splits.test
    ids = [0, *(hint.id for hint in base.kept)]
    picks = [ids[action] for action in hints.actions(last, test).tolist()]
    talks = [
        talk
        for number in range(last, 0, -1)
        for talk in json.loads((hints.folder(f"round_{number}/hints") / "conversations.json").read_text())
    ]
    names = loop.ground.data.users["user_id"]
    learned = cfg.agent.pick in ("ppo", "full_information")
    return HintStory(
        subject="user",
        agent=cfg.agent.pick,
        hints=[asdict(hint) for hint in base.hints],
        choices=pl.DataFrame(
            {"session": test.tolist(), "agent": [cfg.agent.pick] * len(test), "hint": picks},
            schema={"session": pl.Int64, "agent": pl.String, "hint": pl.Int64},
        ),
        curves={cfg.agent.pick: hints.curves(f"round_{last}/agent")} if learned else {},
        rounds=cfg.agent.epochs,
        talk=talks[0] if talks else [],
        names={hint.session: str(names[hint.session]) for hint in base.hints},
    )


def round_summaries(loop: Loop, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every state of the LLM in numbers, with its own validation metrics and the seconds its stages took."""
    found = []
    for number, state in loop.states():
        mine = [entry for entry in loop.run.log if entry["name"].startswith(loop.name(f"{state}/"))]
        validation = {
            f"{r['metric']}|{r['convention']}": {"mean": r["mean"], "ci95": r["ci95"], "n": r["n"]}
            for r in rows
            if (r["row"], r["split"], r["unit"]) == (state, "validation", "user")
        }
        seconds = sum(stage_seconds(entry) for entry in mine)
        told = {"round": number, **summarise(loop, state), "seconds": seconds, "validation": validation}
        trained = [entry["counts"].get(TRAINING) for entry in mine if entry["name"].endswith("/policy")]
        found.append(told | ({"training_seconds": trained[0]} if trained else {}))
    return found


def round_table(rounds: list[dict[str, Any]]) -> Table:
    """The states of the LLM on the terminal: did the reward of held-out users move?"""
    table = Table(title="The LLM, round by round (first fold)", title_justify="left")
    if any(one.get("heldout_flattered") for one in rounds):
        table.caption, table.caption_justify = FLATTERED, "left"
    for name in (
        "state",
        "held-out reward",
        "gain (paired)",
        "training reward",
        "spread",
        "ties",
        "unique",
        "tokens",
        "KL",
        "accuracy",
    ):
        table.add_column(name, justify="left" if name == "state" else "right")
    for one in rounds:
        train = one.get("train", {})
        shown: list[tuple[Any, str]] = [
            (one["train_reward_mean"], ".4f"),
            (one.get("reward_spread"), ".4f"),
            (one.get("tie_rate"), ".0%"),
            (one["unique_answer_rate"], ".0%"),
            (one["answer_tokens_mean"], ".1f"),
            (train.get("kl"), "+.3f"),
            (train.get("accuracy"), ".2f"),
        ]
        cells = ["" if value is None else format(value, form) for value, form in shown]
        gain = one.get("heldout_gain")
        paired = "" if gain is None else signed(gain)
        star = "*" if one.get("heldout_flattered") else ""
        held_out = with_interval(one["heldout_reward"]) + star
        table.add_row(state_name(one["name"]), held_out, paired and paired + star, *cells)
    return table
