"""What the paper reports, to stand beside our numbers (RLRF4Rec v1, arXiv 2410.05939; METHODS 1.4).

One run each, no deviation given, the epoch selected on the test users; means over LISTS under KAR's protocol
and KAR's metric convention. They are comparable with nothing else.
"""

_DATASETS = {
    "ml-1m": "ml-1m",
    "ml1m": "ml-1m",
    "movielens-1m": "ml-1m",
    "amazon-books": "books",
    "books": "books",
}
_COLUMNS = (("ml-1m", "map@5"), ("ml-1m", "ndcg@5"), ("books", "map@5"), ("books", "ndcg@5"))
_TABLE = {
    ("dlcm", "base"): (0.72815, 0.77053, 0.63823, 0.66078),
    ("dlcm", "kar"): (0.73482, 0.77622, 0.65794, 0.68434),
    ("dlcm", "rlrf4rec"): (0.73952, 0.77942, 0.66563, 0.69310),
    ("prm", "base"): (0.73471, 0.77558, 0.63808, 0.65896),
    ("prm", "kar"): (0.74082, 0.78171, 0.66707, 0.69481),
    ("prm", "rlrf4rec"): (0.74542, 0.78529, 0.67360, 0.70131),
}
_METHODS = {
    "no_knowledge": "base",
    "zero_shot": "kar",
    "zero_shot_kar": "kar",  # history and answer encoded as one text, as KAR's code does
}


def published_value(
    *, dataset: str, protocol: str, reranker: str, row: str, metric: str, last_round: int | None = None
) -> float | None:
    """Return the paper's number for a row of the result table, or None where it has none.

    Args:
        dataset: its name, such as "ml-1m" or "amazon-books".
        protocol: only "kar" can be compared with the paper, and only on all users: the caller sees to that.
        reranker: any case; the paper has DLCM and PRM.
        row: `no_knowledge`, `zero_shot` (KAR) or the last round (RLRF4Rec); `_kar` inputs count as well.
        metric: "ndcg@5" or "map@5".
        last_round: the number of the last DPO round.

    >>> published_value(dataset="ml-1m", protocol="kar", reranker="DLCM", row="no_knowledge", metric="ndcg@5")
    0.77053
    """
    name = _DATASETS.get(dataset.lower().replace("_", "-"))
    method = _METHODS.get(row)
    if last_round is not None and row in (f"round_{last_round}", f"round_{last_round}_kar"):
        method = "rlrf4rec"
    values = _TABLE.get((reranker.lower(), method or ""))
    if protocol != "kar" or values is None or (name, metric) not in _COLUMNS:
        return None
    return values[_COLUMNS.index((name, metric))]
