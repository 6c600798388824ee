"""Laws of jax: under its transformations a structure gives what it gives without."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np

from singd_core.structures.base import Structure
from singd_core.testing.draw import Case
from singd_core.testing.law import law
from singd_core.testing.laws_arrays import arguments
from singd_core.testing.laws_optimizer import compare_steps, draw_step, optimizer_of, step_in_numpy
from singd_core.testing.laws_optimizer import step as optimizer_step
from singd_core.testing.mismatch import require
from singd_core.testing.operations import arrays, dtype_of, everything, step
from singd_core.testing.pytree_jax import register_trees


def _jax() -> Any:
    register_trees()
    return importlib.import_module("jax")


def compare(case: Case, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare results with NumPy's, array by array up to rounding, and their dtype."""
    for name, result in expected.items():
        for (array, new), (_, old) in zip(arrays(actual[name]), arrays(result), strict=True):
            where = name + (f", array {array!r}" if array else "")
            dtype = dtype_of(name, case.to(0.0))
            require(new.dtype == dtype, f"{where}: expected {dtype}, got {new.dtype}")
            scale = float(np.max(np.abs(old), initial=0.0)) + 4.0 * case.d
            case.near(new, old, scale, where)


def in_numpy(case: Case, *given: Any) -> tuple[Any, ...]:
    """Structures and arrays as NumPy float64."""
    return tuple(x.map(case.numpy) if isinstance(x, Structure) else case.numpy(x) for x in given)


@law(backends=("jax",), dtypes=("float32",), guard=True, examples=1, sizes=(5,))
def jax_pytree(case: Case) -> None:
    """A structure is a pytree of jax: its leaves are its arrays, and it is rebuilt of anything."""
    tree_util, L = _jax().tree_util, case.member()
    leaves, treedef = tree_util.tree_flatten(L)
    require(len(leaves) == len(list(L.named_arrays())), f"it has {len(leaves)} leaves")
    for leaf, (name, a) in zip(leaves, L.named_arrays(), strict=True):
        require(leaf is a, f"the leaf of {name!r} is another array")
    paths = [
        ".".join(str(getattr(key, "name", key)) for key in path)
        for path, _ in tree_util.tree_flatten_with_path(L)[0]
    ]
    names = [name for name, _ in L.named_arrays()]
    require(paths == names, f"expected the paths {names}, got {paths}")
    require(tree_util.tree_structure(case.member("R")) == treedef, "two members differ as trees")
    case.equal(tree_util.tree_unflatten(treedef, leaves), L)
    tree_util.tree_unflatten(treedef, [object()] * len(leaves))
    case.same(tree_util.tree_map(lambda a: 2.0 * a, L), lambda L: 2.0 * L, L)


@law(backends=("jax",), examples=1, sizes=(5,))
def jax_jit(case: Case) -> None:
    """Every operation gives under `jax.jit` what it gives in NumPy, also of a stack."""
    given = arguments(case, (2,), c=case.to([0.5, 2.0]))
    compare(case, _jax().jit(everything)(*given), everything(*in_numpy(case, *given)))


@law(backends=("jax",), dtypes=("float32",), guard=True, examples=1, sizes=(5,))
def jax_eval_shape(case: Case) -> None:
    """`jax.eval_shape` finds the shapes and dtypes of every operation without data."""
    given = arguments(case, c=case.to(0.5))
    found = _jax().eval_shape(everything, *given)
    for name, result in everything(*in_numpy(case, *given)).items():
        dtype = dtype_of(name, case.to(0.0))
        for (_, a), (_, b) in zip(arrays(found[name]), arrays(result), strict=True):
            same = a.shape == b.shape and a.dtype == dtype
            require(same, f"{name}: expected {b.shape} {dtype}, got {a.shape} {a.dtype}")


@law(backends=("jax",), dtypes=("float32",), examples=1, sizes=(5,))
def jax_vmap(case: Case) -> None:
    """Under `jax.vmap` over a stack every operation gives the stack of its results."""
    stack = arguments(case, (2,), c=case.to([0.5, 2.0]))
    jax = _jax()
    compare(case, jax.jit(jax.vmap(everything))(*stack), everything(*in_numpy(case, *stack)))


@law(backends=("jax",), dtypes=("float32",), examples=1, sizes=(5,))
def jax_scan(case: Case) -> None:
    """Three updates K (I − β m) in `jax.lax.scan` are three updates in a loop."""
    X, start = case.array("X", 3, case.d, 3), case.S.identity(case.d, like=case.to(0.0))
    scanned, _ = _jax().lax.scan(lambda K, X: (step(K, X, 0.1), None), start, X)
    looped, rows = in_numpy(case, start, X)
    for i in range(3):
        looped = step(looped, rows[i], 0.1)
    compare(case, {"step": scanned}, {"step": looped})


def scalar(L: Structure, X: Any, xp: Any) -> Any:
    """A number that depends on a member through the products, the projection and the sums."""
    total = L.trace() + L.norm()
    for result in (L.apply(X), L.apply_t(X), L.gram(), L.congruence(X), L.matmul(L)):
        for _, a in arrays(result):
            total = total + xp.sum(
                xp.sin(a / 64.0)
            )  # entries up to 100: a sine of 100 rounds by 1e-5
    return total


def check_gradient(case: Case, L: Structure, R: Structure, X: Any, gradient: Structure) -> None:
    """Compare ⟨gradient, R⟩ with NumPy's central difference of `scalar` in the direction R."""
    # the difference rounds by 1e-16 / h and is off by h²; the gradient, in float32, by some 1e-7
    h = 1e-5
    L, R, X, gradient = in_numpy(case, L, R, X, gradient)
    expected = (scalar(L + R.scale(h), X, np) - scalar(L - R.scale(h), X, np)) / (2.0 * h)
    pairs = zip(gradient.named_arrays(), R.named_arrays(), strict=True)
    got = sum(float(np.sum(g * r)) for (_, g), (_, r) in pairs)
    size = sum(float(np.sum(np.abs(g))) for _, g in gradient.named_arrays())
    close = abs(got - expected) <= 1e-5 * (1.0 + size)
    require(close, f"expected the derivative {expected:.8g}, got {got:.8g}")


@law(backends=("jax",), dtypes=("float32",), examples=1, sizes=(5,))
def jax_grad(case: Case) -> None:
    """`jax.grad` of a function of a member agrees with its differences."""
    jax, case.floats = _jax(), True
    L, R, X = case.member("L"), case.member("R"), case.rows()
    gradient = jax.jit(jax.grad(lambda L, X: scalar(L, X, jax.numpy)))(L, X)
    check_gradient(case, L, R, X, gradient)


@law(backends=("jax",), dtypes=("float32",), guard=True, examples=1, sizes=(4,))
def jax_step_without_data(case: Case) -> None:
    """`jax.eval_shape` finds the shapes and dtypes of a whole optimizer step without data."""
    optimizer, given = optimizer_of(case), draw_step(case)
    state = optimizer.init({"W": given[0]})
    function = functools.partial(optimizer_step, optimizer)
    change, after = _jax().eval_shape(function, state, *given)
    require(change.shape == given[0].shape, f"the change of W has shape {change.shape}")
    states = dict(after.named_arrays())
    for name, old in state.named_arrays():
        new = states[name]
        same = new.shape == old.shape and new.dtype == old.dtype
        require(same, f"{name}: expected {old.shape} {old.dtype}, got {new.shape} {new.dtype}")


@law(backends=("jax",), dtypes=("float32",), examples=1, sizes=(4,))
def jax_step(case: Case) -> None:
    """A whole optimizer step under `jax.jit` gives what NumPy gives."""
    optimizer, given = optimizer_of(case), draw_step(case)
    state = optimizer.init({"W": given[0]})
    jitted = _jax().jit(functools.partial(optimizer_step, optimizer))
    compare_steps(case, jitted(state, *given), step_in_numpy(case, given))
