"""The rows of every layer are got, whatever the model does: Σ BᵀA is the weight's gradient."""

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watched import CLOSE, Product, Watched, check_products, layers, table

from singd_torch import SINGD


def loss_of(z: Tensor) -> Tensor:
    return (torch.sin(z) - 0.3).square().mean()


def check(
    model: nn.Module,
    x: Tensor,
    *,
    close: float = CLOSE,
    backward: Callable[[nn.Module, Tensor], None] = lambda model, x: loss_of(model(x)).backward(),
    expected_layers: int | None = None,
) -> Watched:
    """Every layer gave rows that explain its gradient, and capture changed no gradient."""
    plain = copy.deepcopy(model)
    backward(plain, x)
    optimizer = Watched(model)
    backward(model, x)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        # equal up to the order of sums: the probe may change the layout of what autograd sums up
        assert p.grad is None or (p.grad - q.grad).norm() <= CLOSE * q.grad.norm()

    found = layers(optimizer)
    assert len(found) == expected_layers if expected_layers is not None else found
    assert all(layer.has_rows for layer in found)
    check_products(optimizer, close)
    optimizer.step()
    assert optimizer.skipped == 0
    return optimizer


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).double()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


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
    model = calls(lambda m, x: m.up(x, output_size=(13, 14)), up=nn.ConvTranspose2d(3, 2, 3, 2))
    check(model, draw(5, 3, 6, 6))


def test_input_that_is_no_contiguous_array() -> None:
    check(net(nn.Linear(5, 4)), draw(5, 6, 9).movedim(0, -1))
    check(net(nn.Conv2d(3, 2, 2)), draw(5, 1, 6, 7).expand(5, 3, 6, 7))
    images = draw(5, 3, 6, 7).to(memory_format=torch.channels_last)
    check(net(nn.Conv2d(3, 2, 2), nn.ReLU(True)).to(memory_format=torch.channels_last), images)


# ---- what models do ----------------------------------------------------------------------------


class Calls(nn.Module):
    """A model that calls its layer as a function says."""

    def __init__(self, call: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def calls(call: Callable[..., Tensor], **layers: nn.Module) -> nn.Module:
    return Calls(call, **layers).double()


def test_module_called_twice() -> None:
    model = calls(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=nn.Linear(5, 5))
    assert check(model, draw(9, 5)).calls == {"layer.weight": 2}


def test_module_called_with_other_shapes() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.layer(x).sum() + m.layer(x.flatten(0, 1)[:7]).sin().sum()

    assert check(calls(call, layer=nn.Linear(5, 4)), draw(9, 2, 5)).calls == {"layer.weight": 2}


def test_recurrent_loop() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(m.inward(x[:, t]) + m.again(h))
        return m.out(h)

    layers = {
        "inward": nn.Linear(5, 5),
        "again": nn.Linear(5, 5, bias=False),
        "out": nn.Linear(5, 2),
    }
    assert check(calls(call, **layers), draw(9, 4, 5)).calls["again.weight"] == 4


def test_weight_shared_by_two_modules() -> None:
    model = calls(
        lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, 5, bias=False)
    )
    model.a.bias = None
    model.b.weight = model.a.weight
    optimizer = check(model, draw(9, 5), expected_layers=1)
    assert optimizer.calls == {"a.weight": 2}


def test_weight_and_bias_shared_by_two_modules() -> None:
    model = calls(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, 5))
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    optimizer = check(model, draw(9, 5), expected_layers=1)
    assert table(optimizer) == {"a.weight": "SINGD", "a.bias": "SINGD"}


def test_weight_shared_by_two_modules_with_biases_of_their_own() -> None:
    """The weight is one layer without bias; AdamW trains the biases."""
    model = calls(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, 5))
    model.b.weight = model.a.weight
    optimizer = check(model, draw(9, 5), expected_layers=1)
    assert table(optimizer) == {"a.weight": "SINGD", "a.bias": "AdamW", "b.bias": "AdamW"}


def test_weight_tied_to_an_embedding() -> None:
    """The embedding gives no rows, so the sum is not the gradient; but training goes on."""
    model = calls(lambda m, x: m.head(m.embed(x)), embed=nn.Embedding(6, 5), head=nn.Linear(5, 6))
    model.head.weight = model.embed.weight
    optimizer = SINGD(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model(torch.arange(6))).backward()
        before = model.head.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, model.head.weight)
    assert optimizer.skipped == 0


def test_input_given_by_name() -> None:
    check(calls(lambda m, x: m.layer(input=x), layer=nn.Linear(5, 4)), draw(9, 5))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing(use_reentrant: bool) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        x = x.requires_grad_(use_reentrant)  # else nothing in the block would be seen to need it
        return m.out(checkpoint(m.block, x, use_reentrant=use_reentrant))

    block = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    optimizer = check(calls(call, block=block, out=nn.Linear(4, 2)), draw(9, 3, 5))
    assert set(optimizer.calls.values()) == {1}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_keeps_no_activation_alive(use_reentrant: bool) -> None:
    block = net(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    optimizer = SINGD(block, structures=("dense", "dense"))
    alive: list[weakref.ref[Tensor]] = []
    block[1].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    z = checkpoint(block, draw(9, 5).requires_grad_(), use_reentrant=use_reentrant)
    assert [ref() for ref in alive] == [None]
    loss_of(z).backward()
    optimizer.step()
    assert "K.matrix" in optimizer.state[block[2].weight]


def test_autocast_to_bfloat16() -> None:
    def backward(model: nn.Module, x: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = model(x)
        loss_of(z.float()).backward()

    layers = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
    # autograd rounds its gradient to bfloat16, and we take the input before its rounding: 2⁻⁹ each
    optimizer = check(
        nn.Sequential(*layers), torch.randn(9, 3, 6, 6), backward=backward, close=2.0**-7
    )
    kept = optimizer.state[layers[0].weight].items()
    assert {a.dtype for name, a in kept if name[:2] in ("K.", "C.")} == {torch.float32}


def test_frozen_weight_with_a_trained_bias_and_the_reverse() -> None:
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    optimizer = check(model, draw(9, 5), expected_layers=2)
    assert [name for name, rule in table(optimizer).items() if rule == "AdamW"] == ["0.bias"]
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) == (name in ("0.weight", "2.bias")), name


def test_weight_frozen_after_construction() -> None:
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = SINGD(model)
    model[0].requires_grad_(False)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(draw(9, 5))).backward()
        optimizer.step()
    assert optimizer.skipped == 0


@pytest.mark.parametrize("layers", [1, 2], ids=["alone", "stacked"])
def test_bias_frozen_after_construction(layers: int) -> None:
    model = net(*(nn.Linear(5, 5) for _ in range(layers)))
    optimizer = SINGD(model, structures=("dense", "dense"))
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model(draw(9, 5))).backward()
        before = copy.deepcopy(model)
        optimizer.step()
        frozen = torch.equal(model[0].bias, before[0].bias)
        assert frozen == (step > 0)
        assert not torch.equal(model[0].weight, before[0].weight)
        assert layers == 1 or not torch.equal(model[1].bias, before[1].bias)
        model[0].bias.requires_grad_(False)


def test_layer_unfrozen_after_construction() -> None:
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    optimizer = SINGD(model, model.parameters())
    assert table(optimizer)["0.bias"] == "SINGD"
    for thawed in (False, True):
        model[0].requires_grad_(thawed)
        before = copy.deepcopy(model[0])
        optimizer.zero_grad()
        loss_of(model(draw(9, 5))).backward()
        optimizer.step()
        for p, q in zip(model[0].parameters(), before.parameters(), strict=True):
            assert torch.equal(p, q) == (not thawed)


def test_bias_of_two_weights_is_a_column_of_none() -> None:
    """Or both would move it. AdamW does."""
    model = calls(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, 5))
    model.b.bias = model.a.bias
    optimizer = check(model, draw(9, 5), expected_layers=2)
    assert table(optimizer) == {"a.weight": "SINGD", "b.weight": "SINGD", "a.bias": "AdamW"}


def test_rows_wait_for_a_gradient_and_validation_leaves_none() -> None:
    model = net(nn.Linear(5, 4))
    optimizer = Watched(model)
    with torch.no_grad():
        model(draw(9, 5))
    model(draw(9, 5))  # a forward pass without a backward pass
    assert optimizer.calls == {}
    loss_of(model(draw(9, 5))).backward()
    assert optimizer.calls == {"0.weight": 1}


def test_rows_are_taken_in_every_Tth_step_only() -> None:
    model = net(nn.Linear(5, 4))
    optimizer = Watched(model, T=3, growing_T=False)
    seen = []
    for _ in range(7):
        optimizer.zero_grad()
        loss_of(model(draw(9, 5))).backward()
        optimizer.step()
        seen.append(optimizer.calls["0.weight"])
    assert seen == [1, 1, 1, 2, 2, 2, 3]


def test_torch_autograd_grad_gives_rows_too() -> None:
    model = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = Watched(model)
    weights = [model[0].weight, model[2].weight]
    gradients = torch.autograd.grad(loss_of(model(draw(9, 5))), weights)
    for product, gradient in zip(optimizer.products.values(), reversed(gradients), strict=True):
        torch.testing.assert_close(product[:, :-1], gradient, rtol=CLOSE, atol=CLOSE)


def test_functorch_transforms_are_left_alone() -> None:
    model = net(nn.Linear(5, 4))
    optimizer = Watched(model)
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, params, (x,)))

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, draw(9, 5))
    assert per_sample["0.weight"].shape == (9, 4, 5)
    assert optimizer.calls == {}


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

    model = calls(call, odd=nn.Linear(5, 4), out=nn.Linear(4, 2))
    optimizer = SINGD(model)
    before = model.odd.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"no rows of 'odd\.weight' have been seen"):
        step(model, optimizer, draw(9, 5))
    assert not torch.equal(before, model.odd.weight)
    assert "exp_avg" not in optimizer.state[model.odd.weight]
    step(model, optimizer, draw(9, 5))  # warned once


def test_unused_layer_is_left_alone() -> None:
    model = calls(lambda m, x: m.used(x), used=nn.Linear(5, 4), unused=nn.Linear(5, 4))
    optimizer = SINGD(model)
    before = copy.deepcopy(model.unused)
    for _ in range(2):
        step(model, optimizer, draw(9, 5))
    assert torch.equal(before.weight, model.unused.weight)
    assert not optimizer.state[model.unused.weight]
