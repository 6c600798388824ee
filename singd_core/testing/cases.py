"""`@laws(...)`: one pytest case for each law, structure, array library and dtype."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from singd_core.structures.base import Structure
from singd_core.structures.registry import get
from singd_core.testing.backends import Backend
from singd_core.testing.law import LAWS, Law, label
from singd_core.testing.report import cases
from singd_core.testing.run import run

# The marks of pytest that a law has for a structure, on an array library and in a dtype.
Marks: TypeAlias = Callable[[type[Structure], Law, Backend, str], Sequence[Any]]


def laws(
    *structures: type[Structure] | str,
    xfail: Mapping[Any, str] | None = None,
    sizes: Sequence[int] | None = None,
) -> Callable[[Callable[..., None]], Any]:
    """Make a test of one argument, which it calls, one pytest case for each law.

    ```python
    @laws(Circulant, xfail={"gram": "not written yet"})
    def test_circulant(law):
        law()
    ```

    Args:
        *structures: The structures, or their registered names.
        xfail: Reasons why a law is known to be broken, by its name or by (structure, name). If it
            holds after all, the case fails.
        sizes: As for `check_structure`.

    Raises:
        ValueError: If `xfail` names no law.
    """
    pytest: Any = importlib.import_module("pytest")
    reasons = dict(xfail or {})
    for key in reasons:
        name = key[1] if isinstance(key, tuple) else key
        if name not in LAWS:
            raise ValueError(f"xfail: there is no law {name!r}; there are {', '.join(LAWS)}")

    def marks(S: type[Structure], law: Law, backend: Backend, dtype: str) -> list[Any]:
        why = reasons.get((S, law.name), reasons.get(law.name))
        return [pytest.mark.xfail(reason=why, strict=True)] if why else []

    def decorate(test: Callable[..., None]) -> Any:
        argument = test.__code__.co_varnames[0]
        return pytest.mark.parametrize(argument, list(parameters(structures, marks, sizes)))(test)

    return decorate


def parameters(
    structures: Iterable[type[Structure] | str], marks: Marks, sizes: Sequence[int] | None = None
) -> Iterator[Any]:
    """One pytest parameter for each law, structure, array library and dtype, with these marks."""
    pytest: Any = importlib.import_module("pytest")
    for S in map(get, structures):
        for law, backend, dtype in cases():
            yield pytest.param(
                functools.partial(run, law, S, backend, dtype, None if law.sizes else sizes),
                id=f"{label(S)}-{law.name}-{backend.name}-{dtype}",
                marks=marks(S, law, backend, dtype),
            )
