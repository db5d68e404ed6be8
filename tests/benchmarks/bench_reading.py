"""MovieLens-1M from raw files to tensors against pandas."""

import tempfile
from pathlib import Path

import pandas as pd
import torch

from lit_rec.data.movielens import MovieLens1M
from tests.benchmarks.harness import SHARED, Row, faster, interleave
from tests.benchmarks.worlds import ml1m_files


def with_pandas(folder: Path) -> dict[str, torch.Tensor]:
    """Read and number the three files the usual way."""
    options = {"sep": "::", "engine": "python", "header": None, "encoding": "latin-1"}
    ratings = pd.read_csv(folder / "ratings.dat", names=["user", "item", "rating", "time"], **options)
    films = pd.read_csv(folder / "movies.dat", names=["item", "title", "genres"], **options)
    pd.read_csv(folder / "users.dat", names=["user", "gender", "age", "job", "zip"], **options)
    ratings = ratings.sort_values(["user", "time"], kind="stable")
    films["genres"] = films["genres"].str.split("|")
    user, item = ratings["user"].factorize()[0], ratings["item"].factorize()[0]
    return {"user": torch.from_numpy(user), "item": torch.from_numpy(item)}


def run(full: bool = False) -> list[Row]:
    """Seconds, files in the page cache."""
    with tempfile.TemporaryDirectory() as work:
        real = SHARED / "ml-1m"
        folder = real if (real / "ratings.dat").is_file() else ml1m_files(Path(work))
        what = "real files" if folder == real else "generated files of that size"
        read = MovieLens1M(root=str(folder)).load()
        assert len(read.interactions) == len(with_pandas(folder)["user"])
        taken = interleave(lambda: MovieLens1M(root=str(folder)).load(), lambda: with_pandas(folder))
    return [faster(f"MovieLens-1M, raw files to tables of rows and times ({what})", "pandas", taken, 5)]
