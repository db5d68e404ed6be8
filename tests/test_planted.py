"""Learning is visible where it must be: a world whose truth is known, played through the whole loop.

Every user likes one genre, and only the history says which. The language model reads it there, but names it in less
than half of its answers; the reranker sees the answer and not the history. So an answer helps exactly when it names
the true genre, and the rewards have to find that out.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lit_rec.config import load_config
from lit_rec.data.atomic import AtomicFiles
from lit_rec.data.canonical import RatingsData
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.prompts import Prompts
from lit_rec.llm.store import AnswerStore
from lit_rec.recipes import rlrf
from lit_rec.recipes.loop import Loop
from lit_rec.recipes.summary import summarise
from lit_rec.run.folder import RunFolder
from lit_rec.run.statistics import Estimate, mean_over_users, paired_difference
from lit_rec.threads import one_thread
from tests.tiny import save_word_encoder, tiny_llama, word_tokenizer

GENRES = ("western", "comedy", "horror", "romance", "crime", "fantasy")
USERS, ITEMS_PER_GENRE = 400, 16
INTERACTIONS, LIKED = 26, 16  # of a user; those of the true genre
SHOWN = 10  # history items in a prompt
KNOWN = 0.5  # share of true names in what the untrained model learnt; it reads worse, and says fewer
ROUNDS = 2
FRESH = 8  # answers per held-out user and state that no part of the loop has seen
ROLES = tuple(f"<|im_start|>{role}" for role in ("system", "user", "assistant"))

CONFIG = """
defaults: [rlrf_schema, _self_]
name: planted
seed: {seed}
run: {{dir: "{root}/run"}}
data:
  _target_: lit_rec.data.atomic.AtomicFiles
  root: "{root}"
  name: planted
  title: title
  attributes: [genre]
lists: {{history: {shown}}}
prompt: {{template: short_v1, history: {shown}}}
llm: {{name: tiny, hub: "{root}/llm", batch_size: 256, max_new_tokens: 4, dtype: float32}}
encoder: {{name: words, hub: "{root}/encoder", batch_size: 256, dtype: float32}}
reranker: {{architecture: dlcm, lr: 5.0e-3, batch_size: 32, max_epochs: 8, patience: 4}}
reward: {{folds: 3}}
pairs: {{samples: 6}}
policy:
  rounds: {rounds}
  epochs: 2
  batch_size: 8
  accumulate: 1
  lr: 1.0e-3
  beta: 0.1
  lora: {{r: 8, alpha: 16}}
evaluation:
  test: 0.2
  validation: 0.2
  inputs: [answer]
  rounds: false
  controls: {{no_knowledge: false, item_only: false, history_only: false}}
trainer: {{accelerator: cpu, precision: 32-true, threads: 1}}
"""


@dataclass
class Outcome:
    """What a run left, and what fresh answers of its policies say about held-out users."""

    loop: Loop
    frames: pl.DataFrame
    rewards: dict[str, np.ndarray]  # state -> [validation users], mean over fresh answers
    right: dict[str, float]  # state -> share of fresh answers that name the true genre
    true: dict[int, str]  # user row -> genre

    @property
    def rounds(self) -> list[str]:
        return ["zero_shot", *(f"round_{k}" for k in range(1, ROUNDS + 1))]

    def gain(self, state: str, over: str) -> Estimate:
        return mean_over_users(self.rewards[state] - self.rewards[over])


def tastes(rng: random.Random, genre: int) -> list[int]:
    """Items of a user, numbered from 0 and mixed in time; item i is of genre i % 6."""
    every = range(len(GENRES) * ITEMS_PER_GENRE)
    rest = [item for item in every if item % len(GENRES) != genre]
    found = rng.sample(every[genre :: len(GENRES)], LIKED) + rng.sample(rest, INTERACTIONS - LIKED)
    rng.shuffle(found)
    return found


def stars(rng: random.Random, item: int, genre: int) -> int:
    return 5 if item % len(GENRES) == genre else rng.choice((1, 2))


def write_world(root: Path, seed: int) -> dict[str, str]:
    """Atomic files; returns the genre of every user id."""
    rng = random.Random(seed)
    n_items = len(GENRES) * ITEMS_PER_GENRE
    items = [f"i{i}\tm{i}\t{GENRES[i % len(GENRES)]}" for i in range(n_items)]
    (root / "planted.item").write_text("\n".join(["item_id:token\ttitle:token\tgenre:token_seq", *items]))
    lines, true = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"], {}
    for user in range(USERS):
        genre = rng.randrange(len(GENRES))
        true[f"u{user}"] = GENRES[genre]
        for time, item in enumerate(tastes(rng, genre)):
            lines.append(f"u{user}\ti{item}\t{stars(rng, item, genre)}\t{time}")
    (root / "planted.inter").write_text("\n".join(lines))
    return true


def invented_prompts(data: RatingsData, n: int, seed: int) -> tuple[Prompts, torch.Tensor]:
    """Prompts of users who are not in the data, and their genres."""
    rng = random.Random(seed)
    number = {item: row for row, item in enumerate(data.items["item_id"])}
    items, ratings = torch.zeros(n, SHOWN, dtype=torch.long), torch.zeros(n, SHOWN)
    genres = torch.tensor([rng.randrange(len(GENRES)) for _ in range(n)])
    for user, genre in enumerate(genres.tolist()):
        shown = tastes(rng, genre)[:SHOWN]
        items[user] = torch.tensor([number[f"i{i}"] for i in shown])
        ratings[user] = torch.tensor([float(stars(rng, i, genre)) for i in shown])
    users = pl.DataFrame({"user_id": [f"invented_{i}" for i in range(n)]})
    return Prompts(replace(data, users=users), (items, ratings), "short_v1", SHOWN), genres


def save_speaker(folder: Path, data: RatingsData, seed: int, *, users: int = 4096, steps: int = 220) -> None:
    """Write a model that says "likes GENRE" to anybody, and learnt to name the true genre in `KNOWN` of the cases."""
    prompts, genres = invented_prompts(data, users, seed)
    messages = prompts.users(range(users))
    words = dict.fromkeys(w for chat in messages for m in chat for w in m["content"].split())
    titles = [f'"{title}",' for title in data.items["title"][1:]]
    tokenizer = word_tokenizer([*ROLES, *words, *titles, "likes", *GENRES])
    said = tokenizer.convert_tokens_to_ids(["likes", GENRES[0], "<|im_end|>"])
    encoded = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
    prompt_ids = torch.tensor(encoded)  # one word per item and rating: all of one length
    names = torch.tensor(tokenizer.convert_tokens_to_ids(list(GENRES)))
    model = tiny_llama(len(tokenizer), hidden=48, seed=seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=7e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 7e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(users, (32,), generator=generator)
        known = 1.0 if step < 0.75 * steps else KNOWN  # first to read histories, then to be unsure
        weights = torch.full((len(rows), len(GENRES)), (1 - known) / (len(GENRES) - 1))
        weights[torch.arange(len(rows)), genres[rows]] = known
        named = names[torch.multinomial(weights, 1, generator=generator)]
        answer = torch.cat([torch.full_like(named, said[0]), named, torch.full_like(named, said[2])], dim=1)
        ids = torch.cat([prompt_ids[rows], answer], dim=1)
        logits = model(ids, logits_to_keep=4).logits[:, :-1]
        target = F.one_hot(answer, logits.shape[-1]).float()
        # Cross-entropy against all names at once: what sampled names come to, without their noise.
        target[:, 1] = 0
        target[:, 1, names] = weights
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def play(root: Path, seed: int) -> Outcome:
    """Build the world, run the recipe on it, and question its policies anew."""
    true = write_world(root, seed)
    data = AtomicFiles(root=str(root), name="planted", title="title", attributes=["genre"]).load()
    with torch.random.fork_rng():
        save_speaker(root / "llm", data, seed)
    save_word_encoder(root / "encoder", GENRES)
    (root / "planted.yaml").write_text(CONFIG.format(seed=seed, root=root, shown=SHOWN, rounds=ROUNDS))
    cfg = load_config(root / "planted.yaml")
    with RunFolder(cfg.run.dir) as run:
        frames, (loop,) = rlrf.fit(cfg, run)
    by_row = dict(enumerate(true[user] for user in loop.ground.data.users["user_id"]))
    outcome = Outcome(loop, frames, {}, {}, by_row)
    question(outcome, root)
    return outcome


def question(outcome: Outcome, root: Path) -> None:
    """Let every kept policy answer the validation users again, with a seed of its own, and score it."""
    loop = outcome.loop
    cfg, ground = loop.cfg, loop.ground
    llm = LanguageModel(cfg.llm, cfg.policy.lora, AnswerStore(root / "fresh"), device="cpu", seed=cfg.seed + 999)
    users = loop.splits.validation
    who = users.repeat_interleave(FRESH)
    for state in ("zero_shot", "random_pairs", *outcome.rounds[1:]):
        if state != "zero_shot":
            kept = loop.run.stage(loop.name(f"{state}/policy")) / "adapter" / "adapter_model.safetensors"
            llm.load_adapter(load_file(kept))
        given = llm.answers(ground.prompts.users(users.tolist()), [FRESH] * len(users))
        texts = [answer.text for answers in given for answer in answers]
        judge, r = loop.judge.model(), cfg.reward
        vectors = ground.encoder.encode(texts)
        rewards = judge.answer_rewards(ground.lists, vectors, who, reward=r.metric, k=r.k, convention=r.convention)
        outcome.rewards[state] = rewards.view(-1, FRESH).mean(1).double().numpy()
        named = [text == f"likes {outcome.true[user]}" for text, user in zip(texts, who.tolist(), strict=True)]
        outcome.right[state] = float(np.mean(named))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    with one_thread():  # such small matrices only wait for each other
        yield play(tmp_path_factory.mktemp("planted"), seed=1)


def test_the_untrained_model_speaks_the_format_and_knows_little(outcome: Outcome) -> None:
    first = outcome.loop.answers("zero_shot")
    assert first["text"].is_in([f"likes {genre}" for genre in GENRES]).mean() > 0.95
    assert 1.2 / len(GENRES) < outcome.right["zero_shot"] < 0.5


def test_held_out_reward_rises_round_over_round(outcome: Outcome) -> None:
    means = [float(outcome.rewards[state].mean()) for state in outcome.rounds]
    assert means == sorted(means)
    for before, after in pairwise(outcome.rounds):
        assert outcome.gain(after, before).low > 0, (before, after, means)
    assert outcome.gain(outcome.rounds[-1], "zero_shot").low > 0.1, means


def test_held_out_answers_come_to_name_the_true_genre(outcome: Outcome) -> None:
    shares = [outcome.right[state] for state in outcome.rounds]
    assert shares == sorted(shares)
    assert shares[1] > shares[0] + 0.15
    assert shares[-1] > 0.7


def test_test_ranking_with_the_tuned_knowledge_beats_untrained_and_shuffled(outcome: Outcome) -> None:
    for row in ("zero_shot", "shuffled", "random_pairs"):
        found = paired_difference(outcome.frames, outcome.rounds[-1], row, "ndcg@5|standard")
        assert found.low > 0.1, (row, found)


def test_more_training_on_random_pairs_does_not_do_it(outcome: Outcome) -> None:
    random_gain, gain = (outcome.gain(state, "zero_shot").mean for state in ("random_pairs", "round_1"))
    assert abs(random_gain) < gain / 2
    assert outcome.gain("round_1", "random_pairs").low > 0
    assert outcome.right["random_pairs"] < outcome.right["zero_shot"] + 0.1


def test_rewards_find_the_truth(outcome: Outcome) -> None:
    pairs = outcome.loop.pairs("zero_shot", "best_worst")
    genre = {name: outcome.true[row] for row, name in enumerate(outcome.loop.ground.data.users["user_id"])}
    share = {
        side: np.mean([row[side][0]["content"] == f"likes {genre[row['user_id']]}" for row in pairs.to_dicts()])
        for side in ("chosen", "rejected")
    }
    assert share["chosen"] > 0.6
    assert share["rejected"] < 0.15


def test_logged_training_is_sensible(outcome: Outcome) -> None:
    kl = 0.0
    for state in outcome.rounds[1:]:
        train = summarise(outcome.loop, state)["train"]
        assert train["accuracy"] > 0.7, (state, train)
        assert train["loss"] < np.log(2), (state, train)
        assert train["margin"] > 0.03, (state, train)
        assert train["kl"] > kl, (state, train)  # ever further from the untrained model
        kl = train["kl"]
    control = summarise(outcome.loop, "random_pairs")["train"]
    assert control["accuracy"] < 0.7
    assert control["margin"] < summarise(outcome.loop, "round_1")["train"]["margin"] / 2


def test_what_the_run_reports_agrees_with_fresh_answers(outcome: Outcome) -> None:
    told = summarise(outcome.loop, outcome.rounds[-1])["heldout_gain"]
    fresh = outcome.gain(outcome.rounds[-1], "zero_shot")
    assert told["ci95"][0] > 0
    assert told["ci95"][0] < fresh.mean < told["ci95"][1]
