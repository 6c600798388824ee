"""What an optimizer is given: which parameters form layers, and the checks of all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np

from singd_core._array import Array, is_complex, is_inexact
from singd_core._layer_state import Parameter, State, pair, parts
from singd_core.layers import LayerKind, Linear, Tensor
from singd_core.layers.base import is_expand, loss_terms


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
    others = ((name, p) for name, p in params.items() if name not in layers)
    found = ((name, _tensor_of(p)) for name, p in others)
    return {name: kind for name, kind in found if kind is not None}


def _tensor_of(parameter: Parameter) -> LayerKind | None:
    """How a parameter is a matrix, None if it is none; a tuple has a weight and its bias."""
    arrays = parts(parameter)
    if not _is_parameter(parameter):
        return None
    if not all(is_inexact(a) and not is_complex(a) for a in arrays):
        return None
    weight, bias = pair(parameter)
    if bias is not None:
        return Tensor.with_bias(weight.shape, bias.shape)
    return Tensor.of(weight.shape) if Tensor.fits(weight.shape) else None


def _is_parameter(value: Any) -> bool:
    """Whether it is an array, or a tuple of a weight and its bias."""
    is_whole = not isinstance(value, tuple) or len(value) == 2
    return is_whole and all(getattr(a, "shape", None) is not None for a in parts(value))


def _is_matrix(weight: Array) -> bool:
    return getattr(weight, "ndim", 0) == 2 and not is_complex(weight)


def check_pair(name: str, value: Any) -> None:
    """Check that something is given for K and for C.

    Raises:
        ValueError: Naming the argument and its value.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}={value!r}: give two, one for K and one for C")


def check_options(kfac_approx: str, loss_average: str | int | None, dtypes: Any) -> None:
    """Check what an optimizer has beside its settings, before any rows come.

    Raises:
        ValueError: Naming the argument and its value.
    """
    is_expand(kfac_approx)
    loss_terms(loss_average, 1, ())
    check_pair("preconditioner_dtype", dtypes)


def check_named(params: Any) -> None:
    """Refuse what is no dictionary of parameters.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is empty, or two names have the same text, as 0 and "0" do.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be a dictionary of arrays, or of tuples (weight, bias), by name, not "
            f"a {type(params).__name__}"
        )
    if not params:
        raise ValueError("params is empty: there is nothing to train")
    texts = dict[str, Any]()
    for name in params:
        if (other := texts.setdefault(str(name), name)) is not name:
            raise ValueError(
                f"params has the names {other!r} and {name!r}, which are one in a saved state: "
                "rename one"
            )


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
        raise ValueError(
            f"{name!r} has a bias but is no layer: name it in layers=, or give the bias a name of "
            'its own. Without layers, the recipe has to be "normalized", both have to be real, and '
            "the bias has to have the shape of its weight's rows, which are two or more"
        )
    if kind is None:
        return
    if any(map(is_complex, parts(parameter))):
        raise ValueError(
            f"{name!r} is complex, and {kind} is a real layer: leave it out of layers=, and give a "
            "bias a name of its own; AdamW trains both"
        )
    weight, bias = pair(parameter)
    try:
        kind.check_weight(tuple(weight.shape), bias is not None)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    if bias is None:
        return
    batch, d_out, _ = kind.shape(tuple(weight.shape), True)
    outputs = prod(batch) * d_out
    # it is a column of the matrix, or of each of them
    flat = not kind.has_rows or tuple(bias.shape) in ((outputs,), (*batch, d_out))
    if prod(bias.shape) != outputs or not flat:
        raise ValueError(
            f"{name!r}: the bias has shape {tuple(bias.shape)}, but a weight of shape "
            f"{tuple(weight.shape)} has {outputs} outputs" + ("" if flat else " along one axis")
        )


def shapes_of(name: str, parameter: Parameter, what: str = "") -> list[tuple[int, ...]]:
    """The shapes of the one or two arrays of a parameter, or `what`, e.g. "the gradient of ".

    Raises:
        TypeError: If it is neither an array nor a tuple of two.
    """
    if not _is_parameter(parameter):
        raise TypeError(
            f"{what}{name!r} must be an array or a tuple (weight, bias), not {described(parameter)}"
        )
    return [tuple(part.shape) for part in parts(parameter)]


def described(x: Any) -> str:
    """What something is, for the message of an error."""
    many = f" of {len(x)}" if isinstance(x, (tuple, list)) else ""
    return "None" if x is None else f"a {type(x).__name__}{many}"


def _library(x: Array) -> str:
    """Whose dtypes an array has: arrays that share them can be computed with each other."""
    # bfloat16 of JAX is a dtype of NumPy, whose type ml_dtypes defines.
    of_numpy = isinstance(x.dtype, np.dtype)
    return "numpy" if of_numpy else type(x.dtype).__module__.partition(".")[0]


def check_library(what: str, array: Array, like: Array) -> None:
    """Refuse an array whose library is not its parameter's.

    Raises:
        TypeError: Naming both.
    """
    if array.dtype != like.dtype and _library(array) != _library(like):
        names = (f"{type(a).__module__}.{type(a).__name__}" for a in (array, like))
        raise TypeError(
            "{} is a {}, its parameter a {}: give arrays of one library".format(what, *names)
        )


def check_layers(layers: Any) -> None:
    """Refuse what is no dictionary of kinds.

    Raises:
        TypeError: Naming what it is.
    """
    if layers is None:
        return
    check_mapping("layers", layers)
    for name, kind in layers.items():
        if not isinstance(kind, LayerKind):
            raise TypeError(f"layers[{name!r}] = {kind!r}: give a kind of layer, e.g. Linear()")


def check_mapping(what: str, given: Any) -> None:
    """Refuse what is no dictionary.

    Raises:
        TypeError: Naming what it is.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{what} must be a dictionary by name, not {described(given)}")


def a_state(state: Any) -> State:
    """The state that was given.

    Raises:
        TypeError: If it is something else, such as its flat form.
    """
    if not isinstance(state, State):
        raise TypeError(
            f"the state is {described(state)}: give what `init`, `update` or `unflatten` returned"
        )
    return state


def check_update(
    grads: Mapping[str, Parameter],
    state: State,
    params: Mapping[str, Parameter],
    rows: Any = None,
    curvature: Any = None,
    refreshed: Any = None,
) -> None:
    """Refuse gradients that are not structured like the parameters, and a state of others.

    The last three stand in each other's place.

    Raises:
        TypeError: If a gradient is neither an array nor a tuple of two, or of another library, or
            if more than one of the last three is given.
        ValueError: If names, shapes or kinds of numbers differ.
    """
    last = {"rows": rows, "curvature": curvature, "refreshed": refreshed}
    several = [name for name, given in last.items() if given is not None]
    if len(several) > 1:
        raise TypeError(f"{' and '.join(several)} are given: give one of them")
    a_state(state)
    check_gradients(grads, params)
    for parameter in params.values():
        check_library("an array of the state", state.skipped, pair(parameter)[0])
    odd = _odd({*state.layers, *state.fallback}, params)
    if odd:
        raise ValueError(
            f"the state and the parameters have different names: {odd} in only one of them; "
            "`init(params)` makes the state"
        )


def check_gradients(grads: Mapping[str, Parameter], params: Mapping[str, Parameter]) -> None:
    """Refuse gradients that are not structured like the parameters.

    Raises:
        TypeError: If one is neither an array nor a tuple of two, or of another library.
        ValueError: If names, shapes or kinds of numbers differ.
    """
    check_mapping("params", params)
    check_alike(grads, params, "gradients", "the gradient of ")
    for name, parameter in params.items():
        for gradient, weight in zip(parts(grads[name]), parts(parameter), strict=True):
            if gradient.dtype != weight.dtype:
                _check_gradient(f"the gradient of {name!r}", gradient, weight)


def _check_gradient(what: str, gradient: Array, weight: Array) -> None:
    """Refuse a gradient whose numbers are of another kind than its parameter's."""
    check_library(what, gradient, weight)
    if not is_inexact(gradient) or (is_complex(gradient) and not is_complex(weight)):
        raise ValueError(f"{what} is of {gradient.dtype}, its parameter of {weight.dtype}: cast it")


def check_alike(
    given: Mapping[str, Parameter], params: Mapping[str, Parameter], whats: str, what: str
) -> None:
    """Refuse what is not structured like the parameters.

    Args:
        given: E.g. gradients.
        params: The parameters.
        whats: What is given, e.g. "gradients".
        what: What is given of one, e.g. "the gradient of ".

    Raises:
        TypeError: If it is no dictionary of arrays and tuples of two.
        ValueError: If names or shapes differ.
    """
    check_mapping(whats, given)
    if odd := _odd(given, params):
        raise ValueError(f"{whats} and parameters have different names: {odd} in only one of them")
    for name, parameter in params.items():
        got, expected = shapes_of(name, given[name], what), shapes_of(name, parameter)
        if got != expected:
            raise ValueError(f"{what}{name!r} has shape {got}, its parameter {expected}")


def _odd(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The names that are in only one of two."""
    return sorted({*names} ^ {*others}, key=str)
