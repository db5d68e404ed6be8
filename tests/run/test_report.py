import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from lit_rec.run.cost import Part
from lit_rec.run.report import write_report
from lit_rec.run.results import result_rows
from tests.pages import EVIL, Page

FACTS = "{llm: {name: tiny}, encoder: {name: small}, pairs: {samples: 4}, reward: {metric: ndcg}}"


def frames(rows: tuple[str, ...], reranker: str = "dlcm") -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.concat(
        pl.DataFrame(
            {
                "row": row,
                "reranker": reranker,
                "seed": seed,
                "fold": 0,
                "split": "test",
                "user": np.arange(30),
                "list": np.arange(30),
                **{f"{m}@5|{c}": rng.random(30, dtype="float32") for m in ("ndcg", "map") for c in ("kar", "standard")},
            }
        )
        for row in rows
        for seed in range(2)
    )


def record(text: str = "likes films") -> dict[str, Any]:
    rng = np.random.default_rng(1)
    state: dict[str, Any] = {
        "heldout_reward": {"mean": 0.7, "ci95": [0.65, 0.75], "n": 20},
        "train_reward_mean": 0.71,
        "reward_spread": None,
        "tie_rate": 0.25,
        "pairs": 12,
        "validation": {"ndcg@5|kar": {"mean": 0.6, "ci95": [None, None], "n": 1}},
    }
    rounds = [
        {"round": 0, "name": "zero_shot", **state, "train": None},
        {
            "round": 1,
            "name": "round_1",
            **state,
            "train": {"loss": 0.69, "margin": None, "kl": 0.01},
            "heldout_gain": {"mean": 0.0125, "ci95": [-0.0025, 0.0275], "n": 20},
            "seconds": 4321.0,
            "training_seconds": 1234.0,
        },
        {"round": 1, "name": text, "heldout_reward": None, "train": {"loss": 0.7}},
    ]
    rewards = pl.DataFrame(
        {
            "round": [0, 1] * 50,
            "user": range(100),
            "user_id": [text] * 100,
            "sample": [0] * 100,
            "text": [text] * 100,
            "tokens": rng.integers(5, 60, 100),
            "reward": rng.random(100),
        }
    )
    pairs = pl.DataFrame(
        {
            "round": [1] * 40,
            "user_id": [f"{text} {i}" for i in range(40)],
            "prompt": [f"prompt {text}"] * 40,
            "chosen": [f"chosen {text}"] * 40,
            "rejected": [f"rejected {text}"] * 40,
            "chosen_reward": np.linspace(0.5, 0.9, 40),
            "rejected_reward": [0.4] * 40,
        }
    )
    return dict(
        title=f"run {text}",
        facts={"LLM": text, text: 3},
        rounds=rounds,
        rewards=rewards,
        pairs=pairs,
        stages=[
            {"name": text, "seconds": 4000.0, "counts": {"answers": 1200, text: text}, "reused": True},
            {"name": "evaluation", "seconds": None, "counts": None, "reused": False},
        ],
        config_yaml=f"name: {text}\n",
        environment={"versions": {"torch": "2.8", text: text}},
    )


def write(path: Path, run: dict[str, Any], rows: tuple[str, ...] = ()) -> str:
    held = frames(rows) if rows else None
    results = result_rows(held, task="rerank", dataset="ml-1m", protocol="kar", resamples=100) if rows else []
    write_report(path, rows=results, frames=held, **run)
    return path.read_text(encoding="utf-8")


def test_a_whole_report_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", record(), ("no_knowledge", "history_only", "zero_shot", "round_1"))
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 4
    assert not {"link", "iframe", "object", "img", "a"} & set(page.tags)
    assert page.tags.count("script") == 1  # the page's own, see test_report_search.py
    assert not [a for a in page.attributes if a[1].startswith("on") or a[1] in ("src", "action", "srcset")]
    assert all(value.startswith("#") for _, name, value in page.attributes if name.endswith("href"))
    assert not re.findall(r"url\((?!#)|@import", text)
    for part in (
        "What this run shows",
        "NDCG@5",
        "kar",
        "round_1",
        "Largest reward gaps",
        "Drawn at random",
        "1:06:40",
    ):
        assert part in page.text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_colours_follow_the_page_in_light_and_dark(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", record(), ("history_only", "round_1"))
    figures = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in figures
    assert not re.findall(r"(?:fill|stroke): #(?!000000)", figures)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_that_data_or_an_llm_wrote_becomes_markup(tmp_path: Path, evil: str) -> None:
    plain = Page(write(tmp_path / "plain.html", record(), ("history_only", "round_1", "row x")))
    page = Page(write(tmp_path / "evil.html", record(evil), ("history_only", "round_1", f"row {evil}")))
    assert sorted(page.tags) == sorted(plain.tags)
    assert page.tags.count("script") == 1
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert page.open == []
    assert evil.replace("\x00", "\ufffd")[1:20] in page.text.replace("\x00", "\ufffd")


def test_pairs_are_the_largest_gaps_and_others_at_random(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", record())
    users = [int(u) for u in re.findall(r"User likes films (\d+)", text)]
    assert users[:12] == list(range(39, 27, -1))
    assert sorted(users) == list(range(40))
    assert Page(text).text.count("prompt likes films") == 40


@pytest.mark.parametrize(
    ("run", "rows", "absent"),
    [
        ({}, (), ("Round by round", "Preference pairs", "The run itself", "What this run shows")),
        (
            dict(title="only results"),
            ("history_only", "zero_shot"),
            ("Round by round", "Preference pairs"),
        ),
        (dict(pairs=record()["pairs"]), (), ("Round by round", "What this run shows")),
        (dict(rewards=record()["rewards"]), (), ("Preference pairs",)),
        (dict(rounds=[{"round": 0, "heldout_reward": None}]), (), ("Round by round",)),
        (
            dict(pairs=record()["pairs"].clear(), rewards=record()["rewards"].clear()),
            (),
            ("Preference pairs",),
        ),
    ],
)
def test_what_is_missing_is_left_out(tmp_path: Path, run: dict[str, Any], rows: tuple[str, ...], absent: tuple) -> None:
    page = Page(write(tmp_path / "report.html", run, rows))
    assert page.open == []
    assert not [title for title in absent if title in page.text]
    assert "How to read the numbers" in page.text
    assert ("No row was evaluated" in page.text) == (not rows)


def test_two_rerankers_get_a_section_each(tmp_path: Path) -> None:
    both = pl.concat([frames(("history_only", "zero_shot")), frames(("history_only", "zero_shot"), "prm")])
    rows = result_rows(both, task="rerank", dataset="x", protocol="strict", resamples=100)
    write_report(tmp_path / "report.html", rows=rows, frames=both)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 2
    assert "DLCM" in page.text
    assert "PRM" in page.text
    assert "Beside the published numbers" not in page.text


def test_equal_runs_write_equal_reports(tmp_path: Path) -> None:
    a = write(tmp_path / "a.html", record(), ("history_only", "zero_shot"))
    assert a == write(tmp_path / "b.html", record(), ("history_only", "zero_shot"))


def test_facts_come_from_the_configuration_and_the_results(tmp_path: Path) -> None:
    config = "name: small\nllm:\n  name: smol\npolicy:\n  rounds: 2\nevaluation: null\n"
    page = Page(write(tmp_path / "report.html", {"config_yaml": config}, ("history_only", "zero_shot")))
    for part in ("small", "smol", "ml-1m", "DPO rounds"):
        assert part in page.text
    assert "Folds" not in page.text
    assert Page(write(tmp_path / "broken.html", {"config_yaml": "a: [b: {"})).open == []


def test_controls_and_nan_are_in_the_tables_but_not_in_the_curves(tmp_path: Path) -> None:
    nan = float("nan")
    rounds = [
        {
            "round": 0,
            "name": "zero_shot",
            "heldout_reward": {"mean": 0.7, "ci95": [nan, nan], "n": 1},
            "tie_rate": nan,
        },
        {"round": 1, "name": "random_pairs", "heldout_reward": {"mean": 0.9, "ci95": [0.8, 1.0], "n": 5}},
    ]
    text = write(tmp_path / "report.html", {"rounds": rounds})
    page = Page(text)
    assert "random_pairs" in page.text
    assert "0.9000 [0.8000, 1.0000]" in page.text
    assert "nan" not in page.text.split("How to read")[0].split("Round by round")[1]
    assert "round 1" not in "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))


def hinted_record() -> dict[str, Any]:
    """Two rounds with hints, as the unified recipe leaves them; every state has rewards of its own."""
    names = ["zero_shot", "hinted_1", "round_1", "hinted_2", "round_2", "best_of_n"]
    behind = [0, 0, 1, 1, 2, 1]
    rounds = [
        {"round": k, "name": name, "heldout_reward": {"mean": 0.5 + n / 100, "ci95": [0.4, 0.6], "n": 9}, "pairs": n}
        for n, (k, name) in enumerate(zip(behind, names, strict=True))
    ]
    places = [0.0, 0.5, 1.5, 2.0]  # of zero_shot, hinted_1, hinted_2 and round_2
    rewards = pl.DataFrame(
        {"round": places * 10, "tokens": range(5, 45), "reward": [0.25 * (1 + n % 4) for n in range(40)]}
    ).with_columns(sample=pl.lit(0))
    others = rewards.filter(pl.col("round") < 2).with_columns(sample=pl.lit(1), reward=pl.lit(0.9))
    rewards = pl.concat([rewards, others])  # the last round has one answer a user, as it makes no pairs
    return {"rounds": rounds, "rewards": rewards}


def drawn(text: str) -> list[list[str]]:
    """The words in every figure of a page."""
    return [re.findall(r"<text[^>]*>([^<]*)", svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_hints_stand_between_the_rounds_in_tables_and_curves(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", hinted_record())
    body = text.split("<h3>Answers and rewards</h3>")[1].split("</table>")[0]
    lines = re.findall(r'class="name">(.*?)</th><td class="num"[^>]*>(.*?)</td>', body)
    order = ["zero-shot", "hints 1", "round 1", "hints 2", "round 2"]
    assert [name for name, _ in lines] == [*order, "best_of_n"]
    assert lines[1][1] == "0.5100 [0.4000, 0.6000]"
    rounds, rewards, length = drawn(text)
    assert [t for t in rounds if t[:4] in ("zero", "hint", "roun", "best")] == order
    assert [t for t in rewards if "mean" in t] == [
        "zero-shot: mean 0.2500, 10 users",
        "hints 1: mean 0.5000, 10 users",
        "hints 2: mean 0.7500, 10 users",
        "round 2: mean 1.0000, 10 users",
    ]
    assert "hints, before DPO" in length
    assert "Hints k: the hints of round k" in Page(text).text
    plain = write(tmp_path / "plain.html", record())
    assert not [part for part in ("hints, before DPO", "hints 1", "Hints k") if part in plain]


def test_a_curve_of_many_rounds_names_every_place(tmp_path: Path) -> None:
    names = ["zero_shot", *(f"{kind}_{k}" for k in range(1, 6) for kind in ("hinted", "round"))]
    rounds = [{"round": 0, "name": name, "heldout_reward": {"mean": 0.5}} for name in reversed(names)]
    text = write(tmp_path / "report.html", {"rounds": rounds})
    places = [word for word in drawn(text)[0] if re.match(r"zero|hints|round", word)]
    assert places == ["zero-shot", *(f"{kind} {k}" for k in range(1, 6) for kind in ("hints", "round"))]
    assert text.count("rotate(-35 ") == len(names)


def test_the_cost_stands_part_by_part_and_ends_the_verdict(tmp_path: Path) -> None:
    parts = [
        Part("Zero-shot knowledge", "", 10, 1000, 5.0),
        Part("Answers of round 1", "DPO", 40, 12000, 300.0),
        Part("DPO training", "DPO", 0, 0, 20.5),
        Part("Final rerankers", "", 0, 0, 250.0),
    ]
    text = write(tmp_path / "report.html", {"cost": parts}, ("history_only", "zero_shot", "round_1"))
    page = Page(text)
    assert page.open == []
    sentence = "DPO cost 12,000 tokens and 320 s (1 round), of 13,000 tokens and 576 s for the whole run."
    assert page.text.split("What this run shows")[1].split("Results")[0].strip().endswith(sentence)
    body = text.split("<h2>Cost</h2>")[1].split("</table>")[0]
    lines = [re.findall(r">([^<>]*)</t[hd]>", line) for line in body.split("<tr>")[1:]]
    assert lines == [
        ["Part", "part of", "LLM answers", "tokens", "seconds"],
        ["Zero-shot knowledge", "", "10", "1,000", "5.0"],
        ["Answers of round 1", "DPO", "40", "12,000", "300.0"],
        ["DPO training", "DPO", "0", "0", "20.5"],
        ["Final rerankers", "", "0", "0", "250.0"],
        ["The whole run", "", "50", "13,000", "575.5"],
    ]
    without = write(tmp_path / "without.html", {}, ("history_only", "zero_shot"))
    assert not [part for part in ("<h2>Cost</h2>", "for the whole run", "DPO cost") if part in without]


def test_rounds_tell_the_paired_gain_and_the_seconds_of_training_alone(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", record())
    answers, training = (
        text.split(f"<h3>{title}</h3>")[1].split("</table>")[0] for title in ("Answers and rewards", "Training")
    )
    assert "gain over zero-shot (paired)" in answers
    assert "+0.0125 [-0.0025, +0.0275]" in answers
    assert "1,234" in training
    assert "4,321" not in training


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (("no_knowledge", "history_only"), set()),
        (("history_only", "zero_shot"), {"LLM"}),
        (("zero_shot", "round_1"), {"LLM", "Reward", "Answers per user and round"}),
    ],
)
def test_facts_are_those_of_the_rows(tmp_path: Path, rows: tuple[str, ...], shown: set[str]) -> None:
    """A run without an LLM has one in its configuration all the same."""
    run = record() | {"facts": None, "config_yaml": FACTS}
    text = write(tmp_path / "report.html", run, rows)
    found = set(re.findall(r"<dt>([^<]*)</dt>", text))
    assert found & {"LLM", "Reward", "Answers per user and round"} == shown
    assert "Text encoder" in found
