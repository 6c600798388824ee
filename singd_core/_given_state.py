"""The check of the state that a step is given: it fits the parameters and the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from singd_core import rules
from singd_core._given_rows import check_made, check_rows
from singd_core._layer_state import LayerState, Parameter, State, parts
from singd_core._settings import Settings
from singd_core.layers import LayerKind
from singd_core.rules.shampoo import Shampoo
from singd_core.step import has_momentum
from singd_core.structures import Structure

# What K and C are to be of a parameter, as a kind has it; None if nobody knows.
Chosen: TypeAlias = Callable[[LayerKind, Parameter], tuple[type[Structure], type[Structure]] | None]


def check_state(
    state: State,
    params: Mapping[str, Parameter],
    kinds: Mapping[str, LayerKind],
    s: Settings,
    with_rows: Iterable[str],
    refreshed: Mapping[str, rules.Factors],
    chosen: Chosen,
) -> None:
    """Refuse a state that `init` has not made of such parameters and settings.

    `with_rows` are the names of which a curvature is given, and `refreshed` factors that are.

    Raises:
        TypeError: If something else is given in the place of factors.
        ValueError: Naming the first parameter whose state does not fit, and why.
    """
    for name, parameter in params.items():
        layer = state.layers.get(name)
        if (layer is None) != (name not in kinds):
            why = "has no factors" if layer is None else "is one of a layer, which it is not here"
        elif layer is None:
            fits = tuple(state.fallback[name].exp_avg.shape) == _shapes(parameter)[0]
            why = "" if fits else "has another shape"
        else:
            why = _misfit(layer, parameter, kinds[name], s) or _other_structures(
                layer.factors, chosen(kinds[name], parameter)
            )
        if why:
            raise ValueError(
                f"the state of {name!r} {why}: it is a state of other parameters or settings; "
                "`init(params)` makes one of these"
            )
    check_rows(with_rows, kinds, state)
    check_made("refreshed factors", refreshed, "refresh", rules.Factors, state)


def _misfit(layer: LayerState, parameter: Parameter, kind: LayerKind, s: Settings) -> str:
    """Why the state of a layer does not fit, "" if it does."""
    own, wanted = layer.factors, rules.get(s.rule)
    if layer.momenta is not None and [tuple(m.shape) for m in layer.momenta] != _shapes(parameter):
        return "has another shape"
    if not isinstance(own, (wanted, Shampoo)):
        return f"has factors of {type(own).__name__}, not of {wanted.__name__}"
    if own.has_rows and not kind.has_rows:
        return "wants rows, of which it gets none here"
    if has_momentum(s) and layer.momenta is None:
        return "has no momentum"
    if layer.momenta is not None and (layer.late is not None) != s.normalized:
        return "has a momentum of another recipe"
    return ""


def _other_structures(
    factors: rules.Factors, chosen: tuple[type[Structure], type[Structure]] | None
) -> str:
    """That the factors have other structures than those chosen, "" if they have these."""
    if chosen is None or factors.structures == chosen:
        return ""
    (K, C), (other_K, other_C) = ([S.name for S in pair] for pair in (factors.structures, chosen))
    return f"has the structures {K!r} and {C!r}, not {other_K!r} and {other_C!r}"


def _shapes(parameter: Parameter) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in parts(parameter)]
