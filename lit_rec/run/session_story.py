"""The rows of the Re2LLM recipe: their order, what each has to beat, and what comes of it in words (METHODS 2.6)."""

from collections.abc import Mapping, Sequence

from lit_rec.run.headline import Comparison, Headline, claim, describe_difference, limit

Means = Mapping[str, float]  # row -> mean of the headline metric

_RECOMMENDERS = ("random", "popularity", "item_knn", "sasrec")
_WANTED: dict[str, Sequence[str]] = {
    "random": (),
    "popularity": ("random",),
    "item_knn": ("random",),
    "sasrec": ("random",),
    "empty_prompt": ("random",),
    "no_hint": ("random", "empty_prompt"),
    "random_hint": ("no_hint",),
    "best_fixed_hint": ("no_hint",),
    "ppo": ("no_hint", "random_hint", "best_fixed_hint"),
    "full_information": ("no_hint", "best_fixed_hint"),
    "oracle": (),  # it sees the answers: a ceiling, not a competitor
}
_CLAIMS = {
    ("no_hint", "empty_prompt"): (
        "The LLM uses the session",
        "The LLM ranks worse with the session than without it",
        "Whether the LLM uses the session is not shown",
    ),
    ("best_fixed_hint", "no_hint"): (
        "A hint helps",
        "Even the best single hint hurts",
        "Whether a hint helps is not shown",
    ),
    ("ppo", "no_hint"): (
        "The agent's hints help",
        "The agent's hints hurt",
        "Whether the agent's hints help is not shown",
    ),
    ("ppo", "best_fixed_hint"): (
        "Choosing a hint for each session helps",
        "Choosing a hint for each session is worse than one hint for all",
        "Choosing a hint for each session is not shown to beat one hint for all",
    ),
    ("ppo", "random_hint"): (
        "The agent chooses better than chance",
        "The agent chooses worse than chance",
        "The agent is not shown to choose better than chance",
    ),
}


_LEFT_OUT = {  # what a gain of the agent is worth where its hints are not shown to help: it may give nobody one
    "best_fixed_hint": "The agent does better than one hint for all, not surely by its hints: it may leave them out",
    "random_hint": "The agent does better than random hints, not surely by its hints: it may leave them out",
}


def row_order(row: str) -> tuple[int, str]:
    """Sort key: what needs no LLM first, then the LLM, then hints, last the oracle."""
    known = list(_WANTED)
    return (known.index(row), "") if row in known else (len(known), row)


def sentences(mine: Sequence[Comparison], means: Means, name: str, headline: Headline, runs: int = 1) -> list[str]:
    """Does the LLM use the session, do hints help, does choosing help, and where do LLM-free recommenders stand?"""
    found = {(c.row, c.against): c for c in mine}
    who = f"with {name}, " if name else ""
    lines = []
    for pair, words in _CLAIMS.items():
        if c := found.get(pair):
            gap = f"{describe_difference(c, headline.drawn)} in {headline.full_label()}"
            claimed = claim(c, words)
            if claimed == words[0] and c.row == "ppo" and c.against in _LEFT_OUT:
                helped = found.get(("ppo", "no_hint"))
                claimed = claimed if not helped or _better(helped) else _LEFT_OUT[c.against]
            lines.append(f"{claimed}: {who}{c.row} against {c.against} is {gap}.{limit(c, headline.drawn)}")
    return lines + _oracle_line(means, who, headline) + _recommender_line(means, who, headline)


def _better(c: Comparison) -> bool:
    return c.sure and c.difference.mean > 0


def _oracle_line(means: Means, who: str, headline: Headline) -> list[str]:
    if not {"no_hint", "ppo", "oracle"} <= set(means):
        return []
    without, agent, oracle = (means[row] for row in ("no_hint", "ppo", "oracle"))
    if oracle <= without:
        claimed = "No hint in the base could have helped"
    elif agent <= without:
        claimed = "The agent got none of what the best hint for each session would bring"
    else:
        share = (agent - without) / (oracle - without)
        claimed = f"The agent got {share:.0%} of what the best hint for each session would bring"
    return [
        f"{claimed}: {who}ppo gains {agent - without:+.4f} over no_hint and oracle {oracle - without:+.4f} in "
        f"{headline.full_label()}. The oracle sees the answers."
    ]


def _recommender_line(means: Means, who: str, headline: Headline) -> list[str]:
    ours = next((row for row in ("ppo", "best_fixed_hint", "no_hint") if row in means), None)
    others = sorted((row for row in _RECOMMENDERS if row in means), key=lambda row: -means[row])
    if ours is None or not others:
        return []
    above = [row for row in others if means[row] > means[ours]]
    claimed = "Without an LLM and above it" if above else "No row without an LLM stands above it"
    shown = ", ".join(f"{row} {means[row]:.4f}" for row in above or others[:1])
    middle = shown if above else f"the nearest is {shown}"
    return [f"{claimed}: {who}{middle} against {ours} {means[ours]:.4f} in {headline.full_label()}; means, not tested."]


def wanted(row: str) -> Sequence[str]:
    """Return the rows that `row` must beat."""
    return _WANTED.get(row, ("no_hint",))
