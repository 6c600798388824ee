"""The rows of every layer are got, however a model uses it: Σ BᵀA is the weight's gradient."""

import copy
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from capturing import check, net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from uses import Does, draw, loss_of
from watched import CLOSE, Watched, table

from singd_torch import SINGD


def test_module_called_twice() -> None:
    model = Does(lambda m, x: m.layer(torch.tanh(m.layer(x))), layer=nn.Linear(5, 5)).double()
    assert check(model, draw(9, 5)).calls == {"layer.weight": 2}


def test_module_called_with_other_shapes() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.layer(x).sum() + m.layer(x.flatten(0, 1)[:7]).sin().sum()

    assert check(Does(call, layer=nn.Linear(5, 4)).double(), draw(9, 2, 5)).calls == {
        "layer.weight": 2
    }


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
    assert check(Does(call, **layers).double(), draw(9, 4, 5)).calls["again.weight"] == 4


def test_weight_shared_by_two_modules() -> None:
    model = Does(
        lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, 5, bias=False)
    ).double()
    model.a.bias = None
    model.b.weight = model.a.weight
    optimizer = check(model, draw(9, 5), expected_layers=1)
    assert optimizer.calls == {"a.weight": 2}


def one_after_the_other() -> nn.Module:
    """Two layers of one shape, `a` and `b`."""
    return Does(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 5), b=nn.Linear(5, 5)).double()


def test_weight_and_bias_shared_by_two_modules() -> None:
    model = one_after_the_other()
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    optimizer = check(model, draw(9, 5), expected_layers=1)
    assert table(optimizer) == {"a.weight": "SINGD", "a.bias": "SINGD"}


def test_weight_shared_by_two_modules_with_biases_of_their_own() -> None:
    """The weight is one layer without bias; AdamW trains the biases."""
    model = one_after_the_other()
    model.b.weight = model.a.weight
    optimizer = check(model, draw(9, 5), expected_layers=1)
    assert table(optimizer) == {"a.weight": "SINGD", "a.bias": "AdamW", "b.bias": "AdamW"}


def test_weight_tied_to_an_embedding() -> None:
    """The embedding gives no rows, so the sum is not the gradient; but training goes on."""
    model = Does(
        lambda m, x: m.head(m.embed(x)), embed=nn.Embedding(6, 5), head=nn.Linear(5, 6)
    ).double()
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
    check(Does(lambda m, x: m.layer(input=x), layer=nn.Linear(5, 4)).double(), draw(9, 5))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing(use_reentrant: bool) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        x = x.requires_grad_(use_reentrant)  # else nothing in the block would be seen to need it
        return m.out(checkpoint(m.block, x, use_reentrant=use_reentrant))

    block = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))
    optimizer = check(Does(call, block=block, out=nn.Linear(4, 2)).double(), draw(9, 3, 5))
    assert set(optimizer.calls.values()) == {1}


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 5), nn.Conv1d(3, 3, 1), nn.MultiheadAttention(5, 1)]
)
def test_checkpointing_that_keeps_the_outputs_of_products(layer: nn.Module) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            x = m.block(x)
            x = m.layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else m.layer(x)
            return torch.tanh(x)

        aten = torch.ops.aten
        products = [aten.mm.default, aten.addmm.default, aten.convolution.default]
        kept = partial(create_selective_checkpoint_contexts, products)
        return m.out(checkpoint(block, x, use_reentrant=False, context_fn=kept))

    layers = {"block": nn.Linear(5, 5), "layer": copy.deepcopy(layer), "out": nn.Linear(5, 2)}
    check(Does(call, **layers).double(), draw(9, 3, 5))


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


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 6), nn.Conv1d(4, 4, 1), nn.MultiheadAttention(6, 2)]
)
def test_inputs_from_inference_mode_under_autocast(layer: nn.Module) -> None:
    with torch.inference_mode():
        x = torch.randn(3, 4, 6) * 2
    models = copy.deepcopy(layer), copy.deepcopy(layer)
    for model, own in zip(models, (x, x.clone()), strict=True):
        optimizer = SINGD(model)
        args = (own,) * (3 if isinstance(layer, nn.MultiheadAttention) else 1)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = model(*args)
            loss_of((z[0] if isinstance(z, tuple) else z).float()).backward()
            optimizer.step()
        assert "without rows" not in repr(optimizer)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


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
    model = one_after_the_other()
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
