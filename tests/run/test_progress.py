"""What is told in which mode, and that JSON lines are all there is on stdout."""

import json
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from lit_rec.run.progress import ALL, JSON, QUIET, console, shown_as, step, tell_results


def table() -> Table:
    made = Table(title="NUMBERS")
    made.add_column("row")
    return made


def say_everything() -> None:
    console.print("in passing", highlight=False)
    console.print(Text("in passing, too"))
    console.aside(table())
    console.print("[yellow]take care[/]: it is [b]empty[/]", highlight=False)
    console.print("warning: http://[::1]/v1 is set aside", highlight=False, markup=False)
    console.print(table())
    with step("writing", 4, "answers") as progress:
        progress(3, 30)
        progress(1)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_everything_is_told_where_nothing_else_is_asked_for(capsys: Any) -> None:
    say_everything()
    out = capsys.readouterr().out
    for words in ("in passing\n", "in passing, too", "take care", "set aside", "writing: 4 answers in", "tokens/s"):
        assert words in out
    assert out.count("NUMBERS") == 2
    assert "{" not in out


def test_quiet_leaves_warnings_and_tables(capsys: Any) -> None:
    with shown_as(QUIET):
        say_everything()
    captured = capsys.readouterr()
    assert "in passing" not in captured.out
    assert "writing" not in captured.out
    assert captured.out.count("NUMBERS") == 1  # the plan is told aside
    assert "take care: it is empty\n" in captured.out
    assert "warning: http://[::1]/v1 is set aside\n" in captured.out
    assert captured.err == ""
    say_everything()
    assert "in passing" in capsys.readouterr().out  # the mode ends


def test_json_is_a_line_for_each_end_of_a_step(capsys: Any) -> None:
    with shown_as(JSON):
        say_everything()
        print("what a library says")
        tell_results(
            [{"metric": "a", "mean": 0.5}, {"metric": "b", "mean": 1}], lambda row: row["metric"] == "a", run="r"
        )
    captured = capsys.readouterr()
    begun, ended, last = lines(captured.out)
    assert begun == {"event": "begin", "step": "writing", "total": 4, "unit": "answers"}
    assert (ended["event"], ended["step"], ended["done"], ended["whole"]) == ("end", "writing", 4, True)
    assert ended["rate_unit"] == "tokens/s"
    assert ended["rate"] > 0
    assert ended["seconds"] >= 0
    assert last == {"event": "results", "run": "r", "rows": [{"metric": "a", "mean": 0.5}]}
    told = captured.err.splitlines()
    assert [json.loads(line)["message"] for line in told[:2]] == [
        "take care: it is empty",
        "warning: http://[::1]/v1 is set aside",
    ]
    assert told[2:] == ["what a library says"]


def test_json_of_a_step_that_fails(capsys: Any) -> None:
    def divide() -> None:
        with step("dividing", 2, "numbers") as progress:
            progress(1)
            raise ZeroDivisionError

    with shown_as(JSON), pytest.raises(ZeroDivisionError):
        divide()
    begun, ended = lines(capsys.readouterr().out)
    assert begun["step"] == ended["step"] == "dividing"
    assert (ended["whole"], ended["done"], ended["rate_unit"]) == (False, 1, "numbers/s")


def test_modes_nest_and_come_back(capsys: Any) -> None:
    with shown_as(JSON):
        with shown_as(QUIET):
            console.emit("not told")
            assert console.mode == QUIET
        console.emit("told", text="é")
        assert not console.ended
        tell_results([], bool)
        assert console.ended
    assert (console.mode, console.ended) == (ALL, False)
    assert capsys.readouterr().out == '{"event": "told", "text": "é"}\n{"event": "results", "rows": []}\n'


def test_rate_counts_what_is_finer_once_it_is_known() -> None:
    with shown_as(QUIET), step("x", 2, "pairs") as progress:
        progress(2)
        assert progress.speed()[1] == "pairs"
        assert progress.rate().endswith(" pairs/s")
        progress(1, 5)
        assert progress.speed()[1] == "tokens"
        assert (progress.done, progress.extra, progress.computed) == (3, 5, 1)


def test_slow_units_are_told_in_seconds_each() -> None:
    with shown_as(QUIET), step("x", 2, "seeds") as progress:
        progress._started -= 20
        assert progress.rate() == "0.0 seeds/s"  # none is done
        progress(2)
        assert progress.rate() == "10.0 s each"
