"""The rows of every layer are got, whatever the model does: Σ BᵀA is the weight's gradient."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from capturing import check, net
from torch import Tensor, nn
from uses import Does, draw, loss_of
from watched import CLOSE, Product, Watched, check_products, table

from singd_torch import SINGD

# ---- layers ------------------------------------------------------------------------------------

LINEAR = {
    "vectors": (net(nn.Linear(5, 4)), (9, 5)),
    "no bias": (net(nn.Linear(5, 4, bias=False)), (9, 5)),
    "one vector": (net(nn.Linear(5, 4)), (5,)),
    "batch of one": (net(nn.Linear(5, 4)), (1, 5)),
    "sequences": (net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (9, 6, 5)),
    "grids": (net(nn.Linear(5, 4)), (9, 2, 3, 5)),
    "one output": (net(nn.Linear(5, 1)), (9, 5)),
    "one input": (net(nn.Linear(1, 4)), (9, 1)),
    "in place after sequences": (
        net(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.SiLU(inplace=True)),
        (9, 6, 5),
    ),
    "in place after vectors": (net(nn.Linear(5, 4), nn.ReLU(inplace=True)), (9, 5)),
    "dropout in place": (net(nn.Linear(5, 4), nn.Dropout(0.0, inplace=True)), (9, 6, 5)),
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear(case: str) -> None:
    model, shape = LINEAR[case]
    check(model, draw(*shape))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), (5, 4, 8)),
    "2d": (nn.Conv2d(4, 6, (3, 2)), (5, 4, 6, 7)),
    "3d": (nn.Conv3d(2, 3, (2, 1, 3)), (3, 2, 4, 3, 5)),
    "stride, padding, dilation": (
        nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (5, 4, 9, 8),
    ),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), (5, 4, 6, 7)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (5, 4, 6, 7)),
    "depthwise 1d": (nn.Conv1d(4, 4, 3, groups=4, bias=False), (5, 4, 8)),
    "same, even kernel": (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 2)), (5, 4, 6, 7)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (5, 4, 6, 7)),
    "circular": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (5, 4, 6, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 6, 7)),
    "replicate": (nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (3, 2, 3, 3, 3)),
    "one image, no batch": (nn.Conv2d(4, 6, 3), (4, 6, 7)),
    "1 × 1": (nn.Conv2d(4, 6, 1), (5, 4, 3, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place after it"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: str, in_place: bool) -> None:
    layer, shape = CONVOLUTIONS[case]
    check(net(copy.deepcopy(layer), nn.ReLU(inplace=in_place)), draw(*shape))


TRANSPOSED = {
    "1d": (nn.ConvTranspose1d(4, 6, 3), (5, 4, 8)),
    "2d, stride": (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3)), (5, 4, 6, 7)),
    "3d": (nn.ConvTranspose3d(2, 3, (2, 1, 3), bias=False), (3, 2, 4, 3, 5)),
    "all": (
        nn.ConvTranspose2d(4, 6, 3, 2, padding=(1, 2), output_padding=1, dilation=2),
        (5, 4, 6, 7),
    ),
    "one image, no batch": (nn.ConvTranspose2d(4, 6, 3), (4, 6, 7)),
    "groups": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (5, 4, 6, 7)),
    "depthwise": (nn.ConvTranspose1d(4, 8, 4, 2, 1, groups=4), (5, 4, 6)),
}


@pytest.mark.parametrize("in_place", [False, True], ids=["", "in place after it"])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolution(case: str, in_place: bool) -> None:
    """Its bias, which is added once to each pixel, is AdamW's."""
    layer, shape = TRANSPOSED[case]
    optimizer = check(net(copy.deepcopy(layer), nn.ReLU(inplace=in_place)), draw(*shape))
    bias = {} if layer.bias is None else {"0.bias": "AdamW"}
    assert table(optimizer) == {"0.weight": "SINGD"} | bias


def test_transposed_convolution_of_a_chosen_size() -> None:
    model = Does(
        lambda m, x: m.up(x, output_size=(13, 14)), up=nn.ConvTranspose2d(3, 2, 3, 2)
    ).double()
    check(model, draw(5, 3, 6, 6))


def test_input_that_is_no_contiguous_array() -> None:
    check(net(nn.Linear(5, 4)), draw(5, 6, 9).movedim(0, -1))
    check(net(nn.Conv2d(3, 2, 2)), draw(5, 1, 6, 7).expand(5, 3, 6, 7))
    images = draw(5, 3, 6, 7).to(memory_format=torch.channels_last)
    check(net(nn.Conv2d(3, 2, 2), nn.ReLU(True)).to(memory_format=torch.channels_last), images)


# ---- many passes and one step ------------------------------------------------------------------


def state_after(batches: list[Tensor], average: str | None, **given: Any) -> dict[str, Tensor]:
    """The optimizer's state after one step on the micro-batches of one large batch."""
    torch.manual_seed(1)
    model = net(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = SINGD(model, loss_average=average, **given)
    total = sum(len(x) for x in batches)
    for x in batches:
        per_sample = (torch.sin(model(x)) - 0.3).square().sum(1)
        (per_sample.sum() / (1 if average is None else total)).backward()
    optimizer.step()
    found = {n: p.detach() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
    return found


@pytest.mark.parametrize("average", ["batch", None], ids=str)
@pytest.mark.parametrize("recipe", ["paper", "normalized"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_micro_batches_are_one_large_batch(
    kfac_approx: str, recipe: str, average: str | None
) -> None:
    x = draw(12, 3, 8)
    given = {"average": average, "recipe": recipe, "kfac_approx": kfac_approx}
    large = state_after([x], **given)
    for split in ([4, 4, 4], [1, 11], [7, 3, 2]):
        for name, value in state_after(list(x.split(split)), **given).items():
            torch.testing.assert_close(value, large[name], rtol=CLOSE, atol=CLOSE)


def test_two_losses_of_one_forward_pass_are_their_sum() -> None:
    """The rows of both backward passes are summed; G has two losses, not one mean."""
    model = net(nn.Linear(5, 4))
    optimizer = Watched(model)
    z = model(draw(9, 5))
    z.sin().mean().backward(retain_graph=True)
    z.cos().mean().backward()
    check_products(optimizer)
    optimizer.step()
    assert optimizer.skipped == 0


def test_zero_grad_forgets_pending_rows() -> None:
    """A pass whose gradients are dropped must not reach the factors."""
    torch.manual_seed(1)
    model, x = net(nn.Linear(5, 4)), draw(2, 9, 5)
    twin = copy.deepcopy(model)
    states = []
    for net_, batches in ((model, x), (twin, x[1:])):
        optimizer = SINGD(net_)
        for batch in batches:
            optimizer.zero_grad()
            loss_of(net_(batch)).backward()
        optimizer.step()
        states.append(optimizer.state[net_[0].weight])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# ---- hooks -------------------------------------------------------------------------------------


def step(model: nn.Module, optimizer: SINGD, x: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model(x)).backward()
    optimizer.step()


def test_copied_and_unpickled_models_have_inert_hooks() -> None:
    model = net(nn.Linear(5, 4))
    optimizer = Watched(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(twin(draw(9, 5))).backward()
        assert optimizer.calls == {}
        own = Watched(twin)
        step(twin, own, draw(9, 5))
        assert own.calls == {"0.weight": 1}
    step(model, optimizer, draw(9, 5))
    assert optimizer.calls == {"0.weight": 1}


def test_deleting_the_optimizer_removes_its_hooks() -> None:
    model = net(nn.Linear(5, 4), nn.Conv1d(9, 2, 1))
    optimizer = SINGD(model)
    step(model, optimizer, draw(9, 5))
    assert all(len(m._forward_hooks) == 1 for m in model)
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None  # at once, without the garbage collector: there is no cycle
    assert not any(m._forward_hooks for m in model)
    loss_of(model(draw(9, 5))).backward()


def test_deleting_the_optimizer_removes_its_hooks_of_attention() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    optimizer = SINGD(model)
    step(model, optimizer, torch.randn(3, 5, 4))
    del optimizer
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_second_optimizer_on_the_same_model() -> None:
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    first, second = Watched(model[:2]), Watched(model)
    loss_of(model(draw(9, 5))).backward()
    assert first.calls == {"0.weight": 1}
    assert second.calls == {"0.weight": 1, "2.weight": 1}
    torch.testing.assert_close(first.products["0.weight", None], second.products["0.weight", None])
    first.step()
    second.step()
    assert (first.skipped, second.skipped) == (0, 0)


def test_module_whose_call_was_never_seen_is_trained_and_named() -> None:
    """Here the weight is used without a call of its module."""

    def call(m: Any, x: Tensor) -> Tensor:
        return m.out(Product.apply(x, m.odd.weight))

    model = Does(call, odd=nn.Linear(5, 4), out=nn.Linear(4, 2)).double()
    optimizer = SINGD(model)
    before = model.odd.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"no rows of 'odd\.weight' have been seen"):
        step(model, optimizer, draw(9, 5))
    assert not torch.equal(before, model.odd.weight)
    assert "exp_avg" not in optimizer.state[model.odd.weight]
    step(model, optimizer, draw(9, 5))  # warned once


def test_unused_layer_is_left_alone() -> None:
    model = Does(lambda m, x: m.used(x), used=nn.Linear(5, 4), unused=nn.Linear(5, 4)).double()
    optimizer = SINGD(model)
    before = copy.deepcopy(model.unused)
    for _ in range(2):
        step(model, optimizer, draw(9, 5))
    assert torch.equal(before.weight, model.unused.weight)
    assert not optimizer.state[model.unused.weight]
