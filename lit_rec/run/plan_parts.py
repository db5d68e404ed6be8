"""The parts of every recipe in order: the stages each leaves, and what the LLM has to write for them at most.

The names of the stages are those of `lit_rec.recipes`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig

from lit_rec.recipes.rlrf import last_rows, needs_encoder, uses_llm
from lit_rec.recipes.session_rows import HINT_ROWS, uses_hints

SAME_TOKENS = 8  # longest answer to whether two hints say the same (lit_rec/agent/reflection.py)


@dataclass(frozen=True)
class Work:
    """What is asked of the LLM, at most: answers, the tokens they may have, and titles whose likelihood is taken."""

    answers: int = 0
    tokens: int = 0
    titles: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.answers + other.answers, self.tokens + other.tokens, self.titles + other.titles)


@dataclass(frozen=True)
class Sizes:
    """Users or sessions of each split, candidates per session, and items that a recipe for users may describe."""

    train: int
    validation: int
    test: int
    candidates: int = 0
    items: int = 0


Parts = list[tuple[str, dict[str, Work]]]  # names for people, and stages


# --- RLRF4Rec, and both in one loop -----------------------------------------------------------------------------------


def reranking_parts(cfg: DictConfig, sizes: Sizes, fold: str) -> Parts:
    """The parts of RLRF4Rec, or of both in one loop, on a split; `fold` is the prefix of its stages."""
    hinted = cfg.recipe == "unified" and cfg.agent.pick != "none"
    rounds = int(cfg.policy.rounds)
    parts: Parts = [("candidate lists and split", _none("lists", f"{fold}split"))]
    if needs_encoder(cfg):
        described, work = "", Work()
        if cfg.knowledge.item_text == "llm":
            described = " (the LLM describes every item first)"
            work = Work(sizes.items, sizes.items * int(cfg.knowledge.item_tokens))
        parts.append((f"items and histories, encoded{described}", {"knowledge": work}))
    if not uses_llm(cfg):
        return [*parts, _rows(cfg, [], fold)]

    def state(name: str, *others: str) -> dict[str, Work]:
        judged = [f"{fold}{name}/rewards"] if rounds else []
        both = [f"{fold}{name}/pairs_best_worst"] if rounds and _samples(cfg, name, hinted) > 1 else []
        paired = sizes.train if cfg.pairs.users is None else min(cfg.pairs.users, sizes.train)
        more = (_samples(cfg, name, hinted) - 1) * paired
        answers = more + sizes.train + sizes.validation + sizes.test
        work = {f"{fold}{name}/answers": Work(answers, answers * int(cfg.llm.max_new_tokens))}
        return work | _none(f"{fold}{name}/vectors", *judged, *both, *(f"{fold}{name}/{stage}" for stage in others))

    def tuned(name: str, before: str, rule: str) -> dict[str, Work]:
        return _none(f"{fold}{before}/pairs_{rule}", f"{fold}{name}/policy") | state(name, "divergence")

    first = state("zero_shot", *(["reward_model"] if rounds else []))
    parts.append(("zero_shot: the LLM describes every user", first))
    for number in range(1, rounds + 1):
        before = f"hinted_{number}" if hinted else "zero_shot" if number == 1 else f"round_{number - 1}"
        if hinted:
            parts.append((f"round {number}: reflection, hints, who gets which", _hints_of(cfg, sizes, number, fold)))
            parts.append((f"round {number}: descriptions with hints", state(before)))
        if number == 1:
            for name, rule in (("random_pairs", "random"), ("best_of_n", "best_worst")):
                if cfg.evaluation.controls[name]:
                    parts.append((f"{name}: the LLM tuned as a control", tuned(name, before, rule)))
        refreshed = _none(f"{fold}{before}/refreshed_model") if cfg.reward.refresh else {}
        parts.append(
            (f"round {number}: DPO, descriptions", refreshed | tuned(f"round_{number}", before, cfg.pairs.rule))
        )
    states = [name for name in ("random_pairs", "best_of_n") if rounds and cfg.evaluation.controls[name]]
    numbers = range(1, rounds + 1)
    made = [name for k in numbers for name in ([f"hinted_{k}", f"round_{k}"] if hinted else [f"round_{k}"])]
    if made and not cfg.evaluation.rounds:
        made = last_rows(made, cfg.evaluation.controls.random_pairs)
    return [*parts, _rows(cfg, [*states, *made], fold)]


def _samples(cfg: DictConfig, state: str, hinted: bool) -> int:
    """Answers per training user in a state."""
    rounds = cfg.policy.rounds
    pairs = (f"hinted_{k}" if hinted else f"round_{k}" for k in range(1, rounds + (1 if hinted else 0)))
    first = () if hinted or not rounds else ("zero_shot",)
    return int(cfg.pairs.samples) if state in (*first, *pairs) else 1


def _rows(cfg: DictConfig, states: list[str], fold: str) -> tuple[str, dict[str, Work]]:
    """The rows of the result table."""
    controls, main = cfg.evaluation.controls, cfg.knowledge.encode
    inputs = [main, *(kind for kind in cfg.evaluation.inputs if kind != main)]
    plain = [n for n in ("no_knowledge", "item_only", "history_shuffled", "history_only") if controls[n]]
    known = [name for name in ("shuffled", "zero_shot") if controls[name]]
    known = [name if kind == main else f"{name}_{kind}" for name in [*known, *states] for kind in inputs]
    return "final rerankers and the table", _none(*(f"{fold}rows/{name}" for name in [*plain, *known]))


def _hints_of(cfg: DictConfig, sizes: Sizes, number: int, fold: str) -> dict[str, Work]:
    """The stages of a round's hints; what a hint gains is seen from the text that the LLM writes with it."""

    def ask(without: int, hints: int) -> Work:
        answers = without + hints
        return Work(answers, answers * int(cfg.llm.max_new_tokens))

    pick, prefix = cfg.agent.pick, f"{fold}hints/round_{number}/"
    work = _reflection(cfg, sizes, ask, ask)
    matrix = _every_hint(cfg, sizes.train + sizes.validation, number, int(cfg.policy.rounds), ask)
    online = cfg.agent.rewards == "online"
    stages = {f"{prefix}hints": work}
    if pick != "random" and not online:
        stages[f"{prefix}rewards"] = matrix
    if pick in ("ppo", "full_information"):
        stages[f"{prefix}agent"] = matrix if online else Work()
    return stages


# --- Re2LLM -----------------------------------------------------------------------------------------------------------


def session_parts(cfg: DictConfig, sizes: Sizes) -> Parts:
    """The parts of Re2LLM."""
    r, rows, rounds = cfg.ranking, cfg.evaluation.rows, int(cfg.agent.rounds)
    if cfg.evaluation.test is not None:
        sizes = Sizes(sizes.train, sizes.validation, min(sizes.test, cfg.evaluation.test), sizes.candidates)
    known, held_out = sizes.train + sizes.validation, sizes.validation + sizes.test

    def whole(without: int, hints: int) -> Work:
        return _ranked(cfg, without + hints, sizes.candidates)

    def ask(without: int, hints: int) -> Work:
        short = sizes.candidates if r.shortlist is None else min(r.shortlist, sizes.candidates)
        return _ranked(cfg, without, sizes.candidates) + _ranked(cfg, hints, short)

    several = len(r.templates) * len(r.priors) * len(r.lengths) > 1
    asked = whole(len(r.templates) * min(known, r.choose_on) if several else 0, 0)
    prior = Work(titles=len(r.templates) * (known + sizes.test) * sizes.candidates) if any(r.priors) else Work()
    parts: Parts = [("sessions", _none("sessions")), ("how the LLM is asked", {"scoring": asked + prior})]
    if uses_hints(cfg):
        parts.append(("sessions, encoded", _none("states")))
        parts += [_session_round(cfg, sizes, number, whole, ask) for number in range(1, rounds + 1)]
        kinds = [("ppo", range(1, cfg.agent.seeds)), ("full_information", range(cfg.agent.seeds))]
        more = [f"agents/{kind}_{seed}" for kind, seeds in kinds if rows[kind] for seed in seeds]
        if more:
            parts.append(("more agents", _none(*more)))
    stages: dict[str, Work] = {}
    if uses_hints(cfg) and cfg.evaluation.matrix:
        stages["matrix/test"] = _every_hint(cfg, sizes.test, rounds, rounds, ask)
        if cfg.agent.rewards == "online" and sizes.validation:
            stages["matrix/validation"] = _every_hint(cfg, sizes.validation, rounds, rounds, ask)
    for name in (str(row) for row, wanted in rows.items() if wanted and row != "random"):
        work = whole(held_out, 0) if name in ("no_hint", "empty_prompt") else Work()
        if name == "empty_prompt" and r.method == "likelihood":
            work += work  # the titles without the session; and within it, for their lengths
        if name in HINT_ROWS and not cfg.evaluation.matrix:
            work = ask(held_out, held_out * (cfg.agent.seeds if name in ("ppo", "full_information") else 1))
        stages[f"rows/{name}"] = work
    return [*parts, ("the rows of the table", stages)]


def _session_round(
    cfg: DictConfig, sizes: Sizes, number: int, whole: Callable[[int, int], Work], ask: Callable[[int, int], Work]
) -> tuple[str, dict[str, Work]]:
    """One round of Re2LLM: what goes wrong, hints, their rewards, the agent."""
    ranking = ask(sizes.train, sizes.train if number > 1 else 0)
    work = ranking + _reflection(cfg, sizes, ask, whole)
    matrix = _every_hint(cfg, sizes.train + sizes.validation, number, int(cfg.agent.rounds), ask)
    stages = {f"round_{number}/hints": work}
    if cfg.agent.rewards == "online":
        stages[f"round_{number}/agent"] = matrix
    else:
        stages |= {f"round_{number}/rewards": matrix, f"round_{number}/agent": Work()}
    return f"round {number}: reflection, hints, PPO", stages


def _ranked(cfg: DictConfig, questions: int, candidates: int) -> Work:
    """Sessions ranked by a written list, or by the likelihoods of the candidates' titles."""
    questions *= int(cfg.ranking.rotations)
    if cfg.ranking.method == "generate":
        return Work(questions, questions * int(cfg.ranking.max_new_tokens))
    return Work(titles=questions * candidates)


# --- both -------------------------------------------------------------------------------------------------------------


def _reflection(
    cfg: DictConfig, sizes: Sizes, ask: Callable[[int, int], Work], own: Callable[[int, int], Work]
) -> Work:
    """Conversations of three answers each, hints tried on others and where they were written, and redundancy.

    Args:
        cfg: The configuration.
        sizes: Of the splits.
        ask: (questions without a hint, with one) -> work, on other sessions.
        own: The same on the session a hint was written for.
    """
    r = cfg.reflection
    talks, others = min(r.sessions, sizes.train), min(r.others, sizes.train)
    tried = min(r.tried, talks * r.hints)
    said = Work(3 * talks, 3 * talks * int(r.max_new_tokens))
    same = Work(tried, tried * SAME_TOKENS) if r.ask_redundancy else Work()
    return said + ask(others, others * tried) + own(min(talks, tried), tried) + same


def _every_hint(cfg: DictConfig, asked: int, number: int, rounds: int, ask: Callable[[int, int], Work]) -> Work:
    """Every hint that a round's base may hold, for so many users or sessions, beside no hint."""
    r = cfg.reflection
    return ask(asked, asked * min(r.size * number // rounds, r.tried * number))


def _none(*stages: str) -> dict[str, Work]:
    """Stages for which the LLM has nothing to write."""
    return {stage: Work() for stage in stages}
