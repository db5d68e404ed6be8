import re
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lit_rec.agent.hints import Hint
from lit_rec.run.hint_report import HintStory, hint_table
from lit_rec.run.report import write_report
from lit_rec.run.results import result_rows
from lit_rec.run.session_report import SessionStory
from lit_rec.run.stories import RERANKING, SESSIONS
from tests.pages import EVIL, Page

PICKS = {"ppo": [0, 3, 3, 1, 3, 0], "best_fixed_hint": [3] * 6, "oracle": [1, 3, 0, 0, 3, 1]}
RANKS = {"ppo": [9, 2, 3, 8, 1, 5], "best_fixed_hint": [9, 2, 3, 20, 1, 5], "oracle": [4, 2, 3, 8, 1, 5]}
PLAIN = [9, 8, 3, 6, 4, 5]
SECTIONS = ("How the LLM is asked", "Hints", "The agents", "Test sessions", "What was asked of the LLM")


def choices(agents: tuple[str, ...] = tuple(PICKS), known: bool = True) -> pl.DataFrame:
    return pl.concat(
        pl.DataFrame(
            {
                "session": range(6),
                "agent": agent,
                "hint": PICKS[agent],
                "rank": RANKS[agent],
                "rank_no_hint": PLAIN if known else [None] * 6,
            }
        )
        for agent in agents
    )


def story(text: str = "prefer sequels") -> SessionStory:
    def hint(number: int, fate: str, **more: Any) -> dict[str, Any]:
        return asdict(
            Hint(number, f"{text} {number}", 1, 77, [f"film {text}", "Heat"], f"next {text}", fate=fate, **more)
        )

    epochs = [
        {"epoch": e, "val/reward": 0.1 * e, "losses/entropy": 2.0 - e, "losses/clipfrac": None if e else float("nan")}
        for e in range(6)
    ]
    measured = {"gain_source": 0.25, "rank_before": 30, "rank_after": 4, "gain_others": 0.031, "others": 10}
    return SessionStory(
        scoring=[
            {"template": text, "prior": p, "length": 1.0, "ndcg": 0.3 + p, "sessions": 40, "chosen": p == 0.5}
            for p in (0.0, 0.5)
        ],
        hints=[
            hint(1, "kept", **measured),
            hint(2, f"names the target {text}"),
            hint(3, "kept", **measured | {"rank_before": None, "gain_others": None, "others": 0}),
            hint(4, "same as 1"),
            hint(5, "same as 3"),
        ],
        choices=choices(),
        examples=[
            {
                "group": group,
                "titles": [f"title {text}"],
                "target": text,
                "hint": text if rank else "",
                "rank_no_hint": 9 if rank else None,
                "rank": 4,
                "best_hint": "" if rank else None,
                "best_rank": 2 if rank else None,
            }
            for group in (f"group {text}", "Largest gains")
            for rank in (0, 1)
        ],
        bias=pl.DataFrame({"row": [text] * 5, "fifth": range(1, 6), "hr": [0.5, 0.4, None, 0.2, 0.1], "n": [7] * 5}),
        counts={"questions": 12345, "parse_failure_rate": 0.0125, "failed": None, text: 0.5, "seconds": float("nan")},
        curves={"ppo": epochs, text: epochs[:3], "none": []},
        rounds=2,
        talk=[{"role": "user", "content": f"Which? {text}"}, {"role": text, "content": "1. Heat"}],
    )


def frames(sessions: int = 20) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.concat(
        pl.DataFrame(
            {
                "row": row,
                "reranker": "smol",
                "seed": 0,
                "fold": 0,
                "split": "test",
                "user": range(sessions),
                "list": range(sessions),
                **{f"{m}@{k}|standard": rng.random(sessions, "float32") for m in ("ndcg", "hr") for k in (5, 10)},
            }
        )
        for row in ("random", "no_hint", "ppo", "oracle")
    )


def write(path: Path, told: SessionStory | None, sessions: int = 0, **more: Any) -> str:
    held = frames(sessions) if sessions else None
    rows = [] if held is None else result_rows(held, dataset="hetrec", protocol="next_item", story=SESSIONS)
    write_report(path, rows=rows, frames=held, story=SESSIONS, hints=told, **more)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("plain") / "report.html", story())


def cells(text: str, heading: str) -> list[list[str]]:
    """The cells of the table's lines that follow a heading."""
    body = text.split(heading, 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    lines = re.findall(r"<tr>(.*?)</tr>", body, flags=re.DOTALL)
    return [[Page(c).text for c in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line, flags=re.DOTALL)] for line in lines]


def test_a_whole_page(tmp_path: Path) -> None:
    config = "name: run\nllm:\n  name: smol\nagent:\n  rounds: 3\n"
    text = write(tmp_path / "report.html", story(), 20, config_yaml=config)
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 1 + 1 + 2  # rows, picks, and a curve for each metric that is anywhere a number
    for part in (*SECTIONS, "HR@10", "mean over test sessions", "sees the answers", "Rounds of reflection"):
        assert part in page.text
    for part in ("user mean", "over\nusers", "history_only", "MAP@", "Preference pairs", "DPO", "Every metric at"):
        assert part not in page.text
    assert not {"link", "iframe", "img", "a"} & set(page.tags)
    assert page.tags.count("script") == 1  # the page's own, see test_report_search.py


def test_hints_are_shown_with_where_they_come_from_and_how_often_they_are_picked(plain: str) -> None:
    lines = [[" ".join(cell.split()) for cell in line] for line in cells(plain, "<h2>Hints")]
    assert [line[0] for line in lines] == ["1", "3"]
    assert lines[0][1] == "prefer sequels 1 Round 1, session 77film prefer sequels · Heatthen: next prefer sequels"
    assert lines[0][2:] == ["+0.2500 rank 30 to 4", "+0.0310 on 10", str(PICKS["ppo"].count(1))]
    assert lines[1][2:] == ["+0.2500", "not tried", str(PICKS["ppo"].count(3))]
    assert [line[0] for line in cells(plain, "Hints that were not kept")] == ["2", "4", "5"]
    assert "kept (2), names the target prefer sequels (1), same as another hint (2)." in Page(plain).text


def test_what_agents_pick_is_counted(plain: str, tmp_path: Path) -> None:
    lines = {line[0]: line[1:] for line in cells(plain, "What the agents pick")}
    assert list(lines) == ["best_fixed_hint", "ppo", "oracle"]
    for agent, shown in lines.items():
        gains = [before - after for before, after in zip(PLAIN, RANKS[agent], strict=True)]
        none, used = PICKS[agent].count(0) / 6, len(set(PICKS[agent]) - {0})
        better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
        assert shown == ["6", f"{none:.0%}", str(used), f"{sum(gains) / 6:+.2f}", str(better), str(worse)]
    unknown = replace(story(), choices=choices(known=False))
    assert [len(line) for line in cells(write(tmp_path / "b.html", unknown), "What the agents pick")] == [4, 4, 4]


def test_bias_is_a_table_or_a_sentence(plain: str, tmp_path: Path) -> None:
    assert cells(plain, "Where the target stands") == [
        ["prefer sequels", "0.500 (7)", "0.400 (7)", "(7)", "0.200 (7)", "0.100 (7)"]
    ]
    empty = pl.DataFrame(schema={"row": pl.String})
    none = write(tmp_path / "b.html", SessionStory(scoring=story().scoring, bias=empty))
    assert "Where the target stands" not in none
    assert "this prompt shows no candidates" in none


def test_the_way_of_asking_is_named_and_a_lone_one_was_not_chosen(plain: str, tmp_path: Path) -> None:
    chosen = "prefer sequels, weight of the prior 0.5, length exponent 1"
    assert f"Chosen on validation and training sessions among 2: {chosen}." in plain
    assert "NDCG@10</th>" not in plain.split("Everything that was tried")[1].split("</table>")[0]  # nobody has one
    lone = [{"template": "list_v1", "prior": 0.0, "length": None, "sessions": 0, "ndcg": 0.0, "chosen": True}]
    text = write(tmp_path / "b.html", SessionStory(scoring=lone))
    assert "As configured: list_v1, weight of the prior 0." in text
    assert "Everything that was tried" not in text


def test_counts_leave_out_what_is_unknown(plain: str) -> None:
    shown = Page(plain).text.split("What was asked of the LLM")[1].split("How to read")[0].split("\n")
    assert [line for line in map(str.strip, shown) if line] == [
        "questions12,345",
        "parse failure rate1.2%",
        "prefer sequels0.50",
    ]


def test_round_ends_are_drawn_between_rounds_only(tmp_path: Path) -> None:
    def dashed(told: SessionStory) -> int:
        return write(tmp_path / "a.html", told).count("stroke-dasharray")

    curves = {"ppo": [{"epoch": e, "val/reward": 0.1} for e in range(6)]}
    assert dashed(SessionStory(curves=curves, rounds=2)) == 2
    assert dashed(SessionStory(curves=curves, rounds=6)) == 0
    assert dashed(SessionStory(curves=curves)) == 0


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_that_data_or_an_llm_wrote_becomes_markup(plain: str, tmp_path: Path, evil: str) -> None:
    page = Page(write(tmp_path / "evil.html", story(evil)))
    assert sorted(page.tags) == sorted(Page(plain).tags)
    assert page.open == []
    assert not [a for a in page.attributes if a[1].startswith("on")]
    shown = evil.replace("\x00", "\ufffd")[1:20]
    assert page.text.replace("\x00", "\ufffd").count(shown) >= 20


@pytest.mark.parametrize("kept", ["", *SessionStory.__dataclass_fields__])
def test_what_is_missing_is_left_out(tmp_path: Path, kept: str) -> None:
    whole = story()
    told = SessionStory(**({kept: getattr(whole, kept)} if kept else {}))
    page = Page(write(tmp_path / "report.html", told))
    assert page.open == []
    places = {"scoring": 0, "bias": 0, "hints": 1, "choices": 2, "curves": 2, "examples": 3, "counts": 4}
    headings = [t for t in SECTIONS if re.search(rf"\n{t}\n", page.text)]
    assert headings == ([SECTIONS[places[kept]]] if kept in places else [])


@pytest.mark.parametrize("sessions", [1, 2])
def test_few_sessions_and_no_story_at_all(tmp_path: Path, sessions: int) -> None:
    few = SessionStory(hints=story().hints, choices=choices().filter(pl.col("session") < sessions))
    for told in (few, None):
        page = Page(write(tmp_path / "report.html", told, sessions))
        assert page.open == []
        assert "nan" not in page.text
        assert ("no interval (1 session)" in page.text) == (sessions == 1)


def test_equal_runs_write_equal_reports(plain: str, tmp_path: Path) -> None:
    assert write(tmp_path / "again.html", story()) == plain


def on_terminal(told: HintStory) -> str:
    out = StringIO()
    Console(file=out, width=160).print(hint_table(told))
    return out.getvalue()


def test_the_terminal_lists_kept_hints_with_gains_and_picks() -> None:
    text = on_terminal(story("[bold]Prefer[/bold] \x1b[31msequels"))
    lines = [re.split(r"\s*│\s*", line)[1:-1] for line in text.splitlines() if line.startswith("│")]
    hint = "[bold]Prefer[/bold]  [31msequels"
    assert lines == [
        ["1", f"{hint} 1", "+0.2500", "+0.0310 (10)", str(PICKS["ppo"].count(1))],
        ["3", f"{hint} 3", "+0.2500", "not tried", str(PICKS["ppo"].count(3))],
    ]
    assert "picked by ppo (6 test sessions)" in text
    assert "\x1b" not in text
    assert "same as another hint (2)" in text


def test_the_terminal_table_without_picks_and_without_hints() -> None:
    without = on_terminal(replace(story(), choices=choices(("oracle",))))
    assert [re.split(r"\s*│\s*", line)[-2] for line in without.splitlines() if line.startswith("│")] == ["", ""]
    assert "All hints written: none" in on_terminal(SessionStory())


def user_story() -> HintStory:
    """What the unified recipe tells of hints: users have names, and test users no ranks."""
    told = story()
    hints = [{**hint, "rank_before": None, "rank_after": None} for hint in told.hints]
    picks = pl.DataFrame({"session": range(6), "agent": "full_information", "hint": PICKS["ppo"]})
    return HintStory(
        subject="user",
        agent="full_information",
        hints=hints,
        choices=picks,
        curves={"full_information": told.curves["ppo"]},
        rounds=2,
        talk=told.talk,
        names={77: "u<9>"},
    )


def test_hints_about_users_are_told_in_their_words_without_ranks(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", story=RERANKING, hints=user_story())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    told = text.split("<h2>Hints")[1].split("<h2>How to read")[0]
    lines = [[" ".join(cell.split()) for cell in line] for line in cells(text, "<h2>Hints")]
    assert (
        lines[0][1]
        == "prefer sequels 1 Round 1, user u<9>film prefer sequels · Heatranked too low: next prefer sequels"
    )
    assert lines[0][2:] == ["+0.2500", "+0.0310 on 10", str(PICKS["ppo"].count(1))]
    assert cells(text, "What the agents pick on test users") == [["full_information", "6", "33%", "2"]]
    for part in (
        "Gain on its own user",
        "Picked by full_information",
        "reward, validation users",
        "Which? prefer sequels",
    ):
        assert part in told
    for part in ("session", "rank gain", "Rank gain", "ppo", "oracle"):
        assert part not in told
    assert [t for t in SECTIONS if re.search(rf"\n{t}\n", page.text)] == ["Hints", "The agents"]


def test_hints_about_sessions_still_name_sessions(plain: str) -> None:
    told = Page(plain).text
    for part in ("training sessions it did worst on", "Gain on its own session", "reward, validation sessions"):
        assert part in told
    assert "Rank gain: places" in told
    assert "test users" not in told


def test_no_hint_of_users_was_kept(tmp_path: Path) -> None:
    none = replace(user_story(), hints=user_story().hints[1:2], choices=pl.DataFrame(), curves={})
    write_report(tmp_path / "report.html", hints=none)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert "names the target prefer sequels (1)." in page.text
    assert "The agents" not in page.text
    assert "names the target prefer sequels (1)" in on_terminal(none)


def test_the_terminal_names_users_and_who_picked() -> None:
    text = on_terminal(user_story())
    assert "gain on its own user" in text
    assert "picked by full_information (6 test users)" in text
    assert "session" not in text
