"""Laws of what is stored: how much, in an operation too, in which dtype, and copies of it."""

from __future__ import annotations

import copy
import pickle
import tracemalloc

import numpy as np

from singd_core._array import cast
from singd_core.structures.base import Structure
from singd_core.testing.draw import Case, near_side
from singd_core.testing.law import law
from singd_core.testing.laws_arrays import attempt
from singd_core.testing.mismatch import require
from singd_core.testing.operations import DENSE, OPERATIONS


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


@law(backends=("numpy",), dtypes=("float64",), guard=True, examples=1)
def width(case: Case) -> None:
    """`width(d)` is a whole number from 1 to d."""
    w = case.S.width(case.d)
    require(1 <= w <= case.d and w == int(w), f"width({case.d}) = {w}")


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
    sides = {near_side(S, d) for d in (256, 1024)} - {None}
    return next((d for d in sorted(d for d in sides if d) if S.numbers(d) <= d * d // 32), None)


def dense_operations(S: type[Structure]) -> list[str]:
    """The operations that form d × d matrices though a member stores far fewer numbers."""
    d = few_numbers(S)
    peaks = {} if d is None else allocated(S, d)
    wide = [name for name in OPERATIONS if d is not None and peaks.get(name, 0) > d * d // 2]
    return list(dict.fromkeys(name.partition(",")[0] for name in wide))


@law(backends=("numpy",), dtypes=("float64",), examples=1, sizes=(256,), floats=False)
def no_dense_intermediate(case: Case) -> None:
    """An operation that a structure of few numbers writes itself forms no d × d matrix.

    Those that it inherits from `Structure` do; a report lists them.
    """
    for name in dense_operations(case.S):
        writer = next(c for c in case.S.__mro__ if name in vars(c))
        message = f"{name} held d²/2 numbers at once or more, where a member stores far fewer"
        require(writer is Structure, message)


@law()
def astype(case: Case) -> None:
    """`L.astype(like)` holds each array of L in the dtype of `like`, rounded once."""
    L = case.member()
    for dtype in case.backend.dtypes:
        like = case.backend.to(np.zeros(()), dtype)
        for (name, old), (_, new) in zip(
            L.named_arrays(), L.astype(like).named_arrays(), strict=True
        ):
            require(new.dtype == like.dtype, f"{name!r}: expected {like.dtype}, got {new.dtype}")
            case.equal(new, cast(old, like), f"{name!r} in {dtype}")


@law(examples=1)
def state_round_trip(case: Case) -> None:
    """A member is rebuilt from its named arrays by the skeleton that `identity(d)` is."""
    for batch in ((), (2,)):
        L = case.member("L", batch)
        skeleton = case.S.identity(case.d, like=case.to(0.0), batch=batch)
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
