"""The state of the optimizer: a pytree of arrays, and its flat form."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax  # type: ignore[import-untyped]

from singd_core import state as flat_state
from singd_core._array import Array
from singd_core._settings import Settings, is_due
from singd_core.optimizer import State
from singd_core.updates.curvature import Curvature


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("core", "T"),
    meta_fields=("growing_T", "rows"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class SingdState:
    """The state of `singd` and `scale_by_singd`: a pytree of arrays.

    Attributes:
        core: The state as every frontend has it; see `singd_core.optimizer.State`.
        T: Steps between two refreshes of the factors, or None if it is every step.
        growing_T: Whether there are fewer at first, which is no array but part of the structure.
        rows: Rows that a factor is measured with, which is no array either.
    """

    core: State
    T: Array | None
    growing_T: bool = False
    rows: float = math.inf

    @property
    def due(self) -> Array | None:
        """Whether the next step refreshes the factors; None if every step does."""
        if self.T is None:
            return None
        due: Array = is_due(self.core.step, Settings(growing_T=self.growing_T), self.T)
        return due


class Both(NamedTuple):
    """What `singd_jax.MultiSteps` accumulates in the place of the gradient alone."""

    gradient: Any
    curvature: dict[str, Curvature]


def find_state(opt_state: Any) -> SingdState:
    """The one `SingdState` inside an optimizer's state, e.g. of `optax.chain`.

    Raises:
        ValueError: If there is none, or more than one.
    """
    first, *others = find_states(opt_state)
    if others:
        raise ValueError(
            f"the optimizer's state holds {1 + len(others)} states of singd where one is needed: "
            "pass that of each group, or save the whole state as a pytree"
        )
    return first


def find_states(opt_state: Any) -> list[SingdState]:
    """Those inside an optimizer's state: several with `optax.multi_transform`.

    Raises:
        ValueError: If there is none, or a layer is part of two.
    """
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(leaf)]
    if not found:
        raise ValueError(
            "the optimizer's state holds no state of singd: pass what `tx.init(params)` returned, "
            "of a transformation with singd in it"
        )
    names = [name for state in found for name in state.core.layers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two transformations of singd train {', '.join(twice)}: give each its own parameters, "
            "e.g. by optax.multi_transform"
        )
    return found


def refuse_lost_curvature(opt_state: Any) -> None:
    """Raise if optax would not pass the curvature on to singd.

    Raises:
        ValueError: If `optax.MultiSteps` is part of another transformation, which drops it.
    """
    if any(map(_drops_curvature, jax.tree.leaves(opt_state, is_leaf=_drops_curvature))):
        raise ValueError(
            "optax.MultiSteps inside another transformation, e.g. optax.chain, does not pass the "
            "curvature on: take singd_jax.MultiSteps(tx, k, layers=layers)."
            "gradient_transformation() in its place, or put the other inside of optax.MultiSteps"
        )


def _drops_curvature(node: Any) -> bool:
    """Whether it is the state of a transformation of optax, `optax.MultiSteps` around singd in it.

    The state of a chain is a tuple, that of a named chain an `OrderedDict`, and those of others are
    classes of optax.
    """
    if isinstance(node, OrderedDict):
        return _drops_curvature(tuple(node.values()))
    of_optax = type(node) is tuple or type(node).__module__.startswith("optax.")
    return of_optax and any(
        isinstance(part, optax.MultiStepsState)
        and not isinstance(part.acc_grads, Both)
        and any(map(_is_state, jax.tree.leaves(part, is_leaf=_is_state)))
        for part in (node if isinstance(node, tuple) else ())
    )


def flatten(opt_state: Any) -> dict[str, Any]:
    """The state of singd as named arrays, as in every frontend (see `singd_core.state`)."""
    return flat_state.flatten(find_state(opt_state).core)


def unflatten(opt_state: Any, flat: Mapping[str, Any]) -> Any:
    """The optimizer's state with that of singd taken from named arrays.

    Args:
        opt_state: A state of the same parameters and settings, e.g. from `tx.init`.
        flat: What `flatten` returned, or another frontend's state under the same names.

    Raises:
        ValueError: Naming the first entry that is missing, left over or of another shape.
    """
    find_state(opt_state)

    def restored(leaf: Any) -> Any:
        if not _is_state(leaf):
            return leaf
        return dataclasses.replace(leaf, core=flat_state.unflatten(leaf.core, flat))

    return jax.tree.map(restored, opt_state, is_leaf=_is_state)


def _is_state(leaf: Any) -> bool:
    return isinstance(leaf, SingdState)
