"""Every use of what jax does not promise to keep: its jaxprs, and types that vary over a mesh.

Written for jax 0.8 to 0.12. Primitives are matched by name: their objects move between modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from singd_core import _array

_array.TRACED = (jax.core.Tracer,)

Jaxpr: TypeAlias = Any
Equation: TypeAlias = Any
Variable: TypeAlias = Any
T = TypeVar("T")


def is_literal(v: Variable) -> bool:
    """Whether an operand is a constant written into the jaxpr."""
    return isinstance(v, core.Literal)


def is_smooth(v: Variable) -> bool:
    """Whether a variable holds numbers that have gradients."""
    return bool(jnp.issubdtype(v.aval.dtype, jnp.inexact))


def evaluate(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """The results of one equation, by jax's own evaluator: rules of differentiation are kept."""
    given = {
        v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, core.Literal)
    }
    names = {"arg_names": ("",) * len(given), "result_paths": ("",) * len(eqn.outvars)}
    told = _debug_info()._replace(**names)
    jaxpr = core.Jaxpr([], list(given), list(eqn.outvars), [eqn], eqn.effects, debug_info=told)
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, []))(*given.values()))


@functools.cache
def _debug_info() -> Any:
    return jax.make_jaxpr(lambda: 0)().jaxpr.debug_info


# Equations that run a jaxpr as it is, and those with rules of differentiation of their own.
INLINE = ("jit", "closed_call")
REFS = ("addupdate", "get", "swap")
OWN_RULES = ("custom_jvp_call", "custom_vjp_call")
# All that run the jaxpr which `inner_jaxpr` returns, once.
RUNS = (*INLINE, "remat2", *OWN_RULES)


def inner_jaxpr(eqn: Equation) -> tuple[Jaxpr, Sequence[Any]]:
    """The jaxpr that a call runs, and its constants."""
    found = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
    return (found.jaxpr, found.consts) if isinstance(found, core.ClosedJaxpr) else (found, ())


def apply(closed: Any, values: Sequence[Any]) -> list[Any]:
    """The results of a closed jaxpr."""
    return list(core.jaxpr_as_fun(closed)(*values))


def without_dead_equations(closed: Any) -> Any:
    """A jaxpr without the equations that no result needs; with all its operands."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), True)
    return core.ClosedJaxpr(jaxpr, closed.consts)


# What has no derivative anywhere.
FLAT = {"ceil", "floor", "round", "sign", "stop_gradient"}


def trained(jaxpr: Jaxpr, gives: Sequence[bool]) -> set[Variable]:
    """The variables of a jaxpr through which a gradient goes back from those results."""
    found = {v for v, own in zip(jaxpr.outvars, gives, strict=True) if own and not is_literal(v)}
    for eqn in reversed(jaxpr.eqns):
        through = [v in found and is_smooth(v) for v in eqn.outvars]
        if eqn.primitive.name in FLAT:
            found -= set(eqn.outvars)
        elif any(through):
            takes = zip(eqn.invars, _takes(eqn, through), strict=True)
            found |= {v for v, own in takes if own and not is_literal(v)}
    return found


def _takes(eqn: Equation, gives: Sequence[bool]) -> list[bool]:
    """Which operands of an equation a gradient may go back to from those results."""
    if eqn.primitive.name == "scan":
        jaxpr, gives = eqn.params["jaxpr"].jaxpr, scanned(eqn, gives)
    elif eqn.primitive.name in (*INLINE, "remat2"):
        jaxpr, _ = inner_jaxpr(eqn)
    else:
        return [True] * len(eqn.invars)
    found = trained(jaxpr, gives)
    return [v in found for v in jaxpr.invars]


def scanned(eqn: Equation, gives: Sequence[bool]) -> list[bool]:
    """Which results of a step of a scan a gradient goes back from: what a later step takes too."""
    jaxpr, (consts, carry) = eqn.params["jaxpr"].jaxpr, scan_counts(eqn.params)
    old: list[bool] = []
    new = list(gives)
    while new != old:
        old, found = new, trained(jaxpr, new)
        carried = zip(old, jaxpr.invars[consts : consts + carry], strict=False)
        new = [own or v in found for own, v in carried] + old[carry:]
    return new


def is_traced(*arguments: Any) -> bool:
    """Whether a program is made of what is done with some of these; else it is done at once."""
    return any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(arguments))


def cond(condition: Any, function: Callable[[], T], other: Callable[[], T]) -> T:
    """`jax.lax.cond`, which in a step that is not compiled would compile both, and keep them."""
    if is_traced(condition):
        found: T = jax.lax.cond(condition, function, other)
        return found
    return function() if condition else other()


def switch(
    eqn: Equation, index: Any, branches: Sequence[Callable[..., Any]], *args: Any
) -> Sequence[Any]:
    """A cond's branch of that index, or of the platform: other platforms' cannot be compiled."""
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return jax.lax.switch(index, branches, *args)  # type: ignore[no-any-return]
    own = {
        name: branch
        for names, branch in zip(platforms, branches, strict=True)
        for name in names or ["default"]
    }
    return jax.lax.platform_dependent(*args, **own)  # type: ignore[no-any-return]


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan (a tree from jax 0.11 on)."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, *_ = (len(list(part)) for part in params["ft_in"].unpack())
    return consts, carry


def manual_axes(eqn: Equation) -> dict[Any, int]:
    """The mesh axes of a shard_map over which its body is per device, and their lengths."""
    p = eqn.params
    lengths = dict(p["mesh"].shape)
    return {name: lengths[name] for name in p.get("newly_manual_axes", p.get("manual_axes"))}


def shard_map(eqn: Equation, f: Callable[..., Any]) -> Callable[..., Any]:
    """`f(operands, extra)` under the shard_map of an equation, `extra` the same everywhere."""
    partition: Any = jax.sharding.PartitionSpec
    p = eqn.params
    return jax.shard_map(
        f,
        mesh=p["mesh"],
        in_specs=(list(p["in_specs"]), partition()),
        out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=set(manual_axes(eqn)),
    )


def varying(x: Any) -> frozenset[Any]:
    """The mesh axes over which `x` differs between devices, inside shard_map."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", None) or getattr(kind, "vma", None) or ())


def vary(x: Any, axes: frozenset[Any]) -> Any:
    """`x` marked as different between devices: autodiff then sums its gradient over them."""
    new = tuple(axes - varying(x))
    if not new:
        return x
    lax: Any = jax.lax
    return lax.pcast(x, new, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, new)


def promoting(f: Callable[..., T]) -> Callable[..., T]:
    """`f`, which may promote ranks and dtypes whatever jax is told of a user's code."""

    @functools.wraps(f)
    def function(*args: Any, **keywords: Any) -> T:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return f(*args, **keywords)

    return function


def kept(x: Any, count: Any) -> Any:
    """A small array in memory, where every kernel reads it.

    XLA computes numbers anew in each kernel that wants them: compiling the step of 49 layers took
    twice as long with all sums of squares in each. On a CPU it drops `optimization_barrier`,
    but it keeps what is written to a place that it does not know.

    Args:
        x: The array.
        count: A 0-d integer that is not negative.
    """
    two = jnp.zeros((2, *x.shape), x.dtype)
    return jax.lax.dynamic_update_index_in_dim(two, x, jnp.minimum(count, 0), 0)[0]


def is_local(*trees: Any) -> bool:
    """Whether each array of a program lies on one device, as far as the types of some tell.

    There is one, the program is of one of several, or each device has its own.
    """
    sharding: Any = jax.sharding
    mesh = sharding.get_abstract_mesh()
    if jax.device_count() == 1 or 0 < len(mesh.axis_names) == len(mesh.manual_axes):
        return True
    meshes = mesh, *map(_mesh, jax.tree.leaves(trees))
    return all(mesh is None or mesh.size <= 1 for mesh in meshes)


def whole(x: Any) -> Any:
    """`x`, on every device if its type says that it is divided: then it can be cut anywhere."""
    sharding: Any = jax.sharding
    typed = getattr(jax.typeof(x), "sharding", None)
    if typed is None or all(names is None for names in typed.spec):
        return x
    return sharding.reshard(x, sharding.NamedSharding(typed.mesh, sharding.PartitionSpec()))


def auto_sharded(f: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """`f` with its shardings left to XLA, the result sharded like `like`, on explicit meshes.

    The mesh is of the context, or else the types of the arrays have it.
    """
    sharding: Any = jax.sharding
    if jax.device_count() == 1:
        return f

    def run(*args: Any) -> Any:
        meshes = [sharding.get_abstract_mesh(), *map(_mesh, jax.tree.leaves((args, like)))]
        mesh = next((m for m in meshes if m is not None and m.explicit_axes), None)
        if mesh is None:
            return f(*args)

        def spec(leaf: Any) -> Any:
            known = _mesh(leaf) is not None
            own = jax.typeof(leaf).sharding.spec if known else sharding.PartitionSpec()
            return own if mesh is meshes[0] else sharding.NamedSharding(mesh, own)

        return sharding.auto_axes(f, out_sharding=jax.tree.map(spec, like))(*args)

    return run


def _mesh(x: Any) -> Any:
    """The mesh that the type of an array has, None if it has none."""
    typed = getattr(getattr(x, "aval", x), "sharding", None)
    mesh = getattr(typed, "mesh", None)
    return None if mesh is None or mesh.empty else getattr(mesh, "abstract_mesh", mesh)
