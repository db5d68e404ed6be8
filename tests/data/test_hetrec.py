"""HetRec 2011, in its official form: Windows line ends, latin-1, headers."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from omegaconf import OmegaConf

from lit_rec.config import configs_dir, instantiate
from lit_rec.data import hetrec
from lit_rec.data.hetrec import MOVIES, HetRec2011, HetRecItems
from lit_rec.data.session_cuts import SessionsOf
from lit_rec.errors import UserError


def movie(item: int, title: str, year: str) -> str:
    known = {"id": str(item), "title": title, "year": year}
    return "\t".join(known.get(column, r"\N") for column in MOVIES.split())


FILES = {
    "movies.dat": [
        MOVIES.replace(" ", "\t"),
        movie(1, "Toy story", "1995"),
        movie(5, "Délicatessen, La", "1991"),
        movie(3, 'The "War" at Home', r"\N"),
        movie(9, "Never rated", "2000"),
    ],
    "movie_genres.dat": ["movieID\tgenre", "1\tAdventure", "1\tAnimation", "5\tComedy", "3\tDrama"],
    "movie_directors.dat": ["movieID\tdirectorID\tdirectorName", "1\tjohn_lasseter\tJohn Lasseter", "5\tj\tJeunet"],
    "movie_countries.dat": ["movieID\tcountry", "1\tUSA", "5\tFrance", "3\t"],
    "movie_actors.dat": [
        "movieID\tactorID\tactorName\tranking",
        "1\tannie_potts\tAnnie Potts\t10",
        "1\ttom_hanks\tTom Hanks\t1",
        "5\tdreyfus\tJean-Claude Dreyfus\t3",
        "1\tvarney\tJim Varney\t4",
        "1\tallen\tTim Allen\t2",
        "1\tnobody\t\t3",
        "1\trickles\tDon Rickles\t5",
    ],
    "user_ratedmovies-timestamps.dat": [
        "userID\tmovieID\trating\ttimestamp",
        "78\t5\t4.5\t1162160240999",
        "75\t3\t1\t1162160236000",
        "75\t1\t4\t1162160236000",
    ],
}


def write(folder: Path, **changed: list[str]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, lines in FILES.items():
        lines = changed.get(name.split(".")[0].replace("-", "_"), lines)
        (folder / name).write_bytes(("\r\n".join(lines) + "\r\n").encode("latin-1"))
    return folder


def test_ratings_and_films(tmp_path):
    data = HetRec2011(root=str(write(tmp_path))).load()
    assert (data.name, data.n_users, data.n_items, data.item_noun) == ("hetrec2011", 2, 3, "movie")
    assert data.users["user_id"].to_list() == ["78", "75"]
    assert data.items["item_id"].to_list() == ["", "1", "5", "3"]
    assert data.items["title"].to_list() == ["", "Toy story", "La Délicatessen", 'The "War" at Home']
    assert data.items["year"].to_list() == [None, 1995, 1991, None]
    assert data.item_attributes == ("genres", "directors", "actors", "countries")
    assert data.items["genres"].to_list() == [[], ["Adventure", "Animation"], ["Comedy"], ["Drama"]]
    assert data.items["directors"].to_list() == [[], ["John Lasseter"], ["Jeunet"], []]
    # four by ranking; the one without a name counts for nothing
    first = ["Tom Hanks", "Tim Allen", "Jim Varney", "Don Rickles"]
    assert data.items["actors"].to_list() == [[], first, ["Jean-Claude Dreyfus"], []]
    assert data.items["countries"].to_list() == [[], ["USA"], ["France"], []]
    assert data.interactions.rows() == [(0, 2, 4.5, 1162160240), (1, 3, 1, 1162160236), (1, 1, 4, 1162160236)]


def test_films_alone_and_without_actors(tmp_path):
    folder = write(tmp_path)
    (folder / "user_ratedmovies-timestamps.dat").unlink()
    (folder / "movie_actors.dat").unlink()
    table = HetRecItems(root=str(folder)).load()
    assert table.items["item_id"].to_list() == ["1", "5", "3", "9"]
    assert table.attributes == ("genres", "directors", "countries")
    assert table.items["genres"].to_list()[3] == []
    assert (table.item_noun, table.verb) == ("movie", "watched")
    with pytest.raises(UserError, match="user_ratedmovies-timestamps.dat") as error:
        HetRec2011(root=str(folder)).load()
    assert "files.grouplens.org" in error.value.fix


@pytest.mark.parametrize("name", [n for n in FILES if n != "movie_actors.dat"])
def test_a_missing_file_is_named(tmp_path, name):
    (write(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=name):
        HetRec2011(root=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("movies.dat", "7\tToo short"),
        ("movie_genres.dat", "1\tDrama\tComedy"),
        ("movie_directors.dat", "1\tJohn"),
        ("movie_countries.dat", ""),
        ("movie_actors.dat", "1\ttom_hanks\tTom Hanks\tfirst"),
        ("user_ratedmovies-timestamps.dat", "75\t1\tfour\t1162160236000"),
        ("user_ratedmovies-timestamps.dat", "75\t1\t4\t29.10.2006"),
        ("user_ratedmovies-timestamps.dat", "75\t1\t4"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, name, line):
    lines = [*FILES[name][:2], line, *FILES[name][2:]]
    folder = write(tmp_path, **{name.split(".")[0].replace("-", "_"): lines})
    with pytest.raises(UserError) as error:
        HetRec2011(root=str(folder)).load()
    assert error.value.where == f"{folder / name}:3"
    assert repr(line) in error.value.what


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("header", [True, False])
def test_the_header_must_be_the_official_one(tmp_path, name, header):
    lines = [FILES[name][0].upper(), *FILES[name][1:]] if header else FILES[name][1:]
    folder = write(tmp_path, **{name.split(".")[0].replace("-", "_"): lines})
    with pytest.raises(UserError, match="malformed line") as error:
        HetRec2011(root=str(folder)).load()
    assert error.value.where == f"{folder / name}:1"


def pack(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as opened:
        for name in FILES:
            opened.write(folder / name, name)  # at the top, as in the official file
    return archive


def test_the_zip_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_REC_CACHE", str(tmp_path / "cache"))
    folder = write(tmp_path / "h")
    archive = pack(folder, tmp_path / "hetrec2011-movielens-2k-v2.zip")
    packed, plain = HetRec2011(root=str(archive)), HetRec2011(root=str(folder))
    assert packed.load().items.equals(plain.load().items)
    assert packed.describe() == plain.describe()
    assert "sha256" not in packed.describe()


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[str]:
    """The official address, with a small zip file behind it."""
    (tmp_path / "served").mkdir()
    pack(write(tmp_path / "h"), tmp_path / "served" / "hetrec.zip")
    monkeypatch.setenv("LIT_REC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setattr(hetrec, "URL", f"http://127.0.0.1:{http.server_port}/hetrec.zip")
        yield hetrec.URL
        http.shutdown()
        thread.join()


def test_nothing_is_downloaded_without_a_checksum(tmp_path, server):
    for sha256 in (None, "", "abc"):
        with pytest.raises(UserError, match="without a checksum") as error:
            HetRec2011(sha256=sha256).load()
        assert server in error.value.fix
    assert not (tmp_path / "cache").exists()


def test_a_download_is_checked(tmp_path, server):
    with pytest.raises(UserError, match="not the file that was expected"):
        HetRec2011(sha256="0" * 64).load()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    digest = hashlib.sha256((tmp_path / "served" / "hetrec.zip").read_bytes()).hexdigest()
    source = HetRec2011(sha256=digest)
    assert source.load().items.equals(HetRec2011(root=str(tmp_path / "h")).load().items)
    assert source.describe()["sha256"] == digest


def test_a_download_that_fails_is_told(tmp_path, server):
    (tmp_path / "served" / "hetrec.zip").unlink()
    with pytest.raises(UserError, match="cannot download"):
        HetRec2011(sha256="0" * 64).load()


def test_describe_is_plain_and_names_the_files(tmp_path):
    described = HetRec2011(root=str(write(tmp_path))).describe()
    assert json.loads(json.dumps(described)) == described
    assert {f["file"] for f in described["files"]} == set(FILES)
    assert described["name"] == "hetrec2011"


def test_the_config_and_its_calendar(tmp_path):
    cfg = OmegaConf.load(configs_dir() / "data" / "hetrec_sessions.yaml")
    cfg.reader.root = str(write(tmp_path))
    made = instantiate(cfg, "data")
    assert isinstance(made, SessionsOf)
    assert made.reader.load().name == "hetrec2011"
    assert (made.by, made.min_length, made.candidates, made.test) == ("day", 4, 50, 0.2)
    # the readme's own example of one rating: 1162160236000 is 29.10.2006, 23:17:16 in the date columns
    told = datetime.fromtimestamp(1162160236, ZoneInfo(made.time_zone))
    assert (told.year, told.month, told.day, told.hour, told.minute, told.second) == (2006, 10, 29, 23, 17, 16)


@pytest.mark.shared_data
def test_the_real_films(shared_data):
    folder = shared_data / "hetrec2011-movielens-2k"
    table = HetRecItems(root=str(folder)).load()
    assert len(table.items) == table.items["item_id"].n_unique() == 10_197  # as the readme says
    assert table.items["genres"].list.len().sum() == 20_809
    assert len(set(table.items["genres"].explode().drop_nulls())) == 20
    assert table.items["year"].null_count() == 0
    assert table.items["directors"].list.len().sum() == 10_155
    assert not (table.items["title"] == "").any()
    assert table.items.row(0)[:3] == ("1", "Toy story", 1995)
