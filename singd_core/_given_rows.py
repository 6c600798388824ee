"""The checks of rows that an optimizer is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from singd_core._array import Array, is_complex
from singd_core._given import check_library, check_mapping, described
from singd_core._layer_state import Parameter, State, pair
from singd_core.layers import LayerKind


def rows_of(
    rows: Mapping[str, Any],
    kinds: Mapping[str, LayerKind],
    params: Mapping[str, Parameter],
    state: State | None = None,
) -> list[tuple[str, Array, Array]]:
    """The name of each layer with rows, its input and the gradient at its output.

    Without a state, all kinds that have rows get some.

    Raises:
        TypeError: If they are no pair of arrays of the library of their parameter.
        ValueError: If a name is no layer with rows, or rows are complex.
    """
    check_mapping("rows", rows)
    check_rows(rows, kinds, state)
    found = [(name, *row_pair(name, given)) for name, given in rows.items()]
    for name, x, g in found:
        _check_numbers(name, x, g, params[name])
    return found


def check_rows(
    names: Iterable[str], kinds: Mapping[str, LayerKind], state: State | None = None
) -> None:
    """Refuse rows of what has none.

    Raises:
        ValueError: Naming the first.
    """
    for name in names:
        if state is not None and name not in state.layers:
            raise ValueError(f"rows of {name!r}: {_why_not(name, state)}")
        if name not in kinds:
            raise ValueError(f"rows of {name!r}: no such layer; the layers are {list(kinds)}")
        if not (kinds[name].has_rows and (state is None or state.layers[name].factors.has_rows)):
            raise ValueError(f"rows of {name!r}: it learns from its gradient alone")


def check_made(what: str, given: Any, by: str, kind: type[Any], state: State) -> None:
    """Refuse what no method of an optimizer has made for the layers of its state.

    Args:
        what: What is given for each layer, e.g. "curvature".
        given: What is given, by name.
        by: The method that makes it.
        kind: The class of what it makes.
        state: The current state.

    Raises:
        TypeError: If it is no dictionary, or something else is given for a layer.
        ValueError: If a name is no layer.
    """
    check_mapping(what, given)
    for name, one in given.items():
        if name not in state.layers:
            raise ValueError(f"{what} of {name!r}: {_why_not(name, state)}")
        if not isinstance(one, kind):
            raise TypeError(f"{what} of {name!r}: give what `{by}` returned, not {described(one)}")


def _why_not(name: str, state: State) -> str:
    """Why a name is none of a layer."""
    why = "AdamW trains it" if name in state.fallback else "no such layer"
    return f"{why}; the layers are {list(state.layers)}"


def row_pair(name: str, rows: Any) -> tuple[Array, Array]:
    """The layer's input and the gradient at its output.

    Raises:
        TypeError: If they are not two.
    """
    if isinstance(rows, (tuple, list)) and len(rows) == 2:
        return rows[0], rows[1]
    raise TypeError(
        f"rows of {name!r} must be a pair, the layer's input and the gradient at its output, not "
        f"{described(rows)}; a layer without rows is left out"
    )


def _check_numbers(name: str, x: Any, g: Any, parameter: Parameter) -> None:
    """Refuse rows that are no arrays of real numbers, or arrays of another library.

    Raises:
        TypeError: If one is no array of the library of its parameter.
        ValueError: If one is complex.
    """
    weight = pair(parameter)[0]
    for what, array in (("input", x), ("output gradient", g)):
        if not hasattr(array, "dtype") or not hasattr(array, "ndim"):
            raise TypeError(
                f"rows of {name!r}: its {what} must be an array, not {described(array)}"
            )
        check_library(f"rows of {name!r}: its {what}", array, weight)
        if array.dtype != weight.dtype and is_complex(array):
            raise ValueError(f"rows of {name!r}: its {what} is complex, and a layer is a real map")
