"""The state of the optimizer: a pytree of arrays, and its flat form."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from singd_core import state as flat_state
from singd_core._array import Array
from singd_core._layer_state import LayerState, State
from singd_core._settings import Settings, is_due
from singd_core.adamw import Moments
from singd_core.rules import Factors
from singd_jax import _compat
from singd_jax._blind import Curvature
from singd_jax._layer import Layer
from singd_jax._layers import Layers
from singd_jax._loss import Leaves
from singd_jax._pytree import static
from singd_jax._sharding import lengthened, shortened


@static
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What of a state is no array.

    Attributes:
        layers: The layers that it was made with.
        growing_T: Whether refreshes are more frequent at first.
        rows: Rows that a factor is measured with.
        shapes: What the arrays of each layer's factors hold. On a mesh zeros follow.
    """

    layers: Layers
    growing_T: bool
    rows: float
    shapes: Mapping[str, Sequence[tuple[int, ...]]]

    def __hash__(self) -> int:
        """The hash of the layers, which is known."""
        return hash((self.layers, self.growing_T, self.rows))

    def __repr__(self) -> str:
        """The names of the layers: their table does not know what trains them in this state."""
        return f"{type(self).__name__}({', '.join(self.layers)})"


class SingdState(NamedTuple):
    """The state of `singd` and `scale_by_singd`: a pytree of arrays.

    `mu` and `nu` are like the parameters, so functions that shard, cast or label parameters do the
    same with them.

    Attributes:
        mu: Momenta of the layers, and the first moments of AdamW.
        nu: The second moments of AdamW.
        rest: The state without both, the factors above all.
        T: Steps between two refreshes of the factors, or None if it is every step.
        fixed: What is no array.
        lost: The rounding errors of the parameters, like these. None unless they are kept.
    """

    mu: Any
    nu: Any
    rest: State
    T: Array | None
    fixed: Fixed
    lost: Any = None

    @classmethod
    def of(cls, core: State, params: Any, T: Array | None, fixed: Fixed) -> SingdState:
        """The state before the first step, its momenta zeros like those leaves of `params`."""
        leaves = Leaves.of(params)
        mu, nu, lost, rest = _apart(core, fixed.layers)
        for layer, own in ((fixed.layers[name], own) for name, own in core.layers.items()):
            for part, momentum in zip(layer.parts, own.momenta or (), strict=False):
                mu[part.name] = jnp.zeros_like(leaves.named[part.name], momentum.dtype)
            for part, cost in zip(layer.parts, own.compensations, strict=False):
                if cost is not None:
                    lost[part.name] = jnp.zeros_like(leaves.named[part.name], cost.dtype)
        costs = leaves.tree(lost) if lost else None
        return cls(leaves.tree(mu), leaves.tree(nu), rest, T, fixed, costs)

    @property
    def layers(self) -> dict[str, Layer]:
        """The layers that are trained."""
        found = self.fixed.layers
        return {name: found[name].of(factors) for name, factors in self.factors.items()}

    @property
    def factors(self) -> dict[str, Factors]:
        """The factors of the layers, without the zeros for a mesh."""
        shapes = self.fixed.shapes
        return {
            name: shortened(own.factors, shapes[name]) for name, own in self.rest.layers.items()
        }

    @property
    def core(self) -> State:
        """The state as every frontend has it; see `singd_core.optimizer.State`."""
        mu, nu, layers, rest = Leaves.of(self.mu).named, Leaves.of(self.nu).named, {}, self.rest
        lost: Mapping[str, Array] = {} if self.lost is None else Leaves.of(self.lost).named
        factors, trained = self.factors, self.layers
        for name, own in rest.layers.items():
            parts, momenta = trained[name].parts, None
            if all(part.name in mu for part in parts):
                momenta = [part.take(mu[part.name]) for part in parts]
            costs = [part.take(lost[part.name]) if part.name in lost else None for part in parts]
            layers[name] = LayerState.of(factors[name], momenta, own.late, costs)
        others = {
            k: Moments(mu[k], nu[k], own.step, lost.get(k)) for k, own in rest.fallback.items()
        }
        return State(rest.step, rest.largest_lr, rest.skipped, layers, others)

    def with_core(self, core: State) -> SingdState:
        """This state with another core."""
        leaves = Leaves.of(self.mu)
        lost = None if self.lost is None else Leaves.of(self.lost)
        known = None if lost is None else lost.named
        mu, nu, costs, rest = _apart(core, self.fixed.layers, leaves.named, known)
        for name, own in self.rest.layers.items():
            factors = lengthened(rest.layers[name].factors, own.factors)
            rest.layers[name] = dataclasses.replace(rest.layers[name], factors=factors)
        return self._replace(
            mu=leaves.tree(mu),
            nu=Leaves.of(self.nu).tree(nu),
            lost=None if lost is None else lost.tree(costs),
            rest=rest,
        )

    @property
    @_compat.promoting
    def due(self) -> Array | None:
        """Whether the next step refreshes the factors; None if every step does."""
        if self.T is None:
            return None
        due: Array = is_due(self.rest.step, Settings(growing_T=self.fixed.growing_T), self.T)
        return due


def _apart(
    core: State,
    layers: Layers,
    momenta: Mapping[str, Array] | None = None,
    costs: Mapping[str, Array] | None = None,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array], State]:
    """The leaves of `mu`, of `nu` and of `lost`, and the rest.

    What a layer has of them is put into `momenta` and `costs`.
    """
    mu, nu, kept, others = dict(momenta or {}), {}, {}, {}
    lost: dict[str, Array] = dict(costs or {})
    for name, own in core.layers.items():
        if momenta:
            for part, momentum in zip(layers[name].parts, own.momenta or (), strict=False):
                mu[part.name] = part.put(mu[part.name], momentum)
        if costs:
            for part, cost in zip(layers[name].parts, own.compensations, strict=False):
                if cost is not None:
                    lost[part.name] = part.put(lost[part.name], cost)
        kept[name] = LayerState(own.factors, None, None, own.late)
    for name, moments in core.fallback.items():
        mu[name], nu[name] = moments.exp_avg, moments.exp_avg_sq
        others[name] = Moments(None, None, moments.step)
        if moments.compensation is not None:
            lost[name] = moments.compensation
    rest = State(core.step, core.largest_lr, core.skipped, kept, others)
    return mu, nu, lost, rest


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
            "pass the state of one group, or save the whole state as a pytree"
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
    names = [name for state in found for name in state.rest.layers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two transformations of singd train {', '.join(twice)}: give each its own parameters, "
            "e.g. by optax.multi_transform"
        )
    return found


def holds_state(tree: Any) -> bool:
    """Whether there is a state of singd in it."""
    return any(map(_is_state, jax.tree.leaves(tree, is_leaf=_is_state)))


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

    The state of a chain is a tuple, of a named chain an `OrderedDict`; other states are classes of
    optax.
    """
    if isinstance(node, OrderedDict):
        return _drops_curvature(tuple(node.values()))
    of_optax = type(node) is tuple or type(node).__module__.startswith("optax.")
    return of_optax and any(
        isinstance(part, optax.MultiStepsState)
        and not isinstance(part.acc_grads, Both)
        and holds_state(part)
        for part in (node if isinstance(node, tuple) else ())
    )


def flatten(opt_state: Any) -> dict[str, Any]:
    """The state of singd as named arrays, as in every frontend (see `singd_core.state`)."""
    return flat_state.flatten(find_state(opt_state).core)


def unflatten(opt_state: Any, flat: Mapping[str, Any]) -> Any:
    """The optimizer's state, with singd's part of it taken from named arrays.

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
        return leaf.with_core(flat_state.unflatten(leaf.core, flat))

    return jax.tree.map(restored, opt_state, is_leaf=_is_state)


def _is_state(leaf: Any) -> bool:
    return isinstance(leaf, SingdState)
