"""The answer store: nothing is lost, nothing is half there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_rec.errors import UserError
from lit_rec.llm.store import Answer, AnswerStore, answer_key
from tests.llm.stub_server import free_port

PROMPT = [{"role": "user", "content": "What does u1 like?"}]
SETTINGS = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.95, "seed": 1}


def batch(*names: str) -> list[tuple[str, Answer]]:
    return [(name, Answer(f"text of {name}", 3, "stop")) for name in names]


def test_reopened_store_has_what_was_added(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.add(batch("a", "b"))
    store.add([])
    store.add(batch("c"))
    assert store.generated == len(store) == 3
    again = AnswerStore(tmp_path)
    assert (len(again), again.generated) == (3, 0)
    assert again["b"] == Answer("text of b", 3, "stop")
    assert "d" not in again
    assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == 2  # one line a batch


def test_unfinished_last_line_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.add(batch("a", "b"))
    whole = store.path.read_bytes()
    store.add(batch("c", "d"))
    written = store.path.read_bytes()
    for cut in range(len(whole) + 1, len(written)):
        store.path.write_bytes(written[:cut])
        again = AnswerStore(tmp_path)
        assert "a" in again
        assert "c" not in again
        assert "d" not in again  # a batch is there whole or not at all
        assert again.path.read_bytes() == whole
    again.add(batch("c", "d"))
    assert again.path.read_bytes() == written


@pytest.mark.parametrize(
    "damage",
    [
        *(
            b"{ not json\n",
            b"[1, 2]\n",
            b'{"k": {"text": "x"}}\n',
            b"\xff\xfe\n",
            b"\x00\x00\n",
            b"[" * 100_000 + b"\n",
        ),
        b'{"k": {"text": 3, "tokens": 1, "finish": "stop"}}\n',
        b'{"k": {"text": "x", "tokens": true, "finish": "stop"}}\n',
        b'{"k": {"text": "x", "tokens": 1, "finish": "stop", "crc32": 1}}\n',
    ],
    ids=lambda damage: str(damage[:30]),
)
def test_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    store = AnswerStore(tmp_path)
    store.add(batch("a"))
    line = store.path.read_bytes()
    store.path.write_bytes(line + damage + line)
    with pytest.raises(UserError, match="damaged") as caught:
        AnswerStore(tmp_path)
    assert caught.value.where == f"{store.path}:2"
    assert "delete that line" in caught.value.fix


def test_every_change_of_an_answer_is_noticed(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.add(batch("a"))
    line = store.path.read_bytes()
    for old, new in ((b"text of a", b"text of b"), (b": 3,", b": 4,"), (b"stop", b"stoP"), (b'{"a"', b'{"b"')):
        assert line.count(old) == 1
        store.path.write_bytes(line.replace(old, new))
        with pytest.raises(UserError, match="damaged") as caught:
            AnswerStore(tmp_path)
        assert "checksum" in caught.value.why


def test_what_the_first_versions_wrote_is_read(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"a": {"text": "x\\ud800", "tokens": 1, "finish": "stop"}}\n')
    assert AnswerStore(tmp_path)["a"].text == "x\ufffd"


def test_a_write_that_fails_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnswerStore(tmp_path)
    store.add(batch("a"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.add(batch("b"))
    assert "b" not in store
    assert store.generated == 1
    store.add(batch("c"))
    lines = store.path.read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [["a"], ["c"]]


@pytest.mark.parametrize("length", [3, 200_000])
def test_what_another_killed_run_left_is_cut_before_a_batch_is_added(tmp_path: Path, length: int) -> None:
    store = AnswerStore(tmp_path)
    store.add(batch("a"))
    with store.path.open("ab") as file:
        file.write(b"{" + b"x" * length)
    store.add(batch("b"))
    again = AnswerStore(tmp_path)
    assert ("a" in again, "b" in again, len(again)) == (True, True, 2)


@pytest.mark.parametrize(
    "text",
    ["", "\ufffd lone", "\x00\x01\x1b[31m\x7f", "line\nnew\rline\u2028end\x85", "Amélie – 千と千尋 🎬", '{"a": "\\'],
)
def test_any_text_survives(tmp_path: Path, text: str) -> None:
    AnswerStore(tmp_path).add([("k", Answer(text, 1, "length"))])
    AnswerStore(tmp_path).add(batch("later"))
    again = AnswerStore(tmp_path)
    assert again["k"].text == text
    assert "later" in again


def test_half_a_pair_becomes_what_can_be_written(tmp_path: Path) -> None:
    AnswerStore(tmp_path).add([("k", Answer("\ud83c\udfac \ud800", 1, "stop"))])
    assert AnswerStore(tmp_path)["k"] == Answer("\U0001f3ac \ufffd", 1, "stop")


def test_keys_differ_by_everything_that_shapes_an_answer() -> None:
    other_prompt = [{"role": "system", "content": PROMPT[0]["content"]}]
    keys = [
        answer_key("m/base", PROMPT, SETTINGS, 0),
        answer_key("m2/base", PROMPT, SETTINGS, 0),
        answer_key("m/adapter", PROMPT, SETTINGS, 0),
        answer_key("m/base", other_prompt, SETTINGS, 0),
        answer_key("m/base", [*PROMPT, *PROMPT], SETTINGS, 0),
        answer_key("m/base", PROMPT, SETTINGS, 1),
        *(answer_key("m/base", PROMPT, {**SETTINGS, name: 0.5}, 0) for name in SETTINGS),
        answer_key("m/base", [{"role": "user", "content": "\ud800"}], SETTINGS, 0),
    ]
    assert len(set(keys)) == len(keys)
    shuffled = dict(reversed(list(SETTINGS.items())))
    assert answer_key("m/base", [dict(reversed(list(PROMPT[0].items())))], shuffled, 0) == keys[0]


def test_two_stores_on_one_file_keep_each_others_batches(tmp_path: Path) -> None:
    one, two = AnswerStore(tmp_path), AnswerStore(tmp_path)
    one.add(batch("a"))
    two.add(batch("b"))
    one.add(batch("c"))
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [["a"], ["b"], ["c"]]
    assert len(AnswerStore(tmp_path)) == 3


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        AnswerStore(tmp_path / "file")


TWO = """
import sys, time
from pathlib import Path
from lit_rec import distributed
from lit_rec.llm.store import Answer, AnswerStore

distributed.start(distributed.discover())
folder, rank = Path(sys.argv[1]), distributed.place().rank
own = AnswerStore(folder)
distributed.barrier()
if rank == 0:  # another run writes, and process 0 alone has seen it
    AnswerStore(folder).add([("theirs", Answer("text", 1, "stop"))])
    own = AnswerStore(folder)
lacking = own.lacking(["theirs", "nobody's"])
print(rank, sorted(lacking), own["theirs"].text, flush=True)
distributed.leave()
"""


def test_processes_agree_on_what_is_lacking(tmp_path: Path) -> None:
    """They open the file one after the other, and what another run writes in between one has and the other has not."""
    port = str(free_port())
    going = []
    for rank in range(2):
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", TWO, str(tmp_path)]
        going.append(subprocess.Popen(command, env={**os.environ, **told}, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[0].strip() for process in going]
    assert said == [f'{rank} ["nobody\'s"] text' for rank in range(2)]
