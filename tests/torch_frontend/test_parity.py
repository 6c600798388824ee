"""With recipe="paper", singd_torch takes the steps of the authors' singd 0.0.5."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from singd_reference import STRUCTURES, corrected, in_float64, reference
from torch import Tensor, nn

from singd_core import structures
from singd_torch import SINGD

STEPS = 20

# Relative to the norm of a weight, float64. The promise is 1e-9. Both sides do the same sums in
# another order: 20 steps of sums over up to 300 rows round by about 20 · √300 · 2⁻⁵³ ≈ 4e-14, which
# the products of unlike matrices in between may enlarge some ten times. Measured: 7e-16.
FLOAT64 = 1e-12
# The same with 2⁻²⁴ in place of 2⁻⁵³ is 2e-5. A tenth of that is enough. Measured: 3e-7.
FLOAT32 = 2e-6

SETTINGS = {
    "lr": 0.05,
    "momentum": 0.9,
    "damping": 0.1,
    "alpha1": 0.5,
    "weight_decay": 0.01,
    "T": 1,
    "lr_cov": 0.02,
}


class Everything(nn.Module):
    """Convolutions with stride, padding and dilation, a linear layer on sequences, and one without
    bias on vectors. Sides of 37, 34 and 49 and more exceed the blocks of all structures."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.strided = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(
            6, 8, (2, 3), dilation=(1, 2), padding=(1, 0), groups=groups, bias=groups == 1
        )
        self.on_sequence = nn.Linear(8, 34)
        self.on_vectors = nn.Linear(34, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dilated(torch.relu_(self.strided(x)))
        x = torch.tanh(self.on_sequence(x.flatten(2).mT))
        return self.on_vectors(x.mean(1))


def images(dtype: torch.dtype) -> list[Tensor]:
    return list(torch.randn(STEPS, 8, 4, 10, 12, dtype=dtype))


def loss_per_sample(z: Tensor) -> Tensor:
    return (torch.tanh(z) - 1.0).square().flatten(1).sum(1)


def mean_loss(z: Tensor) -> Tensor:
    return loss_per_sample(z).mean()


def train(
    model: nn.Module,
    optimizer: Any,
    batches: list[Tensor],
    loss: Callable[[Tensor], Tensor] = mean_loss,
) -> list[Tensor]:
    for x in batches:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def compare(
    model: nn.Module,
    batches: list[Tensor],
    given: dict[str, Any],
    ours_only: dict[str, Any] | None = None,
    loss: Callable[[Tensor], Tensor] = mean_loss,
) -> float:
    """The largest difference between the weights of both after all batches."""
    model = model.to(batches[0].dtype)
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    ours = SINGD(model, recipe="paper", **given, **(ours_only or {}))
    theirs = train(twin, reference(twin, **given), batches, loss)
    reached = train(model, ours, batches, loss)
    assert ours.skipped == 0
    assert largest_difference(start, theirs) > 0.01  # the weights have moved
    return largest_difference(reached, theirs)


def combinations() -> Iterator[Any]:
    """All of them; every second one, so that each pair of settings still meets, is fast."""
    for structure, approx, like, normalize, T in itertools.product(
        STRUCTURES, ["expand", "reduce"], [False, True], [False, True], [1, 3]
    ):
        given = {
            "structures": (structure, structure),
            "kfac_approx": approx,
            "kfac_like": like,
            "normalize_lr_cov": normalize,
            "T": T,
        }
        names = structure, approx, "ikfac" * like, "normalized" * normalize, f"T{T}"
        slow = ((approx == "reduce") + like + normalize + (T == 3)) % 2
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(given, id="-".join(filter(None, names)), marks=marks)


@pytest.mark.parametrize("given", list(combinations()))
def test_weights_equal_the_authors_in_float64(given: dict[str, Any]) -> None:
    with corrected(), in_float64():
        assert compare(Everything(), images(torch.float64), SETTINGS | given) < FLOAT64


@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_equal_the_authors_in_float32(structure: str) -> None:
    given = SETTINGS | {"structures": (structure, structure)}
    with corrected():
        assert compare(Everything(), images(torch.float32), given) < FLOAT32


@pytest.mark.parametrize(
    "changed",
    [
        {"momentum": 0.0, "weight_decay": 0.0},
        {"momentum": 0.0},
        {"weight_decay": 0.0},
        {"alpha1": 0.0},
        {"structures": ("dense", "diagonal")},
        {"structures": ("hierarchical15_15", "triltoeplitz")},
        {"lr_cov": lambda step: 0.03 / (1 + step), "T": 2},
    ],
    ids=lambda changed: ",".join(changed),
)
def test_each_setting_means_what_it_means_to_the_authors(changed: dict[str, Any]) -> None:
    with corrected(), in_float64():
        assert compare(Everything(), images(torch.float64), SETTINGS | changed) < FLOAT64


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("average", ["batch", "batch+sequence", None], ids=str)
@pytest.mark.parametrize("shared", [(), (5,), (2, 3)], ids=["vectors", "sequences", "grids"])
def test_linear_layers_with_every_kind_of_loss(
    shared: tuple[int, ...], average: str | None, kfac_approx: str
) -> None:
    def loss(z: Tensor) -> Tensor:
        per_position = (torch.tanh(z) - 1.0).square().sum(-1)
        if average is None:
            return 0.1 * per_position.sum()
        return per_position.mean() * (1 if average == "batch+sequence" else shared_size)

    shared_size = torch.Size(shared).numel()
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3, bias=False))
    batches = list(torch.randn(STEPS, 8, *shared, 7, dtype=torch.float64))
    given = SETTINGS | {"lr": 0.01, "loss_average": average, "kfac_approx": kfac_approx}
    assert compare(model, batches, given, loss=loss) < FLOAT64


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("average", ["batch+sequence", None], ids=str)
def test_convolutions_with_every_kind_of_loss(average: str | None, kfac_approx: str) -> None:
    def loss(z: Tensor) -> Tensor:
        total = (torch.tanh(z) - 1.0).square().sum(1)
        return 0.01 * total.sum() if average is None else total.mean()

    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 2, stride=(1, 2)))
    given = SETTINGS | {"lr": 0.01, "loss_average": average, "kfac_approx": kfac_approx}
    given["lr_cov"] = 0.002  # M counts the positions, and with 0.02 both would diverge
    assert compare(model, images(torch.float64), given, loss=loss) < FLOAT64


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("kernel", [{"padding": "same"}, {"padding": "valid"}, {"bias": False}])
def test_convolutions_with_named_padding(kernel: dict[str, Any], kfac_approx: str) -> None:
    pool = nn.AdaptiveAvgPool2d(2)
    model = nn.Sequential(nn.Conv2d(4, 5, 3, **kernel), pool, nn.Flatten(), nn.Linear(20, 2))
    given = SETTINGS | {"kfac_approx": kfac_approx}
    assert compare(model, images(torch.float64), given) < FLOAT64


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_averaged_groups_are_the_authors_grouped_convolution(kfac_approx: str) -> None:
    given = SETTINGS | {"kfac_approx": kfac_approx}
    model, batches = Everything(groups=2), images(torch.float64)
    assert compare(copy.deepcopy(model), batches, given, {"average_groups": True}) < FLOAT64
    # by default each group has factors of its own
    assert compare(model, batches, given) > 1e-6  # far above rounding


def test_factors_may_have_a_dtype_of_their_own() -> None:
    given = SETTINGS | {"preconditioner_dtype": (torch.float64, torch.float64)}
    assert compare(Everything(), images(torch.float32), given) < FLOAT32


def test_micro_batches_of_a_sum_equal_the_authors() -> None:
    """With a mean each package weighs micro-batches its own way: see test_capture.py for ours."""
    given = SETTINGS | {"lr": 0.01, "loss_average": None}
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    twin = copy.deepcopy(model)
    optimizers = SINGD(model, recipe="paper", **given), reference(twin, **given)
    for _, x in itertools.product(range(STEPS), torch.randn(1, 8, 7, dtype=torch.float64)):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            (0.1 * loss_per_sample(net(x))).sum().backward()
            optimizer.step()
    difference = largest_difference(list(model.parameters()), list(twin.parameters()))
    assert difference < FLOAT64


# ---- where the authors' code is not the authors' equation --------------------------------------


def blocks_of(M: Tensor, side: int) -> Tensor:
    index = torch.arange(M.shape[0]) // side
    return torch.where(index[:, None] == index[None, :], M, 0.0)


BLOCKS = ("block30diagonal", "block30diagonal")


def test_block_diagonal_follows_the_equation_where_the_authors_code_does_not() -> None:
    """Π̂(Kᵀ X Xᵀ K) and Π̂(Kᵀ K) are the blocks of those matrices, by their docstring and paper.

    The factor K is one of real training, not a made up one.
    """
    model = nn.Linear(37, 3).double()
    ours = SINGD(model, recipe="paper", **SETTINGS, structures=BLOCKS)
    train(model, ours, list(torch.randn(STEPS, 8, 37, dtype=torch.float64)))
    kept = ours.state[model.weight]
    K = structures.get(BLOCKS[0])(kept["K.blocks"], kept["K.last"])
    theirs = reference(nn.Linear(1, 1)).SUPPORTED_STRUCTURES[BLOCKS[0]](K.blocks, K.last)

    dense, X = K.dense(), torch.randn(38, 50, dtype=torch.float64)
    assert torch.equal(theirs.to_dense(), dense)
    H, gram = blocks_of(dense.mT @ X @ X.mT @ dense, 30), blocks_of(dense.mT @ dense, 30)

    def off(found: Tensor, expected: Tensor) -> float:
        return ((found - expected).norm() / expected.norm()).item()

    exact = 1e-14  # sums of at most 50 terms, each rounded by 2⁻⁵³
    assert off(K.congruence(X).dense(), H) < exact
    assert off(K.gram().dense(), gram) < exact
    with in_float64():
        assert off(theirs.from_inner(X).to_dense(), H) > 1e-4
        assert off(theirs.from_inner().to_dense(), gram) > 1e-4
        with corrected():
            assert off(theirs.from_inner(X).to_dense(), H) < exact
            assert off(theirs.from_inner().to_dense(), gram) < exact


def test_the_uncorrected_block_diagonal_leads_elsewhere() -> None:
    """So that the correction is known to be needed: without it the weights differ."""
    batches = list(torch.randn(STEPS, 8, 37, dtype=torch.float64))
    model, given = nn.Linear(37, 3), SETTINGS | {"structures": BLOCKS}
    with in_float64():
        assert compare(copy.deepcopy(model), batches, given) > 1e-3
        with corrected():
            assert compare(model, batches, given) < FLOAT64


def test_all_other_structures_of_the_authors_follow_their_equation() -> None:
    """So that a disagreement with them would be ours."""
    for name in STRUCTURES:
        cls, S = reference(nn.Linear(1, 1)).SUPPORTED_STRUCTURES[name], structures.get(name)
        K = S.project(torch.randn(40, 40, dtype=torch.float64))
        theirs = cls(*(a for _, a in K.named_arrays()))
        X = torch.randn(40, 9, dtype=torch.float64)
        with corrected(), in_float64():
            torch.testing.assert_close(theirs.to_dense(), K.dense())
            torch.testing.assert_close(theirs.rmatmat(X), K.apply_t(X))
            torch.testing.assert_close(theirs.from_inner(X).to_dense(), K.congruence(X).dense())
            torch.testing.assert_close(theirs.from_inner().to_dense(), K.gram().dense())
