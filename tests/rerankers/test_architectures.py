"""What must hold of every architecture, and of the features they read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rec.errors import UserError
from lit_rec.rerankers.attention import score_in_context, self_attention
from lit_rec.rerankers.features import ItemFeatures, Knowledge, perceptron
from lit_rec.rerankers.module import ARCHITECTURES, RerankerModule
from lit_rec.rerankers.prm import sinusoids

N_ITEMS, USERS = 30, 12


def make(architecture: str, seed: int = 1, **arguments: Any) -> RerankerModule:
    torch.manual_seed(seed)
    defaults = {
        "attributes": torch.randint(0, 5, (N_ITEMS + 1, 2)),
        "user_vectors": torch.randn(USERS, 12),
        "item_vectors": torch.randn(N_ITEMS + 1, 12),
    }
    module = RerankerModule(n_items=N_ITEMS, architecture=architecture, **(defaults | arguments))
    for parameter in module.parameters():  # away from the small initial embeddings, so that differences show
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return module.eval()


def make_batch(lists: int = 6, size: int = 10) -> dict[str, Tensor]:
    torch.manual_seed(2)
    history = torch.randint(1, N_ITEMS + 1, (lists, 7))
    history[0], history[1, 3:] = 0, 0  # one user without a history, one with a short one
    return {
        "user": torch.randint(USERS, (lists,)),
        "items": torch.randint(1, N_ITEMS + 1, (lists, size)),
        "labels": (torch.rand(lists, size) < 0.4).float(),
        "list": torch.arange(lists),
        "history_items": history,
        "history_ratings": torch.randint(1, 6, history.shape) * (history > 0).float(),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("training", [False, True])
def test_padding_does_not_change_the_logits(architecture: str, training: bool) -> None:
    """In training too, where padding could leak through the statistics of batch normalisation."""
    module, batch = make(architecture), make_batch()
    module.train(training)
    plain = module(batch)
    padded = dict(batch)
    padded["items"] = torch.nn.functional.pad(batch["items"], (0, 4))
    padded["history_items"] = torch.nn.functional.pad(batch["history_items"], (0, 3))
    padded["history_ratings"] = torch.nn.functional.pad(batch["history_ratings"], (0, 3))
    torch.testing.assert_close(module(padded)[:, :10], plain, atol=1e-5, rtol=1e-4)
    assert plain.isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lists_of_different_lengths_do_not_touch(architecture: str) -> None:
    module, batch = make(architecture), make_batch()
    whole = module(batch)
    batch["items"][2:, 6:] = 0
    mixed = module(batch)
    torch.testing.assert_close(mixed[:2], whole[:2], atol=1e-5, rtol=1e-4)
    alone = {name: tensor[2:3] for name, tensor in batch.items()}
    alone["items"] = alone["items"][:, :6]
    torch.testing.assert_close(module(alone)[0], mixed[2, :6], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_self_attention_is_that_of_torch(padded: bool) -> None:
    """Outputs and gradients against `nn.MultiheadAttention` itself."""
    torch.manual_seed(3)
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    x, mask = torch.randn(5, 8, 12, requires_grad=True), torch.ones(5, 8, dtype=torch.bool)
    if padded:
        mask[1, 5:], mask[3, 1:] = False, False
    weights = torch.randn(5, 8, 12) * mask.unsqueeze(-1)
    found = []
    for context in (self_attention(layer, x, mask), layer(x, x, x, key_padding_mask=~mask, need_weights=False)[0]):
        found.append(
            (context * mask.unsqueeze(-1), *torch.autograd.grad((context * weights).sum(), (x, *layer.parameters())))
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_scores_in_context_are_those_of_the_two_modules(padded: bool) -> None:
    """Logits and the gradients of every parameter against the modules of PyTorch, one after the other."""
    torch.manual_seed(4)
    layer, mlp = torch.nn.MultiheadAttention(12, 3, batch_first=True), perceptron(24, (10, 6), 0.0)
    x, mask = torch.randn(5, 8, 12, requires_grad=True), torch.ones(5, 8, dtype=torch.bool)
    if padded:
        mask[1, 5:], mask[3, 1:] = False, False
    weights, found = torch.randn(5, 8) * mask, []
    with torch.no_grad():
        layer.out_proj.bias.normal_()
    context = layer(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
    plain = mlp(torch.cat([context, x], dim=-1)).squeeze(-1)
    for logits in (score_in_context(layer, mlp, x, mask), plain):
        gradients = torch.autograd.grad((logits * weights).sum(), (x, *layer.parameters(), *mlp.parameters()))
        found.append((logits * mask, *gradients))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_self_attention_of_a_list_without_candidates_is_finite() -> None:
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True)
    mask = torch.tensor([[True, True], [False, False]])
    assert self_attention(layer, torch.randn(2, 2, 12), mask).isfinite().all()


@pytest.mark.parametrize(("architecture", "same"), [("setrank", True), ("mir", True), ("prm", False), ("dlcm", False)])
def test_order_of_candidates(architecture: str, same: bool) -> None:
    """SetRank and MIR score a set; PRM reads positions and DLCM reads a sequence."""
    module, batch = make(architecture), make_batch()
    order = torch.randperm(10)
    expected = module(batch)[:, order]
    batch["items"] = batch["items"][:, order]
    difference = (module(batch) - expected).abs().max().item()
    assert difference < 1e-5 if same else difference > 1e-3


def test_mir_reads_the_history_and_the_knowledge() -> None:
    module, batch = make("mir"), make_batch()
    before = module(batch)
    rated = batch | {"history_ratings": (6 - batch["history_ratings"]) * (batch["history_items"] > 0)}
    changed = (module(rated) - before).abs().amax(dim=1) > 1e-4
    assert changed[1:].all()
    assert not changed[0]  # no history, nothing to read
    module.knowledge.user_vectors.neg_()
    assert ((module(batch) - before).abs().amax(dim=1) > 1e-4).all()
    del batch["history_items"]
    with pytest.raises(ValueError, match="history_items"):
        module(batch)


@pytest.mark.parametrize("architecture", ["dlcm", "prm", "setrank"])
def test_without_user_knowledge_users_are_all_the_same(architecture: str) -> None:
    batch = make_batch()
    batch["items"][1:], batch["user"] = batch["items"][0], torch.arange(6)
    for vectors in (None, torch.zeros(USERS, 12)):
        logits = make(architecture, user_vectors=vectors)(batch)
        torch.testing.assert_close(logits, logits[:1].expand_as(logits))
    assert make(architecture)(batch).std(dim=0).min() > 1e-4


def test_a_batch_of_one_list_trains() -> None:
    for architecture in ARCHITECTURES:
        module = make(architecture).train()
        module.training_step({name: tensor[:1] for name, tensor in make_batch().items()}, 0).backward()


def test_attributes_are_averaged_over_their_values() -> None:
    table = torch.tensor([[0, 0, 0], [1, 2, 3], [2, 0, 4], [0, 0, 4]])  # two values of one attribute, one of another
    features = ItemFeatures(3, table, (2, 1), dim=4)
    assert features.attribute is not None
    weight = features.attribute.weight
    torch.testing.assert_close(features(torch.tensor([1]))[0, 4:8], (weight[1] + weight[2]) / 2)
    torch.testing.assert_close(features(torch.tensor([[2]]))[0, 0, 4:], torch.cat([weight[2], weight[4]]))
    assert features(torch.tensor([3]))[0, 4:8].eq(0).all()
    first = ItemFeatures(3, table, (2, 1), dim=4, first_attribute_only=True)
    assert first.attribute is not None
    torch.testing.assert_close(first(torch.tensor([1]))[0, 4:8], first.attribute.weight[1])
    assert first.width == features.width == 12
    with pytest.raises(ValueError, match="does not fit"):
        ItemFeatures(3, table, (2, 2))


def test_half_stars_are_told_apart() -> None:
    features = ItemFeatures(3, dim=4, rated=True)
    vectors = features.history(torch.tensor([1, 1, 1]), torch.tensor([4.0, 4.5, 5.0]))
    assert len(vectors.unique(dim=0)) == 3


def test_adapted_rows_are_the_rows_of_the_whole() -> None:
    torch.manual_seed(1)
    vectors = torch.randn(USERS, 12)
    knowledge = Knowledge(vectors, None)
    rows = torch.tensor([[3, 3], [0, 7]])
    torch.testing.assert_close(knowledge.adapt_rows("user", rows), knowledge.adapt("user", vectors)[rows])
    assert knowledge.adapt_rows("item", rows).shape == (2, 2, 0)


def test_options_of_the_originals() -> None:
    batch = make_batch()
    learned = make("prm", architecture_args={"positions": "learned", "heads": 1}, loss="list_softmax").train()
    learned.training_step(batch, 0).backward()
    assert learned.ranker.positions.grad is not None
    assert not make("prm").ranker.positions.requires_grad
    assert make("dlcm", loss="attention_rank").train().training_step(batch, 0).isfinite()


def test_prm_knows_as_many_fixed_positions_as_a_list_has() -> None:
    """Beyond the table it has kept they are what a longer table holds."""
    batch = make_batch(size=150)
    short, long = make("prm"), make("prm", architecture_args={"max_length": 150})
    width = short.ranker.positions.shape[1]
    assert len(short.ranker.positions) == 100
    short.ranker.positions.data = sinusoids(100, width)  # `make` has drawn others
    long.load_state_dict(short.state_dict() | {"ranker.positions": sinusoids(150, width)})
    torch.testing.assert_close(short(batch), long(batch))
    assert torch.equal(sinusoids(150, 6)[:100], sinusoids(100, 6))
    assert (sinusoids(3, 6)[0] == 0).all()
    with pytest.raises(UserError, match="150 candidates is too long") as caught:
        make("prm", architecture_args={"positions": "learned"})(batch)
    assert caught.value.where == "reranker.args.max_length"
    assert "PRM has learned 100 positions" in caught.value.why


def test_mistakes_are_explained() -> None:
    with pytest.raises(UserError, match="no reranker 'bert4rec'"):
        make("bert4rec")
    with pytest.raises(UserError, match="cannot be built"):
        make("dlcm", architecture_args={"heads": 2})
    for name, given, why in (
        ("mir", {"architecture_args": {"hidden": 50}}, "hidden must be a multiple of field, 32, not 50"),
        ("mir", {"adaptor": {"out": 20}}, "so must the adaptor's out"),
        ("prm", {"architecture_args": {"mlp": []}}, "mlp needs one or more widths"),
        ("setrank", {"architecture_args": {"mlp": [80, 0]}}, "mlp needs one or more widths"),
    ):
        with pytest.raises(UserError, match="cannot be built") as caught:
            make(name, **given)
        assert why in caught.value.why
    with pytest.raises(UserError, match="no ranking metric"):
        make("dlcm", metrics=["auc"])


def test_hyper_parameters_are_plain() -> None:
    import json

    hparams = dict(make("mir", adaptor={"hidden": 8}).hparams)
    assert json.loads(json.dumps(hparams)) == hparams
    assert not {"attributes", "user_vectors", "item_vectors"} & set(hparams)
    assert not [name for name in make("dlcm").state_dict() if "vectors" in name or "attributes" in name]
