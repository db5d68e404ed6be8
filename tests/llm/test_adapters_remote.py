"""Adapters on servers: every replica has what was trained, or somebody is told what to do."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lit_rec.errors import UserError
from lit_rec.llm import endpoints as module
from lit_rec.llm.adapters_remote import RemoteAdapters
from lit_rec.llm.endpoints import Endpoints
from tests.llm.stub_server import Lora, Reply, StubServer, serving, vllm_lora

NAME = "round_1-0123456789abcdef"
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr("lit_rec.llm.adapters_remote.FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@contextmanager
def replicas(*lora: Lora | None) -> Iterator[list[StubServer]]:
    with ExitStack() as stack:
        stubs = [stack.enter_context(serving()) for _ in lora]
        for stub, behave in zip(stubs, lora, strict=True):
            stub.lora = behave
        yield stubs


def remote(stubs: list[StubServer], timeout: float = 5.0, **options: Any) -> RemoteAdapters:
    return RemoteAdapters(Endpoints([stub.url for stub in stubs], patience=1, timeout=timeout), **options)


def nowhere() -> Path:
    raise AssertionError("no merged model is needed")


def test_every_replica_loads_it_once_and_forgets_it(adapter: Path) -> None:
    with replicas(vllm_lora, vllm_lora) as stubs:
        made = remote(stubs)
        for _ in range(2):  # the second time it is there
            assert made.serve(NAME, adapter, nowhere) == NAME
        assert [stub.adapters for stub in stubs] == [[("load", {"lora_name": NAME, "lora_path": str(adapter)})]] * 2
        assert [stub.models for stub in stubs] == [("m", NAME)] * 2
        for _ in range(2):  # what is not there need not be forgotten
            made.drop(NAME)
        assert [stub.models for stub in stubs] == [("m",)] * 2
    assert all(one.alive for one in made.endpoints.all)


def test_a_path_as_the_servers_see_it(adapter: Path, tmp_path: Path) -> None:
    def anywhere(stub: StubServer, call: str, body: dict[str, Any]) -> Reply:
        return 200, {"Content-Type": "text/plain"}, b"Success"

    with replicas(anywhere) as stubs:
        remote(stubs, here=tmp_path / "run", there="/mnt/run/").serve(NAME, adapter, nowhere)
        assert stubs[0].adapters[0][1]["lora_path"] == "/mnt/run/adapter"


def test_an_attempt_whose_answer_was_lost_is_no_failure(adapter: Path) -> None:
    def loses(stub: StubServer, call: str, body: dict[str, Any]) -> Reply:
        reply = vllm_lora(stub, call, body)
        return (0, {}, None) if len(stub.adapters) == 1 else reply  # it has loaded, and hangs up

    with replicas(loses) as stubs:
        assert remote(stubs).serve(NAME, adapter, nowhere) == NAME
        assert [call for call, _ in stubs[0].adapters] == ["load", "load"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(adapter: Path, status: int) -> None:
    def busy(stub: StubServer, call: str, body: dict[str, Any]) -> Reply:
        return (status, {}, {"error": {"message": "busy"}}) if len(stub.adapters) < 3 else vllm_lora(stub, call, body)

    with replicas(busy) as stubs:
        remote(stubs).serve(NAME, adapter, nowhere)
        assert len(stubs[0].adapters) == 3


def test_one_of_several_that_fails_is_set_aside(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(stub: StubServer, call: str, body: dict[str, Any]) -> Reply:
        return 500, {}, {"error": {"message": "CUDA error"}}

    with replicas(vllm_lora, broken, vllm_lora) as stubs:
        made = remote(stubs, max_retries=1)
        made.serve(NAME, adapter, nowhere)
        assert [one.alive for one in made.endpoints.all] == [True, False, True]
        assert [NAME in stub.models for stub in stubs] == [True, False, True]
        told = capsys.readouterr().out.replace("\n", " ")
        assert stubs[1].url in told
        assert "2 of 3 servers go on" in told


def test_one_that_is_not_there_is_set_aside(adapter: Path) -> None:
    with replicas(vllm_lora) as stubs, serving() as gone:
        dead = gone.url
        made = RemoteAdapters(Endpoints([stubs[0].url, dead], patience=0, timeout=2.0), max_retries=0)
        gone.shutdown()
        gone.server_close()
        made.serve(NAME, adapter, nowhere)
        assert [one.alive for one in made.endpoints.all] == [True, False]


def test_one_that_takes_too_long_is_set_aside_and_not_asked_twice(adapter: Path) -> None:
    import time

    def slow(stub: StubServer, call: str, body: dict[str, Any]) -> Reply:
        time.sleep(1.0)
        return 200, {}, b"Success"

    with replicas(vllm_lora, slow) as stubs:
        made = remote(stubs, timeout=0.3)
        made.serve(NAME, adapter, nowhere)
        assert [one.alive for one in made.endpoints.all] == [True, False]
        assert len(stubs[1].adapters) == 1


def test_a_folder_that_servers_do_not_see_is_told(tmp_path: Path) -> None:
    with replicas(vllm_lora, vllm_lora) as stubs, pytest.raises(UserError, match="does not load the adapter") as caught:
        remote(stubs).serve(NAME, tmp_path / "elsewhere", nowhere)
    assert "No adapter found" in caught.value.why
    assert "shared disk" in caught.value.fix
    assert "llm.server.run_folder" in caught.value.fix


def not_enabled(stub: StubServer, call: str, body: dict[str, Any]) -> Reply:
    return 500, {}, {"error": {"message": "LoRA is not enabled. Use --enable-lora to enable LoRA."}}


@pytest.mark.parametrize("lora", [None, not_enabled])
def test_without_such_a_call_the_merged_model_is_written_and_told(adapter: Path, tmp_path: Path, lora: Any) -> None:
    def merged() -> Path:
        (tmp_path / "merged").mkdir()
        return tmp_path / "merged"

    with replicas(vllm_lora, lora) as stubs:
        made = remote(stubs, max_retries=0)
        with pytest.raises(UserError, match="cannot load adapters while serving") as caught:
            made.serve(NAME, adapter, merged)
        assert stubs[1].url in caught.value.what
        assert stubs[0].url not in caught.value.what
        assert f"vllm serve {tmp_path / 'merged'} --served-model-name {NAME}" in caught.value.fix
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in caught.value.fix
        stubs[1].models = (NAME,)  # started again with the merged model
        assert made.serve(NAME, adapter, nowhere) == NAME


def test_no_server_at_all_is_told(adapter: Path) -> None:
    with replicas(vllm_lora) as stubs:
        made = remote(stubs, max_retries=0)
    with pytest.raises(UserError, match="no server answers") as caught:
        made.serve(NAME, adapter, nowhere)
    assert caught.value.where == "config key llm.server.urls"


def test_the_key_is_sent_and_never_shown(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def echoes(stub: StubServer, call: str, body: dict[str, Any]) -> Reply:
        return 400, {}, {"error": {"message": f"no adapter for {KEY}"}}

    with replicas(echoes, vllm_lora) as stubs:
        remote(stubs).serve(NAME, adapter, nowhere)
        assert stubs[0].keys == stubs[1].keys == {f"Bearer {KEY}"}
        stubs[1].lora = echoes
        with pytest.raises(UserError) as caught:
            remote(stubs).serve("other", adapter, nowhere)
    assert "***" in str(caught.value)
    assert KEY not in str(caught.value) + capsys.readouterr().out + json.dumps(caught.value.args)
