"""A loss whose layers return something as the gradient of a slot, and the loss alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from singd_core._array import Array
from singd_jax._axes import Key
from singd_jax._calls import Call
from singd_jax._enter import CALLS
from singd_jax._layer import Layer
from singd_jax._layers import Layers
from singd_jax._loss import Leaves, evaluate
from singd_jax._tap import Port, Ports, tap
from singd_jax._trace import Tracer


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A loss whose layers return something as the gradient of a slot.

    Attributes:
        loss: The loss.
        layers: Its layers.
        batch_size: The number of examples.
        rule: Makes what is returned from the product, the layer and `kfac_approx`.
        starts: Where the sampling of rows starts, for the layers whose rule wants it.
    """

    loss: Callable[..., Any]
    layers: Layers
    batch_size: int | None
    rule: Callable[[Call, Layer, str], Callable[..., Any]]
    starts: Mapping[str, Array]

    def value_and_grad(
        self,
        leaves: Leaves,
        slots: Mapping[str, Any],
        factors: Mapping[str, Any],
        batch: tuple[Any, ...],
        keywords: Mapping[str, Any],
        has_aux: bool,
    ) -> tuple[Any, Any, list[Array], dict[str, Any], set[str]]:
        """The value, the gradient, what has changed of the model, what the slots got, and of what.

        `slots` has for each layer one for each role, and the last result which of them got
        something.

        Raises:
            ValueError: If the loss uses a layer in another way than as what it was found.
        """
        seen = set[str]()
        index = {name: i for i, name in enumerate(leaves.names)}
        keys: dict[Key, str] = {}
        for name in slots:
            weight = self.layers[name].weight
            keys[index[weight.name], weight.region] = name
        owned = {leaf for leaf, _ in keys}

        def look(key: Key, call: Call) -> Any:
            """How a product is measured, or whether it must not be there."""
            name = keys.get(key)
            role = None if name is None else self.layers[name].role(call)
            if name is None or role is None:
                return key[0] in owned
            seen.add(name + role)
            return role, self.rule(call, self.layers[name], self.layers.kfac_approx)

        def visit(key: Key, call: Call, x: Any, y: Array, ports: Ports) -> Array:
            how = look(key, call) if key in ports else key[0] in owned
            if how is True:
                raise ValueError(
                    f"{leaves.names[key[0]]!r} is used as another matrix than in the loss that the "
                    "layers were found in: find the layers of this loss"
                )
            if how is False:
                return y
            role, rule = how
            port = ports[key]
            return tap(rule, y, x, port._replace(slot=port.slot[role]))

        def function(arrays: list[Array], slots: Mapping[str, Any]) -> Any:
            ports = {
                key: Port(slots[name], factors.get(name), self.starts.get(name))
                for key, name in keys.items()
            }
            stacks = {key: self.layers[name].weight.stack for key, name in keys.items()}
            tracer = Tracer(CALLS, self.batch_size, visit, stacks, look)
            found = evaluate(self.loss, tracer, leaves, arrays, ports, batch, keywords)
            return _first(found[0], has_aux), found

        (_, (value, changed)), (grads, got) = jax.value_and_grad(
            function, argnums=(0, 1), has_aux=True
        )(list(leaves.arrays), dict(slots))
        return value, leaves.gradients(grads), changed, got, seen


def value_and_grad(
    loss: Callable[..., Any], leaves: Leaves, batch: Any, keywords: Any, has_aux: bool
) -> tuple[Any, Any, list[Array]]:
    """The value and the gradient alone, and what has changed of the model."""

    def function(arrays: list[Array]) -> Any:
        model = leaves.join(arrays)
        result = loss(model, *batch, **keywords)
        return _first(result, has_aux), (result, leaves.changed(model))

    (_, (value, changed)), grads = jax.value_and_grad(function, has_aux=True)(list(leaves.arrays))
    return value, leaves.gradients(grads), changed


def _first(result: Any, has_aux: bool) -> Any:
    if not has_aux:
        return result
    value, _ = result
    return value
