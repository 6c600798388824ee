"""The check that needs no oracle: the rows of every layer multiply to its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from singd_core._array import Array, widen
from singd_jax._calls import EXPAND, Call
from singd_jax._curvature import Tapped, padded
from singd_jax._layers import TRANSPOSED, Layer, Layers
from singd_jax._loss import Leaves


def check(
    loss: Callable[..., Any],
    layers: Layers,
    *,
    tolerance: float | None = None,
    has_aux: bool = False,
) -> Callable[..., dict[str, float]]:
    """Whether `Bᵀ A = ∇W` holds for the rows captured of every layer.

    A layer whose weight is read by something else as well, e.g. by a penalty, has more in its
    gradient than its rows say: it is reported and not held to the tolerance.

    Args:
        loss: The loss that the layers were found in.
        layers: What `find_layers` returned.
        tolerance: Of the difference, relative to the norm of ∇W. None is 1e-4, or 8 times the
            rounding of the coarsest numbers that are multiplied.
        has_aux: Whether the loss returns a pair of which the second is auxiliary.

    Returns:
        A function of `params, *batch` that returns the relative difference of each layer.

    Raises:
        AssertionError: Naming the layers whose difference is larger.
        ValueError: If the parameters do not fit the layers.

    Example:
        >>> from singd_jax import find_layers
        >>> loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"]) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((8, 3))
        >>> layers = find_layers(loss)(params, x)
        >>> {name: round(gap, 3) for name, gap in check(loss, layers)(params, x).items()}
        {'w': 0.0}
    """

    def function(params: Any, *batch: Any, **keywords: Any) -> dict[str, float]:
        leaves = Leaves.of(params)
        arrays = leaves.named
        layers.refuse_others(arrays, [leaf for layer in layers.values() for leaf in layer.leaves])
        slots = {
            name: dict.fromkeys(layer.roles, widen(jnp.zeros_like(layer.matrix(arrays))))
            for name, layer in layers.items()
        }
        dtypes = {name: jnp.dtype(jnp.float64) for name in layers}
        rule = functools.partial(_product, dtypes)
        tapped = Tapped(loss, layers, None, rule, {}, {})

        @jax.jit
        def gaps(arrays: Any) -> dict[str, Array]:
            _, grads, products, _ = tapped.value_and_grad(
                leaves.join(arrays), slots, {}, batch, keywords, has_aux
            )
            gradients = Leaves.of(grads).named
            return {
                name: _gap(sum(products[name].values()), layer.matrix(gradients))
                for name, layer in layers.items()
            }

        found = {name: float(gap) for name, gap in gaps(leaves.arrays).items()}
        limits = {
            name: max(1e-4, 8 * _eps(dtypes[name])) if tolerance is None else tolerance
            for name in found
        }
        wrong = [
            f"{name} ({gap:.2g} in {dtypes[name]}, where up to {limits[name]:.2g} is rounding)"
            for name, gap in found.items()
            if not gap <= limits[name] and not layers[name].elsewhere
        ]
        if wrong:
            raise AssertionError(
                "the rows of these layers do not multiply to their gradient, which is a bug in "
                f"singd_jax: {', '.join(wrong)}"
            )
        return found

    return function


def _gap(got: Array, expected: Array) -> Array:
    norm = jnp.linalg.norm(expected.ravel())
    return jnp.linalg.norm((got - expected).ravel()) / jnp.maximum(norm, 1e-30)


def _eps(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def _product(
    dtypes: dict[str, Any], call: Call, layer: Layer, kfac_approx: str
) -> Callable[..., Array]:
    """The rule that returns BᵀA, and tells the coarsest dtype of what a layer multiplies."""
    transposed, bias = layer.role(call) == TRANSPOSED, layer.bias is not None

    def rule(x: Array, g: Array, factors: Any, step: Any) -> Array:
        del factors, step
        seen = [a.dtype for a in (x, g) if jnp.issubdtype(a.dtype, jnp.floating)]
        dtypes[layer.name] = max(*seen, dtypes[layer.name], key=_eps)
        if call.product is not None:
            matrix = call.product(x, g)
        else:
            A = call.inputs(x, bias and not transposed, EXPAND, None)
            B = call.outputs(g, EXPAND, None)
            matrix = B.mT @ A
        if not transposed:
            return matrix
        return padded(matrix.mT) if bias else matrix.mT

    return rule
