"""What a training loop calls, and what the optimizer shows."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from contract_runs import Network, batch, loss_of, moved, step
from torch import Tensor, nn

from singd_core.structures import Diagonal, blockdiagonal
from singd_torch import SINGD
from singd_torch.capture import compiled

# ---- calls -------------------------------------------------------------------------------------


def test_closure_is_evaluated_once_and_its_loss_returned() -> None:
    model, data = Network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model), SINGD(twin)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    expected = loss_of(twin, data).item()
    step(twin, other, data)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == expected
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert SINGD(nn.Linear(1, 1)).step() is None


def test_a_closure_may_evaluate_the_model_several_times() -> None:
    """As a line search does: the last evaluation decides the step."""
    model, data = Network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model), SINGD(twin)

    def closure() -> Tensor:
        for rows in (batch(), data):
            optimizer.zero_grad()
            loss = loss_of(model, rows)
            loss.backward()
        return loss

    optimizer.step(closure)
    step(twin, other, data)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.filterwarnings("ignore:no rows of .* clipped by value")
@pytest.mark.parametrize("clip", [nn.utils.clip_grad_value_, nn.utils.clip_grad_norm_])
def test_clipped_gradients_are_those_that_are_stepped_along(clip: Any) -> None:
    model, data = Network(), batch()
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model), SINGD(twin)
    loss_of(model, data).backward()
    clip(model.parameters(), 1e-4)
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    loss_of(twin, data).backward()
    for p, gradient in zip(twin.parameters(), clipped, strict=True):
        assert not torch.equal(p.grad, gradient)
        p.grad = gradient
    other.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_step_without_any_gradient_changes_nothing() -> None:
    model = Network()
    before, optimizer = copy.deepcopy(model), SINGD(model)
    optimizer.step()
    assert max(moved(model, before).values()) == 0.0
    step(model, optimizer)
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    optimizer.step()
    assert max(moved(model, before).values()) == 0.0


def test_step_hooks_of_torch_are_called() -> None:
    model = Network()
    optimizer, calls = SINGD(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step(model, optimizer)
    assert calls == ["before", "after"]


def test_zero_grad_may_keep_tensors() -> None:
    model = Network()
    optimizer = SINGD(model)
    step(model, optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())
    optimizer.step()
    assert optimizer.skipped == 0


def test_gradients_are_left_as_they_were() -> None:
    model = Network()
    optimizer = SINGD(model, weight_decay=0.1)
    loss_of(model, batch()).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, (p.grad for p in model.parameters())))


def test_weights_stay_in_their_memory() -> None:
    """A view of a weight, or a flat buffer behind it, sees the steps."""
    model = Network()
    optimizer = SINGD(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    step(model, optimizer)
    assert pointers == [p.data_ptr() for p in model.parameters()]


def test_model_in_another_memory_format_trains_alike() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2))
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for net in (model, twin):
        optimizer, g = SINGD(net), torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(5, 3, 6, 6, generator=g)).sin().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("one", ["diagonal", "blockdiagonal:2", Diagonal, blockdiagonal(2)])
def test_one_structure_is_taken_for_both(one: Any) -> None:
    model, data = Network(), batch()
    twin = copy.deepcopy(model)
    optimizers = SINGD(model, structures=one), SINGD(twin, structures=(one, one))
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        step(net, optimizer, data)
        optimizer.load_state_dict(optimizer.state_dict())
    assert repr(optimizers[0]) == repr(optimizers[1])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


# ---- the table ---------------------------------------------------------------------------------


def table(optimizer: SINGD) -> dict[str, list[str]]:
    _, header, *rows = repr(optimizer).splitlines()
    columns = ["parameter", "shape", "rule", "K", "C", "bytes of state"]
    found = re.split(r"  +", header)
    assert found in (columns, [*columns, "why without rows"])
    cells = [re.split(r"  +", row.strip()) for row in rows]
    return {name: rest[: 3 if rest[1] == "AdamW" else 5] for name, *rest in cells}


def test_print_shows_who_owns_each_parameter() -> None:
    model = Network()
    shown = table(SINGD(model, structures=("diagonal", "blockdiagonal:2")))
    assert list(shown) == [
        "embed.weight",
        "conv.weight + bias",
        "hidden.weight + bias",
        "out.weight",
        "shift",
        "norm.weight",
        "norm.bias",
    ]
    assert shown["hidden.weight + bias"][:-1] == ["8×6", "SINGD", "diagonal", "blockdiagonal:2"]
    assert shown["embed.weight"][:-1] == ["7×6", "SINGD", "diagonal", "blockdiagonal:2"]
    assert shown["norm.weight"][:-1] == ["6", "AdamW"]


STATES: dict[str, dict[str, Any]] = {
    "normalized": {},
    "paper": {"recipe": "paper"},
    "no momentum": {"momentum": 0.0},
    "kfac": {"kfac": True},
    "factors of another dtype": {"preconditioner_dtype": (torch.bfloat16, torch.float64)},
    "diagonal": {"structures": ("diagonal", "diagonal")},
    "blocks": {"structures": ("blockdiagonal:4", "blockdiagonal:3")},
    "toeplitz": {"structures": ("triltoeplitz", "triutoeplitz")},
    "hierarchical": {"structures": ("hierarchical:2,3", "hierarchical15_15")},
    "rank one": {"structures": ("trilbottomrightdiag", "triutopleftdiag")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", STATES)
def test_bytes_in_the_table_are_those_of_the_state(case: str, dtype: torch.dtype) -> None:
    model = Network().to(dtype)
    optimizer = SINGD(model, **STATES[case])
    shown = table(optimizer)
    step(model, optimizer)
    assert table(optimizer) == shown
    for name, (*_, size) in shown.items():
        weight, *bias = name.split(" + ")
        names = [weight, *(weight.replace("weight", b) for b in bias)]
        entries = [e for n in names for e in optimizer.state[model.get_parameter(n)].items()]
        # the count of steps, the mean diagonals and the sums over late gradients are numbers
        numbers = "averages.", "late.", "step"
        arrays = [v for k, v in entries if not k.startswith(numbers)]
        assert int(size.replace(",", "")) == sum(a.numel() * a.element_size() for a in arrays), name


# ---- copies ------------------------------------------------------------------------------------


def test_warn_unsupported_names_what_adamw_trains() -> None:
    with pytest.warns(UserWarning, match=r"shift, norm\.weight, norm\.bias"):
        SINGD(Network(), warn_unsupported=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SINGD(Network())
        SINGD(nn.Linear(2, 2), warn_unsupported=True)


def test_arguments_of_the_authors_package_are_accepted_in_their_order() -> None:
    """`lr`, `momentum`, … by position, as singd 0.0.5 takes them."""
    model = nn.Linear(3, 2)
    optimizer = SINGD(
        model, None, 0.1, 0.8, 0.2, 0.3, 0.4, 5, None, 0.6, ("diagonal", "dense"), "reduce", False,
        False, (torch.float64, None), 4.0, True,
    )  # fmt: skip
    expected = {
        "lr": 0.1, "momentum": 0.8, "damping": 0.2, "alpha1": 0.3, "weight_decay": 0.4, "T": 5,
        "loss_average": None, "lr_cov": 0.6, "structures": ("diagonal", "dense"),
        "kfac_approx": "reduce", "rule": "singd", "preconditioner_dtype": (torch.float64, None),
        "normalize_lr_cov": True,
    }  # fmt: skip
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


def test_compiled_by_an_old_torch_it_learns_from_gradients_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "SUPPORTED", False)
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = SINGD(model)
    graph = torch.compile(model, backend="eager")
    before = copy.deepcopy(model)
    graph(torch.randn(5, 4)).sin().mean().backward()
    with pytest.warns(UserWarning, match="no rows of '0.weight' have been seen"):
        optimizer.step()
    assert min(moved(model, before).values()) > 0.0
    assert "SINGD without rows" in repr(optimizer)


def test_warnings_point_at_the_line_of_the_user() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = SINGD(model, warn_unsupported=True)
        (model(torch.randn(5, 4)) * float("nan")).sum().backward()
        optimizer.step()
    assert [w.filename for w in seen] == [__file__, __file__]
