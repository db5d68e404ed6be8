"""The kernels against torch's own layers in double precision, with vectors of every width."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rec.kernels import calls, layers, recurrent
from lit_rec.knowledge.adaptor import HybridExpertAdaptor
from lit_rec.rerankers.attention import score_in_context
from lit_rec.rerankers.dlcm import DLCM
from lit_rec.rerankers.features import ItemFeatures, perceptron
from lit_rec.rerankers.losses import bce
from lit_rec.rerankers.module import RerankerModule
from lit_rec.rerankers.prm import PRM
from tests.kernels.numbers import CLOSE, assert_alike, padded

pytestmark = pytest.mark.usefixtures("_processor")
OTHERS = [("specific.1", "gates.1"), ("specific.0", "gates.0")]  # what the other tower alone has


@pytest.mark.parametrize(
    ("lists", "candidates", "width", "heads", "hidden"),
    [(1, 1, 32, 1, (16,)), (40, 10, 64, 2, (200, 80)), (9, 33, 96, 3, (7, 50, 20)), (256, 10, 192, 2, (200, 80))],
)
def test_logits_and_gradients_are_those_of_attention_and_perceptron(
    lists: int, candidates: int, width: int, heads: int, hidden: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, mlp = nn.MultiheadAttention(width, heads, batch_first=True), perceptron(2 * width, hidden, 0.0)
    for bias in (layer.in_proj_bias, layer.out_proj.bias):
        nn.init.normal_(bias)
    mask = padded(lists, candidates)
    x = (2 * torch.randn(lists, candidates, width)).requires_grad_()
    given = torch.randn(lists, candidates) * mask
    ours = score_in_context(layer, mlp, x, mask)
    assert "_Context" in type(ours.grad_fn).__name__
    found = [ours * mask, *torch.autograd.grad(ours, [x, *layer.parameters(), *mlp.parameters()], given)]
    with torch.no_grad():
        assert torch.equal(score_in_context(layer, mlp, x, mask), ours)

    layer, mlp, x = layer.double(), mlp.double(), x.detach().double().requires_grad_()
    some = mask.any(dim=1)
    context, _ = layer(x[some], x[some], x[some], key_padding_mask=~mask[some], need_weights=False)
    scores = mlp(torch.cat([context, x[some]], dim=-1)).squeeze(-1)
    theirs = torch.zeros(lists, candidates, dtype=torch.float64).masked_scatter(mask, scores[mask[some]])
    expected = torch.autograd.grad(theirs, [x, *layer.parameters(), *mlp.parameters()], given.double())
    assert_alike(found, [theirs, *expected])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize(("lists", "candidates", "width"), [(1, 1, 32), (5, 50, 32), (37, 13, 96), (256, 10, 64)])
def test_cross_entropy_and_gradients_made_on_the_way_are_those_of_the_scores(
    lists: int, candidates: int, width: int, short: bool, threads: int
) -> None:
    torch.manual_seed(0)
    ours = PRM(width)
    exact = copy.deepcopy(ours).double()
    mask = padded(lists, candidates) if short else torch.ones(lists, candidates, dtype=torch.bool)
    x, labels = 5 * torch.randn(lists, candidates, width), torch.randint(0, 3, (lists, candidates)).float()

    def both(model: PRM, x: Tensor, labels: Tensor) -> list[Tensor]:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        loss = model.bce(x.requires_grad_(), mask, labels)
        assert ("_ContextLoss" in type(loss.grad_fn).__name__) == (x.dtype is torch.float32)
        return [loss, *torch.autograd.grad(3 * loss, [x, *weights])]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = both(ours, x.clone(), labels)
        assert torch.equal(both(ours, x.clone(), labels)[0], found[0])
    finally:
        torch.set_num_threads(before)
    assert_alike(found, both(exact, x.double(), labels.double()))


def test_cross_entropy_of_what_is_far_out_stays_finite_and_exact() -> None:
    x, mask, labels = torch.randn(8, 10, 32), torch.ones(8, 10, dtype=torch.bool), torch.zeros(8, 10)
    model = PRM(32)
    with torch.no_grad():
        model.mlp[-1].bias.fill_(300)
    assert model.bce(x, mask, labels).item() == pytest.approx(bce(model(x, mask), labels, mask).item(), rel=1e-6)
    assert model.bce(x, mask, labels + 2).item() == pytest.approx(0, abs=1e-9)  # above 1 counts as 1
    x[3, 4, 5] = torch.nan
    assert model.bce(x, mask, labels).isnan()


def test_prm_is_trained_in_one_pass_and_scored_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = RerankerModule(n_items=49, architecture="prm", attributes=torch.ones(50, 1).long())
    items = torch.randint(1, 50, (6, 10))
    batch = {"user": torch.arange(6), "items": items, "labels": torch.randint(0, 2, (6, 10)).float()}
    loss = module.training_step(batch, 0)
    assert "_ContextLoss" in type(loss.grad_fn).__name__
    assert "_Context" in type(module(batch).grad_fn).__name__
    found = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    monkeypatch.setattr(calls, "library", lambda: None)
    theirs = module.training_step(batch, 0)
    expected = torch.autograd.grad(theirs, [p for p in module.parameters() if p.requires_grad])
    for ours, other in zip([loss, *found], [theirs, *expected], strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "out", "bias"),
    [(1, 1, 16, True), (7, 300, 48, False), (129, 33, 80, True), (333, 600, 112, True)],
)
def test_a_packed_linear_layer_gives_what_torch_gives(rows: int, width: int, out: int, bias: bool, gelu: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(width, out, bias=bias), 5 * torch.randn(rows, 1, width)
    x[0, 0, 0] = 1e4
    found = layers.dense(x, layers.pack(layer.weight.detach()), layer.bias, out, gelu)
    exact = layer.double()(x.double())
    assert_alike([found], [F.gelu(exact) if gelu else exact])


def test_gelu_holds_at_its_ends() -> None:
    at = torch.tensor([-torch.inf, -90.0, -6.0, -1e-6, 0.0, 1e-6, 6.0, 90.0, torch.nan]).unsqueeze(1)
    weight = torch.ones(16, 1)
    found = layers.dense(at, layers.pack(weight), None, 16, True)[:, 0]
    torch.testing.assert_close(found[1:-1], F.gelu(at[1:-1, 0]), rtol=1e-4, atol=1e-6)
    assert found[-1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("texts", "heads", "tokens", "width"), [(1, 1, 1, 16), (3, 2, 64, 32), (5, 3, 150, 20)])
def test_texts_are_read_as_torch_reads_them(
    texts: int, heads: int, tokens: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, texts, tokens, heads, width, dtype=dtype).transpose(2, 3)
    lengths = 1 + torch.arange(texts, dtype=torch.int32) * 61 % tokens
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths.unsqueeze(1))[:, None, None]
    found = layers.attend(q, k, v, lengths, 0.3)
    assert found.dtype == dtype
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=0.3)
    exact = exact.transpose(1, 2)
    if dtype == torch.float32:
        assert_alike([found], [exact])
    else:  # a number is rounded once, at the end
        assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + CLOSE).all()


@pytest.mark.parametrize(
    ("inputs", "widths", "shared", "specific", "hidden"),
    [(1, (16, 16), 1, 1, 3), (37, (48, 32), 2, 3, 20), (300, (32, 64), 0, 2, 7), (700, (384, 384), 2, 5, 128)],
)
def test_outputs_and_gradients_are_those_of_an_adaptor(
    inputs: int, widths: tuple[int, int], shared: int, specific: int, hidden: int
) -> None:
    torch.manual_seed(0)
    adaptor = HybridExpertAdaptor(widths, shared, specific, hidden, out=32)
    for parameter in adaptor.parameters():  # biases too
        nn.init.normal_(parameter, std=0.2)
    exact = copy.deepcopy(adaptor).double()
    given = torch.randn(inputs, 32)
    for tower, width in enumerate(widths):
        x = torch.randn(inputs, width)
        ours, theirs = adaptor(x, tower), exact(x.double(), tower)
        assert "_Mixture" in type(ours.grad_fn).__name__
        with torch.no_grad():
            assert torch.equal(adaptor(x, tower), ours)
        used = [name for name, _ in adaptor.named_parameters() if not name.startswith(OTHERS[tower])]
        found, expected = (
            torch.autograd.grad(out, [model.get_parameter(name) for name in used], d)
            for model, out, d in ((adaptor, ours, given), (exact, theirs, given.double()))
        )
        assert_alike([ours, *found], [theirs, *expected])


@pytest.mark.parametrize("widths", [[], [1], [3, 1]])
def test_embeddings_and_gradients_are_those_of_embedding_bags(
    widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    table = torch.randint(0, 7, (50, sum(widths)))  # 0, padding, among the values
    table[0] = 0
    features = ItemFeatures(49, table, widths, dim=32)
    items = torch.randint(0, 50, (12, 10), dtype=torch.int32)

    def both() -> list[Tensor]:
        given = torch.randn(12, 10, features.width, generator=torch.Generator().manual_seed(1))
        out = features(items)
        return [out, *torch.autograd.grad(out, list(features.parameters()), given)]

    found = both()
    assert "_Embedding" in type(found[0].grad_fn).__name__
    monkeypatch.setattr(calls, "library", lambda: None)
    for ours, theirs in zip(found, both(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("item", [-1, 50])
def test_an_item_that_is_not_embedded_is_refused(item: int) -> None:
    features = ItemFeatures(49, torch.ones(50, 1, dtype=torch.int64))
    with pytest.raises(IndexError, match="50"):
        features(torch.tensor([[1, item]]))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_list_has_its_scores_in_any_batch_and_with_any_threads(threads: int) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(33, 10, 32), padded(33, 10)
    for model in (PRM(32, heads=2).eval(), DLCM(32, hidden=32).eval()):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        alone = torch.cat([model(x[i : i + 1], mask[i : i + 1]) for i in range(33)])
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            together = model(x, mask)
            gradients = torch.autograd.grad((together * mask).sum(), weights)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(together[mask], alone[mask])
        summed = torch.autograd.grad((alone * mask).sum(), weights)
        for ours, theirs in zip(gradients, summed, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_not_a_number_stays_so() -> None:
    x = torch.randn(3, 4, 32)
    x[1, 2, 5] = torch.nan
    mask = torch.ones(3, 4, dtype=torch.bool)
    states = recurrent.states(nn.GRU(32, 32, batch_first=True), x)
    assert states.isnan().any(dim=2).tolist() == [[False] * 4, [False, False, True, True], [False] * 4]
    assert PRM(32)(x, mask).isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_the_default_type_nor_where_tensors_are_kept_matters(threads: int) -> None:
    """What is saved for the way back may be a copy elsewhere by then, of weights that are not contiguous too."""
    torch.manual_seed(0)
    features, adaptor, model = ItemFeatures(49, torch.ones(50, 1).long()), HybridExpertAdaptor((64,), out=32), PRM(96)
    model.attention.out_proj.weight.data = model.attention.out_proj.weight.data.t().contiguous().t()
    gate = adaptor.gates[0].weight
    gate.data = gate.data.t().contiguous().t()
    items, known, mask = torch.randint(1, 50, (6, 10), dtype=torch.int32), torch.randn(60, 64), padded(6, 10)
    weights = [w for part in (features, adaptor, model) for w in part.parameters() if w.requires_grad]
    q, k, v = torch.randn(3, 2, 3, 70, 16)
    full = torch.full((2,), 70, dtype=torch.int32)

    def all_of_them() -> list[Tensor]:
        x = torch.cat([features(items), adaptor(known, 0).view(6, 10, 32)], dim=-1)
        return [layers.attend(q, k, v, full, 1.0), *torch.autograd.grad((model(x, mask) * mask).sum(), weights)]

    expected, before = all_of_them(), torch.get_num_threads()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(threads)
    try:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            found = all_of_them()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(before)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["dropout", "hole", "double", "autocast", "odd width"])
def test_what_kernels_do_not_do_torch_does(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    width = 30 if why == "odd width" else 32
    model, x = PRM(width, dropout=0.2 if why == "dropout" else 0.0), torch.randn(3, 4, width)
    mask = torch.ones(3, 4, dtype=torch.bool)
    if why == "hole":
        mask[1, 1] = False
    if why == "double":
        model, x = model.double(), x.double()

    def scores() -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
            return model(x, mask)

    def loss() -> Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
            return model.bce(x, mask, torch.ones(3, 4, dtype=x.dtype))

    found = scores()
    assert "_Context" not in type(found.grad_fn).__name__
    assert "_Context" not in type(loss().grad_fn).__name__
    monkeypatch.setattr(calls, "library", lambda: None)
    assert torch.equal(scores(), found)
