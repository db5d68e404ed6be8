"""MovieLens-1M from raw files to tensors against pandas: as its documentation reads `::`, and with its fast engine."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lit_rec.data.movielens import MovieLens1M
from tests.benchmarks.harness import SHARED, Row, faster, interleave
from tests.benchmarks.worlds import ml1m_files

TOLD = "it has to be told of the separator, and checks no line"
NAMES = ["user_id", "item_id", "rating", "timestamp"]


def with_pandas(folder: Path, *, trick: bool) -> dict[str, torch.Tensor]:
    """Read and number the three files the usual way: users and items in the order of their files.

    pandas reads a separator of two characters with its Python engine. The trick: its C engine splits the ratings by one
    colon and leaves out the empty columns between.
    """
    slow: dict[str, Any] = {"sep": "::", "engine": "python", "encoding": "latin-1"}
    fast: dict[str, Any] = {"sep": ":", "engine": "c", "usecols": [0, 2, 4, 6]}
    ratings = pd.read_csv(folder / "ratings.dat", header=None, **(fast if trick else slow))
    ratings.columns = pd.Index(NAMES)
    films = pd.read_csv(folder / "movies.dat", names=["item_id", "title", "genres"], **slow)
    people = pd.read_csv(folder / "users.dat", names=["user_id", "gender", "age", "job", "zip"], **slow)
    films["genres"] = films["genres"].str.split("|")
    films["year"] = films["title"].str.extract(r"\((\d{4})\)\s*$")[0].astype("Int32")
    users = pd.Index(people["user_id"][people["user_id"].isin(ratings["user_id"])])
    items = pd.Index(films["item_id"][films["item_id"].isin(ratings["item_id"])])
    return {
        "user": torch.from_numpy(users.get_indexer(ratings["user_id"])),
        "item": torch.from_numpy(items.get_indexer(ratings["item_id"]) + 1),
        "rating": torch.from_numpy(ratings["rating"].to_numpy("float32")),
        "timestamp": torch.from_numpy(ratings["timestamp"].to_numpy(copy=True)),
    }


def ours(folder: Path) -> dict[str, torch.Tensor]:
    """The same by the package, which also checks every line."""
    table = MovieLens1M(root=str(folder)).load().interactions
    return {name: table[name].to_torch() for name in table.columns}


def run(full: bool = False) -> list[Row]:
    """Seconds, files in the page cache."""
    with tempfile.TemporaryDirectory() as work:
        real = SHARED / "ml-1m"
        folder = real if (real / "ratings.dat").is_file() else ml1m_files(Path(work))
        what = "real files" if folder == real else "generated files of that size"
        read = ours(folder)
        for trick in (False, True):
            theirs = with_pandas(folder, trick=trick)
            assert read.keys() == theirs.keys()
            for name, values in read.items():
                assert torch.equal(values.double(), theirs[name].double()), (name, trick)
        calls = [partial(with_pandas, folder, trick=trick) for trick in (False, True)]
        mine, plain, trick_taken = interleave(partial(ours, folder), *calls, repeats=3)
    done = f"MovieLens-1M, raw files to tensors ({what})"
    return [
        faster(done, "pandas as its documentation reads `::`", (mine, plain), 5),
        faster(done, "pandas, ratings split by one colon with its C engine", (mine, trick_taken), 1, TOLD),
    ]
