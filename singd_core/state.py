"""The state as a flat dictionary of arrays: the same names in every frontend.

    <layer>.K.<array>, <layer>.C.<array>      the factors, and m_K, m_C (KFAC: S_K, S_C, P_K, P_C)
    <layer>.averages.t_U, .t_G, .k            averages of the refreshes, and their number
    <layer>.levels.rows, .columns             the levels of rows and columns, if they are kept
    <layer>.momentum_buffer                   the momentum of the weight, in its shape
    <layer>.bias_momentum_buffer              the momentum of the bias
    <layer>.late.squares, .weights, ...       sums over late gradients, if they are kept
    <layer>.compensation, .bias_compensation  the rounding errors, if they are kept
    <parameter>.exp_avg, .exp_avg_sq, .step   the moments of a parameter that AdamW trains
    step, skipped                             counts of the whole optimizer
    largest_lr                                the largest rate of its steps

Any format that stores named arrays can hold it: `numpy.savez`, safetensors, orbax. `step` and
`largest_lr` may be plain numbers, of which safetensors wants arrays: `numpy.asarray`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from singd_core._array import Array, device, is_complex, is_inexact, namespace, widen
from singd_core._given import a_state
from singd_core._layer_state import State
from singd_core._warnings import warn
from singd_core.adamw import Moments
from singd_core.rules import inputs_of

_NUMBERS = "step", "largest_lr"
_FACTORS = "factors."


def flatten(state: State) -> dict[str, Any]:
    """The arrays of a state, and the numbers `step` and `largest_lr`, under their names.

    Raises:
        TypeError: If `state` is no state.
    """
    return {name: getattr(a_state(state), name) for name in _NUMBERS} | dict(_named(state))


def unflatten(template: State, flat: Mapping[str, Any]) -> State:
    """The state with the arrays of a flat dictionary, in their dtypes, on the template's devices.

    Args:
        template: A state of the same parameters and settings, e.g. a new one from `init`.
        flat: The result of `flatten`, with arrays of any library.

    Warns:
        UserWarning: Naming the layers that begin anew, since rows or AdamW trained them before and
            now they learn from gradients.

    Raises:
        TypeError: If `template` is no state, or `flat` no dictionary.
        ValueError: Naming the first entry that is missing, left over, of another shape or kind of
            numbers, or not finite.
    """
    if not isinstance(flat, Mapping):
        raise TypeError(f"the saved state must be a dictionary, not a {type(flat).__name__}")
    for name in _NUMBERS:
        if name not in flat:
            raise ValueError(f"the saved state has no {name!r}: is it what `flatten` returned?")
    arrays, flat = [], _fitted(a_state(template), flat)
    expected = dict(_named(template))
    for name in flat:
        if name not in _NUMBERS and name not in expected:
            raise ValueError(f"the saved state has {name!r}, which this optimizer does not")
    for name, array in expected.items():
        if name not in flat:
            raise ValueError(f"the saved state has no {name!r}: another structure or recipe?")
        raw = _in_known_dtype(name, flat[name], array)
        saved = namespace(array).asarray(raw, device=device(array), copy=True)
        if saved.shape != array.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(saved.shape)} in the saved state, "
                f"but {tuple(array.shape)} is needed"
            )
        _check_numbers(name, saved, array)
        arrays.append(saved)
    numbers = {name: _number(name, flat[name], getattr(template, name)) for name in _NUMBERS}
    restored = dataclasses.replace(template, step=0, largest_lr=0.0).rebuild(arrays)
    return dataclasses.replace(restored, **numbers)


def _number(name: str, saved: Any, number: Any) -> Any:
    """What was saved of a number, an array where a compiled step has it on the device."""
    if not isinstance(number, (int, float)):
        return namespace(number).asarray(saved, dtype=number.dtype, device=device(number))
    whole = " and whole" if isinstance(number, int) else ""
    try:
        found = type(number)(saved)
        fits = 0 <= found < math.inf and (not whole or found == float(saved))
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"{name!r} is {saved} in the saved state: must be at least 0{whole}")
    return found


def _check_numbers(name: str, saved: Array, array: Array) -> None:
    """Check that what was saved are numbers of the kind of an array, all of them finite."""
    kinds = [(is_inexact(a), is_complex(a)) for a in (saved, array)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{name!r} is of {saved.dtype} in the saved state, "
            f"but {array.dtype} or another of its kind is needed"
        )
    if is_inexact(saved) and not bool(
        namespace(saved).all(namespace(saved).isfinite(widen(saved)))
    ):
        raise ValueError(f"{name!r} is not finite in the saved state")


def _fitted(template: State, flat: Mapping[str, Any]) -> dict[str, Any]:
    """With what a weight that learns from gradients keeps now and did not keep.

    It begins anew if it had no mean of inputs: AdamW trained its bias or both of them, or the bias
    was a column. The averages of rows begin anew, where factors learn from gradients now.
    """
    found, anew = dict(flat), list[str]()
    for name, layer in template.layers.items():
        was_there = any(f"{name}.{entry}" in flat for entry in ("averages.k", "exp_avg"))
        has_mean = inputs_of(layer.factors) is None or f"{name}.inputs.mean" in flat
        if was_there and not has_mean:
            fresh = ((k.removeprefix(_FACTORS), a) for k, a in layer.named_arrays())
            found |= {f"{name}.{k}": a for k, a in fresh}
            found = {k: a for k, a in found.items() if not _is_left_over(k, template)}
            anew.append(name)
            continue
        t_U, averages = flat.get(f"{name}.averages.t_U"), layer.factors.averages
        if not layer.factors.has_rows and t_U is not None:
            xp = namespace(averages.t_U)
            if bool(xp.any(xp.asarray(t_U, device=device(averages.t_U)) > 0.0)):
                zeros = averages.map(xp.zeros_like)
                found |= dict(zeros.named_arrays(f"{name}.averages."))
    if anew:
        warn(
            "the saved state is of layers with rows, or of AdamW, where these learn from gradients "
            f"now: {', '.join(anew)}. They begin anew, their momenta too"
        )
    return found


def _is_left_over(name: str, template: State) -> bool:
    """Whether an entry is what AdamW kept of a parameter that it does not train any more."""
    parameter, _, entry = name.rpartition(".")
    return entry in Moments.field_names() and parameter not in {"", *template.fallback}


def _in_known_dtype(name: str, saved: Any, array: Array) -> Any:
    """What was saved, where a file of NumPy has kept the bytes of its dtype alone: of bfloat16."""
    kinds = [getattr(getattr(a, "dtype", None), "kind", "") for a in (saved, array)]
    if kinds[0] == "V" and kinds[1] != "V":
        raise ValueError(
            f"{name!r} was saved in a dtype that NumPy does not know, e.g. bfloat16, and "
            f"{array.dtype} is needed: give this optimizer the dtypes of the saved one"
        )
    return saved.view(array.dtype) if kinds[0] == "V" else saved


def _named(state: State) -> list[tuple[str, Array]]:
    """The arrays in the order of `state.named_arrays`, under the names of a checkpoint."""
    named = [("skipped", state.skipped)]
    for name, layer in state.layers.items():
        named += [(f"{name}.{key.removeprefix(_FACTORS)}", a) for key, a in layer.named_arrays()]
    for name, moments in state.fallback.items():
        named += moments.named_arrays(f"{name}.")
    return named
