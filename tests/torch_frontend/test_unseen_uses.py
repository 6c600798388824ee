"""A weight that is also used where no call is seen: its layer is trained without rows."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from watched import Product, layers, table

from singd_torch import SINGD


class Net(nn.Module):
    """Layers of all kinds, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 8**0.5)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens: Tensor, *, tied: bool = False) -> Tensor:
        x = self.table(tokens)
        x = x + torch.tanh(self.conv(x.mT)).mT
        x = x + self.attention(x, x, x)[0]
        x = x + torch.einsum("bnd,edf->bnef", x, self.experts).tanh().mean(2)
        return F.linear(x, self.table.weight) if tied else self.head(x)  # type: ignore[no-any-return]


def tokens() -> Tensor:
    return torch.randint(12, (16, 6))


def loss_of(model: Net, x: Tensor, **given: Any) -> Tensor:
    return F.cross_entropy(model(x, **given).flatten(0, 1), x.flip(1).flatten())


Loss = Callable[[Net, Tensor], Tensor]


def hidden(x: Tensor) -> Tensor:
    return torch.randn(*x.shape, 8, dtype=torch.float64)


def train(model: Net, optimizer: SINGD, loss: Loss, n: int = 5) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        loss(model, tokens()).backward()
        optimizer.step()


@contextmanager
def warned(name: str) -> Iterator[None]:
    """One warning, of one layer."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "`torch.jit")  # torch's, in forward derivatives
        yield
    [text] = {str(warning.message) for warning in found}
    assert f"no rows of {name!r} are taken, since it is used where no call is seen" in text


# ---- what is noticed ----------------------------------------------------------------------------


def by_function_of_ones_own(model: Net, x: Tensor) -> Tensor:
    return loss_of(model, x) + Product.apply(hidden(x), model.table.weight).cos().mean()


def by_function_of_ones_own_beside_a_tied_head(model: Net, x: Tensor) -> Tensor:
    used = Product.apply(hidden(x), model.table.weight)
    return loss_of(model, x, tied=True) + used.square().mean()


def in_the_loss(model: Net, x: Tensor) -> Tensor:
    logits = F.linear(hidden(x), model.head.weight, model.head.bias)
    return loss_of(model, x) + F.cross_entropy(logits.flatten(0, 1), x.flatten())


def mapped(model: Net, x: Tensor) -> Tensor:
    each = torch.func.vmap(lambda h: torch.tanh(model.head.weight @ h))
    return loss_of(model, x) + each(hidden(x)[0]).square().mean()


def by_forward_derivative(model: Net, x: Tensor) -> Tensor:
    h = hidden(x)
    _, tangent = torch.func.jvp(lambda h: torch.tanh(model.head(h)), (h,), (torch.ones_like(h),))
    return loss_of(model, x) + 10 * tangent.square().mean()


def convolution(model: Net, x: Tensor) -> Tensor:
    used = F.conv1d(hidden(x).mT, model.conv.weight, groups=2)
    return loss_of(model, x) + used.sin().mean()


def attention(model: Net, x: Tensor) -> Tensor:
    used = Product.apply(hidden(x), model.attention.in_proj_weight)
    return loss_of(model, x) + used.sin().mean()


def experts(model: Net, x: Tensor) -> Tensor:
    return loss_of(model, x) + 10 * torch.bmm(hidden(x)[:3], model.experts).sin().mean()


UNSEEN: dict[str, tuple[Loss, ...]] = {
    "table.weight": (by_function_of_ones_own, by_function_of_ones_own_beside_a_tied_head),
    "head.weight": (in_the_loss, mapped, by_forward_derivative),
    "conv.weight": (convolution,),
    "attention.in_proj_weight": (attention,),
    "experts": (experts,),
}
CASES = [pytest.param(name, loss, id=loss.__name__) for name in UNSEEN for loss in UNSEEN[name]]


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_a_use_that_is_not_seen_is_noticed_in_the_first_step(name: str, loss: Loss) -> None:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SINGD(model)
    with warned(name):
        train(model, optimizer, loss, 1)
    train(model, optimizer, loss)  # it has been said, and warnings are errors here
    rules = table(optimizer)
    others = ("table.weight", "conv.weight", "attention.in_proj_weight", "experts", "head.weight")
    assert {rules.pop(name), *map(rules.get, set(others) - {name})} == {
        "SINGD without rows",
        "SINGD",
    }


def test_a_use_that_begins_later_is_noticed_by_twice_the_steps() -> None:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SINGD(model)
    train(model, optimizer, loss_of, 12)
    with warned("head.weight"):
        train(model, optimizer, in_the_loss, 12)
    assert table(optimizer)["head.weight"] == "SINGD without rows"


def test_what_was_learned_from_half_of_the_rows_begins_anew() -> None:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = SINGD(model)
    train(model, optimizer, loss_of, 4)
    old = optimizer.state[model.head.weight]["K.matrix"]
    optimizer.param_groups[0]["steps"] = 7  # the next that is looked at
    with warned("head.weight"):
        train(model, optimizer, in_the_loss, 1)
    assert optimizer.state[model.head.weight]["K.matrix"] is not old
    assert optimizer.skipped == 0


# ---- what is no fault ---------------------------------------------------------------------------

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
    node: Any = torch.autograd.graph.get_gradient_edge(model.head.weight).node
    handle = node.register_prehook(lambda grads: tuple(0.1 * g for g in grads))
    loss_of(model, tokens()).backward()
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
    assert rules.pop("head.weight") == "SINGD without rows"
    assert set(rules.values()) == {"SINGD", "AdamW"}
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
