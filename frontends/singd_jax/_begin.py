"""The state before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from singd_core import rules
from singd_core._array import Array, ranged, widen
from singd_core._layer_state import LayerState, State, begun, no_cost, storage
from singd_core._settings import Settings
from singd_core.adamw import Moments
from singd_jax import _compat
from singd_jax._find import find_layers
from singd_jax._layer import Layer, Wanted
from singd_jax._layers import Layers, checked
from singd_jax._loss import Leaves
from singd_jax._pytree import register_with_flax
from singd_jax._rates import Rates
from singd_jax._sharding import lengthened, numbers_everywhere, placed
from singd_jax._state import Fixed, SingdState
from singd_jax._tensors import NONE, extended, tensors


class Start:
    """Makes the state of the layers that were given, or that a loss has."""

    def __init__(
        self,
        rates: Rates,
        layers: Layers | None,
        loss: Callable[..., Any] | None,
        structures: Any,
        others: bool = True,
    ) -> None:
        """`structures` are those that were given; `others` are trained too, or else left alone."""
        if layers is not None and loss is not None:
            raise TypeError(
                "give singd either loss=loss, for tx.init(params, *batch), or "
                "layers=singd_jax.find_layers(loss)(params, *batch), or gradients alone"
            )
        self.find = None if loss is None else find_layers(loss)
        self.rates, self.chooses, self.others = rates, structures is not None, others
        self.layers = NONE if layers is None else checked(layers)
        # The structure of the last state, which optax.tree.map_params asks for without parameters.
        self.known: dict[str, Any] = {}

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> SingdState:
        """The state before the first step; the batch is wanted where the layers are to be found.

        Raises:
            ValueError: If there is no batch, or no loss for one, or naming the first parameter that
                is not as it was when the layers were found.
        """
        register_with_flax()
        if type(params).__name__ == "_ParamsPlaceholder":
            return self._placeholder(params)
        if self.find is not None:
            self.layers = self._found(params, batch, keywords)
        elif not self.layers.searched and (batch or keywords):
            raise ValueError(
                "tx.init got a batch, and singd no loss to find the layers of: give it "
                "singd(loss=loss), or tx.init(params) alone, which learns from gradients"
            )
        return self._state(params)

    def _found(self, params: Any, batch: tuple[Any, ...], keywords: Mapping[str, Any]) -> Layers:
        """The layers of the loss."""
        try:
            return self.find(params, *batch, **keywords)  # type: ignore[misc]
        except TypeError as error:
            if batch or keywords:
                raise
            raise ValueError(
                "singd(loss=...) finds the layers in tx.init(params, *batch), which got no batch: "
                "as a part of others, or where others call it, give it "
                "layers=singd_jax.find_layers(loss)(params, *batch)"
            ) from error

    @_compat.promoting
    def _state(self, params: Any) -> SingdState:
        leaves = Leaves.of(params)
        arrays = leaves.named
        needed = [name for name in self.layers.shapes if not leaves.leaves_out(name)]
        self.layers.refuse_others(arrays, needed)
        if self.layers.searched:
            self.layers.refuse_further(arrays, self.layers.shapes)
        found, s = self._present(arrays), self.rates.settings
        owned = {name for layer in found.values() for name in layer.leaves}
        found |= tensors(self.layers, arrays, owned, s) if self.others else {}
        owned |= {leaf for layer in found.values() for leaf in layer.leaves}
        dtypes = {name: arrays[name].dtype for name in owned}

        # Compiled, so that no array is tied to a device: the core makes them on another array's
        # device, and the second step would be compiled again for what is then tied to it.
        def made() -> dict[str, LayerState]:
            return {name: self._layer_state(layer, dtypes) for name, layer in found.items()}

        shapes = jax.eval_shape(made)
        where = placed(found, arrays, shapes)
        shardings = jax.tree.map(lambda a: a.sharding, where)
        states = jax.jit(lambda: lengthened(made(), where), out_shardings=shardings)()
        rest = {k: _moments(a, s) for k, a in arrays.items() if self.others and k not in owned}
        count, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
        largest_lr = jnp.zeros((), jnp.float32)
        core = State(count, largest_lr, skipped, states, rest)  # type: ignore[arg-type]
        hold = {k: [a.shape for a in jax.tree.leaves(own.factors)] for k, own in shapes.items()}
        blind = {name: layer for name, layer in found.items() if not layer.has_rows}
        fixed = Fixed(extended(self.layers, blind, leaves.numbers), s.growing_T, s.rows, hold)
        state = numbers_everywhere(SingdState.of(core, params, self.rates.T, fixed), arrays)
        self.known |= {"rest": jax.tree.map(lambda _: 0, state.rest), "fixed": fixed}
        axes = frozenset[Any]().union(*map(_compat.varying, arrays.values()))
        if not axes:
            return state
        # inside shard_map each device has parameters of its own, and so a state after each step
        own: SingdState = jax.tree.map(lambda a: _compat.vary(a, axes), state)
        return own._replace(T=state.T)

    def _placeholder(self, params: Any) -> SingdState:
        """A state of the same structure, with what `optax.tree.map_params` gives for parameters.

        Raises:
            ValueError: If nothing tells the structure.
        """
        if "rest" not in self.known:
            if not self.layers.searched:
                raise ValueError(
                    "optax.tree.map_params asks for a state like the last one that this singd() "
                    "has begun, and there is none: call jax.eval_shape(tx.init, params) before, "
                    "with the batch if there is a loss"
                )
            shapes = self.layers.shapes.items()
            jax.eval_shape(lambda: self({k: jnp.zeros(n) for k, n in shapes}))
        costs = params if self.rates.settings.rounding == "kahan" else None
        known = self.known["rest"], self.rates.T, self.known["fixed"]
        return SingdState(params, params, *known, costs)

    def _present(self, arrays: Mapping[str, Array]) -> dict[str, Layer]:
        """The layers whose weight is there, and their bias if it is: masks leave some out.

        One-hot rows have no dense factors, which some rules want. A bare preconditioner, which
        trains no others, has rows alone.
        """
        dense, s = self.rates.rule.only_dense, self.rates.settings
        found = {
            name: layer if layer.leaves[-1] in arrays else layer.without_bias()
            for name, layer in self.layers.items()
            if layer.weight.name in arrays and not (dense and layer.diagonal)
        }
        return {
            name: layer.learning(self._structures, s) if self.others else layer
            for name, layer in found.items()
        }

    @property
    def _structures(self) -> Wanted:
        """Those that were given, or that the layers were found with, or the recipe's."""
        found = None if self.chooses else self.layers.structures
        return self.rates.optimizer.structures if found is None else found

    def _layer_state(self, layer: Layer, dtypes: Mapping[str, Any]) -> LayerState:
        """The state of a layer, its momenta without entries yet."""
        optimizer, s = self.rates.optimizer, self.rates.settings
        empty = [jnp.zeros((0,), dtypes[leaf]) for leaf in layer.leaves]
        likes = [
            ranged(empty[0])
            if dtype is None
            else storage("preconditioner_dtype", jnp.zeros((0,), dtype))
            for dtype in optimizer.preconditioner_dtype
        ]
        factors = rules.start(
            layer.structures(self._structures, self.rates.rule),
            layer.shape,
            s,
            *likes,
            has_rows=layer.has_rows,
            one_hot=bool(layer.diagonal),
            bias=layer.bias is not None,
        )
        return begun(factors, empty, layer.shape[0], s, optimizer.momentum_dtype)


def _moments(a: Array, s: Settings) -> Moments:
    """Zeros, sharded like the parameter; their count is on no device in particular."""
    wide = jnp.abs(jnp.zeros_like(widen(a)))  # real
    return Moments(jnp.zeros_like(a), wide, jnp.zeros((), wide.dtype), no_cost(a, s))
