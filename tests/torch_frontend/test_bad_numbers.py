"""Numbers that are not finite, empty batches and dead layers do no harm."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_network import INF, NAN, assert_same, everything, loss_of, network, step
from torch import Tensor, nn

from singd_torch import SINGD
from singd_torch.tensors import pieces

CASES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper", "T": 1, "damping": 0.1, "weight_decay": 0.01},
    "normalized lr_cov": {"recipe": "paper", "T": 1, "normalize_lr_cov": True},
    "kfac": {"kfac": True},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "blocks": {"structures": ("blockdiagonal:3", "blockdiagonal:2")},
    "triangular": {"structures": ("tril", "triu")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:2,2", "hierarchical:1,1")},
}


def poison_input(model: nn.Module, value: float) -> None:
    x = torch.randn(9, 6)
    x[3, 2] = value
    loss_of(model, x).backward()


def poison_gradient(index: int, name: str) -> Callable[[nn.Module, float], None]:
    def poison(model: nn.Module, value: float) -> None:
        loss_of(model, torch.randn(9, 6)).backward()
        getattr(model[index], name).grad.flatten()[-1] = value

    return poison


def poison_row(index: int, of_output: bool) -> Callable[[nn.Module, float], None]:
    """Gradients stay finite: the row alone is not."""

    def poison(model: nn.Module, value: float) -> None:
        (hook,) = model[index]._forward_hooks.values()
        rows = hook._owner().rows_wanted(hook.source)
        x, z = {0: ((9, 6), (9, 8)), 4: ((9, 2, 4), (9, 3, 3)), 6: ((9, 9), (9, 3))}[index]
        x, z = torch.randn(x), torch.randn(z)
        (z if of_output else x).view(-1)[5] = value

        def one_more(_: Tensor) -> None:
            rows(x, z, None, None)

        handle = model[index].weight.register_hook(one_more)
        loss_of(model, torch.randn(9, 6)).backward()
        handle.remove()

    return poison


# What is done, and what the warning says of it.
POISONS = {
    "an input": (
        poison_input,
        r"the gradients of '0\.weight', '0\.bias' and \d+ more",
    ),
    "gradient of a weight": (poison_gradient(0, "weight"), r"the gradient of '0\.weight'"),
    "gradient of a bias": (poison_gradient(6, "bias"), r"the gradient of '6\.bias'"),
    "gradient of a convolution": (poison_gradient(4, "weight"), r"the gradient of '4\.weight'"),
    "gradient of a fallback parameter": (
        poison_gradient(1, "weight"),
        r"the gradient of '1\.weight'",
    ),
    "row of an input": (poison_row(6, False), r"the curvature of '6\.weight'"),
    "row of an output": (poison_row(0, True), r"the curvature of '0\.weight'"),
    "row of a convolution": (poison_row(4, True), r"the curvature of '4\.weight'"),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_changes_nothing_is_counted_and_warned_about_once(
    poison: str, value: float
) -> None:
    model = network()
    optimizer = SINGD(model)
    for _ in range(2):
        step(model, optimizer)
    before = everything(model, optimizer)
    spoil, named = POISONS[poison]
    warning = pytest.warns(
        UserWarning, match=f"^{named} (was|were) NaN or infinite: the step changed"
    )
    for count, expectation in ((1, warning), (2, None)):
        optimizer.zero_grad()
        spoil(model, value)
        if expectation is None:
            optimizer.step()  # a second warning would be an error
        else:
            with expectation as caught:
                optimizer.step()
            assert len(caught) == 1
        assert optimizer.skipped == count
        assert_same(before, everything(model, optimizer))
    step(model, optimizer)  # goes on
    assert optimizer.skipped == 2
    after = everything(model, optimizer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(after["0.weight"], before["0.weight"])


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_rule_and_structure_survives_nan(case: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = SINGD(model, **CASES[case])
    poisoned = torch.randn(9, 6, dtype=dtype)
    poisoned[0, 0] = NAN
    step(model, optimizer, poisoned)  # before any state
    for _ in range(2):
        step(model, optimizer, torch.randn(9, 6, dtype=dtype))
    before = everything(model, optimizer)
    step(model, optimizer, poisoned)
    assert_same(before, everything(model, optimizer))
    step(model, optimizer, torch.randn(9, 6, dtype=dtype))
    assert optimizer.skipped == 2
    assert all(torch.isfinite(value).all() for value in everything(model, optimizer).values())


def test_a_skipped_step_is_a_step_for_the_schedule_of_refreshes() -> None:
    model = network()
    optimizer = SINGD(model, T=2, growing_T=False)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        step(model, optimizer, torch.full((9, 6), NAN))
    assert optimizer.param_groups[0]["steps"] == 1


def test_rows_that_overflow_are_not_finite() -> None:
    """Inputs of 1e25 have a float32 square of infinity, and a gradient that is finite."""
    model = nn.Linear(6, 3)
    optimizer = SINGD(model)
    x = torch.randn(9, 6)
    step(model, optimizer, x)
    before = everything(model, optimizer)
    optimizer.zero_grad()
    (model(x * 1e25) * 1e-27).mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with pytest.warns(UserWarning, match="NaN or infinite"):
        optimizer.step()
    assert_same(before, everything(model, optimizer))


@pytest.mark.filterwarnings("ignore:the squared gradients of '0.weight'")
@pytest.mark.parametrize("size", [1e15, 1e17, 1e19])
@pytest.mark.parametrize("host", [True, False], ids=["host", "accelerator"])
def test_gradients_whose_squares_leave_the_range_change_nothing(
    size: float, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of squares of late gradients leave it before a square does."""
    monkeypatch.setattr(pieces, "on_host", lambda x: host)
    model = network()
    optimizer, large = SINGD(model), 6
    step(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(large):
        optimizer.zero_grad()
        loss_of(model, torch.randn(9, 6)).backward()
        scale = size / float(model[0].weight.grad.norm())
        for p in model.parameters():
            p.grad *= scale  # type: ignore[operator]
        optimizer.step()
    unchanged = all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert (unchanged, int(optimizer.skipped)) == ((False, 0) if size < 1e16 else (True, large))
    step(model, optimizer)
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert all(value.isfinite().all() for value in everything(model, optimizer).values())


@pytest.mark.parametrize("case", CASES)
def test_empty_batch_does_no_harm(case: str) -> None:
    model = network()
    optimizer = SINGD(model, **CASES[case])
    step(model, optimizer)
    optimizer.zero_grad()
    model(torch.randn(0, 6)).sum().backward()  # zeros
    optimizer.step()
    optimizer.zero_grad()
    loss = model(torch.randn(0, 6)).mean()  # of nothing: NaN
    (loss + sum(p.sum() for p in model.parameters()) * loss).backward()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        optimizer.step()
    step(model, optimizer)
    assert optimizer.skipped == 1
    assert all(torch.isfinite(value).all() for value in everything(model, optimizer).values())


@pytest.mark.filterwarnings("ignore:no rows of")
def test_empty_first_batch_does_no_harm() -> None:
    model = network()
    optimizer = SINGD(model)
    model(torch.randn(0, 6)).sum().backward()
    optimizer.step()
    step(model, optimizer)
    assert optimizer.skipped == 0
    assert all(torch.isfinite(value).all() for value in everything(model, optimizer).values())


def losses(model: nn.Module, optimizer: SINGD, n: int = 30) -> list[float]:
    x, found = torch.randn(9, 6).to(model[0].weight.dtype), []
    for _ in range(n):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_head_that_starts_at_zero(case: str, dtype: torch.dtype) -> None:
    """It sends no gradient down in the first step: rows of zeros for every layer below it."""
    model = network()
    nn.init.zeros_(model[6].weight)
    nn.init.zeros_(model[6].bias)
    before = copy.deepcopy(model).to(dtype)
    optimizer = SINGD(model.to(dtype), **CASES[case])
    found = losses(model, optimizer)
    assert optimizer.skipped == 0
    assert found[-1] < found[0]
    assert not torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize("case", CASES)
def test_layer_that_is_dead_from_the_start_and_one_that_dies(case: str) -> None:
    model = network()
    model.add_module("7", nn.Linear(3, 3))
    kill = {"now": True}
    model[3].register_forward_hook(lambda m, args, out: out * 0.0 if kill["now"] else None)
    optimizer = SINGD(model, **CASES[case])
    for now in (True, False, True, False):  # inputs of zero above, gradients of zero below
        kill["now"] = now
        for _ in range(4):
            step(model, optimizer)
            assert optimizer.skipped == 0
            state = everything(model, optimizer)
            assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("scale", [1e-8, 1e-12, 1e-16, 1e-20, 1e-24])
def test_tiny_gradients_skip_no_step(scale: float) -> None:
    """Their squares leave the range of float32 on the way down."""
    model = network()
    optimizer = SINGD(model)
    for _ in range(5):
        optimizer.zero_grad()
        (loss_of(model, torch.randn(9, 6)) * scale).backward()
        optimizer.step()
    assert optimizer.skipped == 0
    assert all(torch.isfinite(value).all() for value in everything(model, optimizer).values())


def test_sparse_gradient_is_an_error_that_says_so() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    optimizer = SINGD(model)
    loss_of(model, torch.arange(5)).backward()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"gradient of '0\.weight' is sparse"):
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p)


def test_warning_names_the_line_of_the_user() -> None:
    model = nn.Linear(2, 2)
    optimizer = SINGD(model)
    model(torch.full((3, 2), NAN)).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert len(caught) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_of_adamw_without_gradients_stays_where_epsilon_is_0(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = SINGD([p], fallback_eps=0.0, fallback_weight_decay=0.0, rounding="nearest")
    p.grad = torch.tensor([0.0, 1.0], dtype=dtype)
    for _ in range(9):
        optimizer.step()
    assert p[0] == 1.0
    assert p[1] < 1.0
