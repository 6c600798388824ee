"""Following the parameters through a loss, equation by equation."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from singd_core._array import Array
from singd_jax import _calls, _compat
from singd_jax._axes import Group, Join, Region, View, axes_of, rearranged
from singd_jax._bias import Bias, bias_of
from singd_jax._calls import Call, Cut

Key: TypeAlias = tuple[int, Region]  # the leaf and the region of a weight
Path: TypeAlias = tuple[int, ...]  # an equation, and those it lies in
Ports: TypeAlias = Mapping[Key, Any]
# Takes a product, its operand, itself and the ports; returns the product, tapped or not.
Visit: TypeAlias = Callable[[Key, Call, Array, Array, Ports], Array]


@dataclasses.dataclass(frozen=True)
class Piece:
    """One product of a view, as part of the whole that a concatenation computes."""

    key: Key
    path: Path
    call: Call
    cut: Cut | None


@dataclasses.dataclass(frozen=True)
class Product:
    """A layer's output, on its way to its bias; `dims` are atoms of its own axes."""

    pieces: tuple[Piece, ...]
    dims: tuple[Group, ...]


Origin: TypeAlias = View | Join | Product | None


class Tracer:
    """Evaluates a jaxpr, and visits each product of a parameter with data.

    Everything that is no such product is evaluated by jax itself. Calls with a parameter among
    their operands are rebuilt by the public transformation they came from, so that what is inside
    can be visited.

    Attributes:
        calls: The products found of each weight, by the path of their equations.
        biases: What was added to them.
        reads: For each leaf the other equations that read it.
    """

    def __init__(self, batch_size: int | None, visit: Visit) -> None:
        self.batch_size, self.visit = batch_size, visit
        self.calls: dict[Key, dict[Path, Call]] = collections.defaultdict(dict)
        self.biases: dict[Key, dict[Path, Bias]] = collections.defaultdict(dict)
        self.reads: dict[int, dict[str, None]] = collections.defaultdict(dict)
        self._within: Path = ()

    def run(
        self,
        jaxpr: _compat.Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Any],
        origins: Sequence[Origin],
        ports: Ports,
    ) -> tuple[list[Any], list[Origin]]:
        """The results of a jaxpr, and where they come from."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= zip(jaxpr.invars, args, strict=True)
        known: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=True))
        operands = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
        readers = collections.Counter(v for v in operands if not _compat.is_literal(v))

        def read(v: Any) -> Any:
            return v.val if _compat.is_literal(v) else env[v]

        def origin(v: Any) -> Origin:
            return None if _compat.is_literal(v) else known.get(v)

        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            found = [origin(v) for v in eqn.invars]
            results, new = self._equation(eqn, values, found, ports)
            env |= zip(eqn.outvars, results, strict=True)
            for v, o in zip(eqn.outvars, new, strict=True):
                # A bias must reach all of a product, so nothing else may read it before.
                if o is not None and not (isinstance(o, Product) and readers[v] > 1):
                    known[v] = o
        return [read(v) for v in jaxpr.outvars], [origin(v) for v in jaxpr.outvars]

    def _equation(
        self, eqn: Any, values: list[Any], origins: list[Origin], ports: Ports
    ) -> tuple[list[Any], list[Origin]]:
        none: list[Origin] = [None] * len(eqn.outvars)
        if all(o is None for o in origins):
            return _compat.evaluate(eqn, values), none
        call = _compat.CALLS.get(eqn.primitive.name)
        if call is not None and any(isinstance(o, (View, Join)) for o in origins):
            within, self._within = self._within, (*self._within, id(eqn))
            try:
                mine = {k: p for k, p in ports.items() if _reaches(origins, k)}
                return getattr(self, f"_{call}")(eqn, values, origins, mine)  # type: ignore[no-any-return]
            finally:
                self._within = within
        results = _compat.evaluate(eqn, values)
        if eqn.primitive.name == "split" and isinstance(origins[0], View):
            return results, self._split(origins[0], eqn.params["axis"], eqn.params["sizes"])
        return results, [self._single(eqn, values, origins, results, ports), *none[1:]]

    # ---- calls, rebuilt with their bodies visited -----------------------------------------------

    def _inline(self, eqn: Any, values: Any, origins: Any, ports: Ports) -> Any:
        jaxpr, consts = _compat.inner_jaxpr(eqn)
        return self.run(jaxpr, consts, values, origins, ports)

    def _remat(self, eqn: Any, values: Any, origins: Any, ports: Ports) -> Any:
        jaxpr, consts = _compat.inner_jaxpr(eqn)
        found: list[Origin] = []

        def body(values: Any, ports: Any) -> Any:
            results, found[:] = self.run(jaxpr, consts, values, origins, ports)
            return results

        p = eqn.params
        again = jax.checkpoint(body, policy=p["policy"], prevent_cse=p["prevent_cse"])
        return again(values, ports), found

    def _cond(self, eqn: Any, values: Any, origins: Any, ports: Ports) -> Any:
        def branch(closed: Any) -> Callable[..., Any]:
            def body(values: Any, ports: Any) -> Any:
                return self.run(closed.jaxpr, closed.consts, values, origins[1:], ports)[0]

            return body

        branches = [branch(closed) for closed in eqn.params["branches"]]
        results = jax.lax.switch(values[0], branches, values[1:], ports)
        return results, [None] * len(results)

    def _scan(self, eqn: Any, values: Any, origins: Any, ports: Ports) -> Any:
        p = eqn.params
        body, (n_consts, n_carry) = p["jaxpr"], _compat.scan_counts(p)
        first = n_consts + n_carry
        for o in origins[n_consts:first]:
            self._note(o, "carried through a scan")
        entered = [self._enter(o, id(eqn)) for o in origins[first:]]
        inside = [*origins[:n_consts], *[None] * n_carry, *entered]
        sliced = {k: v for k, v in ports.items() if _reaches(origins[first:], k)}
        whole = {k: v for k, v in ports.items() if k not in sliced}

        def step(carry: Any, xs: Any) -> Any:
            xs, mine = xs
            args = [*values[:n_consts], *carry, *xs]
            results, _ = self.run(body.jaxpr, body.consts, args, inside, {**whole, **mine})
            return results[:n_carry], results[n_carry:]

        carry, ys = jax.lax.scan(
            step,
            values[n_consts:first],
            (values[first:], sliced),
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        return [*carry, *ys], [None] * len(eqn.outvars)

    def _enter(self, origin: Origin, scan: int) -> Origin:
        if isinstance(origin, View):
            return origin.enter_scan(scan)
        self._note(origin, "scanned over as a concatenation")
        return None

    def _shard_map(self, eqn: Any, values: Any, origins: Any, ports: Ports) -> Any:
        if not eqn.params["check_vma"]:
            # The gradient of a replicated value is then summed over devices and divided by their
            # number, which is right for gradients and wrong for sums of squares.
            return self._opaque(eqn, values, origins, "inside shard_map(check_vma=False)")
        jaxpr, consts = _compat.inner_jaxpr(eqn)
        inside = []
        for o, spec in zip(origins, eqn.params["in_specs"], strict=True):
            replicated = all(axis is None for axis in spec)
            if not replicated:
                self._note(o, "sharded by shard_map")
            inside.append(o if replicated else None)

        def body(values: Any, ports: Any) -> Any:
            return self.run(jaxpr, consts, values, inside, ports)[0]

        results = _compat.shard_map(eqn, body)(values, dict(ports))
        return results, [None] * len(results)

    def _opaque(self, eqn: Any, values: Any, origins: Any, reason: str) -> Any:
        for o in origins:
            self._note(o, reason)
        return _compat.evaluate(eqn, values), [None] * len(eqn.outvars)

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
        if name == "concatenate" and all(isinstance(o, View) for o in origins):
            return Join(p["dimension"], tuple(o for o in origins if isinstance(o, View)))
        first = origins[0]
        new: Origin = None
        if isinstance(first, (View, Join)):
            new = first.apply(name, p)
        elif isinstance(first, Product):
            dims = rearranged(name, p, first.dims)
            new = None if dims is None else dataclasses.replace(first, dims=dims)
        if new is None:
            for o in origins:
                self._note(o, _REASONS.get(name, f"read by `{name}`"))
        return new

    def _split(self, view: View, axis: int, sizes: Sequence[int]) -> list[Origin]:
        found: list[Origin] = []
        start = 0
        for n in map(int, sizes):
            found.append(view.narrow(axis, start, n))
            start += n
        if None in found:
            self._note(view, "split across its layout")
        return found

    def _product(
        self, eqn: Any, side: int, values: Any, origins: Any, results: list[Any], ports: Ports
    ) -> Origin:
        """Visit a product; `results` is changed in place."""
        origin, x, y = origins[side], values[1 - side], results[0]
        views = origin.views if isinstance(origin, Join) else (origin,)
        joined = origin.axis if isinstance(origin, Join) else None
        for i, n in enumerate(eqn.invars[side].aval.shape):
            if n != 1 and i != joined and not views[0].dims[i]:
                self._note(origin, "repeated by a broadcast")
                return None
        cuts: list[tuple[Cut | None, Cut | None]] = [(None, None)] * len(views)
        if isinstance(origin, Join):
            found = _cuts(eqn, side, origin, x.ndim)
            if found is None:
                self._note(origin, "concatenated along an axis of a stack")
                return None
            cuts = found
        pieces = []
        for view, (x_cut, y_cut) in zip(views, cuts, strict=True):
            call = self._call(eqn, side, view, _shape(x, x_cut), _shape(y, y_cut))
            if isinstance(call, str):
                self._note(view, call)
                return None
            if x_cut or y_cut:
                call = call.of_part(x_cut, y_cut)
            key, path = (view.leaf, view.region), (*self._within, id(eqn))
            self.calls[key][path] = call
            results[0] = self.visit(key, call, x, results[0], ports)
            pieces.append(Piece(key, path, call, y_cut))
        if any(cut[0] for cut in cuts) or not pieces[0].call.takes_bias:
            return None  # concatenated inputs: a bias is no part of any of them
        return Product(tuple(pieces), axes_of(y.shape))

    def _call(
        self, eqn: Any, side: int, view: View, x: Sequence[int], y: Sequence[int]
    ) -> Call | str:
        if eqn.primitive.name == "dot_general":
            return _calls.dot_general(eqn.params, side, view, x, self.batch_size)
        if eqn.primitive.name == "conv_general_dilated":
            return _calls.convolution(eqn.params, view, y)
        return _calls.gather(eqn.params, view, x, y)

    def _add(self, origins: list[Origin], result: Any) -> Origin:
        """`y + b` finds a bias; `y + anything` is still y, as far as its gradient is concerned."""
        products = [o for o in origins if isinstance(o, Product) and len(o.dims) == result.ndim]
        added = [o for o in origins if isinstance(o, (View, Join))]
        if not added:
            return products[0] if products else None
        for o in added:
            if not (products and self._biased(products[0], o)):
                self._note(o, "added to what is no layer's output")
        return None

    def _biased(self, product: Product, added: View | Join) -> bool:
        pieces = product.pieces
        views = added.views if isinstance(added, Join) else (added,)
        if len(views) != len(pieces):
            return False
        found = []
        whole = sum(piece.cut[2] for piece in pieces if piece.cut is not None)
        for piece, view in zip(pieces, views, strict=True):
            dims = product.dims
            if piece.cut is not None:  # its own part of the concatenated axis
                axis, _, n = piece.cut
                own: Group = ((axis, 1, n),)
                dims = tuple(own if group == ((axis, 1, whole),) else group for group in dims)
            found.append(bias_of(piece.call, dims, view))
        for piece, bias in zip(pieces, found, strict=True):
            if bias is None:
                return False
            self.biases[piece.key][piece.path] = bias
        return True

    def _note(self, origin: Origin, reason: str) -> None:
        views = origin.views if isinstance(origin, Join) else (origin,)
        for view in views:
            if isinstance(view, View):
                self.reads[view.leaf][reason] = None


_REASONS = {
    "mul": "multiplied entry by entry",
    "while": "inside a while loop",
    "custom_vjp_call": "inside a custom_vjp, which shows no gradient of an output",
    "custom_vjp_call_jaxpr": "inside a custom_vjp, which shows no gradient of an output",
    "custom_jvp_call": "inside a custom_jvp, which shows no gradient of an output",
    "concatenate": "concatenated with what is no parameter",
    "dynamic_slice": "indexed by what is known only at run time",
    "slice": "sliced across its layout",
    "dot_general": "multiplied with a parameter",
}


def _shape(x: Any, cut: Cut | None) -> tuple[int, ...]:
    shape = tuple(x.shape)
    return shape if cut is None else (*shape[: cut[0]], cut[2], *shape[cut[0] + 1 :])


def _reaches(origins: Sequence[Origin], key: Key) -> bool:
    """Whether a weight lies in one of the values."""
    leaf, region = key
    for origin in origins:
        for view in origin.views if isinstance(origin, Join) else (origin,):
            if isinstance(view, View) and view.leaf == leaf:
                inner = zip(region, view.region, strict=True)
                if all(a >= b and a + n <= b + m for (a, n), (b, m) in inner):
                    return True
    return False


def _cuts(
    eqn: Any, side: int, origin: Join, x_ndim: int
) -> list[tuple[Cut | None, Cut | None]] | None:
    """Which part of the operand and of the product belongs to each view of a concatenation."""
    if eqn.primitive.name == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        contracted, stack = contract[side], batch[side]
        free = [i for i in range(len(origin.views[0].dims)) if i not in (*contracted, *stack)]
        others = x_ndim - len(contract[1 - side]) - len(stack)
        if origin.axis in stack:
            return None
        in_x = origin.axis in contracted
        if in_x:
            axis = contract[1 - side][list(contracted).index(origin.axis)]
        else:
            axis = len(stack) + (others if side == 1 else 0) + free.index(origin.axis)
    else:
        numbers = eqn.params["dimension_numbers"]
        grouped = eqn.params["feature_group_count"] > 1
        if grouped or origin.axis not in numbers.rhs_spec[:2]:
            return None
        in_x = origin.axis == numbers.rhs_spec[1]
        axis = (numbers.lhs_spec if in_x else numbers.out_spec)[1]
    found: list[tuple[Cut | None, Cut | None]] = []
    start = 0
    for n in origin.sizes:
        cut = (int(axis), start, n)
        found.append((cut, None) if in_x else (None, cut))
        start += n
    return found
