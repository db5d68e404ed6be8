"""A whole run against an OpenAI-compatible server whose LLM follows one hint and no other; it also dies half way."""

import json
import random
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from lit_rec.agent.hints import HintBase
from lit_rec.cli import main
from tests.llm.stub_server import Reply, completion, serving, vllm_lora
from tests.session_worlds import make_session_world
from tests.test_fit_re2llm import BARE, means
from tests.worlds import BARE as BARE_RLRF
from tests.worlds import ITEMS, World, assert_told, make_world

GOOD, BAD = "Recommend what has the next number.", "Prefer films with a small number always."
SERVER = ["+llm=server", "llm.server.model=m", "llm.server.retries=0", "llm.server.concurrency=4"]
GENERATE = ["ranking.method=generate", "ranking.templates=[list_v1]", "ranking.shortlist=null", "evaluation.ks=[1,5]"]
GENERATE = [*GENERATE, "agent.epochs=20", "agent.lr=1e-2"]
NONSENSE = {"empty": "", "other language": "抱歉，我不知道。", "garbage": "}{ [1, 2 <|x|> 0xff"}


def films(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"film(\d+)", text)]


def planted(number: int, body: dict[str, Any]) -> Reply:
    """Lists the candidates by number; with the good hint what follows the session comes first."""
    text = body["messages"][-1]["content"]
    if "Candidate set" in text:
        before, candidates = text.split("Candidate set")
        order = sorted(films(candidates))
        if GOOD in text:
            order.sort(key=lambda n: n != films(before)[-1] + 1)
        answer = "\n".join(f"{n}. film{film}" for n, film in enumerate(order[:10], 1))
        if "Hint" not in text and films(before) and films(before)[-1] % 9 == 0:
            answer = list(NONSENSE.values())[films(before)[-1] // 9 % 3]
    elif "one sentence each" in text:
        answer = f"Certainly, here you are:\n1. {GOOD}\n2. {BAD}\n3. ok"
    else:
        answer = "0" if "same advice" in text else "I looked at the wrong numbers."
    return 200, {}, completion(answer)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_session_world(tmp_path_factory.mktemp("server"))


def command(world: World, url: str, run: Path) -> list[str]:
    return ["fit", "--config", world.config, *BARE, *SERVER, *GENERATE, f"llm.server.urls=[{url}]", f"run.dir={run}"]


def test_the_hint_that_helps_is_found_kept_and_picked(world: World) -> None:
    run = world.root / "planted"
    with serving(planted) as stub:
        assert main(command(world, stub.url, run)) == 0
        asked = len(stub.asked)
        assert main(command(world, stub.url, run)) == 0
        assert len(stub.asked) == asked  # the second run asks nothing
    assert len({json.dumps(body, sort_keys=True) for body in stub.asked}) == asked  # nor does the first ask twice
    base = HintBase.load(run / "hints.json")
    assert [hint.text for hint in base.kept] == [GOOD]
    assert base.fates()["malformed"] >= 1
    found = means(run, "hr@1")
    assert found["best_fixed_hint"] == found["oracle"] == 1
    assert min(found["ppo"], found["full_information"]) >= 0.9
    assert found["no_hint"] < 0.5
    page = (run / "report.html").read_text()
    assert GOOD in page


def test_a_server_that_dies_loses_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.root / "dies"
    alive = 25

    def dies(number: int, body: dict[str, Any]) -> Reply:
        return planted(number, body) if number < alive else (0, {}, None)

    with serving(dies) as stub:
        assert_told(capsys, main(command(world, stub.url, run)), "answers are kept", stub.url)
        first = stub.asked[:alive]
    with serving(planted) as stub:
        assert main(command(world, stub.url, run)) == 0
    again = {json.dumps(body, sort_keys=True) for body in stub.asked}
    assert not again & {json.dumps(body, sort_keys=True) for body in first}
    for metric in ("hr@1", "ndcg@5"):
        assert means(run, metric) == means(world.root / "planted", metric)


def test_no_server_is_told_at_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(planted) as stub:
        url = stub.url
    assert_told(capsys, main(command(world, url, world.root / "nobody")), url, "llm.server")


def test_rlrf_samples_on_replicas_that_load_each_rounds_adapter(tmp_path: Path) -> None:
    """Trained in process, sampled on two servers: as `llm=server llm.hub=...` sets it up."""

    def writes(number: int, body: dict[str, Any]) -> Reply:
        chance = random.Random(json.dumps(body, sort_keys=True))
        return 200, {}, completion(" ".join(f"film{chance.randint(1, ITEMS)}" for _ in range(4)))

    world = make_world(tmp_path)
    with serving(writes) as one, serving(writes) as two:
        one.lora = two.lora = vllm_lora
        servers = [
            f"llm.server.urls=[{one.url},{two.url}]",
            "+llm=server",
            "llm.server.model=m",
            "llm.server.key_env=null",
        ]
        places = [f"llm.hub={world.root}/llm", "llm.dtype=float32", "llm.max_new_tokens=6"]
        arguments = ["fit", "--config", world.config, *BARE_RLRF, "policy.rounds=2", *servers, *places]
        assert main(arguments) == 0
        asked = [*one.asked, *two.asked]
        loaded = [body["lora_name"] for call, body in one.adapters if call == "load"]
        assert main(arguments) == 0
        assert len(one.asked) + len(two.asked) == len(asked)  # the second run asks nothing
    assert one.asked
    assert two.asked
    assert len(loaded) == 2
    assert {body["model"] for body in asked} == {"m", *loaded}
    for number, name in enumerate(loaded, 1):
        kept = world.run / f"stages/fold_0/round_{number}/policy/adapter/adapter_model.safetensors"
        served = world.run / "adapters" / name.removeprefix("m-") / "adapter_model.safetensors"
        assert served.read_bytes() == kept.read_bytes()
    table = pl.read_parquet(world.run / "stages/fold_0/round_1/answers/answers.parquet")
    assert set(table.group_by("user").len()["len"]) == {1, 3}
    assert table["text"].str.contains(r"^film\d+( film\d+){3}$").all()
