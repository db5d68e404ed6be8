"""RLRF4Rec (arXiv 2410.05939), top to bottom as in the paper's algorithm, with the controls that test its claim.

knowledge of every user and item from the base LLM -> vectors
reward model <- the reranker, trained with that knowledge
for round t = 1..T: sample N answers per training user, score each with the reranker, best against worst, DPO on LoRA
knowledge of every user from the tuned LLM -> the final reranker -> test
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import polars as pl
from omegaconf import DictConfig
from torch import Tensor

from callbacks.evaluation import RoundEvaluation, log_state
from callbacks.health import Health
from callbacks.preferences import PreferenceRounds
from callbacks.progress import EpochProgress
from callbacks.rounds import RoundCallback, RoundHooks
from lit_rec import distributed
from lit_rec.errors import UserError
from lit_rec.llm.loading import native_bf16
from lit_rec.policy.dpo import DPOPolicy
from lit_rec.policy.pairs import PreferenceDataModule
from lit_rec.recipes.ground import Ground
from lit_rec.recipes.loop import Loop, somebody_else
from lit_rec.recipes.models import by_all, extra_callbacks
from lit_rec.recipes.rows import evaluate_row
from lit_rec.rerankers.training import quiet
from lit_rec.run.folder import RunFolder, never


def fit(
    cfg: DictConfig, run: RunFolder, make_loop: type[Loop] = Loop, hooks: Sequence[RoundHooks] = ()
) -> tuple[pl.DataFrame, list[Loop]]:
    """Run the whole recipe, or what is left of it.

    Args:
        cfg: The configuration.
        run: The run folder.
        make_loop: The stages of a split.
        hooks: What happens between rounds before the pairs are made.

    Returns:
        Per-list metrics of every row and fold, and the loops they came from.
    """
    ground = Ground(cfg, run)
    extra_callbacks(cfg)  # a mistake there is told before anything is paid for
    if needs_encoder(cfg):
        ground.check_encoder("knowledge")
    if (uses_llm(cfg) or (needs_encoder(cfg) and cfg.knowledge.item_text == "llm")) and distributed.main():
        ground.llm.check()
    folds = range(cfg.evaluation.folds) if cfg.evaluation.only_folds is None else cfg.evaluation.only_folds
    frames, loops = [], []
    for fold in folds:
        loop = make_loop(ground, ground.keep_split(fold), fold)
        frames.append(run_split(loop, hooks))
        loops.append(loop)
    return pl.concat(frames), loops


def run_split(loop: Loop, hooks: Sequence[RoundHooks] = ()) -> pl.DataFrame:
    """Everything on one split: the loop of the paper, then the rows of the result table."""
    cfg = loop.cfg
    controls = cfg.evaluation.controls
    if not uses_llm(cfg):
        return evaluate(loop, [])
    if cfg.policy.rounds > 0:  # what tuning will need is asked for before the LLM writes for hours
        loop.board()
        if not loop.run.done(loop.name("round_1/policy")):
            _ = loop.llm.model
    loop.answers("zero_shot")
    loop.vectors("zero_shot")
    states = ["zero_shot"] if controls.zero_shot or controls.shuffled else []
    if cfg.policy.rounds > 0:
        loop.rewards("zero_shot")
        log_state(loop, "zero_shot", 0)
        if controls.random_pairs:
            tune(loop, "random_pairs", rule="random", rounds=1, hooks=hooks)
        if controls.best_of_n:
            tune(loop, "best_of_n", rule="best_worst", rounds=1, loss="sft", hooks=hooks)
        tune(loop, "round", rule=cfg.pairs.rule, rounds=cfg.policy.rounds, hooks=hooks)
        states += [name for _, name in loop.controls()]
        rounds = [name for _, name in loop.states() if name not in ("zero_shot", *states)]
        states += rounds if cfg.evaluation.rounds else last_rows(rounds, controls.random_pairs)
    return evaluate(loop, states)


def last_rows(states: Sequence[str], random_pairs: bool) -> list[str]:
    """Of the states of all rounds those that have rows where only the last round is measured.

    With hints the first ones alone too, and the last ones without the last round of DPO: each part has its row. Random
    pairs are held against round 1.
    """
    hinted = states[0].startswith("hinted_")
    judged = ["round_1"] if random_pairs else []
    return list(dict.fromkeys([*states[:1], *judged, *states[-2:]] if hinted else [*judged, *states[-1:]]))


def uses_llm(cfg: DictConfig) -> bool:
    """Whether any row needs a text by the LLM."""
    controls = cfg.evaluation.controls
    return cfg.policy.rounds > 0 or controls.zero_shot or controls.shuffled


def tune(
    loop: Loop, name: str, *, rule: str, rounds: int, loss: str | None = None, hooks: Sequence[RoundHooks] = ()
) -> None:
    """Preference optimisation over all rounds, in ONE Trainer.fit; callbacks work between the rounds.

    Args:
        loop: The split.
        name: "round", or the name of a control.
        rule: How rewards become pairs.
        rounds: Number of rounds.
        loss: Another preference loss than the configuration's.
        hooks: What happens between rounds before the pairs are made.
    """
    cfg = loop.cfg
    settings = cfg.policy.copy()
    settings.loss = loss or settings.loss
    checkpoint = loop.run.path / "checkpoints" / f"fold_{loop.fold}_{name}.ckpt"
    key = loop.policy_key(settings) | {"pairs": {"rule": rule}}
    outer = RoundCallback(loop, name, rounds, settings.epochs, checkpoint, key)
    if loop.run.done(loop.name(f"{outer.state_of(rounds)}/divergence")):
        revisit(loop, outer, rule, settings)
        return
    loop.llm.reset_adapter()
    policy = DPOPolicy(loop.llm, settings)
    data = PreferenceDataModule(
        loop.llm.tokenizer,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        max_length=settings.max_length,
        seed=cfg.seed,
    )
    keys = "policy.lr and policy.gradient_clip"
    health = Health(cfg.trainer.bad_updates, name=f"the preference optimisation of {name}", keys=keys)
    extra = [health, EpochProgress(f"{name}: DPO epoch"), *extra_callbacks(cfg)]
    with quiet():
        trainer = L.Trainer(
            **by_all(loop.ground.device),
            precision=precision(cfg, loop.ground.device),
            max_epochs=rounds * settings.epochs,
            reload_dataloaders_every_n_epochs=1,
            accumulate_grad_batches=data.batches_per_update,
            gradient_clip_val=settings.gradient_clip,
            callbacks=[*hooks, PreferenceRounds(rule), RoundEvaluation(rule), *extra, outer],
            logger=loop.board(name).loggers,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        there = distributed.agreed(checkpoint.is_file())
        resume: dict[str, Any] = {"ckpt_path": str(checkpoint), "weights_only": True} if there else {}
        trainer.fit(policy, datamodule=data, **resume)


def revisit(loop: Loop, outer: RoundCallback, rule: str, settings: Any) -> None:
    """Visit the finished stages of a policy again: each checks that it was made from this configuration."""
    for number in range(1, outer.rounds + 1):
        before, state = outer.pairs_from(number), outer.state_of(number)
        loop.keep_policy(state, before, rule, settings, never)
        loop.rewards(state)
        loop.keep_divergence(state, never)


def precision(cfg: DictConfig, device: str) -> Any:
    """Lightning's precision; `auto` is bf16-mixed where the processor computes in bfloat16."""
    if cfg.trainer.precision != "auto":
        return cfg.trainer.precision
    return "bf16-mixed" if native_bf16(device) else "32-true"


def evaluate(loop: Loop, states: list[str]) -> pl.DataFrame:
    """Every row of the result table: the controls, then one row per state of the LLM and knowledge input."""
    controls, main = loop.cfg.evaluation.controls, loop.cfg.knowledge.encode
    inputs = [main, *(i for i in loop.cfg.evaluation.inputs if i != main)]
    items = loop.ground.item_vectors if needs_encoder(loop.cfg) else None
    rows: list[Callable[[], pl.DataFrame]] = []

    def row(
        name: str,
        user: Callable[[], Tensor | None],
        item: Tensor | None = items,
        after: tuple[str, ...] = (),
        encode: str | None = None,
    ) -> None:
        rows.append(lambda: evaluate_row(loop, name, user=user(), item=item, after=after, encode=encode))

    if controls.no_knowledge:
        row("no_knowledge", lambda: None, None)
    if controls.item_only:
        row("item_only", lambda: None)
    if controls.history_shuffled:
        row("history_shuffled", lambda: _of_others(loop.ground.history_vectors, loop.cfg.seed))
    if controls.history_only:
        row("history_only", lambda: loop.ground.history_vectors)
    told = [("shuffled", "zero_shot")] if controls.shuffled else []
    told += [(state, state) for state in states if state != "zero_shot" or controls.zero_shot]
    for name, state in told:
        loop.vectors(state)  # made by all processes, before each trains rerankers of its own
        for kind in inputs:
            knowledge = partial(loop.user_vectors, state, kind, shuffle=name == "shuffled")
            row(name if kind == main else f"{name}_{kind}", knowledge, after=(f"{state}/vectors",), encode=kind)
    if not rows:
        raise UserError(
            "nothing to evaluate: every control is off and there is no round",
            where="config key evaluation.controls",
            fix="switch a control on, or set policy.rounds above 0",
        )
    frames = distributed.divide(rows)
    if distributed.size() > 1 and distributed.main():  # visits what others have built, whose costs are told as well
        with distributed.alone():
            frames = [one() for one in rows]
    return pl.concat(frames)


def _of_others(vectors: Tensor, seed: int) -> Tensor:
    """Everybody gets somebody else's."""
    return vectors[somebody_else(len(vectors), seed)]


def needs_encoder(cfg: DictConfig) -> bool:
    """Whether any row uses text vectors."""
    controls = cfg.evaluation.controls
    return controls.item_only or controls.history_only or controls.history_shuffled or uses_llm(cfg)
