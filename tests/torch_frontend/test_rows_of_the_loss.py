"""Backward passes of the loss bring rows. What else differentiates the model brings none."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from watched import layers

from singd_torch import SINGD

INPUTS, LABELS = torch.randn(32, 4), torch.randint(3, (32,))

Before = Callable[[nn.Module, SINGD], Any]


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(model: nn.Module) -> Tensor:
    return cross_entropy(model(INPUTS), LABELS)


def leaf() -> Tensor:
    return INPUTS.clone().requires_grad_()


def step_after(before: Before, call: Callable[[nn.Module], Any] = lambda model: model) -> nn.Module:
    """The network after one step on the loss, with something else before its backward pass."""
    model = network()
    optimizer = SINGD(model, recipe="paper", lr=0.01)
    before(call(model), optimizer)
    loss(model).backward()
    optimizer.step()
    return model


def saliency(model: nn.Module, optimizer: SINGD) -> None:
    x = leaf()
    torch.autograd.grad(model(x).sum(), x)


def attack(model: nn.Module, optimizer: SINGD) -> None:
    x = leaf()
    cross_entropy(model(x), LABELS).backward(inputs=[x])


def second_derivatives(model: nn.Module, optimizer: SINGD) -> None:
    x = leaf()
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    torch.autograd.grad(dx.sum(), x)


def jacobian(model: nn.Module, optimizer: SINGD) -> None:
    torch.autograd.functional.jacobian(model, INPUTS[:2])


def jacobian_at_once(model: nn.Module, optimizer: SINGD) -> None:
    torch.autograd.functional.jacobian(model, INPUTS[:2], vectorize=True)


def jacobian_forwards(model: nn.Module, optimizer: SINGD) -> None:
    torch.autograd.functional.jacobian(model, INPUTS[:2], vectorize=True, strategy="forward-mode")


def gradient_of_another_layer(model: nn.Module, optimizer: SINGD) -> None:
    """It reaches that weight, as a pass of the loss would."""
    with optimizer.no_rows():
        torch.autograd.grad(loss(model), model[2].weight)


def hessian_vector_product(model: nn.Module, optimizer: SINGD) -> None:
    parameters = list(model.parameters())
    with optimizer.no_rows():
        gradients = torch.autograd.grad(loss(model), parameters, create_graph=True)
        torch.autograd.grad(sum(g.sum() for g in gradients), parameters)


def gradients_of_another_loss(model: nn.Module, optimizer: SINGD) -> None:
    """Which are looked at, and not stepped along."""
    torch.autograd.grad(model(INPUTS).square().sum(), list(model.parameters()))


def gradients_of_another_loss_beside_zeros(model: nn.Module, optimizer: SINGD) -> None:
    loss(model).backward()
    optimizer.zero_grad(set_to_none=False)
    gradients_of_another_loss(model, optimizer)


def gradients_dropped_by_the_model(model: nn.Module, optimizer: SINGD) -> None:
    for _ in range(2):
        loss(model).backward()
    model.zero_grad()


def gradients_filled_with_zeros(model: nn.Module, optimizer: SINGD) -> None:
    for _ in range(2):
        (3 * loss(model)).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.zero_()


OTHERS = [
    saliency, attack, second_derivatives, jacobian, jacobian_at_once, jacobian_forwards,
    gradient_of_another_layer,
    hessian_vector_product, gradients_of_another_loss, gradients_of_another_loss_beside_zeros,
    gradients_dropped_by_the_model, gradients_filled_with_zeros,
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_the_step_is_that_of_the_loss_alone(other: Before) -> None:
    alone, beside = step_after(lambda model, optimizer: None), step_after(other)
    for p, q in zip(alone.parameters(), beside.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradients_that_are_looked_at_after_those_of_the_loss() -> None:
    models = alone, beside = network(), network()
    for model in models:
        optimizer = SINGD(model, recipe="paper", lr=0.01)
        loss(model).backward()
        if model is beside:
            gradients_of_another_loss(model, optimizer)
        optimizer.step()
    for p, q in zip(alone.parameters(), beside.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("other", [saliency, attack], ids=lambda other: other.__name__)
def test_the_step_is_that_of_the_loss_alone_in_compiled_models(other: Before) -> None:
    if torch.__version__ < "2.13":
        pytest.skip("probes are compiled from torch 2.13 on")

    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, backend="aot_eager")

    alone = step_after(lambda model, optimizer: None)
    beside = step_after(other, compiled)
    for p, q in zip(alone.parameters(), beside.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_frozen_layer_behind_the_loss_of_others() -> None:
    """A pass that reaches one weight brings rows of that one."""
    model = network()
    optimizer = SINGD(model)
    torch.autograd.grad(loss(model), model[2].weight)
    assert [bool(layer.pending) for layer in layers(optimizer)] == [False, True]


def test_rows_outside_of_the_block_are_taken() -> None:
    """Also where the forward pass was inside; the block ends with an error too."""
    model = network()
    optimizer = SINGD(model)
    with contextlib.suppress(ZeroDivisionError), optimizer.no_rows():
        value = loss(model)
        raise ZeroDivisionError
    value.backward()
    assert all(layer.pending for layer in layers(optimizer))


def test_a_block_without_rows_inside_another_ends_alone() -> None:
    model = network()
    optimizer = SINGD(model)
    with optimizer.no_rows():
        with optimizer.no_rows():
            pass
        loss(model).backward()
    assert not any(layer.pending for layer in layers(optimizer))


def test_gradients_by_autograd_grad_accumulate() -> None:
    """They are never in `grad` during a pass, which is no sign that they were dropped."""
    model = network()
    twin = copy.deepcopy(model)
    other = SINGD(twin)
    cross_entropy(twin(INPUTS), LABELS).backward()
    other.step()

    optimizer, parameters = SINGD(model), list(model.parameters())
    halves = [
        torch.autograd.grad(cross_entropy(model(x), y) / 2, parameters)
        for x, y in zip(INPUTS.chunk(2), LABELS.chunk(2), strict=True)
    ]
    for p, *gradients in zip(parameters, *halves, strict=True):
        p.grad = sum(gradients)
    optimizer.step()
    for p, q in zip(parameters, twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("wrote", [False, True])
def test_gradients_beside_a_pass_without_calls_of_the_layers(wrote: bool) -> None:
    """As of meta-learning to first order, whose loss has other weights, made of the model's.

    They count where they were written to `grad` before.
    """
    model = network()
    optimizer, named = SINGD(model), dict(model.named_parameters())
    for _ in range(2):  # another task
        gradients = torch.autograd.grad(loss(model), list(named.values()))
        pairs = zip(named.items(), gradients, strict=True)
        fast = {name: p - 0.1 * g for (name, p), g in pairs}
        if wrote:
            for p, g in zip(named.values(), gradients, strict=True):
                p.grad = g if p.grad is None else p.grad + g
        cross_entropy(torch.func.functional_call(model, fast, (-INPUTS,)), LABELS).backward()
    assert [bool(layer.pending) for layer in layers(optimizer)] == [wrote, wrote]
    optimizer.zero_grad()
    assert all(not p._backward_hooks for p in named.values())
    loss(model).backward()
    assert all(layer.pending for layer in layers(optimizer))


def test_a_product_with_second_derivatives_of_the_loss_brings_no_rows() -> None:
    """The pass before it, which only makes gradients, is one more pass through the same batch."""
    models, twice = (network().double(), network().double()), (False, True)
    x = INPUTS.double()
    for model, also in zip(models, twice, strict=True):
        optimizer, parameters = SINGD(model), list(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            value = cross_entropy(model(x), LABELS)
            if also:
                gradients = torch.autograd.grad(value, parameters, create_graph=True)
                products = sum(g.sin().sum() for g in gradients)
                torch.autograd.grad(products, parameters, retain_graph=True)
            value.backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=0.0)


def test_discriminator_whose_gradients_the_model_drops() -> None:
    """As in torch's example of a DCGAN, where the generator's loss passes through it as well."""

    def curvature(drop: str) -> list[float]:
        torch.manual_seed(2)
        critic, found = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), []
        optimizer = SINGD(critic)
        for _ in range(3):
            (optimizer if drop == "optimizer" else critic).zero_grad()
            critic(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
            (10 * critic(torch.randn(16, 4))).mean().backward()  # of the generator's loss
            found.append(float(optimizer.state[critic[0].weight]["averages.t_G"]))
        return found

    assert curvature("model") == curvature("optimizer")
