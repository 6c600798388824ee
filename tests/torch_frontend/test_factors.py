"""curvlinops-for-pytorch, an independent KFAC, computes the same factors U and G."""

from typing import Any

import pytest
import torch
from curvlinops import KFACLinearOperator
from torch import Tensor, nn

from singd_torch import SINGD

# Relative, float64: sums over up to 250 rows and a backward pass of four layers, in another order;
# √1000 roundings of 2⁻⁵³ are 4e-15.
CLOSE = 1e-13

BATCH, CLASSES = 10, 4


class ClassesSecond(nn.Module):
    """(batch, ..., classes) as cross-entropy wants it: (batch, classes, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


def vectors() -> tuple[nn.Module, Tensor, str]:
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES, bias=False))
    return model, torch.randn(BATCH, 6, dtype=torch.float64), "batch"


def sequences() -> tuple[nn.Module, Tensor, str]:
    """Every position is classified: the loss is a mean over batch and sequence."""
    layers = nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES), ClassesSecond()
    return nn.Sequential(*layers), torch.randn(BATCH, 5, 6, dtype=torch.float64), "batch+sequence"


def pooled_sequences() -> tuple[nn.Module, Tensor, str]:
    """The first layer shares its weight, the loss has one term a sample."""
    layers = nn.Linear(6, 7), nn.Tanh(), nn.Flatten(), nn.Linear(35, CLASSES)
    return nn.Sequential(*layers), torch.randn(BATCH, 5, 6, dtype=torch.float64), "batch"


def images() -> tuple[nn.Module, Tensor, str]:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, (2, 3), dilation=(1, 2), padding=(1, 0), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(30, CLASSES),
    )
    return model, torch.randn(BATCH, 3, 8, 10, dtype=torch.float64), "batch"


CASES = [vectors, sequences, pooled_sequences, images]
APPROXIMATIONS = ["expand", "reduce"]


def ours(model: nn.Module, optimizer: SINGD, batches: list[tuple[Tensor, Tensor]]) -> Any:
    optimizer.zero_grad()
    for x, y in batches:
        (nn.functional.cross_entropy(model(x), y) / len(batches)).backward()
    optimizer.step()
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    return {n.removesuffix(".weight"): optimizer.state[p] for n, p in weights.items()}


def independent(model: nn.Module, batches: list[tuple[Tensor, Tensor]], kfac_approx: str) -> Any:
    kfac = KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [p for p in model.parameters() if p.requires_grad],
        batches,
        fisher_type="empirical",
        kfac_approx=kfac_approx,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    kfac.compute_kronecker_factors()
    return kfac._input_covariances, kfac._gradient_covariances


def labelled(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        shape = model(x).shape
    return x, torch.randint(CLASSES, (shape[0], *shape[2:]))


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kfac_approx", APPROXIMATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_kfac_averages_the_independent_factors(case: Any, kfac_approx: str) -> None:
    """With β₁ = 1 the average S_K is the last U, and S_C the last G."""
    model, x, average = case()
    batch = labelled(model.double(), x)
    U, G = independent(model, [batch], kfac_approx)
    given = {"kfac_approx": kfac_approx, "loss_average": average}
    optimizer = SINGD(model, recipe="paper", kfac=True, lr_cov=1.0, **given)
    state = ours(model, optimizer, [batch])
    assert state.keys() == U.keys() == G.keys()
    for name, entries in state.items():
        assert difference(entries["S_K.matrix"], U[name]) < CLOSE
        assert difference(entries["S_C.matrix"], G[name]) < CLOSE


@pytest.mark.parametrize("kfac_approx", APPROXIMATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_first_inverse_free_step_is_along_the_independent_factors(
    case: Any, kfac_approx: str
) -> None:
    """From K = I and with β₁ = 1, IKFAC goes to K = I − ½ (U + λI − I)."""
    model, x, average = case()
    batch = labelled(model.double(), x)
    U, G = independent(model, [batch], kfac_approx)
    given = {"kfac_approx": kfac_approx, "loss_average": average, "damping": 0.1}
    optimizer = SINGD(model, recipe="paper", kfac_like=True, lr_cov=1.0, **given)
    for name, entries in ours(model, optimizer, [batch]).items():
        for key, expected in (("K.matrix", U[name]), ("C.matrix", G[name])):
            I = torch.eye(len(expected), dtype=torch.float64)
            # I and −½ (… − I) cancel: what is small beside I has its error relative to I
            error = (2.0 * (I - entries[key]) + 0.9 * I - expected).norm() / I.norm()
            assert error < CLOSE


@pytest.mark.parametrize("kfac_approx", APPROXIMATIONS)
def test_micro_batches_of_unequal_kind_are_one_data_set(kfac_approx: str) -> None:
    """curvlinops, too, weighs each sample alike, in whichever batch it came."""
    model, x, average = images()
    batches = [labelled(model.double(), x + shift) for shift in (0.0, 0.5, 2.0)]
    U, G = independent(model, batches, kfac_approx)
    given = {"kfac_approx": kfac_approx, "loss_average": average}
    optimizer = SINGD(model, recipe="paper", kfac=True, lr_cov=1.0, **given)
    for name, entries in ours(model, optimizer, batches).items():
        assert difference(entries["S_K.matrix"], U[name]) < CLOSE
        assert difference(entries["S_C.matrix"], G[name]) < CLOSE
