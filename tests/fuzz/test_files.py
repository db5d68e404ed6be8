"""Files that were cut or changed: the store gives what was written or says so, an archive stays in its folder."""

import io
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rec.data.assets import extract_zip
from lit_rec.llm.store import Answer, AnswerStore
from tests.fuzz.cases import amounts, cases, spoiled, told

TEXTS = st.text(max_size=20) | st.sampled_from(["\ud800", "\n", "\r\n", "\x85\u2028", '"}', "\x00"])
BATCHES = st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=5)


def written(folder: Path, batches: list[list[str]]) -> tuple[bytes, list[dict[str, Answer]]]:
    """A store of these batches: its bytes, and what each line holds."""
    (folder / "answers.jsonl").unlink(missing_ok=True)
    store = AnswerStore(folder)
    made = [{f"key{n}.{i}": Answer(t, i, "stop") for i, t in enumerate(ts)} for n, ts in enumerate(batches)]
    for batch in made:
        store.add(batch.items())
    return store.path.read_bytes(), made


@amounts(700)
def test_a_store_that_was_cut_anywhere_has_every_whole_batch_and_goes_on(tmp_path: Path, many: int) -> None:
    @cases(many)
    @given(BATCHES, st.data())
    def holds(batches: list[list[str]], data: st.DataObject) -> None:
        whole, made = written(tmp_path, batches)
        cut = data.draw(st.integers(0, len(whole)))
        tail = data.draw(st.sampled_from([b"", b"\x00" * 40, b'{"half": {"te']))  # of the next batch, or of a power cut
        (tmp_path / "answers.jsonl").write_bytes(whole[:cut] + tail)
        store = AnswerStore(tmp_path)
        kept = whole[:cut].count(b"\n")
        expected = {key: answer for batch in made[:kept] for key, answer in batch.items()}
        assert store._answers == expected
        for batch in made[kept:]:
            store.add(batch.items())
        assert store.path.read_bytes() == whole
        assert AnswerStore(tmp_path)._answers == {key: answer for batch in made for key, answer in batch.items()}

    holds()


@amounts(1000)
def test_a_store_whose_bytes_changed_gives_nothing_that_was_not_written(tmp_path: Path, many: int) -> None:
    whole, made = written(tmp_path, [["plain", "Amélie 🎬"], ["two\nlines"], ["", "\ud800"], ["the last"]])
    true = {key: answer for batch in made for key, answer in batch.items()}

    @cases(many)
    @given(spoiled(whole) | st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 7)))
    def holds(content: bytes | tuple[int, int]) -> None:
        if isinstance(content, tuple):  # one bit
            place, bit = content
            content = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        (tmp_path / "answers.jsonl").write_bytes(content)
        if (store := told(lambda: AnswerStore(tmp_path))) is not None:
            assert store._answers.items() <= true.items()

    holds()


NAMES = st.one_of(
    st.sampled_from(["a", "a/b", "a/b/c", "../x", "a/../../x", "/x", "C:/x", "..\\x", ".", "./a", "a//b", "x" * 300]),
    st.text(max_size=12),
)
KINDS = st.sampled_from([0, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR])
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=30), KINDS), max_size=4)


def archive(members: list[tuple[str, bytes, int]]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, kind in members:
            about = zipfile.ZipInfo("x")
            about.filename = name.encode("utf-8", "replace").decode()
            about.external_attr, about.compress_type = (kind | 0o777) << 16, zipfile.ZIP_DEFLATED
            file.writestr(about, content)
    return made.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@amounts(800)
def test_no_archive_writes_outside_its_folder_or_too_much(tmp_path: Path, many: int) -> None:
    numbers = iter(range(10**6))

    @cases(many)
    @given(MEMBERS, st.data())
    def holds(members: list[tuple[str, bytes, int]], data: st.DataObject) -> None:
        content = archive(members)
        if data.draw(st.booleans()):
            content = data.draw(spoiled(content))
        room = tmp_path / str(next(numbers))
        target = room / "deep" / "inside"
        room.mkdir()
        (room / "a.zip").write_bytes(content)
        told(lambda: extract_zip(room / "a.zip", target, limit=60))
        paths = list(room.rglob("*"))
        files = [path for path in paths if path.is_file() and path.name != "a.zip"]
        assert not [path for path in paths if path.is_symlink() or path.is_fifo()]
        assert all(target in path.parents for path in files)
        assert sum(path.stat().st_size for path in files) <= 60

    holds()
