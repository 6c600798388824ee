"""Code that equal layers have in common: it is traced once, and XLA compiles its kernels once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from singd_core.layers import LayerKind
from singd_core.rounding import Rounding
from singd_jax import _compat

T = TypeVar("T")


def shared(function: Callable[..., T]) -> Callable[..., T]:
    """A function that a program has once, however often it calls it.

    A step that is not compiled would compile it anew, and keep it.
    """
    once = jax.jit(function)

    @wraps(function)
    def called(*arguments: Any) -> T:
        found: T = (once if _compat.is_traced(arguments) else function)(*arguments)
        return found

    return called


class Shared:
    """Runs functions of one parameter; equal layers call one compiled function.

    It lives as long as one step is traced. Steps that are not traced run everything as it is.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`."""
        traced = _compat.is_traced(arguments)
        if not (traced and isinstance(function, partial)) or function.keywords:
            return function(*arguments)
        given, key = function.args, (function.func, *map(_identity, function.args))
        bits = [_bits(a) if isinstance(a, Rounding) else None for a in given]
        if key not in self._known:

            def of_arrays(bits: list[Any], arguments: Any) -> Any:
                own = [
                    a if b is None else a._replace(**b) for a, b in zip(given, bits, strict=True)
                ]
                return function.func(*own, *arguments)

            # the function is kept alive too, so that what it holds keeps its id
            self._known[key] = jax.jit(of_arrays), function
        return self._known[key][0](bits, arguments)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let go of what is traced inside: what such functions hold may be of an inner trace."""
        known, self._known = self._known, {}
        try:
            yield
        finally:
            self._known = known


def _identity(given: Any) -> Any:
    """What tells functions apart that hold this."""
    if isinstance(given, LayerKind):
        return given
    return tuple(given.dtypes.items()) if isinstance(given, Rounding) else id(given)


def _bits(rounding: Rounding) -> dict[str, Any]:
    """What differs between layers."""
    return {name: jnp.asarray(getattr(rounding, name), jnp.int32) for name in ("base", "owner")}
