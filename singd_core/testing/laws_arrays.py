"""Laws of the arrays: dtype, device, memory, batch axes, state, and no waiting for the device."""

from __future__ import annotations

import copy
import importlib
import pickle
import tracemalloc
from typing import Any

import numpy as np
from array_api_compat import device

from singd_core._array import is_half, namespace
from singd_core.structures.base import Structure
from singd_core.testing.backends import no_host_sync
from singd_core.testing.draw import Case
from singd_core.testing.law import law
from singd_core.testing.mismatch import require
from singd_core.testing.operations import DENSE, OPERATIONS, SUMS, arrays
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


def dtype_of(name: str, leaf: Any) -> Any:
    """The dtype that the result of an operation on arrays like `leaf` has to have."""
    return namespace(leaf).float32 if name in SUMS and is_half(leaf) else leaf.dtype


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
        for name in OPERATIONS if isinstance(c, float) else ("scale", "add_identity"):
            result = _evaluate(case, name, arguments(case, c=c))
            for array, x in arrays(result) if result is not None else ():
                expected = dtype_of(name, leaf)
                scalar = "" if isinstance(c, float) else f" with a 0-d scalar in {c.dtype}"
                where = f"{name}{scalar}" + (f", array {array!r}" if array else "")
                require(x.dtype == expected, f"{where}: expected {expected}, got {x.dtype}")


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


@law(backends=("numpy",), dtypes=("float64",), guard=True, examples=1)
def numbers_as_declared(case: Case) -> None:
    """`numbers(d)` is how many numbers a member, and the identity, store."""
    declared = case.S.numbers(case.d)
    members = {
        "a member": case.member(),
        "the identity": case.S.identity(case.d, like=case.to(0.0)),
    }
    for what, L in members.items():
        stored = sum(int(np.size(a)) for _, a in L.named_arrays())
        require(stored == declared, f"numbers({case.d}) = {declared}, but {what} stores {stored}")


def allocated(S: type[Structure], d: int) -> dict[str, int]:
    """How many float64 numbers each operation held at once, with NumPy, beyond its input."""
    I = S.identity(d, like=np.zeros(()))
    given = (I, I.scale(2.0), np.ones((d, 3)), None, 0.5)
    peaks = {}
    for name in OPERATIONS.keys() - DENSE:
        tracemalloc.start()
        attempt(name, given)
        peaks[name] = tracemalloc.get_traced_memory()[1] // 8
        tracemalloc.stop()
    return peaks


def few_numbers(S: type[Structure]) -> int | None:
    """A side at which a member stores at most d²/32 numbers, or None: then d² are declared."""
    return next((d for d in (256, 1024) if S.numbers(d) <= d * d // 32), None)


def dense_operations(S: type[Structure]) -> list[str]:
    """The operations that form d × d matrices though a member stores far fewer numbers."""
    d = few_numbers(S)
    peaks = {} if d is None else allocated(S, d)
    return [name for name in OPERATIONS if d is not None and peaks.get(name, 0) > d * d // 2]


@law(backends=("numpy",), dtypes=("float64",), examples=1, sizes=(256,), floats=False)
def no_dense_intermediate(case: Case) -> None:
    """An operation that a structure of few numbers writes itself forms no d × d matrix.

    Those that it inherits from `Structure` do; a report lists them.
    """
    for name in dense_operations(case.S):
        writer = next(c for c in case.S.__mro__ if name in vars(c))
        message = f"{name} held d²/2 numbers at once or more, where a member stores far fewer"
        require(writer is Structure, message)


# in jax, the laws of `jit` and of `vmap` compare stacks: a loop would compile everything anew
@law(backends=("numpy", "strict", "torch", "cupy"), examples=1)
def batch_axes_equal_a_loop(case: Case) -> None:
    """Every operation on a stack gives the stack of its results, also with a scalar for each."""
    for batch in ((2,), (2, 3)):
        numbers = np.arange(1.0, 1.0 + np.prod(batch)).reshape(batch)
        stack = arguments(case, batch, c=case.to(numbers))
        for name, operation in OPERATIONS.items():
            result = case.numpy(operation(*stack))
            for i in np.ndindex(batch):
                alone = case.numpy(operation(*(_pick(x, i) for x in stack)))
                require(
                    result[i].shape == alone.shape,
                    f"{name} of a stack {batch}: expected {alone.shape}, got {result[i].shape}",
                )
                scale = float(np.max(np.abs(result), initial=0.0)) + 4.0 * case.d
                try:
                    case.same(result[i], lambda x: x, alone, exact=False, scale=scale)
                except AssertionError as error:
                    raise AssertionError(f"{name} of a stack {batch}, at {i}: {error}") from None


def _pick(x: Any, i: tuple[int, ...]) -> Any:
    return x.map(lambda a: a[(*i, ...)]) if isinstance(x, Structure) else x[(*i, ...)]


@law(examples=1)
def state_round_trip(case: Case) -> None:
    """A member is rebuilt from its named arrays by the skeleton that `identity(d)` is."""
    L, skeleton = case.member(), case.S.identity(case.d, like=case.to(0.0))
    state = dict(L.named_arrays())
    names = [name for name, _ in L.named_arrays()]
    require(len(state) == len(names), f"two arrays have one name: {names}")
    for (name, a), (other, b) in zip(L.named_arrays(), skeleton.named_arrays(), strict=True):
        require(name == other, f"identity(d) has {other!r} where a member has {name!r}")
        require(a.shape == b.shape, f"{name!r}: shape {a.shape}, in identity(d) {b.shape}")
    saved = {name: case.to(case.backend.back(a)) for name, a in state.items()}
    case.equal(skeleton.rebuild(saved[name] for name in names), L)


@law(backends=("numpy",), dtypes=("float64",), examples=1)
def pickle_round_trip(case: Case) -> None:
    """A member comes back from pickle, and from a deep copy, as it was."""
    L = case.member()
    for new in (pickle.loads(pickle.dumps(L)), copy.deepcopy(L)):
        require(type(new) is type(L), f"it comes back as a {type(new).__name__}")
        case.equal(new, L)
