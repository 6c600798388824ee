"""`@laws(...)`: one pytest case for each law, structure, array library and dtype."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from singd_core.structures.base import Structure
from singd_core.structures.registry import get
from singd_core.testing.law import LAWS, label
from singd_core.testing.report import cases
from singd_core.testing.run import run


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

    def parameters() -> Iterator[Any]:
        for S in map(get, structures):
            for law, backend, dtype in cases():
                why = reasons.get((S, law.name), reasons.get(law.name))
                marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
                check = functools.partial(run, law, S, backend, dtype, None if law.sizes else sizes)
                name = f"{label(S)}-{law.name}-{backend.name}-{dtype}"
                yield pytest.param(check, id=name, marks=marks)

    def decorate(test: Callable[..., None]) -> Any:
        argument = test.__code__.co_varnames[0]
        return pytest.mark.parametrize(argument, list(parameters()))(test)

    return decorate
