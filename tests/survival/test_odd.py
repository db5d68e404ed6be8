"""Texts that no LLM should give and titles that no film should have: every recipe goes through with them."""

import json
from pathlib import Path

import pytest

from lit_rec.llm.store import AnswerStore
from tests.llm.odd import ODD
from tests.session_worlds import make_session_world
from tests.survival.attempts import SHORT, Attempt, run_attempts
from tests.survival.pages import assert_harmless
from tests.worlds import World, make_unified_world, make_world

EVIL = [text for text in ODD if text.strip() and len(text) < 300 and "\ud800" not in text]


def titled(world: World) -> World:
    """Give some of the films odd titles, whatever way the world tells them."""
    titles, table = world.root / "data" / "titles.json", world.root / "data" / "tiny.item"
    if titles.exists():
        told = json.loads(titles.read_text())
        told |= {str(30 + n): f"{text} {n}" for n, text in enumerate(EVIL)}
        titles.write_text(json.dumps(told))
    else:
        rows = [line.split("\t") for line in table.read_text().splitlines()]
        for n, text in enumerate(EVIL):
            rows[30 + n][1] = f"{' '.join(text.split())} {n}"
        table.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return world


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rlrf", "re2llm", "unified"])
def test_a_run_with_odd_texts_and_titles(tmp_path: Path, recipe: str) -> None:
    make = {"rlrf": make_world, "re2llm": make_session_world, "unified": make_unified_world}[recipe]
    world = titled(make(tmp_path))
    one = Attempt(["fit", "--config", world.config], str(tmp_path / "log"), odd=True)
    run_attempts([one])
    assert one.code == 0, one.said[-4000:]
    assert "\x1b[2J" not in one.said
    kept = {answer.text for answer in AnswerStore(world.run / "answers")._answers.values()}
    assert len(kept & set(ODD)) > len(SHORT) // 2
    assert_harmless(world.run / "report.html", tmp_path)
