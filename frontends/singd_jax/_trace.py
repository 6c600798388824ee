"""Following the parameters through a loss, equation by equation."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from singd_core._array import Array
from singd_jax import _calls, _compat
from singd_jax._axes import Group, Key, View, axes_of, rearranged, size
from singd_jax._calls import Call, Cut
from singd_jax._joins import Join, cuts
from singd_jax._lookups import gather
from singd_jax._product import Noted, Origin, Path, Piece, Product, views_of
from singd_jax._ragged import ragged_dot
from singd_jax._reasons import reason
from singd_jax._spread import Perturbed, Spread
from singd_jax._tap import Ports

# Takes a product, its operand, itself and the ports; returns the product, tapped or not.
Visit: TypeAlias = Callable[[Key, Call, Any, Array, Ports], Array]
Results: TypeAlias = tuple[list[Any], list[Origin]]  # with where they come from


class Called(NamedTuple):
    """An equation that calls other jaxprs, which are entered.

    Attributes:
        eqn: The equation.
        values: Its operands.
        origins: Where these come from.
        ports: The ports of the weights among them.
        gives: Which of its results a gradient goes back from.
    """

    eqn: Any
    values: Sequence[Any]
    origins: Sequence[Origin]
    ports: Ports
    gives: Sequence[bool]


Enter: TypeAlias = "Callable[[Tracer, Called], Results]"


class Tracer:
    """Evaluates a jaxpr, and visits each product of a parameter with data.

    Everything that is no such product is evaluated by jax itself; calls with a parameter among
    their operands are entered (see `_enter`).

    Attributes:
        noted: What is noted of the parameters.
        scans: The lengths of the scans that were entered.
        leading: The lengths of the first axes of what parameters multiply.
        spread: Along which axes of a mesh data differ between devices.
        perturbed: Which values change with the parameters.
        within: The equations that are being entered.
        twins: Calls that were traced, for equal ones.
        constants: The constants of the jaxprs, by id. Nothing else counts as known, so that a step
            that is not compiled, where all values are, measures what a compiled one does. An array
            that a loss captures and is also handed counts as a constant there.
    """

    def __init__(
        self,
        calls: Mapping[str, Enter],
        batch_size: int | None,
        visit: Visit = lambda key, call, x, y, ports: y,
        stacks: Mapping[Key, Sequence[Group]] = MappingProxyType({}),
        look: Callable[[Key, Call], Any] = lambda key, call: None,
    ) -> None:
        """`calls`: how equations are entered, by name; `stacks`: a port's axes that stack layers.

        `look`: what a product's visit depends on.
        """
        self.calls, self.batch_size, self.visit = calls, batch_size, visit
        self.look, self.stacks = look, stacks
        self.noted = Noted()
        self.scans: dict[int, int] = {}
        self.leading: set[int | None] = set()
        self.spread, self.perturbed = Spread(), Perturbed()
        self.within: Path = ()
        self.twins: dict[Any, Any] = {}
        self.constants: dict[int, Any] = {}
        self._kept: list[Any] = []

    def keep(self, jaxpr: Any) -> Any:
        """A jaxpr that is kept alive, so that its equations keep their ids."""
        self._kept.append(jaxpr)
        return jaxpr

    def run(
        self,
        jaxpr: _compat.Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Any],
        origins: Sequence[Origin],
        ports: Ports,
        gives: Sequence[bool],
    ) -> Results:
        """The results of a jaxpr, and where they come from.

        `gives`: which of them a gradient goes back from.
        """
        # a constant of NumPy, which jax 0.8 has a class for, has no gradient, and functions with
        # rules of their own want one
        own = [hasattr(c, "__array__") and not isinstance(c, jax.Array) for c in consts]
        arrays = [jnp.asarray(c) if numpy else c for c, numpy in zip(consts, own, strict=True)]
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, arrays, strict=True))
        env |= zip(jaxpr.invars, args, strict=True)
        known: dict[Any, Origin] = {}
        operands = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
        constants = [*arrays, *(v.val for v in operands if _compat.is_literal(v))]
        self.constants |= {id(c): c for c in constants if not isinstance(c, jax.core.Tracer)}
        readers = collections.Counter(v for v in operands if not _compat.is_literal(v))

        def learn(variables: Sequence[Any], origins: Sequence[Origin]) -> None:
            for v, o in zip(variables, origins, strict=True):
                # A bias must reach all of a product, so nothing else may read it before.
                if o is not None and not (isinstance(o, Product) and readers[v] > 1):
                    known[v] = o

        def read(v: Any) -> Any:
            return v.val if _compat.is_literal(v) else env[v]

        def origin(v: Any) -> Origin:
            return None if _compat.is_literal(v) else known.get(v)

        learn(jaxpr.invars, origins)
        trained = _compat.trained(jaxpr, gives)
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            through = [v in trained for v in eqn.outvars]
            found = [origin(v) if any(through) else None for v in eqn.invars]
            results, new = self._equation(eqn, values, found, ports, through)
            env |= zip(eqn.outvars, results, strict=True)
            learn(eqn.outvars, new)
        return [read(v) for v in jaxpr.outvars], [origin(v) for v in jaxpr.outvars]

    def _equation(
        self,
        eqn: Any,
        values: list[Any],
        origins: list[Origin],
        ports: Ports,
        gives: Sequence[bool],
    ) -> Results:
        none: list[Origin] = [None] * len(eqn.outvars)
        if all(o is None for o in origins):
            return _compat.evaluate(eqn, values), none
        enter, views = self.calls.get(eqn.primitive.name), views_of(*origins)
        if enter is not None and views:
            within, self.within = self.within, (*self.within, id(eqn))
            try:
                mine = {k: p for k, p in ports.items() if any(view.holds(k) for view in views)}
                return enter(self, Called(eqn, values, origins, mine, gives))
            finally:
                self.within = within
        results = _compat.evaluate(eqn, values)
        if eqn.primitive.name in ("optimization_barrier", "device_put"):
            return results, origins
        if eqn.primitive.name == "split" and isinstance(origins[0], View):
            parts = origins[0].split(eqn.params["axis"], [*map(int, eqn.params["sizes"])])
            if None in parts:
                self.note(origins[0], "split across its layout")
            return results, [*parts]
        return results, [self._single(eqn, values, origins, results, ports), *none[1:]]

    # ---- single equations -----------------------------------------------------------------------

    def _single(
        self, eqn: Any, values: Any, origins: list[Origin], results: list[Any], ports: Ports
    ) -> Origin:
        """Where the first result comes from; if it is a product it is visited."""
        name, p = eqn.primitive.name, eqn.params
        views = [isinstance(o, (View, Join)) for o in origins]
        if name in ("add", "add_any"):
            return self._add(origins, results[0])
        if name == "dot_general" and sum(views) == 1:
            return self._product(eqn, views.index(True), values, origins, results, ports)
        if name == "conv_general_dilated" and views == [False, True]:
            return self._product(eqn, 1, values, origins, results, ports)
        if name == "gather" and views == [True, False] and isinstance(origins[0], View):
            return self._product(eqn, 0, values, origins, results, ports)
        if name == "ragged_dot_general" and views == [False, True, False]:
            return self._product(eqn, 1, values, origins, results, ports)
        if name == "concatenate" and all(isinstance(o, View) for o in origins):
            return Join(p["dimension"], tuple(o for o in origins if isinstance(o, View)))
        first = origins[0]
        new: Origin = None
        if name in ("mul", "div", "neg"):
            new = self._multiple(name, values, origins)
        elif name == "dynamic_slice" and isinstance(first, View):
            starts, sizes = values[1:], p["slice_sizes"]
            new = first.pick(starts, sizes)
            if new is None and all(map(self._is_constant, starts)):
                new = first.cut(starts, sizes)
        elif isinstance(first, (View, Join)):
            new = first.apply(name, p)
        elif isinstance(first, Product):
            dims = rearranged(name, p, first.dims)
            new = None if dims is None else dataclasses.replace(first, dims=dims)
        if new is None:
            for o in origins:
                self.note(o, reason(name))
        return new

    def _multiple(self, name: str, values: Any, origins: list[Origin]) -> Origin:
        """A parameter times a number: the number then multiplies what the parameter does."""
        large = [i for i, x in enumerate(values) if np.size(x) > 1]
        side = large[0] if len(large) == 1 else 0
        origin = origins[side]
        if not isinstance(origin, (View, Join)) or (name == "div" and side == 1):
            return None
        if name == "neg":
            return origin.times(-1.0)
        other = values[1 - side]
        if np.size(other) != 1:
            return None
        self.note(origins[1 - side], reason("mul"))
        literal = self._is_constant(other) and not isinstance(other, jax.Array)
        number = np.asarray(other).reshape(()) if literal else jnp.reshape(other, ())
        return origin.times(1.0 / number if name == "div" else number)

    def _product(
        self, eqn: Any, side: int, values: Any, origins: Any, results: list[Any], ports: Ports
    ) -> Origin:
        """Visit a product; `results` is changed in place."""
        origin, x, y = origins[side], values[1 - side], results[0]
        if jnp.issubdtype(y.dtype, jnp.complexfloating):
            self.note(origin, "multiplied with complex numbers")
            return None
        self.spread.refuse_shared(eqn.invars[1 - side], x, y)
        views = views_of(origin)
        joined = origin.axis if isinstance(origin, Join) else None
        for i, n in enumerate(eqn.invars[side].aval.shape):
            if n != 1 and i != joined and not views[0].dims[i]:
                self.note(origin, "repeated by a broadcast")
                return None
        parts: list[tuple[Cut | None, Cut | None]] | None = [(None, None)]
        if isinstance(origin, Join):
            parts = cuts(eqn, side, origin, x.ndim)
        if parts is None:
            self.note(origin, "concatenated along an axis of a stack")
            return None
        pieces = []
        for k, (view, (x_cut, y_cut)) in enumerate(zip(views, parts, strict=True)):
            call = self._call(eqn, side, view, _calls.shape_of(x, x_cut), _calls.shape_of(y, y_cut))
            if isinstance(call, str):
                self.note(view, call)
                return None
            if x_cut or y_cut:
                call = call.of_part(x_cut, y_cut)
            path = (*self.within, id(eqn), k)  # a concatenation may have a weight twice
            call = self.record(call, path, x, y, self.spread)
            operand = x if call.sizes is None else (x, values[2])
            own = ports
            if view.key in ports:
                own = {**ports, view.key: ports[view.key].of(view)}
            results[0] = self.visit(view.key, call, operand, results[0], own)
            pieces.append(Piece(view.key, path, call, y_cut))
        if any(cut[0] for cut in parts) or not pieces[0].call.takes_bias:
            return None  # concatenated inputs: a bias is no part of any of them
        return Product(tuple(pieces), axes_of(y.shape))

    def record(self, call: Call, path: Path, x: Any, y: Any, spread: Spread) -> Call:
        """A product of a weight with data x at a path; returned as one that runs so often."""
        view = call.view
        scans = [i for i in path if i in self.scans and i not in view.scans]
        lengths = [self.scans[i] for i in scans]
        in_turn = math.prod(self.scans[i] for i in view.scans)
        for _, n in view.picks:
            if n in lengths:  # a loop that picks one layer after the other
                lengths.remove(n)
                in_turn *= n
        if lengths:
            self.noted.steps.add(view.key)
        steps = max(math.prod(lengths), 1)
        times = steps * spread.devices(x, y)
        call = dataclasses.replace(call, times=times, in_turn=in_turn)
        self.noted.calls[view.key][path] = call
        self.leading.add(call.leading)
        return call

    def _call(
        self, eqn: Any, side: int, view: View, x: Sequence[int], y: Sequence[int]
    ) -> Call | str:
        if eqn.primitive.name == "dot_general":
            return _calls.dot_general(eqn.params, side, view, x, self.batch_size)
        if eqn.primitive.name == "conv_general_dilated":
            return _calls.convolution(eqn.params, view, y)
        if eqn.primitive.name == "ragged_dot_general":
            return ragged_dot(eqn.params, view, x, eqn.invars[2].aval.shape[-1])
        return gather(eqn.params, view, x, y)

    def _add(self, origins: list[Origin], result: Any) -> Origin:
        """`y + b` finds a bias; `y + anything` is still y, as far as its gradient is concerned."""
        products = [o for o in origins if isinstance(o, Product) and len(o.dims) == result.ndim]
        added = [o for o in origins if isinstance(o, (View, Join))]
        if not added:
            return products[0] if products else None
        for o in added:
            biases = products[0].biases(o) if products else None
            if biases is None:
                self.note(o, "added to what is no layer's output")
                continue
            for piece, bias in zip(products[0].pieces, biases, strict=True):
                self.noted.biases[piece.key][piece.path] = bias
            self._note_vectors(o)
        return None

    def closed(self, origin: Origin, name: str) -> Origin:
        """A parameter inside a call that can be given no further values: numbers, indices."""
        # a factor that is made of numbers in the code alone is no array of jax
        views = views_of(origin)
        if all(not view.picks and not isinstance(view.factor, jax.Array) for view in views):
            return origin
        self.note(origin, f"multiplied or indexed by what is computed outside of a `{name}`")
        return None

    def _is_constant(self, value: Any) -> bool:
        return id(value) in self.constants

    def note(self, origin: Origin, reason: str) -> None:
        """Remember how a parameter is read besides."""
        for view in views_of(origin):
            self.noted.reads[view.leaf][reason] = None
        self._note_vectors(origin)

    def _note_vectors(self, origin: Origin) -> None:
        """Remember a parameter of which each step of a scan reads a vector."""
        for view in views_of(origin):
            if view.stack and sum(size(axis) > 1 for axis in view.dims) <= 1:
                self.noted.vectors.add(view.leaf)
