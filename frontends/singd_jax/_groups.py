"""Equal layers that step as one, along a first axis: XLA compiles one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from singd_core._layer_state import Parameter
from singd_core.adamw import Moments
from singd_core.optimizer import State
from singd_jax._layer import Layer

Named: TypeAlias = Mapping[str, Any]  # trees of arrays, by the names of parameters or groups

# A stack has at most so many numbers, or is one layer: it is a copy, and larger ones fill a device.
_MOST = 1 << 24


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which parameters of a state step together.

    Attributes:
        members: The names in each group, which has that of its first.
    """

    members: dict[str, tuple[str, ...]]

    @classmethod
    def of(
        cls, layers: Mapping[str, Layer], core: State, *others: Mapping[str, Parameter | Any]
    ) -> Groups:
        """Those that are alike.

        Args:
            layers: The layers that are trained.
            core: The state.
            *others: What else a step takes of each parameter, which some of them may not have.
        """
        open_: dict[Any, list[str]] = {}
        found: list[list[str]] = []
        for name, state in (*core.layers.items(), *core.fallback.items()):
            given = state, [other.get(name) for other in others]
            leaves, tree = jax.tree.flatten(given)
            key = _kind(layers.get(name)), tree, tuple(map(jax.typeof, leaves))
            most = _MOST // max(1, max(a.size for a in leaves))
            group = open_.get(key)
            if group is None or len(group) >= most:
                open_[key] = group = []
                found.append(group)
            group.append(name)
        return cls({group[0]: tuple(group) for group in found})

    def layers(self, layers: Mapping[str, Layer]) -> dict[str, Layer]:
        """The layer of each group that is one of layers."""
        return {
            name: layers[name] if len(own) == 1 else layers[name].stacked(len(own))
            for name, own in self.members.items()
            if name in layers
        }

    def stacked(self, values: Named) -> dict[str, Any]:
        """The values of the groups whose members have one."""
        found = {}
        for name, own in self.members.items():
            if name in values:
                found[name] = _stacked([values[member] for member in own])
        return found

    def apart(self, values: Named) -> dict[str, Any]:
        """The inverse of `stacked`."""
        return dict(self._apart(values))

    def _apart(self, values: Named) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            own = self.members[name]
            for i, member in enumerate(own):
                yield member, value if len(own) == 1 else _entry(value, i)

    def of_state(self, core: State) -> State:
        """A state of groups."""
        return _with(core, self.stacked)

    def to_state(self, core: State) -> State:
        """The inverse of `of_state`."""
        return _with(core, self.apart)


def _with(core: State, change: Callable[[Named], dict[str, Any]]) -> State:
    layers, fallback = change(core.layers), change(core.fallback)
    return dataclasses.replace(core, layers=layers, fallback=fallback)


def _kind(layer: Layer | None) -> Any:
    """What equal layers have in common, beside the shapes of their arrays."""
    if layer is None:
        return None
    parts = [dataclasses.replace(part.stacked(2), name="") for part in layer.parts]
    return *parts, layer.overlap, layer.has_rows


def _stacked(trees: list[Any]) -> Any:
    if len(trees) == 1:
        return trees[0]
    tree = jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)
    if not isinstance(tree, Moments):
        return tree
    axes = tree.exp_avg.ndim - 1  # a count for each parameter, not for each of its numbers
    return dataclasses.replace(tree, step=tree.step.reshape(-1, *(1,) * axes))


def _entry(tree: Any, i: int) -> Any:
    found = jax.tree.map(lambda a: jax.lax.index_in_dim(a, i, keepdims=False), tree)
    if not isinstance(found, Moments):
        return found
    return dataclasses.replace(found, step=found.step.reshape(()))
