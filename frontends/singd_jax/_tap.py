"""An identity on a layer's output whose gradient is the layer's curvature."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from singd_core._array import Array
from singd_jax import _compat
from singd_jax._axes import Key, View
from singd_jax._measure import Sums

# Takes the layer's input, the gradient at its output, the factors, where sampling starts and the
# number that multiplies the weight; returns a tree like `slot`.
Rule: TypeAlias = Callable[[Any, Array, Any, Any, Any], Any]


class Port(NamedTuple):
    """What a tap of a layer needs; the stack's axes come first in every array.

    Attributes:
        slot: Zeros. The gradient with respect to it is the sum of what the rule returns.
        factors: What the rule measures with, or a `Slice`.
        starts: Where the sampling of rows starts in this step, where the rule wants it, or None.
        factor: A number that the weight is multiplied by, or None.
    """

    slot: Any
    factors: Any
    starts: Any = None
    factor: Any = None

    def of(self, view: View) -> Port:
        """The port of the layers that a view has picked, with its factor."""
        port = self
        for i, n in view.picks:
            i = jnp.clip(i, 0, n - 1)  # as dynamic_slice does
            slot = jax.tree.map(functools.partial(_entry, i=i), port.slot)
            port = port._replace(slot=slot, factors=Slice(port.factors, i))
        return port._replace(factor=view.factor)


Ports: TypeAlias = Mapping[Key, Port]  # by weight


class Slice(NamedTuple):
    """Entry `i` of stacked factors, maybe a slice themselves, in a scan over the stack.

    It is cut out in the backward pass: before, it would be a residual of each step, and
    `jax.checkpoint` would hold a copy of every layer's for as long as it recomputes a block.
    """

    stack: Any
    i: Array

    def cut(self) -> Any:
        """The factors."""
        stack = self.stack.cut() if isinstance(self.stack, Slice) else self.stack
        return jax.tree.map(functools.partial(_entry, i=self.i), stack)


def _entry(a: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(a, i, keepdims=False)


def tap(rule: Rule, y: Array, x: Any, port: Port) -> Array:
    """`y`. The rule's result for its gradient g joins the gradient of the slot.

    Sums over the steps of a scan, over devices, micro-batches and uses of a weight are autodiff's.
    """
    axes = _compat.varying(y).union(*map(_compat.varying, jax.tree.leaves(x)))
    slot = jax.tree.map(lambda s: _compat.vary(s, axes), port.slot)
    return _tap(rule, y, x, slot, port._replace(slot=None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(rule: Rule, y: Array, x: Any, slot: Any, port: Port) -> Array:
    return y


def _forward(rule: Rule, y: Array, x: Any, slot: Any, port: Port) -> tuple[Array, Any]:
    return y, (x, slot, port)


def _backward(rule: Rule, residuals: Any, g: Array) -> tuple[Any, ...]:
    x, slot, port = residuals

    def measured(x: Any, g: Array, port: Port) -> Any:
        factors = port.factors.cut() if isinstance(port.factors, Slice) else port.factors
        return jax.tree.map(_like, rule(x, g, factors, port.starts, port.factor), slot)

    found = _compat.promoting(_compat.auto_sharded(measured, slot))(x, g, port)
    if isinstance(found, Sums):
        g, found = found.before(g)
    return g, None, found, None


def _like(value: Array, slot: Array) -> Array:
    return _compat.vary(value.astype(slot.dtype), _compat.varying(slot))


_tap.defvjp(_forward, _backward)
