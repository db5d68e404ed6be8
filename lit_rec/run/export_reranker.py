"""A reranker as files another program reads: weights, shapes, vocabularies, and an ONNX graph that is checked."""

import contextlib
import importlib.util
import io
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from lit_rec.data.canonical import RatingsData, attribute_table
from lit_rec.errors import UserError
from lit_rec.rerankers.features import ITEM, USER
from lit_rec.rerankers.module import RerankerModule

TOLERANCE = 1e-4  # largest difference of a logit between torch and ONNX
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LENGTHS = {"items": ("batch", "candidates"), "user_vectors": ("batch",)}
LENGTHS |= {"history_items": ("batch", "history"), "history_ratings": ("batch", "history")}


def need_onnx() -> None:
    """Refuse an ONNX export that cannot be made, before anything is done.

    Raises:
        UserError: A package is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} not installed",
            where="--onnx",
            why="ONNX comes with an optional part of lit_rec",
            fix='pip install -e ".[export]", or leave --onnx out',
        )


class ServedReranker(nn.Module):
    """A reranker in evaluation as a graph of plain look-ups: what depends on items alone is computed once, here.

    Args:
        module: The reranker with its knowledge.
    """

    table: Tensor

    def __init__(self, module: RerankerModule) -> None:
        super().__init__()
        self.ranker, self.knowledge, self.rating = module.ranker, module.knowledge, module.features.rating
        rows = torch.arange(module.features.item.num_embeddings)
        with torch.no_grad():
            self.register_buffer("table", module.features(rows))
            self.register_buffer("known", module.knowledge.adapt_rows(ITEM, rows))

    def forward(
        self,
        items: Tensor,
        user_vectors: Tensor | None = None,
        history_items: Tensor | None = None,
        history_ratings: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, C] of items [B, C], for users of knowledge vectors [B, d] and histories [B, H]."""
        parts = [self.table[items], self.known[items]]  # type: ignore[index]
        if user_vectors is not None:
            user = self.knowledge.adapt(USER, user_vectors)
            parts.insert(1, user.unsqueeze(1).expand(-1, items.shape[1], -1))
        x = torch.cat(parts, dim=-1)
        if history_items is None or history_ratings is None:
            return self.ranker(x, items > 0)
        assert self.rating is not None
        level = (2 * history_ratings).round().long().clamp(0, self.rating.num_embeddings - 1)
        history = torch.cat([self.table[history_items], self.rating(level)], dim=-1)
        return self.ranker(x, items > 0, history, history_items > 0)


def random_lists(
    module: RerankerModule, batch: int, candidates: int, history: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """A batch of random lists and histories with padding, as `RerankerModule.forward` takes it."""
    n_items = module.features.item.num_embeddings - 1
    users = len(module.knowledge.user_vectors) if USER in module.knowledge.towers else 1

    def items(width: int) -> Tensor:
        rows = torch.randint(1, n_items + 1, (batch, width), generator=generator)
        length = torch.randint(1, width + 1, (batch, 1), generator=generator)
        return rows.where(torch.arange(width) < length, 0)

    made = {"user": torch.randint(users, (batch,), generator=generator), "items": items(candidates)}
    if module.uses_history:
        past = items(history)
        half_steps = torch.randint(1, 2 * round(module.hparams["rating_max"]) + 1, past.shape, generator=generator)
        made |= {"history_items": past, "history_ratings": (half_steps / 2).where(past > 0, 0)}
    return made


def inputs_of(module: RerankerModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch as the ONNX graph takes it: the users' knowledge vectors in place of their rows."""
    given = {name: tensor for name, tensor in batch.items() if name != "user"}
    if USER in module.knowledge.towers:
        given["user_vectors"] = module.knowledge.user_vectors[batch["user"]].float()
    return given


def export_onnx(module: RerankerModule, path: Path, *, candidates: int, history: int, seed: int = 0) -> dict[str, Any]:
    """Write a reranker as ONNX with open batch, list and history lengths, and check it against torch.

    Args:
        module: The reranker with its knowledge, in evaluation mode.
        path: The file.
        candidates: Usual length of a list.
        history: Usual length of a history.
        seed: Of the random lists it is checked on.

    Returns:
        Plain values for a model card: opset, inputs, lists (how many were compared), difference (the largest one).

    Raises:
        UserError: ONNX is not installed, or the graph's logits differ from torch's by `TOLERANCE` or more.
    """
    need_onnx()
    import onnx

    generator = torch.Generator().manual_seed(seed)
    example = inputs_of(module, random_lists(module, 3, candidates, history, generator))
    free = torch.export.Dim.DYNAMIC
    shapes = {name: {axis: free for axis in range(len(LENGTHS[name]))} for name in example}
    with _plain_attention(), _silence():
        program = torch.onnx.export(
            ServedReranker(module).eval(),
            kwargs=example,
            dynamic_shapes=shapes,
            input_names=list(example),
            output_names=["logits"],
            dynamo=True,
        )
    assert program is not None
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, LENGTHS.get(value.name, LENGTHS["items"]), strict=False):
            dim.dim_param = name
    del model.graph.value_info[:]  # sizes of the example, where the exporter took them for constants
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    lists, difference = max_difference(module, path, candidates=candidates, history=history, generator=generator)
    if not difference < TOLERANCE:
        raise UserError(
            f"the ONNX graph of the reranker differs from torch by {difference:.2e}",
            where="--onnx",
            why=f"on {lists} random lists; less than {TOLERANCE:g} is asked for",
            fix="leave --onnx out; model.safetensors holds the reranker itself",
        )
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return {"opset": opset, "inputs": list(example), "lists": lists, "difference": difference}


def max_difference(
    module: RerankerModule, path: Path, *, candidates: int, history: int, generator: torch.Generator
) -> tuple[int, float]:
    """Compare an ONNX file with the reranker it was made from, on random lists of several shapes.

    Returns:
        Number of lists, and the largest difference of a candidate's logit.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    longest = len(module.ranker.positions) if hasattr(module.ranker, "positions") else 2 * candidates
    largest, lists = 0.0, 0
    shapes = (
        (1, candidates, history),
        (7, max(2, candidates // 2), history + 3),
        (64, min(2 * candidates, longest), 1),
    )
    for batch, width, past in shapes:
        drawn = random_lists(module, batch, width, past, generator)
        given = {name: tensor.numpy() for name, tensor in inputs_of(module, drawn).items()}
        with torch.no_grad():
            wanted = module(drawn)
        found = torch.from_numpy(session.run(["logits"], given)[0])
        largest = max(largest, float((found - wanted)[drawn["items"] > 0].abs().max()))
        lists += batch
    return lists, largest


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as ordinary operations: the fused one has no counterpart in ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter tells every step of its own."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_reranker(source: Path, target: Path, module: RerankerModule, data: RatingsData) -> dict[str, Any]:
    """Write a kept reranker as model.safetensors, config.json, knowledge.safetensors and vocabularies.

    Args:
        source: Folder with reranker.safetensors, reranker.json, row.json and, with knowledge, knowledge.safetensors.
        target: Folder to write into; made when missing.
        module: The same reranker, loaded.
        data: What its rows mean.

    Returns:
        The configuration, as written.
    """
    target.mkdir(parents=True, exist_ok=True)
    about = json.loads((source / "reranker.json").read_text())
    # The table was saved as it is used: one column per attribute where only the first value counts.
    arguments = about["arguments"] | {"attribute_widths": list(module.features.widths)}
    towers = module.knowledge.towers
    config = {
        "architecture": arguments["architecture"],
        "arguments": arguments,
        "best_epoch": about["best_epoch"],
        **json.loads((source / "row.json").read_text()),
        "users": data.n_users,
        "items": data.n_items,
        "user_vector_width": module.knowledge.user_vectors.shape[1] if USER in towers else 0,
        "item_vector_width": module.knowledge.item_vectors.shape[1] if ITEM in towers else 0,
    }
    shutil.copy2(source / "reranker.safetensors", target / "model.safetensors")
    if (source / "knowledge.safetensors").is_file():
        shutil.copy2(source / "knowledge.safetensors", target / "knowledge.safetensors")
    (target / "config.json").write_text(json.dumps(config, indent=1))
    data.users.select("user_id").with_row_index("row").write_parquet(target / "users.parquet")
    data.items.with_row_index("row").write_parquet(target / "items.parquet")
    attribute_values(data).write_parquet(target / "attributes.parquet")
    return config


def attribute_values(data: RatingsData) -> pl.DataFrame:
    """Which number stands for which attribute value: attribute, value, number (0 = padding)."""
    table, widths = attribute_table(data)
    found: set[tuple[str, str, int]] = set()
    at = 0
    named = [name for name in data.item_attributes if data.items[name].list.len().max()]
    for name, width in zip(named, widths, strict=True):
        columns = table[:, at : at + width].tolist()
        for values, numbers in zip(data.items[name].to_list(), columns, strict=True):
            found.update((name, value, number) for value, number in zip(values, numbers, strict=False))
        at += width
    schema = {"attribute": pl.String, "value": pl.String, "number": pl.Int64}
    return pl.DataFrame(sorted(found, key=lambda row: row[2]), schema=schema, orient="row")
