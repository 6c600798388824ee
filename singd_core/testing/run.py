"""Runs a law: small sizes first, and the numbers of a counterexample made few and small."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from singd_core.structures.base import Structure
from singd_core.testing.backends import Backend, backend
from singd_core.testing.draw import Case, show
from singd_core.testing.law import Law, LawError, nightly

_TRIALS = 300  # calls of a law to shrink a counterexample


def sizes_of(S: type[Structure], backend: str = "numpy", dtype: str = "float64") -> tuple[int, ...]:
    """The sides to try: 1, 2, below and above the structure's parameters, and no multiples.

    jax compiles every operation for each shape anew, so it gets fewer.
    """
    parameters = S.made_by[1] if S.made_by else ()
    k = max((p for p in parameters if isinstance(p, int)), default=0)
    large = (k + 1, 2 * k + 3) if k > 4 else ()
    if nightly():
        sides = {*range(1, 13), 16, 17, *large, *((k - 1, k, 2 * k, 3 * k - 1) if large else ())}
    elif backend == "numpy":
        sides = {1, 2, 3, 5, 8, *large}
    elif backend == "jax":
        sides = {1, 5, *large[-1:]} if dtype == "float32" else {5}
    else:
        sides = {1, 2, 5, *large[-1:]}
    return tuple(sorted(sides))


def run(
    law: Law, S: type[Structure], backend: Backend, dtype: str, sizes: Sequence[int] | None = None
) -> None:
    """Check a law of a structure with one array library and dtype.

    Raises:
        LawError: With the smallest counterexample found.
    """
    key: Any = S
    exact = not _rounds(law, key, None if sizes is None else tuple(sizes))
    with backend.active():
        for case in _cases(law, S, backend, dtype, sizes):
            case.exact = exact
            error = _broken(law, case)
            if error is not None:
                raise _shrunk(law, case, error)


def _cases(
    law: Law, S: type[Structure], backend: Backend, dtype: str, sizes: Sequence[int] | None
) -> Iterator[Case]:
    examples = law.examples if backend.name == "numpy" or law.examples == 1 else 2
    examples *= 10 if nightly() else 1
    name = zlib.crc32(law.name.encode())
    fixed = law.sizes[-1:] if law.sizes and backend.library == "jax" else law.sizes
    for d in sizes or fixed or sizes_of(S, backend.library, dtype):
        for i in range(examples):
            # the last one is of floats: a single one is of integers
            floats = law.floats and i > 0 and i == examples - 1
            yield Case(S, backend, dtype, d, (name, d, i), floats)


@functools.cache
def _rounds(law: Law, S: Any, sizes: tuple[int, ...] | None) -> bool:
    """Whether the operations of a law round with this structure, seen on integers in NumPy.

    Operations that take a square root may be exact by luck, so three dtypes are asked.
    """
    numpy = backend("numpy")
    for dtype in numpy.dtypes if numpy else ():
        if numpy is None or not law.speaks_of("numpy", dtype):
            continue
        for case in _cases(law, S, numpy, dtype, sizes):
            case.exact = False
            if not case.floats and _broken(law, case) is None and case.rounded:
                return True
    return False


def _broken(law: Law, case: Case) -> Exception | None:
    """What is wrong in a case."""
    try:
        law.check(case)
    except Exception as error:  # whatever an operation raises breaks the law
        return error
    return None


def _shrunk(law: Law, case: Case, error: Exception) -> LawError:
    """The error of a case, after numbers that do not matter were set to 0, others to 1 and 2."""
    best, trials = case, 0 if law.examples > 1 else _TRIALS
    for name in list(case.drawn):
        for index in np.ndindex(case.drawn[name].shape):
            for simple in (0.0, 1.0, 2.0):
                old = best.drawn[name][index]
                if old == simple or (simple and old in (0.0, 1.0)) or trials >= _TRIALS:
                    break
                trials += 1
                drawn = {n: a.copy() for n, a in best.drawn.items()}
                drawn[name][index] = simple
                simpler = Case(
                    case.S,
                    case.backend,
                    case.dtype,
                    case.d,
                    case.seed,
                    case.floats,
                    case.exact,
                    drawn,
                )
                new = _broken(law, simpler)
                if new is not None and type(new) is type(error):
                    best, error = simpler, new
                    break
    return _error(law, best, error)


def _error(law: Law, case: Case, cause: Exception) -> LawError:
    kind = "" if isinstance(cause, AssertionError) else f"{type(cause).__name__}: "
    values = "".join(
        f"\n{name} =\n  " + show(a).replace("\n", "\n  ")
        for name, a in case.drawn.items()
        if law.examples > 1  # the others name the operation that fails on any numbers
    )
    error = LawError(
        f'{case.S.__name__} breaks the law "{law.name}": {law.promise}\n'
        f"on {case.backend.name} in {case.dtype}, with d = {case.d}: {kind}{cause}"
        + (f"\nwith{values}" if values else "")
    )
    error.law, error.structure, error.d = law.name, case.S, case.d
    error.backend, error.dtype = case.backend.name, case.dtype
    error.__cause__ = cause
    return error
