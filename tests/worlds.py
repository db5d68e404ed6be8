"""A whole experiment small enough for a test: data files, a tiny LLM, a tiny encoder and an experiment YAML."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from lit_rec.llm.prompts import TEMPLATES
from tests.tiny import save_encoder, save_llm

GENRES = ("drama", "comedy", "horror", "space", "crime", "music")
USERS, ITEMS, RATINGS = 24, 60, 30
TITLES = [f"film{i}" for i in range(1, ITEMS + 1)]
EXPERIMENT = """\
defaults:
  - rlrf_schema
  - _self_
name: tiny
seed: 3
run:
  dir: {root}/run
  cache: {root}/cache
data:
  _target_: lit_rec.data.atomic.AtomicFiles
  root: {root}/data
  name: tiny
  title: title
  item_noun: movie
lists:
  history: 8
prompt:
  template: short_v1
  history: 6
llm:
  name: tiny
  hub: {root}/llm
  dtype: float32
  batch_size: 12
  max_new_tokens: 6
encoder:
  name: tiny
  hub: {root}/encoder
  dtype: float32
  max_tokens: 64
reranker:
  max_epochs: 2
  patience: 2
reward:
  metric: ndcg
  folds: 2
pairs:
  samples: 3
policy:
  rounds: 2
  epochs: 1
  batch_size: 2
  accumulate: 2
  lr: 0.01
  beta: 0.1
evaluation:
  test: 0.25
  validation: 0.25
trainer:
  accelerator: cpu
  precision: 32-true
  threads: 1
"""
HINTS = """\
reflection:
  sessions: 8
  max_new_tokens: 12
  temperature: 1.5
  others: 4
  min_gain: -1.0
  size: 4
agent:
  epochs: 3
  batch_size: 8
  update_epochs: 2
"""
# Just the paper's row on top of one round: for variants of which only the middle matters.
BARE = [
    "policy.rounds=1",
    *(f"evaluation.controls.{name}=false" for name in ("no_knowledge", "item_only", "history_only", "shuffled")),
    *(f"evaluation.controls.{name}=false" for name in ("zero_shot", "random_pairs")),
    "evaluation.inputs=[answer]",
]


@dataclass(frozen=True)
class World:
    """Where everything of a tiny experiment lies."""

    root: Path

    @property
    def config(self) -> str:
        """The experiment's YAML file."""
        return str(self.root / "tiny.yaml")

    @property
    def run(self) -> Path:
        """The run folder of the YAML file."""
        return self.root / "run"


def prompt_words() -> list[str]:
    """Every word of two prompts, so that the tiny LLM reads more than unknown tokens; new templates change nothing."""
    templates = yaml.safe_load(TEMPLATES.read_text())["templates"]
    words = " ".join(text for name in ("preferences_v1", "short_v1") for text in templates[name].values()).split()
    quoted = [f'"{title}",' for title in TITLES]
    return [*words, *GENRES, *TITLES, *quoted, "1", "2", "3", "4", "5", "stars;", "star;", "stars", "star"]


def write_data(folder: Path, *, users: int = USERS, seed: int = 0) -> None:
    """RecBole's atomic files of users who like two genres each."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    genres = {i: draw.sample(GENRES, draw.randint(1, 2)) for i in range(1, ITEMS + 1)}
    lines = ["item_id:token\ttitle:token\tgenres:token_seq"]
    lines += [f"{i}\t{TITLES[i - 1]}\t{' '.join(g)}" for i, g in genres.items()]
    (folder / "tiny.item").write_text("\n".join(lines) + "\n")
    lines = ["user_id:token\tage:token\tgender:token"]
    lines += [f"u{u}\t{draw.choice(('18', '25', '35'))}\t{draw.choice('FM')}" for u in range(users)]
    (folder / "tiny.user").write_text("\n".join(lines) + "\n")
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        liked = set(draw.sample(GENRES, 2))
        for time, item in enumerate(draw.sample(range(1, ITEMS + 1), RATINGS)):
            rating = draw.choice((4, 5)) if liked & set(genres[item]) else draw.choice((1, 2, 3))
            lines.append(f"u{user}\t{item}\t{rating}\t{1000 + time}")
    (folder / "tiny.inter").write_text("\n".join(lines) + "\n")


def make_world(root: Path, *, users: int = USERS) -> World:
    """Write the data, both models and the experiment below `root`."""
    write_data(root / "data", users=users)
    words = prompt_words()
    save_llm(root / "llm", words)
    save_encoder(root / "encoder", words)
    (root / "tiny.yaml").write_text(EXPERIMENT.format(root=root))
    return World(root)


def make_unified_world(root: Path) -> World:
    """The same with hints: the unified recipe."""
    world = make_world(root)
    experiment = EXPERIMENT.format(root=root).replace("rlrf_schema", "unified_schema")
    (root / "tiny.yaml").write_text(experiment + HINTS)
    return world


def means(run: Path) -> dict[tuple[str, ...], float]:
    """The means of a run's `results.json`, by row, split, metric, convention and unit."""
    lines = json.loads((run / "results.json").read_text())
    return {tuple(r[name] for name in ("row", "split", "metric", "convention", "unit")): r["mean"] for r in lines}


def assert_told(capsys: object, code: int, *words: str) -> str:
    """The command ended with code 2 and ONE message on stderr that holds these words."""
    captured = capsys.readouterr()  # type: ignore[attr-defined]
    assert code == 2, captured.out + captured.err
    assert captured.err.count("error:") == 1
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    for word in words:
        assert word in captured.err, captured.err
    return captured.err
