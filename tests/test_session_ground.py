"""What the sessions' rows rest on: states, the way of asking, mistakes; and nothing of it from test sessions."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rec.config import load_config
from lit_rec.llm.prompts import item_text
from lit_rec.recipes import session_rows
from lit_rec.recipes.session_ground import SessionGround
from lit_rec.recipes.session_hints import SessionHints
from lit_rec.run.folder import RunFolder
from tests.session_worlds import make_session_world


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SessionGround]:
    world = make_session_world(tmp_path_factory.mktemp("sessions"))
    cfg = load_config(world.config)
    with RunFolder(cfg.run.dir) as run:
        yield SessionGround(cfg, run)


def test_a_state_is_the_mean_of_its_items_texts(ground: SessionGround) -> None:
    data = ground.data
    for session in (0, 7, 20):
        items = [i for i in data.lists.history_items[session].tolist() if i]
        each = ground.encoder.encode([item_text(data.items, data.item_attributes, i) for i in items])
        torch.testing.assert_close(ground.states[session], each.mean(0), atol=1e-5, rtol=1e-4)
        assert ground.target(session) not in items


def test_the_way_of_asking_is_the_best_one_on_known_sessions(
    ground: SessionGround, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []
    real = SessionGround._try_template

    def spy(self: SessionGround, template: str, sessions: Tensor) -> Any:
        asked.append(sessions)
        return real(self, template, sessions)

    monkeypatch.setattr(SessionGround, "_try_template", spy)
    lines = ground.scoring
    known = torch.cat([ground.data.splits.validation, ground.data.splits.train])
    assert asked
    assert all(torch.equal(sessions, known[: len(sessions)]) for sessions in asked)
    values = [line["ndcg"] for line in lines]
    assert [line["ndcg"] for line in lines if line["chosen"]] == [max(values)]
    assert min(values) < max(values)


def test_a_mistake_hides_its_target(ground: SessionGround) -> None:
    hints = SessionHints(ground)
    for session in ground.data.splits.train.tolist()[:8]:
        mistake = hints.mistake(session, 1)
        assert mistake.target == ground.title(ground.target(session))
        assert mistake.answer
        assert mistake.target not in mistake.answer


def test_sasrec_is_chosen_on_validation_sessions(ground: SessionGround, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    seen: list[Tensor] = []

    def stop(*_: Any, **given: Any) -> None:
        seen.append(given["validation"][1])
        raise Seen

    monkeypatch.setattr(session_rows, "fit_sasrec", stop)
    with pytest.raises(Seen):
        session_rows.SessionRows(SessionHints(ground))._sasrec()
    assert torch.equal(seen[0], ground.data.splits.validation)
