"""What the state costs: known before, bounded by default, and within a budget by choice."""

import gc
import itertools

import pytest
import torch
from torch import nn
from watched import layers

from singd_torch import SINGD, estimate


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 10)
    )


def state_bytes(model: nn.Module, optimizer: SINGD) -> int:
    """What the state holds after a step, but for the counts and mean diagonals (numbers)."""
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    tensors = [t for entries in optimizer.state.values() for t in entries.values()]
    return sum(t.nbytes for t in tensors if t.ndim)


@pytest.mark.parametrize(
    "structures", [None, ("dense", "dense"), ("diagonal", "hierarchical:4,4"), "auto"]
)
@pytest.mark.parametrize("recipe", ["normalized", "paper"])
def test_the_estimate_is_what_the_state_holds(structures: object, recipe: str) -> None:
    budget = 30_000 if structures == "auto" else None
    kwargs = {"structures": structures, "recipe": recipe, "memory_budget": budget}
    m = model()
    guess = estimate(m, **kwargs)  # type: ignore[arg-type]
    held = state_bytes(m, SINGD(m, **kwargs))  # type: ignore[arg-type]
    assert guess.total == held
    assert budget is None or held <= budget


def test_the_estimate_allocates_nothing() -> None:
    with torch.device("meta"):
        huge = nn.Linear(50_000, 50_000)
    assert estimate(huge, structures=("dense", "dense")).total > 20e9


def test_by_default_no_factor_holds_more_than_its_weight_or_than_a_small_layer() -> None:
    with torch.device("meta"):
        m = nn.Sequential(nn.Embedding(50_257, 768), nn.Linear(768, 3072), nn.Linear(768, 50_257))
        m.append(nn.Conv2d(64, 128, 3)).append(nn.Linear(1024, 10)).append(nn.Linear(64, 64))
    for layer in layers(SINGD(m)):
        (_, d_out, d_in), (K, C) = layer.shape, layer.structures
        assert K.numbers(d_in) <= max(d_out * d_in, 2**16)
        assert C.numbers(d_out) <= max(d_out * d_in, 2**16)


def test_a_richer_budget_gives_richer_structures() -> None:
    totals = [
        estimate(model(), "auto", memory_budget=budget).total for budget in (20_000, 40_000, 10**9)
    ]
    assert totals == sorted(totals)
    assert totals[-1] == estimate(model(), ("dense", "dense")).total


def test_a_budget_that_nothing_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="diagonal factors already need"):
        SINGD(model(), structures="auto", memory_budget=1000)
    with pytest.raises(ValueError, match="memory_budget"):
        SINGD(model(), structures="auto")


def alive() -> dict[int, int]:
    """The bytes of each memory that a tensor of Python has."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter)]
    memories = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return {memory.data_ptr(): memory.nbytes() for memory in memories}


def test_with_diagonal_factors_all_memory_is_half_of_adamws_state() -> None:
    # seven shapes, which step in one bundle: the momenta, and little for where each number is
    sides = [3, 32, 32, 64, 64, 128, 128]
    convolutions = [nn.Conv2d(*pair, 3, padding=1) for pair in itertools.pairwise(sides)]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    before = alive()
    optimizer = SINGD(model, structures="diagonal")
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    held = sum(n for memory, n in alive().items() if memory not in before)
    assert held <= 0.55 * 2 * sum(p.nbytes for p in model.parameters())


class First(nn.Sequential):
    """Returns the first of several results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = super().forward(x)[0]
        return first


def test_what_a_run_does_many_times_leaves_no_objects() -> None:
    by_function = nn.LSTMCell(16, 3)  # calls of functions are watched with it
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 16), by_function
    model = First(*layers)
    optimizer, x = SINGD(model, T=5), torch.randn(5, 1, 4, 4)

    def objects(turns: int) -> int:
        for _ in range(turns):
            optimizer.load_state_dict(optimizer.state_dict())
            for _ in range(10):
                torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
                model.eval()(x)
                optimizer.zero_grad()
                model.train()(x).square().mean().backward()
                optimizer.step()
        gc.collect()
        return len(gc.get_objects())

    objects(8)  # caches are full
    before = objects(2)
    assert objects(10) <= before + 10
