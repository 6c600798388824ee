"""The check that needs no oracle: the rows of every layer multiply to its gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from singd_core._array import Array, widen
from singd_jax import _compat
from singd_jax._axes import coarsest, eps
from singd_jax._calls import EXPAND, Call
from singd_jax._layer import TRANSPOSED, Layer
from singd_jax._layers import Layers, checked
from singd_jax._loss import Leaves, parted
from singd_jax._part import padded
from singd_jax._tapped import Tapped, value_and_grad


def check(
    loss: Callable[..., Any],
    layers: Layers,
    *,
    tolerance: float | None = None,
    has_aux: bool = False,
) -> Callable[..., dict[str, float]]:
    """Check that `Bᵀ A = ∇W` holds for the captured rows of every layer.

    The check also compares the value and the gradients with `jax.value_and_grad` of the loss.
    If something else reads the weight of a layer too, e.g. a penalty, the gradient contains more
    than the rows. Such a layer is reported and not held to the tolerance.

    Args:
        loss: The loss that the layers were found in.
        layers: What `find_layers` returned.
        tolerance: The largest difference that is no error, relative to the norm of ∇W, or to a
            hundredth of the norm of `|B|ᵀ |A|` if the rows cancel. None is 1e-4, or 8 times the
            rounding of the coarsest numbers that are multiplied.
        has_aux: Whether the loss returns a pair (value, auxiliary output).

    Returns:
        A function of `params, *batch` that returns the relative difference of each layer.

    Raises:
        AssertionError: If a difference is larger. The message names the layers or gradients.
        ValueError: If the parameters do not fit the layers, or gradients are not finite.

    Example:
        >>> from singd_jax import find_layers
        >>> loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["w"]) ** 2)
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.ones((8, 3))
        >>> layers = find_layers(loss)(params, x)
        >>> {name: round(gap, 3) for name, gap in check(loss, layers)(params, x).items()}
        {'w': 0.0}
    """
    layers = checked(layers)

    def function(params: Any, *batch: Any, **keywords: Any) -> dict[str, float]:
        leaves = Leaves.of(params)
        arrays = leaves.named
        layers.refuse_others(arrays, [leaf for layer in layers.values() for leaf in layer.leaves])
        slots = {name: _slots(layer, arrays) for name, layer in layers.items()}
        dtypes = {name: jnp.dtype(jnp.float64) for name in layers}
        rule = functools.partial(_product, dtypes)
        tapped = Tapped(loss, layers, None, rule, {})
        # the arrays of several processes cannot be part of a program
        arguments, join = parted(batch, keywords)

        @jax.jit
        def traced(arrays: Any, rest: Any) -> Any:
            own = dataclasses.replace(leaves, arrays=tuple(arrays))
            data, named = join(rest)
            value, grads, _, products, _ = tapped.value_and_grad(
                own, slots, {}, data, named, has_aux
            )
            gradients = Leaves.of(grads).named
            gaps = {
                name: _gap(list(products[name].values()), layer.matrix(gradients))
                for name, layer in layers.items()
            }
            return gaps, (value[0] if has_aux else value), gradients

        @jax.jit
        def plain(arrays: Any, rest: Any) -> Any:
            own = dataclasses.replace(leaves, arrays=tuple(arrays))
            data, named = join(rest)
            value, grads, _ = value_and_grad(loss, own, data, named, has_aux)
            return (value[0] if has_aux else value), Leaves.of(grads).named

        # else products of an accelerator have 8 or 11 bits, and two programs differ by as much
        with jax.default_matmul_precision("highest"):
            gaps, *got = traced(leaves.arrays, arguments)
            expected = plain(leaves.arrays, arguments)
        # XLA may leave out a rounding before one use of a layer's input and not before the other.
        rounding = max([1e-4, *(8 * eps(dtype) for dtype in dtypes.values())])
        limit = rounding if tolerance is None else tolerance
        _refuse_another_gradient(got, expected, max(1e-4, limit))
        _refuse_infinite(*expected)
        found = {name: float(gap) for name, gap in gaps.items()}
        wrong = [
            f"{name} ({gap:.2g} in {dtypes[name]}, where up to {limit:.2g} is rounding)"
            for name, gap in found.items()
            if not gap <= limit and not layers[name].elsewhere
        ]
        if wrong:
            raise AssertionError(
                "the rows of these layers do not multiply to their gradient, which is a bug in "
                f"singd_jax: {', '.join(wrong)}"
            )
        return found

    return function


def _refuse_another_gradient(got: Any, plain: Any, limit: float) -> None:
    """Raise if the loss evaluated by singd_jax has another value or gradient than the loss."""
    (value, grads), (own_value, own_grads) = got, plain
    norms = {name: _norm(g) for name, g in own_grads.items()}
    floor = 1e-2 * math.hypot(*norms.values())  # a gradient that cancels is rounding
    gaps = {
        f"the gradient of {name}": _norm(grads[name] - g) / max(norms[name] + floor, 1e-30)
        for name, g in own_grads.items()
    }
    gaps["the value"] = _norm(value - own_value) / max(_norm(own_value), 1e-30)
    wrong = [f"{name} ({gap:.2g})" for name, gap in gaps.items() if not gap <= limit]
    if wrong and all(math.isfinite(x) for x in (_norm(own_value), *norms.values())):
        raise AssertionError(
            "the loss as singd_jax evaluates it differs from jax.value_and_grad(loss) by more "
            f"than {limit:.2g}: {', '.join(wrong)}. If it does in float64 as well, this is a bug "
            "in singd_jax"
        )


def _refuse_infinite(value: Any, gradients: Mapping[str, Array]) -> None:
    """Raise if a loss has gradients of which rows tell nothing."""
    infinite = [name for name, g in gradients.items() if not bool(jnp.isfinite(g).all())]
    if infinite:
        raise ValueError(
            f"the loss is {float(value):.3g}, and gradients of {', '.join(infinite)} are NaN or "
            "infinite: give check a loss whose gradients are numbers"
        )


def _slots(layer: Layer, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """For each role zeros for the sums of BᵀA and of |B|ᵀ|A|."""
    zeros = widen(jnp.zeros_like(layer.matrix(arrays)))
    return dict.fromkeys(layer.roles, (zeros, zeros))


@_compat.promoting
def _gap(products: Sequence[tuple[Array, Array]], expected: Array) -> Array:
    got, size = (sum(parts) for parts in zip(*products, strict=True))
    norm = jnp.maximum(
        jnp.linalg.norm(expected.ravel()), 1e-2 * jnp.linalg.norm(jnp.asarray(size).ravel())
    )
    return jnp.linalg.norm((got - expected).ravel()) / jnp.maximum(norm, 1e-30)


def _norm(x: Any) -> float:
    return float(jnp.linalg.norm(jnp.ravel(widen(x))))


def _product(
    dtypes: dict[str, Any], call: Call, layer: Layer, kfac_approx: str
) -> Callable[..., tuple[Array, Array]]:
    """The rule that returns BᵀA and |B|ᵀ|A|, and tells the coarsest dtype that is multiplied.

    A weight that is cast first has a gradient that is rounded as the weight is.
    """
    transposed, bias = layer.role(call) == TRANSPOSED, layer.bias is not None

    def turned(matrix: Array) -> Array:
        if not transposed:
            return matrix
        return padded(matrix.mT) if bias else matrix.mT

    def rule(x: Any, g: Any, factors: Any, step: Any, factor: Any) -> tuple[Array, Array]:
        del factors, step
        seen = [a.dtype for a in jax.tree.leaves((x, g))]
        x, g = call.operands(x, g, factor)
        dtypes[layer.name] = jnp.dtype(coarsest(dtypes[layer.name], *seen, call.view.rounded))
        if call.product is not None:
            return turned(call.product(x, g)), turned(call.product(x, jnp.abs(g)))
        A = call.inputs(x, bias and not transposed, EXPAND, None)
        B = call.outputs(g, EXPAND, None)
        return turned(B.mT @ A), turned(jnp.abs(B).mT @ jnp.abs(A))

    return rule
