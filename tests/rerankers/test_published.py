"""KAR's protocol on MovieLens-1M, no knowledge: the rerankers must stand where the published ones stand."""

from pathlib import Path

import pytest

from lit_rec.data.canonical import attribute_table
from lit_rec.data.lists import build_lists
from lit_rec.data.movielens import MovieLens1M
from lit_rec.data.splits import split_users
from lit_rec.rerankers.training import fit_reranker


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("architecture", "published", "kars_own"),
    [("dlcm", (0.77053, 0.72815), (0.7617, 0.7205)), ("prm", (0.77558, 0.73471), (0.7692, 0.7292))],
)
def test_published_numbers(
    shared_data: Path, architecture: str, published: tuple[float, float], kars_own: tuple[float, float]
) -> None:
    """NDCG@5 and MAP@5 within 0.01 of the paper, and not below a run of KAR's code on the same data."""
    data = MovieLens1M(root=str(shared_data / "ml-1m")).load()
    splits = split_users(data.n_users, protocol="kar", validation=0)
    table, widths = attribute_table(data)
    fitted = fit_reranker(
        lists=build_lists(data, protocol="kar"),
        train_users=splits.train,
        test_users=splits.test,
        n_items=data.n_items,
        attributes=table,
        attribute_widths=widths,
        first_attribute_only=True,
        architecture=architecture,
        selection="test_kar",
        max_epochs=25,
        patience=4,
    )
    best = fitted.history[fitted.best_epoch]
    for metric, paper, own in zip(("ndcg@5", "map@5"), published, kars_own, strict=True):
        assert best[f"val/list/{metric}"] == pytest.approx(paper, abs=0.01)
        assert best[f"val/list/{metric}"] >= own
