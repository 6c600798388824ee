"""Sampled rows: the expected sums are the sums of all rows, and all rows come at last."""

import itertools
import math

import numpy as np
import pytest
from curvature_cases import CASES

from singd_core.layers import Convolution, Embedding, LayerKind, Linear, Sample, StackedLinear
from singd_core.structures import Diagonal, blockdiagonal, get

# Sums of some thousand products in float64, in another order.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


class Started(Sample):
    """A sample with a start that is given for each axis, in place of the step's."""

    def start(self, n, axis=0):
        return self.step[axis]


def sums(kind: LayerKind, x, g, sample, *, kfac_approx="expand", bias=True, diagonal=False):
    """Sums over the rows, and the counts."""
    inputs = kind.diagonal_rows if diagonal else kind.inputs
    A, N = inputs(x, bias=bias, kfac_approx=kfac_approx, sample=sample)
    B, M = kind.outputs(g, kfac_approx=kfac_approx, loss_average="batch", sample=sample)
    A = A.astype(np.float64)  # a table's is in float32
    squares = (A * A).sum(-2) if diagonal else A.mT @ A
    return [squares, B.mT @ B], (N, M), (A.shape, B.shape)


def check_unbiased(kind: LayerKind, x, g, most: int, lengths, **given) -> None:
    """The mean over all starts is the sum over all rows; no shape depends on the start."""
    full, counts, _ = sums(kind, x, g, None, **given)
    mean, shapes = [0.0, 0.0], set()
    starts = list(itertools.product(*map(range, lengths)))
    for start in starts:
        got, new_counts, new_shapes = sums(kind, x, g, Started(most, start), **given)
        assert new_counts == counts
        shapes.add(new_shapes)
        mean = [m + s / len(starts) for m, s in zip(mean, got, strict=True)]
    for m, f in zip(mean, full, strict=True):
        np.testing.assert_allclose(m, f, **EXACT)
    assert len(shapes) == 1


@pytest.mark.parametrize("most", [1, 3, 7, 11, 29])
@pytest.mark.parametrize("shape", [(30,), (6, 5), (3, 5, 2), (31,)])
@pytest.mark.parametrize("kind", [Linear(), StackedLinear(3)], ids=["linear", "stacked"])
def test_linear_is_unbiased(
    kind: LayerKind, shape: tuple[int, ...], most: int, rng: np.random.Generator
) -> None:
    x, g = rng.normal(size=(*shape, 4)), rng.normal(size=(*shape, 3))
    check_unbiased(kind, x, g, most, [math.prod(shape)])
    check_unbiased(kind, x, g, most, [math.prod(shape)], diagonal=True)
    A, _ = kind.inputs(x, bias=True, kfac_approx="expand", sample=Sample(most, 5))
    assert A.shape == (most, 5)


@pytest.mark.parametrize("diagonal", [False, True])
def test_reduce_thins_the_examples_alone(diagonal: bool, rng: np.random.Generator) -> None:
    x, g = rng.normal(size=(7, 5, 4)), rng.normal(size=(7, 5, 3))
    check_unbiased(Linear(), x, g, 3, [7], kfac_approx="reduce", diagonal=diagonal)
    kind, x, g = Convolution((3, 2)), rng.normal(size=(7, 2, 5, 4)), rng.normal(size=(7, 3, 3, 3))
    check_unbiased(kind, x, g, 3, [7], kfac_approx="reduce", diagonal=diagonal)


@pytest.mark.parametrize("average_groups", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_convolution_is_unbiased(
    name: str, diagonal: bool, average_groups: bool, rng: np.random.Generator
) -> None:
    case = CASES[name]
    kind, x = case.kind(average_groups=average_groups), rng.normal(size=(3, *case.shape))
    along = zip(kind.windows, case.shape[1:], strict=True)
    lengths = (3, *(window.positions(n) for window, n in along))
    g = rng.normal(size=(3, 4, *lengths[1:]))
    most = max(1, math.prod(lengths) // 6)
    check_unbiased(kind, x, g, most, lengths, bias=case.bias, diagonal=diagonal)


def test_a_table_gives_all_inputs_and_some_outputs(rng: np.random.Generator) -> None:
    kind, x, g = Embedding(5), rng.integers(5, size=(6, 4)), rng.normal(size=(6, 4, 3))
    check_unbiased(kind, x, g, 5, [24], bias=False, diagonal=True)
    A, _ = kind.inputs(x, bias=False, kfac_approx="expand", sample=Sample(5))
    np.testing.assert_array_equal(A, kind.inputs(x, bias=False, kfac_approx="expand")[0])


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_as_many_as_there_are_is_all_of_them(kfac_approx: str, rng: np.random.Generator) -> None:
    case = CASES["groups"]
    for kind, x, g in [
        (Linear(), rng.normal(size=(6, 5, 4)), rng.normal(size=(6, 5, 3))),
        (case.kind(), rng.normal(size=(3, *case.shape)), rng.normal(size=(3, 4, 5, 6))),
    ]:
        for sample in (Sample(90, 3), Sample(1000, 3)):
            for rows in (kind.inputs, kind.diagonal_rows):
                some = rows(x, bias=True, kfac_approx=kfac_approx, sample=sample)
                every = rows(x, bias=True, kfac_approx=kfac_approx)
                np.testing.assert_array_equal(some[0], every[0])
            some = kind.outputs(g, kfac_approx=kfac_approx, loss_average=None, sample=sample)
            every = kind.outputs(g, kfac_approx=kfac_approx, loss_average=None)
            np.testing.assert_array_equal(some[0], every[0])


@pytest.mark.parametrize("kind", [Linear(), Convolution((3,))], ids=["linear", "convolution"])
def test_an_empty_batch_stays_empty(kind: LayerKind) -> None:
    x, g = np.ones((0, 4, 6)), np.ones((0, 3, 4))
    A, N = kind.inputs(x, bias=True, kfac_approx="expand", sample=Sample(2, 1))
    B, _ = kind.outputs(g, kfac_approx="expand", loss_average="batch", sample=Sample(2, 1))
    assert (A.shape[-2], N, B.shape[-2]) == (0, 0, 0)


# ---- which rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 10, 50, 64])
@pytest.mark.parametrize("length", [2, 3, 60, 64, 97, 100, 128, 1024])
def test_all_positions_come_soon_and_evenly(length: int, T: int) -> None:
    """Also where the refreshes are T steps apart."""
    batch, most, steps = 16, 256, 64
    counts = np.zeros(length)
    for step in range(0, steps * T, T):
        rows = Sample(most, step).rows(np.arange(batch * length).reshape(batch, length, 1))[0][:, 0]
        assert len(set(rows)) == len(rows) == min(most, batch * length)
        np.add.at(counts, rows % length, 1)
    mean = steps * min(most, batch * length) / length
    assert counts.min() >= mean / 2
    assert counts.max() <= 2 * mean


@pytest.mark.parametrize("length", [64, 100, 1024])
def test_one_step_has_different_positions_of_different_examples(length: int) -> None:
    x = np.arange(16 * length).reshape(16, length, 1)
    rows = Sample(256, 3).rows(x)[0][:, 0]
    assert len(set(rows % length)) >= min(length, 256) * 0.7
    assert len(set(rows // length)) == 16


@pytest.mark.parametrize("T", [1, 10, 64])
def test_all_places_of_all_images_come(T: int) -> None:
    lengths, seen = (8, 13, 16), np.zeros((8, 13, 16))
    for step in range(0, 600 * T, T):
        sample = Sample(64, step)
        counts = sample.counts(lengths)
        indices = [
            sample.indices(n, m, seen, axis=i)
            for i, (n, m) in enumerate(zip(lengths, counts, strict=True))
        ]
        seen[np.ix_(*indices)] += 1
    assert seen.min() > 0
    assert seen.max() <= 3 * seen.mean()


@pytest.mark.parametrize(
    ("lengths", "most"),
    [((32, 32, 32), 256), ((32, 16, 16), 576), ((32, 7, 7), 256), ((128, 100), 256), ((900,), 256)],
)
def test_examples_and_positions_are_thinned_alike(lengths: tuple[int, ...], most: int) -> None:
    counts = Sample(most).counts(lengths)
    assert 0.6 * most <= math.prod(counts) <= 1.5 * most
    if len(lengths) > 1:
        examples, positions = lengths[0] / counts[0], math.prod(lengths[1:]) / math.prod(counts[1:])
        assert 0.5 <= examples / positions <= 2.0


def test_how_many_rows_a_factor_gets() -> None:
    assert Sample.of(None, Diagonal, 700) is None
    assert Sample.of(math.inf, Diagonal, 700) is None
    assert Sample.of(256, Diagonal, 700, step=3) == Sample(256, 3)
    assert Sample.of(256, get("dense"), 700) == Sample(700)
    assert Sample.of(256, blockdiagonal(300), 700) == Sample(300)


# ---- array libraries ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2d", "3d", "groups", "circular", "1d"])
def test_sampled_rows_equal_numpy(backend, name: str, rng: np.random.Generator) -> None:
    case = CASES[name]
    x, sample = rng.normal(size=(5, *case.shape)), Sample(9, 11)
    kind, like = case.kind(), backend.array(x)
    for f in (kind.inputs, kind.diagonal_rows, Linear().inputs):
        expected, N = f(x, bias=True, kfac_approx="expand", sample=sample)
        actual = backend.run(
            lambda x, f=f: f(x, bias=True, kfac_approx="expand", sample=sample)[0], like
        )
        assert actual.dtype == like.dtype
        assert f(x, bias=True, kfac_approx="expand")[1] == N
        atol = backend.tolerance * np.abs(expected).max()
        np.testing.assert_allclose(backend.numpy(actual), expected, rtol=0, atol=atol)


def test_a_traced_step_gives_the_rows_of_its_number(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray(rng.normal(size=(50, 40, 3)))
    rows = jax.jit(lambda x, step: Sample(100, step).rows(x)[0])
    for step in (0, 1, 77, 106_100, 2**31 - 1):
        np.testing.assert_array_equal(rows(x, step), Sample(100, step).rows(np.asarray(x))[0])
    assert rows._cache_size() == 1


@pytest.mark.parametrize("T", [2, 4, 6, 16, 35])
@pytest.mark.parametrize("most", [60, 128, 256])
def test_positions_that_a_model_has_flattened_come_as_others(most: int, T: int) -> None:
    """With examples in one axis, as of tokens and patches: no step sees few positions alone."""
    batch = 2048 // T
    x = np.repeat(np.arange(T)[None], batch, 0)[..., None].astype(float)
    for step in range(12):
        sample = Sample(most, step)
        flat, factor = sample.rows(x.reshape(-1, 1))
        kept, same = sample.rows(x)
        np.testing.assert_array_equal(flat, kept)
        assert factor == same
        _, counts = np.unique(flat, return_counts=True)
        assert len(counts) == T
        assert counts.max() - counts.min() <= 1
