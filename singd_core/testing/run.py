"""Runs a law: small sizes first, on examples that hypothesis draws and makes few and small."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from singd_core.structures.base import Structure
from singd_core.testing.backends import Backend, backend
from singd_core.testing.draw import Case, near_side
from singd_core.testing.law import Law, LawError, label, nightly
from singd_core.testing.mismatch import indent, show

try:
    import hypothesis
    from hypothesis import strategies
except ImportError as error:
    raise ImportError(
        "the laws draw their examples with hypothesis: pip install '.[testing]' in a checkout"
    ) from error

# The same examples in every run, without a file or a time limit, whatever profile is loaded.
_SETTINGS = hypothesis.settings(
    database=None,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(hypothesis.HealthCheck),
    verbosity=hypothesis.Verbosity.quiet,  # a LawError shows the example itself
)
# In the nightly profile: sides beyond 64 and 128, where libraries and people change the algorithm,
# and as many columns as reach beyond a small batch.
_LARGE = 67, 131
_COLUMNS = 3, 33
_AT_ONCE = 8  # sides in an example, for which hypothesis draws 8 kB
_DRAW, _SHRINK = hypothesis.Phase.generate, hypothesis.Phase.shrink


def _sizes(law: Law, S: type[Structure], backend: str, dtype: str) -> tuple[int, ...]:
    """The sides to try: 1, 2, below and above the structure's parameters, and no multiples.

    jax compiles every operation for each shape anew, so it gets fewer. A structure that has not all
    sides is tried at the nearest that it has.
    """
    near = {near_side(S, d) for d in _wanted(law, S, backend, dtype)} - {None}
    if not near:
        raise ValueError(f"{label(S)}.has_side(d) is true for no d near 1")
    return tuple(sorted(d for d in near if d))


def _wanted(law: Law, S: type[Structure], backend: str, dtype: str) -> Iterable[int]:
    if law.sizes:
        return law.sizes[-1:] if backend == "jax" else law.sizes
    parameters = S.made_by[1] if S.made_by else ()
    k = max((p for p in parameters if isinstance(p, int)), default=0)
    large = (k + 1, 2 * k + 3) if k > 4 else ()
    if nightly():
        sides = {*range(1, 13), 16, 17, *large, *((k - 1, k, 2 * k, 3 * k - 1) if large else ())}
        sides |= set(_LARGE[:1] if backend == "jax" else _LARGE)
    elif backend == "numpy":
        sides = {1, 2, 3, 5, 8, *large}
    elif backend == "jax":
        sides = {5, *large[-1:]} if dtype == "float32" else {5}
    else:
        sides = {1, 2, 5, *large[-1:]}
    return sides


def run(
    law: Law,
    S: type[Structure],
    backend: Backend,
    dtype: str,
    sizes: Sequence[int] | None = None,
    *,
    shrink: bool = True,
) -> None:
    """Check a law of a structure with one array library and dtype.

    Raises:
        LawError: With the smallest counterexample found, or with `shrink=False` the first.
        ValueError: If the structure has no matrices of a side in `sizes`, or these are not whole
            numbers of at least 1.
    """
    for d in sizes or ():
        if d < 1 or d != int(d):
            raise ValueError(f"sizes: a side is a whole number of at least 1, got {d!r}")
        if not S.has_side(d):
            raise ValueError(f"sizes: {label(S)} has no matrices of side {d}")
    key: Any = S
    sides = sizes or _sizes(law, S, backend.library, dtype)
    rounds = functools.partial(_rounds, law, key, None if sizes is None else tuple(sizes))
    case = functools.partial(Case, S, backend, dtype, rounds=rounds)
    few = law.examples if backend.name == "numpy" else min(law.examples, 3)

    @hypothesis.seed(_seed(law))
    @hypothesis.settings(
        _SETTINGS,
        max_examples=few * (25 if nightly() else 1),
        phases=(_DRAW, _SHRINK) if shrink else (_DRAW,),
    )
    @hypothesis.given(data=strategies.data())
    def holds(some: Sequence[int], data: Any) -> None:
        for d in some:
            columns = data.draw(strategies.sampled_from(_COLUMNS)) if nightly() else _COLUMNS[0]
            floats = law.floats and data.draw(strategies.booleans())
            drawn = functools.partial(_drawn, data)
            _attempt(law, case(d, drawn, columns=columns, floats=floats))

    with backend.active():
        if law.examples == 1:
            for d in sides:
                _attempt(law, case(d, _seeded(law, d)))
        else:
            for i in range(0, len(sides), _AT_ONCE):
                holds(sides[i : i + _AT_ONCE])


def _drawn(data: Any, n: int) -> bytes:
    found: bytes = data.draw(strategies.binary(min_size=n, max_size=n))
    return found


def _seed(law: Law) -> int:
    return zlib.crc32(law.name.encode())


def _seeded(law: Law, *seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng([_seed(law), *seed]).bytes


def _attempt(law: Law, case: Case) -> None:
    try:
        law.check(case)
    except Exception as error:  # whatever an operation raises breaks the law
        raise _error(law, case, error) from error


@functools.cache
def _rounds(law: Law, S: Any, sizes: tuple[int, ...] | None) -> bool:
    """Whether the operations of a law round with this structure, seen on integers in NumPy.

    Operations that take a square root may be exact by luck, so three dtypes are asked.
    """
    numpy = backend("numpy")
    for dtype in numpy.dtypes if numpy else ():
        if numpy is None or not law.speaks_of("numpy", dtype):
            continue
        for d in sizes or _sizes(law, S, "numpy", dtype):
            for i in range(2):
                case = Case(S, numpy, dtype, d, _seeded(law, d, i), rounds=lambda: True)
                try:
                    law.check(case)
                except Exception:
                    continue
                if case.rounded:
                    return True
    return False


def _error(law: Law, case: Case, cause: Exception) -> LawError:
    kind = "" if isinstance(cause, AssertionError) else f"{type(cause).__name__}: "
    values = "".join(
        f"\n{name}{', the restriction of' if name in case.members else ' ='}\n{indent(show(a))}"
        for (name, _), a in case.drawn.items()
        if law.examples > 1  # the others name the operation that fails on any numbers
    )
    error = LawError(
        f'{label(case.S)} breaks the law "{law.name}": {law.promise}\n'
        f"on {case.backend.name} in {case.dtype}, with d = {case.d}: {kind}{cause}"
        + (f"\nwith{values}" if values else "")
    )
    error.law, error.structure, error.d = law.name, case.S, case.d
    error.backend, error.dtype = case.backend.name, case.dtype
    return error
