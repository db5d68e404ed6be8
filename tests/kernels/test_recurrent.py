"""Kernels with a GRU against torch's own layers in double precision."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from lit_rec.kernels import calls, recurrent
from lit_rec.rerankers.dlcm import DLCM
from tests.kernels.numbers import assert_alike, padded

pytestmark = pytest.mark.usefixtures("_processor")


@pytest.mark.parametrize(
    ("lists", "candidates", "width", "hidden"), [(1, 1, 16, 16), (37, 10, 64, 64), (13, 50, 96, 32), (256, 10, 192, 64)]
)
def test_states_and_gradients_are_those_of_a_gru(lists: int, candidates: int, width: int, hidden: int) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(width, hidden, batch_first=True)
    x = (3 * torch.randn(lists, candidates, width)).requires_grad_()
    given = torch.randn(lists, candidates, hidden)
    ours = recurrent.states(layer, x)
    assert "_GRU" in type(ours.grad_fn).__name__
    found = [ours, *torch.autograd.grad(ours, [x, *layer.parameters()], given)]
    with torch.no_grad():
        assert torch.equal(recurrent.states(layer, x), ours)

    exact, x = layer.double(), x.detach().double().requires_grad_()
    theirs = exact(x)[0]
    assert_alike(found, [theirs, *torch.autograd.grad(theirs, [x, *exact.parameters()], given.double())])


def scored(model: DLCM, x: Tensor, mask: Tensor, given: Tensor) -> list[Tensor]:
    """Logits and all gradients."""
    x = x.clone().requires_grad_()
    logits = model(x, mask)
    return [logits * mask, *torch.autograd.grad(logits, [x, *model.parameters()], given)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize(
    ("lists", "candidates", "width", "hidden"),
    [(1, 1, 16, 16), (1, 5, 32, 16), (2, 1, 16, 32), (37, 13, 96, 32), (256, 10, 64, 64)],
)
def test_logits_gradients_and_statistics_are_those_of_dlcm(
    lists: int, candidates: int, width: int, hidden: int, short: bool, training: bool
) -> None:
    torch.manual_seed(0)
    ours = DLCM(width, hidden).train(training)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.4)
    theirs = copy.deepcopy(ours).double()
    mask = padded(lists, candidates) if short else torch.ones(lists, candidates, dtype=torch.bool)
    for _ in range(3):  # running statistics move from step to step
        x, given = torch.randn(lists, candidates, width), torch.randn(lists, candidates) * mask
        assert "_Dlcm" in type(ours(x.requires_grad_(), mask).grad_fn).__name__
        found = scored(ours, x.detach(), mask, given)
        with patch.object(calls, "library", lambda: None):
            theirs(x.double(), mask)
            assert_alike(found, scored(theirs, x.detach().double(), mask, given.double()))
    assert_alike(list(ours.buffers()), [buffer.double() for buffer in theirs.buffers()])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_statistics_are_of_all_threads_lists(threads: int) -> None:
    torch.manual_seed(0)
    ours, x = DLCM(32, 32), torch.randn(33, 10, 32)
    theirs, mask, given = copy.deepcopy(ours).double(), padded(33, 10), torch.randn(33, 10)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = scored(ours, x, mask, given * mask)
        with torch.no_grad():  # a batch counts where no gradient is wanted, too
            ours(x, mask)
    finally:
        torch.set_num_threads(before)
    with patch.object(calls, "library", lambda: None):
        assert_alike(found, scored(theirs, x.double(), mask, (given * mask).double()))
        theirs(x.double(), mask)
    assert_alike(list(ours.buffers()), [buffer.double() for buffer in theirs.buffers()])


def test_dropout_is_left_to_torch() -> None:
    model, x, mask = DLCM(32, 32, dropout=0.5), torch.randn(3, 4, 32), torch.ones(3, 4, dtype=torch.bool)
    assert "_Dlcm" not in type(model(x, mask).grad_fn).__name__
    assert "_Dlcm" in type(model.eval()(x, mask).grad_fn).__name__
