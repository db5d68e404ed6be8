"""A whole session experiment small enough for a test: JSON lines, titles, both tiny models and an experiment YAML."""

import json
import random
from pathlib import Path

from tests.tiny import save_encoder, save_llm
from tests.worlds import ITEMS, TITLES, World, prompt_words

CANDIDATES, TRAIN, TEST = 12, 30, 24
EXPERIMENT = """\
defaults:
  - re2llm_schema
  - data: session_files
  - _self_
name: tiny
seed: 3
run:
  dir: {root}/run
  cache: {root}/cache
data:
  root: {root}/data
  name: tiny
  validation: 8
  item_noun: movie
  verb: watched
llm:
  name: tiny
  hub: {root}/llm
  dtype: float32
  batch_size: 12
encoder:
  name: tiny
  hub: {root}/encoder
  dtype: float32
  max_tokens: 64
ranking:
  templates: [favorites_v1, next_v1]
  lengths: [0.0, 1.0]
  priors: [0.0, 0.5]
  choose_on: 6
  shortlist: 9
  batch_tokens: 256
reflection:
  sessions: 14
  error_rank: 2
  max_new_tokens: 12
  temperature: 1.5
  others: 4
  min_gain: -1.0
  size: 6
agent:
  rounds: 2
  epochs: 3
  batch_size: 8
  update_epochs: 2
  seeds: 2
evaluation:
  ks: [2, 5]
  sasrec:
    max_epochs: 2
    dim: 8
trainer:
  accelerator: cpu
  precision: 32-true
  threads: 1
"""
# One round and the rows that a prediction can be compared with.
OFF = [
    "popularity",
    "item_knn",
    "sasrec",
    "empty_prompt",
    "random_hint",
    "best_fixed_hint",
    "full_information",
    "oracle",
]
LEAN = ["agent.rounds=1", "agent.seeds=1", "ranking.templates=[favorites_v1]", "evaluation.matrix=false"]
LEAN += [f"evaluation.rows.{row}=false" for row in OFF]


def lines(count: int, seed: int) -> list[str]:
    """Different sessions whose target follows their last item, as JSON lines."""
    draw = random.Random(seed)
    spans = draw.sample([(start, start + n) for start in range(1, ITEMS - 8) for n in range(2, 7)], count)
    made = []
    for start, target in spans:
        session = list(range(start, target))
        others = [i for i in range(1, ITEMS + 1) if i not in (*session, target)]
        candidates = [target, *draw.sample(others, CANDIDATES - 1)]
        draw.shuffle(candidates)
        made.append(json.dumps({"session": session, "target": target, "candidates": candidates}))
    return made


def make_session_world(root: Path) -> World:
    """Write the data, both models and the experiment below `root`."""
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    (data / "titles.json").write_text(json.dumps({str(n + 1): title for n, title in enumerate(TITLES)}))
    made = lines(TRAIN + TEST, 0)
    (data / "train.jsonl").write_text("\n".join(made[:TRAIN]) + "\n")
    (data / "test.jsonl").write_text("\n".join(made[TRAIN:]) + "\n")
    words = [*prompt_words(), *(f'{title}"' for title in TITLES), '"', "1.", "2.", "3."]
    save_llm(root / "llm", words)
    save_encoder(root / "encoder", words)
    (root / "tiny.yaml").write_text(EXPERIMENT.format(root=root))
    return World(root)
