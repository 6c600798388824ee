"""What README and docstrings of `singd` 0.0.5 promise, and what docs/torch.md says differs."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from singd_reference import STRUCTURES, Reference, reference
from torch import Tensor, nn

from singd_torch import SINGD

SCALE = 2.0**13  # a power of two rounds nothing


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def ours(model: nn.Module, *args: Any, **given: Any) -> SINGD:
    return SINGD(model, *args, recipe="paper", **given)


def steps(make: Callable[..., Any], model: nn.Module, n: int = 5, scale: float = 1.0) -> Tensor:
    """The weights after n steps, whose loss is multiplied by a scale that is told."""
    model, g = copy.deepcopy(model), torch.Generator().manual_seed(0)
    optimizer = make(model)
    for _ in range(n):
        x, y = torch.randn(9, 6, generator=g), torch.randint(3, (9,), generator=g)
        optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(model(x), y)).backward()
        if scale != 1.0:
            optimizer.set_current_grad_scale(scale)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_alike(model: nn.Module, n: int = 5, scale: float = 1.0, **given: Any) -> None:
    a, b = (steps(lambda m, f=f: f(m, **given), model, n, scale) for f in (ours, reference))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # float32 sums in another order


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_name_of_a_structure_is_known(structure: str) -> None:
    assert_alike(network(), n=1, lr=0.1, structures=(structure, structure))


def test_a_scale_that_is_told_is_divided_out() -> None:
    model, given = network(), {"lr": 0.1, "T": 1, "init_grad_scale": SCALE}
    assert_alike(model, scale=SCALE, **given)
    assert torch.equal(
        steps(lambda m: ours(m, **given), model, scale=SCALE),
        steps(lambda m: ours(m, **given), model),
    )


def test_a_schedule_of_the_factors_is_called_with_the_number_of_steps() -> None:
    calls: dict[str, set[int]] = {"ours": set(), "theirs": set()}

    def schedule(of: str) -> Callable[[int], float]:
        def lr_cov(step: int) -> float:
            calls[of].add(step)
            return 0.1 / (1 + step)

        return lr_cov

    model = network()
    a = steps(lambda m: ours(m, lr=0.1, T=2, lr_cov=schedule("ours")), model)
    b = steps(lambda m: reference(m, lr=0.1, T=2, lr_cov=schedule("theirs")), model)
    assert calls["ours"] == calls["theirs"] == {0, 2, 4}
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_groups_may_have_settings_of_their_own() -> None:
    def grouped(make: Callable[..., Any]) -> Callable[[nn.Module], Any]:
        def with_groups(model: Any) -> Any:
            first = {"params": list(model[0].parameters()), "structures": ("diagonal", "dense")}
            last = {"params": list(model[2].parameters()), "lr": 0.02, "weight_decay": 0.1, "T": 2}
            return make(model, [first, last], lr=0.1, T=1)

        return with_groups

    model = network()
    a, b = (steps(grouped(make), model) for make in (ours, reference))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_factors_have_the_dtypes_that_are_asked_for() -> None:
    model = network().to(torch.bfloat16)
    optimizer = ours(model, preconditioner_dtype=(torch.float32, None))
    model(torch.randn(9, 6, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    kept = optimizer.state[model[0].weight]
    dtypes = {name: kept[f"{name}.matrix"].dtype for name in ("K", "m_K", "C", "m_C")}
    wide, own = torch.float32, torch.bfloat16
    assert dtypes == {"K": wide, "m_K": wide, "C": own, "m_C": own}


def test_a_normalized_rate_of_the_factors_is_at_most_the_rate() -> None:
    """With curvatures that are huge, where the rate itself would be."""
    model = network()
    assert_alike(model, lr=1e-3, T=1, lr_cov=0.1, normalize_lr_cov=True)
    optimizer = ours(model, lr=1e-3, T=1, lr_cov=0.1, normalize_lr_cov=True)
    (1e3 * model(torch.randn(9, 6))).square().mean().backward()
    optimizer.step()
    K = optimizer.state[model[0].weight]["K.matrix"]
    assert (K - torch.eye(7)).abs().max() <= 0.1 * (1 + 1e-6)


def test_what_its_attributes_hold_is_in_the_state() -> None:
    model = network()
    twin = copy.deepcopy(model)
    mine, theirs = ours(model, lr=0.1, T=1), reference(twin, lr=0.1, T=1)
    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    for net, optimizer in ((model, mine), (twin, theirs)):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert mine.param_groups[0]["steps"] == theirs.steps
    for name, layer in (("0", model[0]), ("2", model[2])):
        found = mine.state[layer.weight]
        kept = {"K": theirs.Ks, "C": theirs.Cs, "m_K": theirs.m_Ks, "m_C": theirs.m_Cs}
        for key, matrices in kept.items():
            expected = matrices[name].to_dense()
            torch.testing.assert_close(found[f"{key}.matrix"], expected, rtol=1e-4, atol=1e-6)


# ---- what differs ------------------------------------------------------------------------------

ACCEPTED_THERE: list[dict[str, Any]] = [
    {"lr": -1}, {"lr": float("inf")}, {"lr_cov": float("nan")}, {"damping": -1.0},
    {"momentum": 1.5}, {"alpha1": 2.0}, {"T": 2.5}, {"kfac_like": 1},
]  # fmt: skip


@pytest.mark.parametrize("given", ACCEPTED_THERE, ids=str)
def test_wrong_values_that_it_accepts_are_errors_here(given: dict[str, Any]) -> None:
    reference(network(), **given)
    (name,) = given
    with pytest.raises(ValueError, match=f"^{name}="):
        ours(network(), **given)


@pytest.mark.parametrize(
    "given", [{"lr": -1.0}, {"loss_average": "mean"}, {"kfac_approx": "mean"}], ids=str
)
def test_wrong_values_that_it_refuses_are_errors_here(given: dict[str, Any]) -> None:
    for make in (reference, ours):
        with pytest.raises(ValueError, match=next(iter(given))):
            make(network(), **given)


def test_an_ignored_momentum_of_the_factors_is_no_warning() -> None:
    model, given = network(), {"kfac_like": True, "alpha1": 0.5}
    with pytest.warns(UserWarning, match="kfac_like=True"):
        Reference(copy.deepcopy(model), **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(copy.deepcopy(model), **given)
    assert_alike(model, lr=0.1, T=1, **given)


def test_gradients_that_a_scaler_has_unscaled_are_not_divided_again() -> None:
    """There, told of the scale, they are."""
    model = network()

    def distance(make: Callable[..., Any]) -> float:
        net = copy.deepcopy(model)
        optimizer, scaler = make(net, lr=0.1), torch.amp.GradScaler("cpu", init_scale=SCALE)
        scaler.scale(net(torch.ones(4, 6)).square().mean()).backward()
        scaler.unscale_(optimizer)
        optimizer.set_current_grad_scale(scaler.get_scale())
        scaler.step(optimizer)
        pairs = zip(net.parameters(), model.parameters(), strict=True)
        return sum((p - q).square().sum() for p, q in pairs).sqrt().item()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of scales
        theirs = distance(reference)
    assert distance(ours) > 100 * theirs
