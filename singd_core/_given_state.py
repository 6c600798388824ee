"""The check of the state that a step is given: it fits the parameters and the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from singd_core import rules
from singd_core._array import Array
from singd_core._given_rows import check_made, check_rows
from singd_core._layer_state import LayerState, Parameter, State, keeps_cost, pair, parts
from singd_core._settings import Settings, is_zero
from singd_core.layers import LayerKind
from singd_core.rules import inputs_of
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
            own = state.fallback[name]
            fits = tuple(own.exp_avg.shape) == _shapes(parameter)[0]
            why = "" if fits else "has another shape"
            why = why or _other_rounding([own.compensation], parameter, s)
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
    if type(own) not in (wanted, Shampoo):
        return f"has factors of {type(own).__name__}, not of {wanted.__name__} (rule={s.rule!r})"
    if own.has_rows and not kind.has_rows:
        return "wants rows, of which it gets none here"
    if not _has_sides(own, parameter, kind):
        return "has another shape"
    if layer.momenta is not None and (layer.late is not None) != s.normalized:
        return "has a momentum of another recipe"
    if own.levels is not None and not s.normalized:
        return "has levels, which are of another recipe"
    why = ""
    if has_momentum(s):  # one that is kept does no harm: a rate may be 0 for a while
        why = _unlike("momentum", layer.momenta is not None, True, s, "momentum")
    if isinstance(own, rules.InverseFree) and not is_zero(s.alpha1):
        kept = own.m_K is not None, wanted.keeps_momentum(s)
        why = why or _unlike("Riemannian momentum", *kept, s, "alpha1", "rule")
    return why or _other_rounding(layer.compensations, parameter, s)


def _unlike(what: str, has: bool, keeps: bool, s: Settings, *names: str) -> str:
    """That something is kept, or is not, and settings say otherwise; "" if they say the same."""
    if has == keeps:
        return ""
    given = ", ".join(f"{name}={getattr(s, name)!r}" for name in names)
    return f"has {'a' if has else 'no'} {what}, and {given} keeps {'one' if keeps else 'none'}"


def _has_sides(own: rules.Factors, parameter: Parameter, kind: LayerKind) -> bool:
    """Whether the factors are of matrices of the parameter's shape, with a bias if it has one."""
    weight, bias = pair(parameter)
    batch, d_out, d_in = kind.shape(tuple(weight.shape), bias is not None)
    apart = bias is not None and not own.has_rows
    sides = [tuple(L.shape[:-1]) for L in own.sides]
    return sides == [(*batch, d_in), (*batch, d_out)] and apart == (inputs_of(own) is not None)


def _other_rounding(costs: Sequence[Array | None], parameter: Parameter, s: Settings) -> str:
    """That rounding errors are kept, or are not, and the setting says otherwise; "" else."""
    why = ""
    for w, cost in zip(parts(parameter), costs, strict=False):
        kept = cost is not None, keeps_cost(w, s)
        why = why or _unlike("compensation", *kept, s, "rounding")
    return why


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
