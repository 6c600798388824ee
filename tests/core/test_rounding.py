"""Rounding to 16 bits: what it is on average, what it leaves alone, and which bits it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, Backend
from optimizer_cases import GIVEN, LAYERS, leaves, mapped, params, steps

from singd_core import Optimizer, rounding
from singd_core.rounding import Place, Rounding, format_of, hashed, identity, random_bits

# NumPy's bfloat16 is another package's, which its own functions do not know.
HALVES = [
    (b, dtype)
    for b in BACKENDS
    for dtype in ("bfloat16", "float16")
    if b.name in ("torch", "jax") or (b.name == "numpy" and dtype == "float16")
]
HALF = pytest.mark.parametrize(("backend", "dtype"), HALVES, ids=str)

# Units in the last place between 1 and 2.
UNITS = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
MANY = 100_000

Round = Callable[[Any, str, int], Any]  # numbers in float32, a dtype and a step: numbers in float32


def rounded(x: Any, dtype: str, step: int = 0) -> Any:
    how = Rounding.of("stochastic", 0, step, "layer", {"weight": dtype})
    assert how is not None
    return how(x, "weight")


# ---- the laws of a rounding ---------------------------------------------------------------------


def mean_is_exact(backend: Backend, dtype: str, round: Round) -> None:
    """Of 10⁵ roundings of a number, the mean is within 5 standard deviations of it."""
    for x in (1.001, -1.3125012, 3.0e-3, 257.3):
        whole = backend.to(np.full(MANY, x), "float32")
        value = float(backend.back(whole)[0])
        found = backend.back(round(whole, dtype, 0))
        unit = UNITS[dtype] * 2.0 ** math.floor(math.log2(abs(x)))
        deviation = 0.5 * unit / math.sqrt(MANY)
        assert abs(found.mean() - value) < 5.0 * deviation, x


def steps_are_independent(backend: Backend, dtype: str, round: Round) -> None:
    """Of each of 256 equal numbers, the share that is rounded up in 64 steps is as by chance."""
    x = backend.to(np.full(256, 1.0 + 0.3 * UNITS[dtype]), "float32")
    ups = sum(backend.back(round(x, dtype, step)) > 1.0 for step in range(64)) / 64.0
    deviation = math.sqrt(0.3 * 0.7 / 64.0)
    assert abs(ups.mean() - 0.3) < 5.0 * deviation / 16.0
    assert 0.75 * deviation < ups.std() < 1.25 * deviation


def neighbours_alone(backend: Backend, dtype: str, round: Round) -> None:
    """Each number becomes one of the two around it, which the dtype has."""
    rng = np.random.default_rng(0)
    x = backend.to(rng.standard_normal(4096) * 2.0 ** rng.integers(-30, 12, 4096), "float32")
    new = round(x, dtype, 0)
    kept = backend.back(backend.to(backend.back(new), dtype))
    new, x = backend.back(new), backend.back(x)
    assert np.array_equal(kept, new)
    exponent = np.floor(np.log2(np.abs(x)))
    unit = UNITS[dtype] * 2.0 ** (exponent if dtype == "bfloat16" else np.maximum(exponent, -14.0))
    assert (np.abs(new - x) < unit).all()


def exact_numbers_stay(backend: Backend, dtype: str, round: Round) -> None:
    """What the dtype has, its largest and smallest among them, NaN and infinity."""
    largest = {"bfloat16": 3.3895313892515355e38, "float16": 65504.0}[dtype]
    exact = [0.0, 1.0, -1.5, 2.0**-14, 3.0 * 2.0**-24, largest, -largest, math.inf, -math.inf]
    x = backend.to(np.asarray([*exact, math.nan]), "float32")
    for step in range(16):
        new = backend.back(round(x, dtype, step))
        assert np.array_equal(new, backend.back(x), equal_nan=True)


def largest_is_not_exceeded(backend: Backend, dtype: str, round: Round) -> None:
    """Numbers below the largest do not become infinite, as no noise is added at the top."""
    largest = {"bfloat16": 3.3895313892515355e38, "float16": 65504.0}[dtype]
    x = backend.to(np.full(256, largest * (1.0 - 2.0**-20)), "float32")
    new = backend.back(backend.to(backend.back(round(x, dtype, 0)), dtype))
    assert np.isfinite(new).all()


LAWS = [
    mean_is_exact,
    steps_are_independent,
    neighbours_alone,
    exact_numbers_stay,
    largest_is_not_exceeded,
]


@HALF
@pytest.mark.parametrize("law", LAWS)
def test_stochastic_rounding_keeps_the_law(law: Any, backend: Backend, dtype: str) -> None:
    with backend.active():
        law(backend, dtype, rounded)


def nearest(x: Any, dtype: str, step: int) -> Any:
    torch = pytest.importorskip("torch")
    return x.to(getattr(torch, dtype)).float()


def always_up(x: Any, dtype: str, step: int) -> Any:
    known = format_of(dtype)
    assert known is not None
    return rounding.stochastic(x, random_bits(0, x) * 0 + 0xFFFF, known)


def same_in_every_step(x: Any, dtype: str, step: int) -> Any:
    return rounded(x, dtype, 0)


def of_fewer_bits(x: Any, dtype: str, step: int) -> Any:
    known = format_of(dtype)
    assert known is not None
    return rounding.stochastic(x, random_bits(hashed(step), x) >> 4, known)


def of_a_coarser_dtype(x: Any, dtype: str, step: int) -> Any:
    known = format_of(dtype)
    assert known is not None
    coarser = known._replace(fewer=known.fewer + 1)
    bits = random_bits(hashed(step), x) * 2 + (random_bits(hashed(step + 1), x) & 1)
    return rounding.stochastic(x, bits, coarser)


def without_the_largest(x: Any, dtype: str, step: int) -> Any:
    known = format_of(dtype)
    assert known is not None
    bits = random_bits(hashed(step), x)
    return rounding.stochastic(x + 1e-3 * x, bits, known._replace(largest=math.inf))


PLANTED = [
    nearest,
    always_up,
    same_in_every_step,
    of_fewer_bits,
    of_a_coarser_dtype,
    without_the_largest,
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("planted", PLANTED)
def test_a_wrong_rounding_breaks_a_law(planted: Round, dtype: str) -> None:
    (backend,) = [b for b in BACKENDS if b.name == "torch"]
    broken = []
    with backend.active():
        for law in LAWS:
            try:
                law(backend, dtype, planted)
            except AssertionError:
                broken.append(law)
    assert broken


# ---- the bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_bits_are_the_same_in_every_library_and_forever(backend: Backend) -> None:
    """A run that is resumed with another library, or another version, takes the same."""
    key = Rounding.at(5, 7, identity("layer.weight"), {}).key("weight")
    with backend.active():
        like = backend.to(np.zeros((2, 3)), "float32")
        bits = backend.back(random_bits(key, like))
    assert key == -1514119459
    assert bits.tolist() == [[10984, 5639, 5323], [25031, 2620, 55807]]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_stacks_and_parts_have_the_bits_of_the_whole(backend: Backend) -> None:
    with backend.active():
        whole = backend.to(np.zeros((6, 5, 4)), "float32")
        bits = backend.back(random_bits(11, whole))
        part = backend.to(np.zeros((2, 3, 2)), "float32")
        place = Place.of((6, 5, 4), (3, 1, 2))
        assert np.array_equal(backend.back(random_bits(11, part, place)), bits[3:5, 1:4, 2:4])
        rows = backend.to(np.zeros((2, 5, 4)), "float32")
        assert np.array_equal(backend.back(random_bits(11, rows, Place(60))), bits[3:5])
        keys = backend.to(np.asarray([11, 12, -(2**31)]), "int32")
        stack = backend.to(np.zeros((3, 6, 5, 4)), "float32")
        found = backend.back(random_bits(keys, stack))
        assert np.array_equal(found[0], bits)
        assert not np.array_equal(found[1], bits)


def test_bits_depend_on_seed_step_layer_array_and_position() -> None:
    like = np.zeros(64, np.float32)

    def bits(
        seed: int = 0, step: int = 0, layer: str = "a", name: str = "K", part: str = ""
    ) -> Any:
        return random_bits(Rounding.at(seed, step, identity(layer), {}).key(name, part), like)

    first = bits()
    assert np.array_equal(first, bits())
    others = [bits(seed=1), bits(step=1), bits(layer="b"), bits(name="C"), bits(part="matrix")]
    for other in others:
        assert (other == first).mean() < 0.1
    assert len(set(first.tolist())) > 60


def test_what_rounding_costs_a_parameter_of_adamw_is_kept() -> None:
    params = {"scale": np.ones(4, np.float16)}
    optimizer = Optimizer(layers={}, rounding="kahan", warmup=0)
    state = optimizer.init(params)
    _, state = optimizer.update({"scale": np.linspace(1, 2, 4, dtype=np.float16)}, state, params)
    kept = state.fallback["scale"].compensation
    assert kept is not None
    assert np.any(kept)


def test_nothing_is_kept_of_what_rounding_costs_32_bits() -> None:
    params = {"scale": np.ones(4, np.float32), "map": np.ones((3, 2), np.float32)}
    state = Optimizer(rounding="kahan").init(params)
    assert state.fallback["scale"].compensation is None
    assert state.layers["map"].compensations == (None, None)


# ---- what is stored ------------------------------------------------------------------------------

STORED: dict[str, dict[str, Any]] = {
    **GIVEN,
    "no momentum": {"momentum": 0.0, "weight_decay": 0.1},
    "coupled decay": {"recipe": "paper", "weight_decay": 0.1},
    "singd": {"rule": "singd", "alpha1": 0.5},
}


WITH_ROWS = [(case, LAYERS) for case in STORED]
ALONE = [(case, {}) for case, s in STORED.items() if s.get("recipe") != "paper" and case != "kfac"]


@pytest.mark.parametrize("mode", rounding.ROUNDINGS)
@pytest.mark.parametrize(("case", "layers"), WITH_ROWS + ALONE)
def test_steps_in_bfloat16_on_numpy_keep_all_dtypes(case: str, layers: Any, mode: str) -> None:
    """Operations with Python numbers make float32 of it there."""
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16

    def to(tree: Any) -> Any:
        return mapped(lambda x: x.astype(bfloat16), tree)

    optimizer = Optimizer(layers, rounding=mode, **STORED[case])
    p = to(params())
    state = started = optimizer.init(p)
    for grads, rows in steps(2):
        updates, state = optimizer.update(to(grads), state, p, to(rows) if layers else None)
        p = optimizer.apply(p, updates)
        for tree in (updates, p):
            assert {leaf.dtype for leaf in leaves(tree)} == {np.dtype(bfloat16)}
    assert state.skipped == 0
    for (name, a), (_, b) in zip(state.named_arrays(), started.named_arrays(), strict=True):
        assert a.dtype == b.dtype, name


def test_a_name_may_be_any_that_a_dictionary_takes() -> None:
    params = {("encoder", 0): np.ones((3, 2), np.float16), 1: np.ones(4, np.float16)}
    optimizer = Optimizer()
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert all(np.any(update) for update in updates.values())
