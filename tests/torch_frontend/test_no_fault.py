"""Gradients that are changed, checkpoints and dtypes are no fault: rows are taken as before."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from unseen import Net, hidden, loss_of, tokens
from watched import layers, table

from singd_torch import SINGD

Step = Callable[[Net, SINGD], None]


def scaled_gradient(model: Net, optimizer: SINGD) -> None:
    handle = model.head.weight.register_hook(lambda g: 0.1 * g)
    loss_of(model, tokens()).backward()
    handle.remove()


def frozen_entries(model: Net, optimizer: SINGD) -> None:
    kept = (torch.arange(12) > 6)[:, None]
    handle = model.table.weight.register_hook(lambda g: g * kept)
    loss_of(model, tokens()).backward()
    handle.remove()


def scaled_before_it_is_added(model: Net, optimizer: SINGD) -> None:
    edges = map(torch.autograd.graph.get_gradient_edge, model.head.parameters())
    nodes: list[Any] = [edge.node for edge in edges]
    handles = [n.register_prehook(lambda grads: tuple(0.1 * g for g in grads)) for n in nodes]
    loss_of(model, tokens()).backward()
    for handle in handles:
        handle.remove()


def changed_where_it_is_added(model: Net, optimizer: SINGD) -> None:
    def noisy(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.add_(torch.randn_like(p))

    handle = model.head.weight.register_post_accumulate_grad_hook(noisy)
    loss_of(model, tokens()).backward()
    handle.remove()


def decay_in_the_loss(model: Net, optimizer: SINGD) -> None:
    decay = sum(p.square().sum() for p in model.parameters())
    (loss_of(model, tokens()) + 0.5 * decay).backward()


def sparse_decay_in_the_loss(model: Net, optimizer: SINGD) -> None:
    decay = sum(p.abs().sum() + p.norm() for p in model.parameters())
    (loss_of(model, tokens()) + 0.2 * decay).backward()


def penalty_in_a_pass_of_its_own(model: Net, optimizer: SINGD) -> None:
    loss_of(model, tokens()).backward()
    W = model.head.weight
    (W @ W.T - torch.eye(12, dtype=W.dtype)).square().sum().backward()


def clipped_and_noisy(model: Net, optimizer: SINGD) -> None:
    loss_of(model, tokens()).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    for p in model.parameters():
        assert p.grad is not None
        p.grad += 0.1 * torch.randn_like(p)


def accumulated(model: Net, optimizer: SINGD) -> None:
    optimizer.zero_grad(set_to_none=False)
    for _ in range(3):
        (loss_of(model, tokens()) / 3).backward()


def curvature_beside(model: Net, optimizer: SINGD) -> None:
    parameters = list(model.parameters())
    with optimizer.no_rows():
        loss = loss_of(model, tokens())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        torch.autograd.grad(sum(g.sin().sum() for g in gradients), parameters)
    loss_of(model, tokens()).backward()


def curvature_without_a_block(model: Net, optimizer: SINGD) -> None:
    parameters = list(model.parameters())
    loss = loss_of(model, tokens())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    torch.autograd.grad(sum(g.sin().sum() for g in gradients), parameters, retain_graph=True)
    loss.backward()


def curvature_that_the_model_drops(model: Net, optimizer: SINGD) -> None:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(model, tokens()), parameters, create_graph=True)
    sum(g.sin().sum() for g in gradients).backward()  # type: ignore[union-attr]
    model.zero_grad()
    loss_of(model, tokens()).backward()


def checkpointed(reentrant: bool) -> Step:
    def step(model: Net, optimizer: SINGD) -> None:
        def inner(h: Tensor) -> Tensor:
            return model.head(model.attention(h, h, h)[0])  # type: ignore[no-any-return]

        x = tokens()
        h = model.table(x)
        twice: Any = checkpoint(inner, h, use_reentrant=reentrant)
        loss = F.cross_entropy((twice + inner(h)).flatten(0, 1), x.flatten())
        (loss + loss_of(model, x)).backward()

    return step


def by_autograd_grad(model: Net, optimizer: SINGD) -> None:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss_of(model, tokens()), parameters)
    for p, g in zip(parameters, found, strict=True):
        p.grad = g


def two_losses(model: Net, optimizer: SINGD) -> None:
    x = tokens()
    logits = model(x).flatten(0, 1)
    F.cross_entropy(logits, x.flatten()).backward(retain_graph=True)
    logits.square().mean().backward()


def masked(model: Net, optimizer: SINGD) -> None:
    x, mask = tokens(), torch.rand(16, 6) < 0.5
    optimizer.mask_rows(mask)
    F.cross_entropy(model(x)[mask], x[mask]).backward()


def of_sampled_labels(model: Net, optimizer: SINGD) -> None:
    x = tokens()
    logits = model(x).flatten(0, 1)
    with optimizer.sampled_labels():
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        F.cross_entropy(logits, drawn).backward(retain_graph=True)
    F.cross_entropy(logits, x.flatten()).backward()


def tied_head(model: Net, optimizer: SINGD) -> None:
    loss_of(model, tokens(), tied=True).backward()


def with_another_optimizer(model: Net, optimizer: SINGD) -> None:
    other = SINGD(model)
    loss_of(model, tokens()).backward()
    assert layers(other)


def of_no_gradient(model: Net, optimizer: SINGD) -> None:
    (0.0 * loss_of(model, tokens())).backward()


STEPS: list[Step] = [
    scaled_gradient, frozen_entries, scaled_before_it_is_added, changed_where_it_is_added,
    decay_in_the_loss, sparse_decay_in_the_loss, penalty_in_a_pass_of_its_own, clipped_and_noisy,
    accumulated, curvature_beside, curvature_without_a_block, curvature_that_the_model_drops,
    by_autograd_grad, two_losses, masked, of_sampled_labels, tied_head, with_another_optimizer,
    of_no_gradient,
]  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_what_is_done_to_gradients_is_no_fault(step: Step) -> None:
    check_no_fault(step)


def penalized(weight: float, model: Net, optimizer: SINGD) -> None:
    x = tokens()
    h = hidden(x).requires_grad_()
    (slope,) = torch.autograd.grad(model.head(h).sin().sum(), h, create_graph=True)
    penalty = slope.square().sum(-1).sub(1).square().mean()
    optimizer.zero_grad()
    (loss_of(model, x) + weight * penalty).backward()


def test_a_small_gradient_penalty_is_no_fault() -> None:
    check_no_fault(partial(penalized, 1e-4))


def test_where_derivatives_in_the_loss_make_the_gradient_the_factors_learn_from_it() -> None:
    """Nobody is warned: that is a choice of the loss."""
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SINGD(model)
    for _ in range(3):  # warnings are errors here
        penalized(10.0, model, optimizer)
        optimizer.step()
    rules = table(optimizer)
    of_head = {rules.pop(name) for name in ("head.weight", "head.bias")}
    assert of_head == {"SINGD without rows"}
    assert set(rules.values()) == {"SINGD"}
    assert "derivatives of it are in the loss" in str(optimizer)


def test_a_loss_of_derivatives_alone() -> None:
    """As of forces, which are the gradients of an energy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer, start = SINGD(model), [model[0].weight.clone(), model[2].weight.clone()]
    for _ in range(4):  # warnings are errors here
        x = torch.randn(16, 4).double().requires_grad_()
        (force,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        optimizer.zero_grad()
        (force + x.detach().sin()).square().mean().backward()
        optimizer.step()
    assert {table(optimizer)[name] for name in ("0.weight", "2.weight")} == {"SINGD without rows"}
    assert str(optimizer).count("derivatives of it are in the loss") == 2
    for p, q in zip((model[0].weight, model[2].weight), start, strict=True):
        assert not torch.equal(p, q)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_no_fault(reentrant: bool) -> None:
    check_no_fault(checkpointed(reentrant))


def check_no_fault(step: Step) -> None:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SINGD(model)
    for _ in range(5):  # warnings are errors here
        optimizer.zero_grad()
        step(model, optimizer)
        optimizer.step()
    found = {own for name, own in table(optimizer).items() if own != "AdamW"}
    assert found == {"SINGD"}
    assert all(not p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("layer", "axes"),
    [
        (nn.Conv1d(4, 6, 4, padding="same", groups=2), 1),  # one more of zeros behind than before
        (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), 2),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 2),
        (nn.Conv3d(4, 6, 2), 3),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_no_argument_of_convolutions_is_a_fault(layer: nn.Module, axes: int) -> None:
    """Their rows are proved by convolutions with other kernels."""
    torch.manual_seed(0)
    model = copy.deepcopy(layer).double()
    optimizer = SINGD(model)
    model(torch.randn(3, 4, *(7,) * axes).double()).sin().sum().backward()
    optimizer.step()  # warnings are errors here
    assert table(optimizer)["weight"] == "SINGD"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_is_no_fault(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = SINGD(model)
    for scale in (1.0, 1e-4, 1e-8):
        optimizer.zero_grad()
        x = tokens()
        (scale * F.cross_entropy(model(x).float().flatten(0, 1), x.flatten())).backward()
        optimizer.step()
    assert {own for own in table(optimizer).values() if own != "AdamW"} == {"SINGD"}


def test_autocast_is_no_fault() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = SINGD(model)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens())
        loss.backward()
        optimizer.step()
    assert {own for own in table(optimizer).values() if own != "AdamW"} == {"SINGD"}
