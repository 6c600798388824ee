"""What an optimizer is given: which parameters form layers, and the checks of all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from singd_core._array import Array, is_complex, is_inexact
from singd_core._layer_state import Parameter, State, pair, parts
from singd_core.layers import LayerKind, Linear, Tensor


def kinds_of(
    layers: Mapping[str, LayerKind] | None, params: Mapping[str, Parameter]
) -> Mapping[str, LayerKind]:
    """The kind of each layer; where none are named, each tuple and each matrix is linear.

    A complex matrix is no layer unless named: a layer is a real map.

    Raises:
        ValueError: If a layer is named that is no parameter.
    """
    if layers is None:
        return {n: Linear() for n, p in params.items() if isinstance(p, tuple) or _is_matrix(p)}
    for name in layers:
        if name not in params:
            raise ValueError(f"layers: {name!r} is no parameter; there are {list(params)}")
    return layers


def tensors_of(
    layers: Mapping[str, LayerKind], params: Mapping[str, Parameter]
) -> dict[str, LayerKind]:
    """The kinds of the other parameters whose gradients are all that their factors want."""
    others: dict[str, Any] = {n: p for n, p in params.items() if n not in layers}
    return {
        n: Tensor.of(p.shape)
        for n, p in others.items()
        if Tensor.fits(getattr(p, "shape", ())) and is_inexact(p) and not is_complex(p)
    }


def _is_matrix(weight: Array) -> bool:
    return getattr(weight, "ndim", 0) == 2 and not is_complex(weight)


def check_pair(name: str, value: Any) -> None:
    """Check that something is given for K and for C.

    Raises:
        ValueError: Naming the argument and its value.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}={value!r}: give two, one for K and one for C")


def check_named(params: Any) -> None:
    """Refuse what is no dictionary of parameters.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is empty.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be a dictionary of arrays, or of tuples (weight, bias), by name, not "
            f"a {type(params).__name__}"
        )
    if not params:
        raise ValueError("params is empty: there is nothing to train")


def check_params(params: Mapping[str, Parameter], kinds: Mapping[str, LayerKind]) -> None:
    """Refuse what is no parameter, or no layer of its kind.

    Raises:
        TypeError: If one is neither an array nor a tuple of two.
        ValueError: If one is not of floating-point numbers, or does not fit its kind.
    """
    for name, parameter in params.items():
        _check_parameter(name, parameter, kinds.get(name))


def _check_parameter(name: str, parameter: Parameter, kind: LayerKind | None) -> None:
    shapes_of(name, parameter)
    if not all(map(is_inexact, parts(parameter))):
        raise ValueError(f"{name!r} is not of floating-point numbers: leave it out")
    if kind is None and isinstance(parameter, tuple):
        raise ValueError(f"{name!r} has a bias but is no layer: name it in layers=")
    if kind is None:
        return
    if any(map(is_complex, parts(parameter))):
        raise ValueError(
            f"{name!r} is complex, and {kind} is a real layer: leave it out of layers=, and give a "
            "bias a name of its own; AdamW trains both"
        )
    weight, bias = pair(parameter)
    try:
        batch, d_out, _ = kind.shape(tuple(weight.shape), bias is not None)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    outputs = prod(batch) * d_out
    if bias is not None and prod(bias.shape) != outputs:
        raise ValueError(
            f"{name!r}: the bias has shape {tuple(bias.shape)}, but a weight of shape "
            f"{tuple(weight.shape)} has {outputs} outputs"
        )


def shapes_of(name: str, parameter: Parameter, what: str = "") -> list[tuple[int, ...]]:
    """The shapes of the one or two arrays of a parameter, or `what`, e.g. "the gradient of ".

    Raises:
        TypeError: If it is neither an array nor a tuple of two.
    """
    found = [getattr(part, "shape", None) for part in parts(parameter)]
    if None in found or len(found) > 2 or not found:
        raise TypeError(
            f"{what}{name!r} must be an array or a tuple (weight, bias), "
            f"not {_described(parameter)}"
        )
    return [tuple(shape) for shape in found if shape is not None]


def check_rows(names: Iterable[str], kinds: Mapping[str, LayerKind], state: State) -> None:
    """Refuse rows of what has none.

    Raises:
        ValueError: Naming the first.
    """
    for name in names:
        if name not in state.layers:
            why = "AdamW trains it" if name in state.fallback else "no such layer"
            raise ValueError(f"rows of {name!r}: {why}; the layers are {list(state.layers)}")
        if not kinds[name].has_rows:
            raise ValueError(f"rows of {name!r}: it learns from its gradient alone")


def row_pair(name: str, rows: Any) -> tuple[Array, Array]:
    """The layer's input and the gradient at its output.

    Raises:
        TypeError: If they are not two.
    """
    if isinstance(rows, (tuple, list)) and len(rows) == 2:
        return rows[0], rows[1]
    raise TypeError(
        f"rows of {name!r} must be a pair, the layer's input and the gradient at its output, not "
        f"{_described(rows)}; a layer without rows is left out"
    )


def _described(x: Any) -> str:
    many = f" of {len(x)}" if isinstance(x, (tuple, list)) else ""
    return "None" if x is None else f"a {type(x).__name__}{many}"


def check_update(
    grads: Mapping[str, Parameter], state: State, params: Mapping[str, Parameter]
) -> None:
    """Refuse gradients that are not structured like the parameters, and a state of others.

    Raises:
        TypeError: If a gradient is neither an array nor a tuple of two.
        ValueError: If names or shapes differ.
    """
    if grads.keys() != params.keys():
        odd = sorted(set(grads) ^ set(params))
        raise ValueError(
            f"gradients and parameters have different names: {odd} in only one of them"
        )
    for name, parameter in params.items():
        got = shapes_of(name, grads[name], "the gradient of ")
        expected = shapes_of(name, parameter)
        if got != expected:
            raise ValueError(f"the gradient of {name!r} has shape {got}, its parameter {expected}")
    odd = sorted({*state.layers, *state.fallback} ^ set(params))
    if odd:
        raise ValueError(
            f"the state and the parameters have different names: {odd} in only one of them; "
            "`init(params)` makes the state"
        )
