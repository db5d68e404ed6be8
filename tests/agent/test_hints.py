"""The hint base on disk and in order."""

import json
from pathlib import Path

import pytest

from lit_rec.agent.hints import KEPT, Hint, HintBase
from lit_rec.errors import UserError


def hint(number: int, *, round: int = 0, fate: str = KEPT, text: str = "") -> Hint:
    return Hint(number, text or f"Prefer kind {number}.", round, 3, ["Amélie", 'The "Best"'], "千と千尋", fate=fate)


def test_base_lists_the_kept_hints_round_by_round() -> None:
    """Action a > 0 is hint a of this list, so later rounds must stand behind earlier ones."""
    base = HintBase([hint(0, fate="malformed"), hint(1), hint(2)])
    first = base.texts
    assert first == ["Prefer kind 1.", "Prefer kind 2."]
    base.hints += [hint(3, round=1), hint(4, round=1, fate=""), hint(5, round=1)]
    assert base.texts == [*first, "Prefer kind 3.", "Prefer kind 5."]
    assert [h.id for h in HintBase(base.hints[::-1]).kept] == [2, 1, 5, 3]
    assert HintBase().texts == []


def test_fates_count_every_hint() -> None:
    fates = [KEPT, KEPT, "malformed", "same as hint 3 (cosine 0.95)", "same as a kept hint, says the LLM", ""]
    found = HintBase(hint(n, fate=fate) for n, fate in enumerate(fates)).fates()
    assert found == {KEPT: 2, "malformed": 1, "same as another hint": 2, "": 1}


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    tried = Hint(7, "Look for “quiet” films.\n", 2, 9, ["A", "B"], "C", 0.25, 9, 2, 0.125, 30, KEPT)
    base = HintBase([hint(0), tried, hint(1, fate="repeated")])
    path = tmp_path / "deep" / "hints.json"
    base.save(path)
    assert HintBase.load(path).hints == base.hints
    assert "千と千尋" in path.read_text(encoding="utf-8")  # for people to read
    assert json.loads(path.read_text(encoding="utf-8"))["hints"][1]["gain_source"] == 0.25
    HintBase().save(path)
    assert HintBase.load(path).hints == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"hints": [{"id": 1',
        b"[]",
        b"{}",
        b'{"hints": 3}',
        b'{"hints": null}',
        b'{"hints": [3]}',
        b'{"hints": [{"id": 1}]}',
        b'{"hints": [{"id": 1, "colour": "red"}]}',
        b'\xff\xfe{"hints": []}',
    ],
)
def test_what_is_no_hint_base_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hints.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a hint base") as caught:
        HintBase.load(path)
    assert caught.value.where == str(path)
    assert "--fresh" in caught.value.fix
