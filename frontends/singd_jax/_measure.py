"""What one product of a layer adds to the curvature: sums over its rows, chosen or all."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from singd_core import layers
from singd_core._array import Array, append_ones, widen
from singd_core.curvature import Measured
from singd_core.rules import Factors
from singd_core.structures import Diagonal, Structure
from singd_core.structures.choose import MatrixShape
from singd_jax import _compat
from singd_jax._calls import Call
from singd_jax._layer import TRANSPOSED, Layer
from singd_jax._sample import Sample
from singd_jax._shared import shared


class Sums(NamedTuple):
    """What the taps of a layer add up, the stack's axes first.

    The inputs are counted in the rows that the layer was found with, so their number is 1 where
    XLA knows it, and scaling by it later costs nothing.

    Attributes:
        K: The mean over the rows of K, which are inputs unless the matrix is used transposed;
            of a blind layer the structure alone.
        C: The sum over the rows of C, times the number of terms of the loss where it is a number.
        counts: The number of rows in units of those found, the number of rows if every position
            is one, and the number of products, each counted once however often it runs: shape
            (*stack, 3).
    """

    K: Any  # Measured or Structure, as C
    C: Any
    counts: Array

    def before(self, g: Array) -> tuple[Array, Sums]:
        """The gradient at an output, no sooner than the sums are there, and the sums.

        So rows that are copied need no memory beside the gradient that it goes on to. The counts
        are not held up: XLA knows them, and computes with them beforehand.
        """
        together = g, self.K, self.C
        g, K, C = jax.lax.optimization_barrier(together)  # type: ignore[no-untyped-call]
        return g, self._replace(K=K, C=C)


def measure(
    trained: Mapping[str, Factors],
    rows: Mapping[str, float],
    average: str | int | None,
    known: dict[Any, Callable[..., Sums]],
    call: Call,
    layer: Layer,
    kfac_approx: str,
) -> Callable[..., Sums]:
    """The rule that measures so many of the rows, or all, for the layer's factors.

    It is one function for equal products of equal layers, `known` by what they have in common.
    """
    transposed, bias = layer.role(call) == TRANSPOSED, layer.bias is not None
    _, d_out, d_in = layer.shape
    most = rows[layer.name]
    N = call.examples if kfac_approx == "reduce" else call.rows
    unit = max(layer.rows, 1)
    counted, structures = (N / unit, call.rows, 1.0 / call.times), trained[layer.name].structures
    M = average if isinstance(average, int) else 1

    def rule(x: Any, g: Any, factors: Factors | None, starts: Array | None, factor: Any) -> Sums:
        x, g = call.operands(x, g, factor)
        some = most if _compat.is_local(x, g) else math.inf
        of_K, of_C = (
            _sample(some, structure, d, starts, N)
            for structure, d in zip(structures, (d_in, d_out), strict=True)
        )
        of_x, of_g = (of_C, of_K) if transposed else (of_K, of_C)
        A = call.inputs(x, False, kfac_approx, of_x)
        B = call.outputs(g, kfac_approx, of_g)
        # of the rows that were chosen, each stands for N of all; a transpose does not see the bias
        last = 0.0 if transposed else (N / max(A.shape[-2], 1)) ** 0.5
        written = bias and not transposed and last != 1.0 and structures[0].width(d_in) == d_in
        if written:  # chosen rows are written in any case, and a dense factor reads them at once
            A = append_ones(A, A.ndim - 1, last)
        counts = jnp.broadcast_to(jnp.asarray(counted, jnp.float32), (*B.shape[:-2], 3))
        if call.sizes is not None:
            counts = counts.at[..., 0].set(call.sizes(x) / unit)
        scales = 1.0 / unit, float(M)
        if transposed:
            A, B, scales = B, A, scales[::-1]
        return Sums(
            *_sums(structures, factors, A, B, scales, last if bias and not written else None),
            counts,
        )

    if call.code is None:
        return rule
    same = call.code, layer.shape, transposed, bias, structures, most, counted, M, kfac_approx
    return known.setdefault(same, shared(rule))


def _sample(
    most: float, structure: type[Structure], d: int, starts: Array | None, n: int
) -> layers.Sample | None:
    """Which of n rows a factor is measured with: all where that is cheaper than to choose some.

    A diagonal factor reads its rows once; those that are chosen are read, written and read again.
    """
    if issubclass(structure, Diagonal) and n <= 3 * most:
        return None
    return Sample.of(most, structure, d, starts)


def slot(layer: Layer, factors: Factors, zeros: Callable[..., Array]) -> Sums:
    """Zeros of the shapes that `measure` returns, to add many up in: in at least float32."""
    arrays, tree = jax.tree.flatten(factors.measuring())
    shapes = _shapes(layer.shape, tree, tuple((a.shape, a.dtype) for a in arrays))
    return jax.tree.map(  # type: ignore[no-any-return]
        lambda s: zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )


@functools.cache
def _shapes(shape: MatrixShape, tree: Any, arrays: tuple[Any, ...]) -> Sums:
    """What a layer's taps add up, from what its factors measure with."""
    stack, d_out, d_in = shape

    def shaped(factors: Factors) -> Sums:
        sides = zip((d_in, d_out), factors.sides, strict=True)
        A, B = (jnp.zeros((*stack, 1, d), widen(L.like).dtype) for d, L in sides)
        counts = jnp.zeros((*stack, 3), jnp.float32)
        return Sums(
            *_sums(factors.structures, None if is_blind(factors) else factors, A, B), counts
        )

    # as on one device: their products need no type that says how they are sharded
    make: Any = jax.ShapeDtypeStruct
    plain = tree.unflatten([make(*a) for a in arrays])
    return jax.eval_shape(shaped, plain)  # type: ignore[no-any-return]


def _sums(
    structures: tuple[type[Structure], type[Structure]],
    factors: Factors | None,
    A: Array,
    B: Array,
    scales: tuple[float, float] = (1.0, 1.0),
    last: float | None = None,
) -> tuple[Measured | Structure, Measured | Structure]:
    """The sums of rows A and B times the scales, blind if there are no factors.

    A has one more column of the number `last`, if it is given.
    """
    of_A, of_B = scales
    if factors is not None:
        K, C = factors.measure(A if last is None else append_ones(A, A.ndim - 1, last), B)
        return K.map(lambda a: a * of_A), C.map(lambda a: a * of_B)
    # in float32: what rounds the sums is large where a factor is
    S_K, S_C = structures
    return S_K.summed(widen(A), of_A, last), S_C.summed(widen(B), of_B)


def is_blind(factors: Factors) -> bool:
    """Whether a layer is measured with K = C = I, and `seen` turns that into its curvature.

    Then it needs no factors, and is the same code for all layers of a loss. Some structures do not
    keep enough of it.
    """
    return all(S.sums() is S for S in factors.structures)
