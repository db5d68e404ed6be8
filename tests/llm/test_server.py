"""The server port: answers come once, come whole, and every failure is one message that names what to do."""

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from lit_rec.errors import UserError
from lit_rec.llm import endpoints
from lit_rec.llm.background import in_thread
from lit_rec.llm.endpoints import hide_key
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.sampler import SamplingSettings
from lit_rec.llm.server import ServerModel
from lit_rec.llm.store import AnswerStore
from lit_rec.schema import LLMConfig, LoraConfig
from tests.llm.stub_server import StubServer, completion, echo, free_port, serving
from tests.tiny import save_llm

PROMPTS = [[{"role": "user", "content": f"question {i}"}] for i in range(12)]
ONES = [1] * len(PROMPTS)
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.005)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def make(urls: str | list[str], folder: Path, **options: Any) -> ServerModel:
    options = {"concurrency": 4, "timeout": 5.0, "max_retries": 3, **options}
    return ServerModel("m", [urls] if isinstance(urls, str) else urls, AnswerStore(folder), **options)


def nobody() -> str:
    return f"http://127.0.0.1:{free_port()}/v1"


def content(stub: StubServer) -> list[str]:
    return [body["messages"][0]["content"] for body in stub.asked]


def test_answers_are_the_servers_and_asked_for_once(tmp_path: Path) -> None:
    counts, done = [1, 3, 0, 2], []
    with serving() as stub:
        llm = make(stub.url, tmp_path)
        given = llm.answers(PROMPTS[:4], counts, progress=lambda n, tokens: done.append((n, tokens)))
        assert len(stub.asked) == 6
        again = make(stub.url, tmp_path)
        assert again.answers(PROMPTS[:4], counts, progress=lambda n, tokens: done.append((n, tokens))) == given
        assert len(stub.asked) == 6
    assert [len(one) for one in given] == counts
    by_prompt = {c: {echo(b) for b in stub.asked if b["messages"][0]["content"] == c} for c in content(stub)}
    for prompt, one in zip(PROMPTS, given, strict=False):
        assert {a.text for a in one} == by_prompt.get(prompt[0]["content"], set())
    assert len({body["seed"] for body in stub.asked}) == 6
    assert done[0] == (0, 0)
    assert done[-1] == (6, 0)
    assert sum(n for n, _ in done[:-1]) == 6
    assert sum(tokens for _, tokens in done) == 6 * 3
    assert (llm.usage.requests, llm.usage.prompt_tokens, llm.usage.completion_tokens) == (6, 42, 18)
    assert (llm.usage.retries, llm.usage.stored, again.usage.stored, again.usage.requests) == (0, 0, 6, 0)


def test_what_is_sent(tmp_path: Path) -> None:
    with serving() as stub:
        llm = make(stub.url + "/", tmp_path, settings=SamplingSettings(77, 0.25, 0.5))
        llm.answers(PROMPTS[:1], [1])
        llm.answers(PROMPTS[:1], [1], settings=SamplingSettings(5, 0.0, 1.0))
    sent = [{k: body[k] for k in ("model", "messages", "temperature", "top_p", "max_tokens")} for body in stub.asked]
    common = {"model": "m", "messages": PROMPTS[0]}
    assert sent[0] == {**common, "temperature": 0.25, "top_p": 0.5, "max_tokens": 77}
    assert sent[1] == {**common, "temperature": 0.0, "top_p": 1.0, "max_tokens": 5}
    assert all(0 <= body["seed"] < 2**31 for body in stub.asked)
    assert "n" not in stub.asked[0]


def test_duplicates_are_asked_once(tmp_path: Path) -> None:
    done: list[int] = []
    with serving() as stub:
        prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
        given = make(stub.url, tmp_path).answers(prompts, [1, 1, 2, 1], progress=lambda n, _: done.append(n))
    assert sorted(content(stub)) == ["question 0", "question 0", "question 1"]
    assert given[0] == given[2][:1] == given[3]
    assert sum(done) == 5


def test_key_is_made_of_what_shapes_an_answer(tmp_path: Path) -> None:
    with serving() as one, serving() as two:
        make(one.url, tmp_path).answers(PROMPTS, ONES)
        make(two.url, tmp_path, api_key_env="PATH", concurrency=1).answers(PROMPTS, ONES)
        assert len(two.asked) == 0  # neither address nor key nor concurrency
        for n, other in enumerate(
            ({"revision": "2"}, {"seed": 1}, {"settings": SamplingSettings(5)}, {"settings": SamplingSettings(top_p=1)})
        ):
            make(two.url, tmp_path, **other).answers(PROMPTS[:1], [1])
            assert len(two.asked) == n + 1
        ServerModel("other", [two.url], AnswerStore(tmp_path)).answers(PROMPTS[:1], [1])
        assert len(two.asked) == 5
        assert len({body["seed"] for body in one.asked + two.asked}) == len(PROMPTS) + 5


def test_all_requests_under_way_fail_together(tmp_path: Path) -> None:
    together = threading.Barrier(4, timeout=20)

    def fail(number: int, body: dict[str, Any]) -> Any:
        if not 4 <= number < 8:
            return None
        together.wait()
        return (0, {}, None)

    with serving(fail) as stub:
        llm = make(stub.url, tmp_path, concurrency=4, max_retries=1)
        assert all(one[0].text for one in llm.answers(PROMPTS, ONES))  # one failure of the URL, not four
    assert len(stub.asked) == len(PROMPTS) + 4


@pytest.mark.parametrize("concurrency", [1, 5, 16])
def test_requests_under_way_reach_the_bound_and_keep_it(tmp_path: Path, concurrency: int) -> None:
    together = threading.Barrier(concurrency, timeout=20)  # nobody is answered before all are under way

    def gather(number: int, body: dict[str, Any]) -> None:
        together.wait()

    with serving(gather, delay=0.05) as stub:
        prompts = [[{"role": "user", "content": f"{i}"}] for i in range(3 * concurrency)]
        make(stub.url, tmp_path, concurrency=concurrency).answers(prompts, [1] * len(prompts))
    assert stub.most == concurrency


def test_two_servers_share_the_work_and_the_bound(tmp_path: Path) -> None:
    most, now, lock, together = 0, 0, threading.Lock(), threading.Barrier(4, timeout=20)

    def count(number: int, body: dict[str, Any]) -> None:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        together.wait()
        time.sleep(0.02)
        with lock:
            now -= 1

    with serving(count) as one, serving(count) as two:
        make([one.url, two.url], tmp_path, concurrency=4).answers(PROMPTS, ONES)
    assert most == 4
    assert min(len(one.asked), len(two.asked)) >= 3
    assert len(one.asked) + len(two.asked) == len(PROMPTS)


@pytest.mark.parametrize(
    "reply",
    [
        (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}),
        (500, {}, {"error": {"message": "oops"}}),
        (503, {}, b"loading"),
        (408, {}, b""),
        (0, {}, None),  # the connection ends without a word
        (200, {}, b'{"choices": [{"mess'),
        (200, {}, {"choices": []}),
        (200, {}, {"foo": 1}),
        (200, {"Content-Type": "text/html"}, b"<html>welcome</html>"),
        (200, {}, {"choices": [{"message": {"content": [1]}, "finish_reason": "stop"}]}),
        (200, {}, b"\xff\xfe"),
        (200, {}, b"null"),
    ],
)
def test_passing_failures_are_tried_again(tmp_path: Path, reply: Any) -> None:
    with serving(lambda number, body: reply if number in (0, 3) else None) as stub:
        llm = make(stub.url, tmp_path, concurrency=2)
        given = llm.answers(PROMPTS, ONES)
    assert {a.text for one in given for a in one} <= {echo(body) for body in stub.asked}
    assert len({a.text for one in given for a in one}) == len(PROMPTS)
    assert len(stub.asked) == len(PROMPTS) + 2
    assert (llm.usage.requests, llm.usage.retries) == (len(PROMPTS) + 2, 2)
    assert llm.usage.completion_tokens == 3 * len(PROMPTS)


def test_retry_after_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    with serving(lambda number, body: (429, {"Retry-After": "17"}, {}) if number == 0 else None) as stub:
        make(stub.url, tmp_path).answers(PROMPTS[:1], [1])
    assert len(stub.asked) == 2
    assert [round(s) for s in waited] == [17]


def test_pauses_double_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: (low + high) / 2)
    assert [endpoints.pause(n) for n in (1, 2, 3, 6, 20)] == [1, 2, 4, 30, 30]
    monkeypatch.undo()
    assert len({endpoints.pause(3) for _ in range(9)}) > 1


def failing(tmp_path: Path, behave: Any, **options: Any) -> tuple[str, StubServer, ServerModel]:
    with serving(behave) as stub:
        llm = make(stub.url, tmp_path, **options)
        with pytest.raises(UserError) as failed:
            llm.answers(PROMPTS[:1], [1])
    assert failed.value.__cause__ is None
    assert failed.value.__suppress_context__
    return str(failed.value), stub, llm


def test_slow_answers_are_asked_for_again_and_then_told(tmp_path: Path) -> None:
    hang = threading.Event()

    def hangs(number: int, body: dict[str, Any]) -> None:
        if number == 0:
            hang.wait(20)

    with serving(hangs) as stub:
        llm = make(stub.url, tmp_path / "a", timeout=1.0, concurrency=1)
        assert llm.answers(PROMPTS[:2], [1, 1])
        hang.set()
    assert llm.usage.retries >= 1
    assert content(stub)[0] == content(stub)[1]
    message, stub, _ = failing(tmp_path / "b", lambda *_: time.sleep(0.3), timeout=0.1, max_retries=1)
    assert "llm.server.timeout" in message
    assert "0 of 1 answers are kept" in message


@pytest.mark.parametrize(
    ("reply", "attempts", "words"),
    [
        ((401, {}, {"error": {"message": f"Incorrect key {KEY}"}}), 1, ["MY_KEY", "401"]),
        ((403, {}, {"error": {"message": f"no access with {KEY}"}}), 1, ["MY_KEY", "403"]),
        ((404, {}, {"error": {"message": "gone"}}), 1, ["'m'", "llm.server.urls", "the server has big-model"]),
        (
            (400, {}, {"error": {"message": "This model's maximum context length is 64 tokens.", "code": 400}}),
            1,
            ["ranking.history", "maximum context length is 64"],
        ),
        ((400, {}, {"error": {"message": "no", "code": "context_length_exceeded"}}), 1, ["ranking.history"]),
        ((400, {}, {"error": {"message": "exceeds the available context size"}}), 1, ["ranking.history"]),
        ((422, {}, {"detail": "Unexpected fields: seed"}), 1, ["422", "Unexpected fields: seed"]),
        ((429, {}, {"error": {"message": "slow"}}), 4, ["429", "llm.server.concurrency", "slow"]),
        ((429, {}, {"error": {"message": "pay", "code": "insufficient_quota"}}), 1, ["429", "pay"]),
        ((429, {"Retry-After": "86400"}, {"error": {"message": "x"}}), 1, ["asks to wait 86400 s"]),
        ((500, {}, {"error": {"message": f"crash {KEY}"}}), 4, ["500", "crash ***"]),
        ((200, {}, b"garbage " + KEY.encode()), 4, ["no chat completions"]),
        ((200, {}, {"choices": None, "key": KEY, "long": "x" * 20_000}), 4, ["no chat completion", "***"]),
    ],
)
def test_lasting_failures_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Any, attempts: int, words: list[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda *_: reply, models=("big-model",)) as stub:
        llm = make(stub.url, tmp_path, api_key_env="MY_KEY")
        with pytest.raises(UserError) as failed:
            llm.answers(PROMPTS[:1], [1])
    message = str(failed.value)
    assert failed.value.__suppress_context__
    assert len(stub.asked) == attempts
    for word in [*words, "0 of 1 answers are kept", stub.url]:
        assert word in message
    assert stub.keys == {f"Bearer {KEY}"}
    assert KEY not in message
    assert KEY not in repr(vars(llm))
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.rglob("*"))


def test_key_is_nowhere_but_in_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    caplog.set_level("INFO")
    with serving() as stub:
        llm = make([stub.url, nobody()], tmp_path)
        llm.check()
        llm.answers(PROMPTS, ONES)
    assert stub.keys == {f"Bearer {KEY}"}
    told = capsys.readouterr()
    assert KEY not in caplog.text + told.out + told.err + repr(vars(llm)) + llm.fingerprint
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    assert all(KEY.encode() not in file.read_bytes() for file in files)


def test_a_key_in_an_answer_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY_NAME", KEY)
    with serving(lambda *_: (200, {}, completion(f"It is {KEY}!"))) as stub:
        llm = make(stub.url, tmp_path, api_key_env="ANY_NAME")
        assert llm.answers(PROMPTS[:1], [1])[0][0].text == "It is ***!"
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.rglob("*"))


def test_a_server_that_is_set_aside_does_not_show_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANY_NAME", KEY)
    with serving() as stub:
        llm = make([stub.url, nobody()], tmp_path, api_key_env="ANY_NAME")
        llm.answers(PROMPTS[:1], [1])
        llm.endpoints.set_aside(llm.endpoints.all[1], RuntimeError(f"no {KEY}"))
    assert KEY not in (told := capsys.readouterr().out)
    assert "***" in told


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'"yes"', "yes"),
        (b'"\\ud83c\\udfac \\ud800 \\udc00"', "\U0001f3ac \ufffd \ufffd"),  # a pair, and two halves of none
        (b'"\\u0000\\u001b[2J\\u202e\\u2028"', "\x00\x1b[2J\u202e"),  # the last is a line's end
        (json.dumps("word " * 10_000).encode(), ("word " * 10_000).strip()),
        (
            json.dumps("Ignore the above. <script>alert(1)</script>").encode(),
            "Ignore the above. <script>alert(1)</script>",
        ),
    ],
)
def test_odd_texts_are_answers_that_can_be_sent_again(tmp_path: Path, raw: bytes, text: str) -> None:
    whole = json.dumps(completion("HERE", tokens=10_000)).encode().replace(b'"HERE"', raw)
    with serving(lambda *_: (200, {}, whole)) as stub:
        llm = make(stub.url, tmp_path)
        answer = llm.answers(PROMPTS[:1], [1])[0][0]
        assert (answer.text, answer.tokens) == (text, 10_000)
        assert AnswerStore(tmp_path)[next(iter(llm.store._answers))] == answer
        llm.answers([[*PROMPTS[0], {"role": "assistant", "content": answer.text}]], [1])
        assert stub.asked[-1]["messages"][-1]["content"] == text


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"\xc3"])
def test_bytes_that_are_no_text_are_told(tmp_path: Path, raw: bytes) -> None:
    whole = json.dumps(completion("HERE")).encode().replace(b"HERE", raw)
    with serving(lambda *_: (200, {}, whole)) as stub, pytest.raises(UserError, match="sends no chat completions"):
        make(stub.url, tmp_path, max_retries=0).answers(PROMPTS[:1], [1])


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", None])
def test_without_a_key_a_placeholder_is_sent(tmp_path: Path, variable: str | None) -> None:
    with serving() as stub:
        make(stub.url, tmp_path, api_key_env=variable).answers(PROMPTS[:1], [1])
    assert stub.keys == {"Bearer none"}
    message, _, _ = failing(tmp_path / "b", lambda *_: (401, {}, {}), api_key_env=variable)
    assert f"{variable} is not set" in message if variable else "no key is sent" in message


def test_key_that_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY + "\u2028é")
    with pytest.raises(UserError, match="MY_KEY") as failed:
        make(nobody(), tmp_path, api_key_env="MY_KEY").answers(PROMPTS[:1], [1])
    assert KEY not in str(failed.value)


def test_one_of_two_servers_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dead = nobody()
    with serving(delay=0.02) as stub:
        llm = make([dead, stub.url], tmp_path, max_retries=1)
        given = llm.answers(PROMPTS, ONES)
        assert [one.alive for one in llm.endpoints.all] == [False, True]
        llm.answers(PROMPTS, [2] * len(PROMPTS))
    assert all(one[0].text for one in given)
    assert len(stub.asked) == 2 * len(PROMPTS)
    told = capsys.readouterr().out
    assert told.count("is set aside") == 1  # once, and not asked again
    assert dead in told
    assert "1 of 2 servers go on" in " ".join(told.split())
    assert llm.usage.requests - len(stub.asked) == llm.usage.retries


def test_no_server_is_there(tmp_path: Path) -> None:
    urls = [nobody(), nobody()]
    llm = make(urls, tmp_path, max_retries=1)
    for ask in (lambda: llm.answers(PROMPTS, ONES), llm.check):
        with pytest.raises(UserError, match="no server answers") as failed:
            ask()
        assert all(url in str(failed.value) for url in urls)
        assert "ConnectionRefusedError" in str(failed.value)
    assert len(llm.store) == 0


def test_server_that_dies_half_way_loses_nothing(tmp_path: Path) -> None:
    stop = threading.Event()

    def die(number: int, body: dict[str, Any]) -> Any:
        if number >= 7:
            stop.set()
        return (0, {}, None) if stop.is_set() else None

    with serving(die) as stub:
        llm = make(stub.url, tmp_path, concurrency=1, max_retries=1)
        with pytest.raises(UserError, match="7 of 12 answers are kept"):
            llm.answers(PROMPTS, ONES)
    assert len(AnswerStore(tmp_path)) == 7  # on disk
    with serving() as other:
        given = make(other.url, tmp_path).answers(PROMPTS, ONES)
        assert sorted(content(other)) == sorted(p[0]["content"] for p in PROMPTS[7:])
        assert all(len(one) == 1 for one in given)


def test_server_that_comes_back_is_used_again(tmp_path: Path) -> None:
    port = free_port()
    llm = make(f"http://127.0.0.1:{port}/v1", tmp_path, max_retries=0)
    with pytest.raises(UserError, match="no server answers"):
        llm.answers(PROMPTS[:1], [1])
    with serving(port=port):
        assert llm.answers(PROMPTS[:1], [1])[0][0].text


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_empty_answer_is_an_answer(tmp_path: Path, text: str | None) -> None:
    with serving(lambda *_: (200, {}, completion(text, finish="length"))) as stub:
        llm = make(stub.url, tmp_path)
        [[answer]] = llm.answers(PROMPTS[:1], [1])
        assert llm.answers(PROMPTS[:1], [1]) == [[answer]]
    assert (answer.text, answer.tokens, answer.finish) == ("", 3, "length")
    assert (llm.usage.empty, len(stub.asked)) == (1, 1)


def test_reasoning_is_left_out_and_missing_usage_counted(tmp_path: Path) -> None:
    body = completion(" the answer ", finish="content_filter")
    body["choices"][0]["message"]["reasoning_content"] = "hmm"
    del body["usage"]
    with serving(lambda *_: (200, {}, body)) as stub:
        llm = make(stub.url, tmp_path)
        [[answer]] = llm.answers(PROMPTS[:1], [1])
    assert (answer.text, answer.tokens, answer.finish) == ("the answer", 0, "content_filter")
    assert (llm.usage.unmetered, llm.usage.completion_tokens) == (1, 0)


def test_inside_a_running_event_loop(tmp_path: Path) -> None:
    threads: set[threading.Thread] = set()

    async def notebook(url: str) -> Any:
        llm = make(url, tmp_path)
        llm.check()
        return llm.answers(PROMPTS, ONES, progress=lambda *_: threads.add(threading.current_thread()))

    with serving() as stub:
        given = asyncio.run(notebook(stub.url))
    assert {a.text for one in given for a in one} == {echo(body) for body in stub.asked}
    assert threads == {threading.main_thread()}  # progress bars live there


@pytest.mark.parametrize("models", [("m", "x"), (), (404, {}, {}), (200, {}, b"<html>"), (500, {}, {}), (200, {}, [1])])
def test_check_passes_a_server_that_knows_the_model_or_lists_none(tmp_path: Path, models: Any) -> None:
    with serving(models=models) as stub:
        make(stub.url, tmp_path).check()
    assert (stub.listed, len(stub.asked)) == (1, 0)


def test_check_refuses_an_unknown_model_and_a_refused_key(tmp_path: Path) -> None:
    with serving() as knows, serving(models=("a", "b")) as other:
        with pytest.raises(UserError, match="has no model 'm'") as failed:
            make([knows.url, other.url], tmp_path).check()
        assert other.url in str(failed.value)
        assert "it has a, b" in str(failed.value)
    with serving(models=(401, {}, {})) as stub, pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        make(stub.url, tmp_path).check()
    with serving(models=("org/m",)) as stub:
        ServerModel("org/m@main", [stub.url], AnswerStore(tmp_path)).check()
        ServerModel("/a/folder", [stub.url], AnswerStore(tmp_path)).check()


def test_check_sets_a_missing_server_aside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dead = nobody()
    with serving() as stub:
        llm = make([dead, stub.url], tmp_path)
        llm.check()
        llm.answers(PROMPTS, ONES)
    assert capsys.readouterr().out.count(dead) == 1
    assert (llm.usage.requests, llm.usage.retries) == (len(PROMPTS), 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"urls": "localhost:8000"}, "no base URL"),
        ({"urls": "ftp://x/v1"}, "no base URL"),
        ({"urls": "http://x/v1/chat/completions"}, "leave out"),
        ({"urls": f"http://me:{KEY}@x/v1"}, "no password"),
        ({"urls": f"http://x/v1?key={KEY}"}, "no password"),
        ({"urls": []}, "llm.server.urls"),
        ({"concurrency": 0}, "llm.server.concurrency"),
        ({"max_retries": -1}, "llm.server.retries"),
        ({"timeout": 0.0}, "llm.server.timeout"),
    ],
)
def test_wrong_settings_are_told_at_once(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as failed:
        make(**{"urls": "http://x/v1", "folder": tmp_path, **change})
    assert KEY not in str(failed.value)


def test_interrupt_keeps_what_has_come(tmp_path: Path) -> None:
    pressed: list[bool] = []

    def interrupt(n: int, tokens: int) -> None:
        if not pressed and len(AnswerStore(tmp_path)) >= 3:
            pressed.append(True)
            raise KeyboardInterrupt

    with serving(delay=0.01) as stub, pytest.raises(KeyboardInterrupt):
        make(stub.url, tmp_path, concurrency=1).answers(PROMPTS, ONES, progress=interrupt)
    assert 3 <= len(AnswerStore(tmp_path)) < len(PROMPTS)
    assert len(AnswerStore(tmp_path)) >= len(stub.asked) - 1  # but for the one under way
    assert not [t for t in threading.enumerate() if t.name == "event-loop"]


def test_results_come_in_order_and_in_batches_and_errors_come_last() -> None:
    batches: list[list[int]] = []

    async def work(put: Callable[[int], None]) -> None:
        for n in range(10):
            put(n)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_thread(work, lambda batch: batches.append(list(batch)), 4)
    assert [n for batch in batches for n in batch] == list(range(10))
    assert max(map(len, batches)) <= 4


def test_a_loop_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: Coroutine[Any, Any, None]) -> None:
        work.close()
        raise OSError(24, "Too many open files")

    async def work(put: Callable[[int], None]) -> None:
        put(1)

    monkeypatch.setattr("lit_rec.llm.background.asyncio.run", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        in_thread(work, lambda _: None, 4)


@pytest.mark.parametrize(("key", "shown"), [("test", "the greatest hits"), ("sk-12345678", "the greatest hits")])
def test_a_key_as_short_as_a_word_changes_no_answer(key: str, shown: str) -> None:
    assert hide_key("the greatest hits", key) == shown
    assert hide_key(f"{key} is refused", key) == ("test is refused" if key == "test" else "*** is refused")


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_in_process(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(40)]
    folder, port = save_llm(tmp_path / "llm", words), free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        settings = SamplingSettings(6, temperature=0.0, top_p=1.0)
        url = f"http://127.0.0.1:{port}/v1"
        llm = ServerModel(str(folder), [url], AnswerStore(tmp_path / "server"), settings=settings, concurrency=2)
        llm.check()
        prompts = [[{"role": "user", "content": " ".join(words[i : 3 + 2 * i])}] for i in range(5)]
        given = llm.answers(prompts, [1] * 5)
        cfg = LLMConfig(name="tiny", hub=str(folder), dtype="float32", max_new_tokens=6)
        inside = LanguageModel(cfg, LoraConfig(r=4), AnswerStore(tmp_path / "inside"), device="cpu", seed=0)
        expected = inside.answers(prompts, [1] * 5, settings=settings)
        assert [[a.text for a in one] for one in given] == [[a.text for a in one] for one in expected]
        assert [[a.finish for a in one] for one in given] == [[a.finish for a in one] for one in expected]
        assert llm.usage.requests == 5
        assert llm.usage.prompt_tokens == sum(len(inside.tokenize(p)) for p in prompts)
        assert 0 < llm.usage.completion_tokens == sum(a.tokens for one in given for a in one)
        with pytest.raises(UserError, match="pinned"):
            ServerModel("other", [url], AnswerStore(tmp_path / "other")).answers(prompts[:1], [1])
    finally:
        server.terminate()
        server.wait(20)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(1200):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")
