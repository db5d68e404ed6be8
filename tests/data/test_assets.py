import hashlib
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lit_rec.data import assets
from lit_rec.data.assets import cache_dir, extract_zip, fetch_url, fetch_wheel, hash_of, unpacked_zip
from lit_rec.errors import UserError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "data.bin").write_bytes(b"ratings" * 1000)
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", folder / "data.bin"
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def zipped(path: Path, members: dict[str, bytes], link: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o120777 if name == link else 0o100644) << 16
            archive.writestr(entry, content)
    return path


def wheel_in(folder: Path, members: dict[str, bytes]) -> str:
    """A wheel pip can find; its sha256."""
    info = "some_data-1.0.dist-info"
    members |= {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    return hash_of(zipped(folder / "some_data-1.0-py3-none-any.whl", members))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip sees this folder alone."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("LIT_REC_CACHE", "/somewhere/else")
    assert cache_dir() == Path("/somewhere/else")
    monkeypatch.delenv("LIT_REC_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "lit_rec"


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_fetch_url(server, no_proxy, tmp_path, kind):
    url, file = server
    target = tmp_path / "cache" / "data.bin"
    known = f"{kind}:{hash_of(file, kind)}"
    assert fetch_url(f"{url}/data.bin", target, known_hash=known) == target
    assert target.read_bytes() == file.read_bytes()
    file.unlink()  # a second call needs no server
    assert fetch_url(f"{url}/data.bin", target, known_hash=known) == target


def test_a_file_with_another_hash_is_not_kept(server, no_proxy, tmp_path):
    url, _ = server
    target = tmp_path / "cache" / "data.bin"
    with pytest.raises(UserError, match="not the file that was expected"):
        fetch_url(f"{url}/data.bin", target, known_hash="md5:" + "0" * 32)
    assert [p.name for p in target.parent.iterdir() if not p.name.endswith(".lock")] == []


def test_not_found_and_no_network(server, no_proxy, tmp_path):
    url, _ = server
    target = tmp_path / "cache" / "x"
    with pytest.raises(UserError, match="cannot download") as error:
        fetch_url(f"{url}/missing.zip", target, known_hash="md5:" + "0" * 32)
    assert "404" in error.value.why
    with pytest.raises(UserError, match="cannot download") as error:
        fetch_url("http://127.0.0.1:9/x", target, known_hash="md5:" + "0" * 32)
    assert error.value.fix
    assert not target.exists()


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "..\\out.txt", "C:/out.txt"])
def test_names_outside_the_target_are_refused(tmp_path, name):
    archive = zipped(tmp_path / "a.zip", {"good.txt": b"1", name: b"2"})
    with pytest.raises(UserError, match="unsafe name") as error:
        extract_zip(archive, tmp_path / "target")
    assert str(archive) in error.value.where
    assert not (tmp_path / "target").exists()
    assert not (tmp_path / "out.txt").exists()


def test_links_are_refused(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"link": b"/etc/passwd"}, link="link")
    with pytest.raises(UserError, match="unsafe name"):
        extract_zip(archive, tmp_path / "target")


def test_too_much_is_refused(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"a": b"0" * 600, "b": b"0" * 600})
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        extract_zip(archive, tmp_path / "target", limit=1000)
    extract_zip(archive, tmp_path / "target", limit=1200)
    assert (tmp_path / "target" / "b").stat().st_size == 600


def test_only_members_under_the_prefix(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"keep/x/a.txt": b"1", "other/b.txt": b"2"})
    extract_zip(archive, tmp_path / "target", prefix="keep/")
    assert [p.name for p in (tmp_path / "target").rglob("*.txt")] == ["a.txt"]


@pytest.mark.parametrize("spoil", [lambda b: b[:40], lambda b: b"no zip", lambda b: b.replace(b"12345", b"12346", 1)])
def test_a_broken_zip_leaves_nothing(tmp_path, spoil):
    archive = zipped(tmp_path / "a.zip", {"a.txt": b"1234567890" * 9})
    archive.write_bytes(spoil(archive.read_bytes()))
    with pytest.raises(UserError, match="cannot be read|not a whole"):
        unpacked_zip(archive, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "archives").rglob("*.txt"))
    assert not [p for p in (tmp_path / "cache" / "archives").iterdir() if p.is_dir()]


def test_unpacked_once_per_content(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"a.txt": b"1"})
    first = unpacked_zip(archive, cache=tmp_path / "cache")
    assert unpacked_zip(archive, cache=tmp_path / "cache") == first
    zipped(archive, {"a.txt": b"2"})
    second = unpacked_zip(archive, cache=tmp_path / "cache")
    assert (first / "a.txt").read_text(), (second / "a.txt").read_text() == ("1", "2")


def test_fetch_wheel(index, tmp_path, monkeypatch):
    sha = wheel_in(index, {"some_data/sub/a.txt": b"1", "some_data/b.txt": b"2"})
    folder = fetch_wheel("some-data", "1.0", sha, "some_data/sub/", cache=tmp_path / "cache")
    assert (folder / "some_data/sub/a.txt").read_bytes() == b"1"
    assert not (folder / "some_data/b.txt").exists()
    assert not list((tmp_path / "cache").rglob("*.whl"))
    monkeypatch.setattr(assets, "_download_wheel", None)  # a second call uses what is there
    assert fetch_wheel("some-data", "1.0", sha, "some_data/sub/", cache=tmp_path / "cache") == folder


def test_fetch_wheel_checks_the_hash(index, tmp_path):
    wheel_in(index, {"some_data/a.txt": b"1"})
    with pytest.raises(UserError, match="not the file that was expected") as error:
        fetch_wheel("some-data", "1.0", "0" * 64, "some_data/", cache=tmp_path / "cache")
    assert "0" * 64 in error.value.why
    assert not list((tmp_path / "cache").rglob("a.txt"))


def test_fetch_wheel_names_what_pip_said(index, tmp_path):
    index.mkdir()
    with pytest.raises(UserError, match="cannot fetch no-such-data==9") as error:
        fetch_wheel("no-such-data", "9", "0" * 64, "x/", cache=tmp_path / "cache")
    assert "no-such-data" in error.value.why
    assert error.value.fix


def test_a_member_that_is_not_there(index, tmp_path):
    sha = wheel_in(index, {"some_data/a.txt": b"1"})
    with pytest.raises(UserError, match="holds no nothing/"):
        fetch_wheel("some-data", "1.0", sha, "nothing/", cache=tmp_path / "cache")


def test_two_processes_at_once(index, tmp_path):
    sha = wheel_in(index, {"some_data/a.txt": b"1"})
    call = f"from lit_rec.data.assets import fetch_wheel as f; from pathlib import Path; print(f('some-data', '1.0', {sha!r}, 'some_data/', cache=Path({str(tmp_path / 'cache')!r})))"  # noqa: E501
    root = Path(assets.__file__).parents[2]
    started = [
        subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(folders) == 1
    assert (Path(folders.pop()) / "some_data/a.txt").read_bytes() == b"1"


def test_hash_of(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_of(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
