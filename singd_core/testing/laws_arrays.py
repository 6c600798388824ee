"""Laws of the arrays: dtype, device, batch axes, no changes, and no waiting for the device."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from array_api_compat import device

from singd_core._array import namespace
from singd_core.structures.base import Structure
from singd_core.testing.draw import Case
from singd_core.testing.host_sync import no_host_sync
from singd_core.testing.law import law
from singd_core.testing.mismatch import require
from singd_core.testing.operations import OPERATIONS, SCALARS, arrays, dtype_of
from singd_core.testing.pytree_jax import register_trees


def arguments(case: Case, batch: tuple[int, ...] = (), c: Any = 0.5) -> tuple[Any, ...]:
    """What every operation can be called with."""
    L, R = case.member("L", batch), case.member("R", batch)
    return L, R, case.rows(batch=batch), case.symmetric(batch=batch), c


def attempt(name: str, given: tuple[Any, ...]) -> Any:
    """The result of an operation, or None if it raises: that is for the laws of its numbers."""
    try:
        return OPERATIONS[name](*given)
    except Exception:
        return None


@law(backends=("numpy",), dtypes=("float64",), guard=True, examples=1, sizes=(3,))
def declared(case: Case) -> None:
    """The class is decorated with `structure`, so that its arrays are the fields of a dataclass."""
    own = [
        n for n, t in vars(case.S).get("__annotations__", {}).items() if "ClassVar" not in str(t)
    ]
    frozen = getattr(getattr(case.S, "__dataclass_params__", None), "frozen", False)
    require(frozen, "it is no frozen dataclass")
    missing = [n for n in own if n not in case.S.field_names()]
    require(not missing, f"{', '.join(missing)} is no field")
    require(len(case.S.field_names()) > 0, "it has no fields")


def _evaluate(case: Case, name: str, given: tuple[Any, ...]) -> Any:
    """The result of an operation; in jax its shapes and dtypes, which need no compilation."""
    if case.backend.library != "jax":
        return attempt(name, given)
    register_trees()
    try:
        return importlib.import_module("jax").eval_shape(OPERATIONS[name], *given)
    except Exception:
        return None


@law(guard=True, examples=1)
def dtype_of_the_leaf(case: Case) -> None:
    """Every result has the dtype of the arrays (sums at least float32), whatever a scalar has."""
    leaf = case.to(0.0)
    others = [case.backend.to(np.asarray(0.5), t) for t in ("float32", "float64")]
    if case.backend.name == "numpy":
        others += [c[()] for c in others]  # NumPy's scalars: its own sums are no 0-d arrays
    for c in (0.5, *others):
        for name in OPERATIONS if isinstance(c, float) else SCALARS:
            result = _evaluate(case, name, arguments(case, c=c))
            for array, x in arrays(result) if result is not None else ():
                expected = dtype_of(name, leaf)
                scalar = "" if isinstance(c, float) else f" with a 0-d scalar in {c.dtype}"
                where = f"{name}{scalar}" + (f", array {array!r}" if array else "")
                require(x.dtype == expected, f"{where}: expected {expected}, got {x.dtype}")


@law(backends=("numpy",), guard=True, examples=1)
def like(case: Case) -> None:
    """`L.like` is one of the arrays, of a stack too."""
    for batch in ((), (2,)):
        L = case.member("L", batch)
        require(any(a is L.like for _, a in L.named_arrays()), "it is none of them")


@law(backends=("strict", "torch:cuda", "cupy"), guard=True, examples=1)
def device_of_the_leaf(case: Case) -> None:
    """Every result is on the device of the arrays, and nothing is made on another."""
    place = device(case.to(0.0))
    given = arguments(case, c=case.to(0.5))
    for name, operation in OPERATIONS.items():
        try:
            result = operation(*given)
        except Exception as error:
            if attempt(name, _on_host(given)) is not None:
                raise RuntimeError(f"{name}: {error}") from error
            continue
        for _, x in arrays(result):
            require(device(x) == place, f"{name}: expected {place}, got {device(x)}")


def _on_host(given: tuple[Any, ...]) -> tuple[Any, ...]:
    def move(x: Any) -> Any:
        if isinstance(x, Structure):
            return x.map(move)
        xp = namespace(x)
        return xp.asarray(x, device=xp.Device("CPU_DEVICE")) if hasattr(xp, "Device") else x

    return tuple(move(x) for x in given)


@law(backends=("strict",), guard=True, examples=1)
def no_waiting_for_the_device(case: Case) -> None:
    """No operation reads a number back to the host, and no shape depends on data."""
    given = arguments(case, c=case.to(0.5))
    for name, operation in OPERATIONS.items():
        if attempt(name, given) is not None:
            try:
                with no_host_sync():
                    operation(*given)
            except Exception as error:
                raise RuntimeError(f"{name}: {error}") from error


@law(backends=("numpy", "torch", "cupy"), dtypes=("float64",), guard=True, examples=1)
def nothing_is_changed(case: Case) -> None:
    """No operation changes the arrays it is given."""
    xp = namespace(case.to(0.0))

    def copied(x: Any) -> Any:
        return x.map(copied) if isinstance(x, Structure) else xp.asarray(x, copy=True)

    given = arguments(case, c=case.to(0.5))
    for name in OPERATIONS:
        used = tuple(copied(x) for x in given)
        attempt(name, used)
        for argument, old, new in zip(("L", "R", "X", "M", "c"), given, used, strict=True):
            case.equal(new, old, f"{name} changes {argument}")


# in jax, the laws of `jit` and of `vmap` compare stacks: a loop would compile everything anew
@law(backends=("numpy", "strict", "torch", "cupy"), examples=1)
def batch_axes_equal_a_loop(case: Case) -> None:
    """Every operation on a stack gives the stack of its results, also with a scalar for each."""
    for batch in ((2,), (2, 3)):
        each = case.to(np.arange(1.0, 1.0 + np.prod(batch)).reshape(batch))
        for names, c in ((OPERATIONS, each), (SCALARS, 0.5)):
            stack = arguments(case, batch, c=c)
            for name in names:
                _compare_with_a_loop(case, name, stack, batch)


def _compare_with_a_loop(
    case: Case, name: str, stack: tuple[Any, ...], batch: tuple[int, ...]
) -> None:
    result = case.numpy(OPERATIONS[name](*stack))
    for i in np.ndindex(batch):
        alone = case.numpy(OPERATIONS[name](*(_pick(x, i) for x in stack)))
        require(
            result[i].shape == alone.shape,
            f"{name} of a stack {batch}: expected {alone.shape}, got {result[i].shape}",
        )
        scale = float(np.max(np.abs(result), initial=0.0)) + 4.0 * case.d
        case.near(result[i], alone, scale, f"{name} of a stack {batch}, at {i}")


def _pick(x: Any, i: tuple[int, ...]) -> Any:
    if isinstance(x, float):
        return x
    return x.map(lambda a: a[(*i, ...)]) if isinstance(x, Structure) else x[(*i, ...)]
