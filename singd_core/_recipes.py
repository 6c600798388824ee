"""The two recipes that fill all settings, and the checks of what is given."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from singd_core._settings import Settings, is_zero, plain
from singd_core.adamw import Fallback
from singd_core.rounding import ROUNDINGS
from singd_core.rules import get as get_rule

RECIPES: dict[str, Settings] = {
    # the authors' update and the default values of their package
    "paper": Settings(),
    # steps of a size of their own: one rate for all scales; `make compare` measures it
    "normalized": Settings(
        lr=0.12,
        nesterov=True,
        normalized=True,
        warmup=20,
        decoupled_weight_decay=True,
        T=50,
        growing_T=True,
        rows=256,
        lr_cov=0.05,
        damping=0.1,
        relative_damping=True,
        rule="ikfac",
        alpha1=0.0,
        scaled_start=True,
        early_averaging=True,
        factor_bound=0.5,
    ),
}

DEFAULT = "normalized"

# Other names of what `rule` says.
ALIASES = "kfac_like", "kfac"

# The rate and the decay of AdamW for all other parameters, where none are given.
_FALLBACK_RATES = {"paper": 1e-3, DEFAULT: 1e-2}
_FALLBACK_DECAY = 0.01

# Below it are AdamW's rates; the recipe "normalized" hardly trains with one of them.
_LEAST_STEP = 0.003

# The structures of K and C where none are given; None takes what fits each weight.
STRUCTURES: dict[str, tuple[str, str] | None] = {"paper": ("dense", "dense"), DEFAULT: None}


def settings(recipe: str = DEFAULT, **given: Any) -> Settings:
    """The settings of a recipe. Settings that are given and not None win over the recipe.

    Raises:
        ValueError: If there is no such recipe or setting, or a value is out of range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r}: there are {', '.join(map(repr, RECIPES))}")
    given = with_rule(given)
    check_names(given)
    chosen = dataclasses.replace(
        RECIPES[recipe], **{k: plain(v) for k, v in given.items() if v is not None}
    )
    validate(chosen)
    return chosen


def fallback_of(recipe: str, weight_decay: Any, given: Any = None) -> Fallback:
    """The settings of AdamW: those given, and for those that are None the recipe's.

    A decay of 0 that is given for the matrices holds for all.

    Raises:
        TypeError: If what is given is no `Fallback`.
        ValueError: Naming the setting that is out of range.
    """
    chosen = Fallback() if given is None else given
    check_fallback(chosen)
    decay = 0.0 if is_zero(weight_decay) else _FALLBACK_DECAY
    own = {"lr": _FALLBACK_RATES[recipe], "weight_decay": decay}
    return dataclasses.replace(chosen, **{k: v for k, v in own.items() if vars(chosen)[k] is None})


def with_rule(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with `rule` in place of `kfac_like`, as the authors call it, and of `kfac`.

    Raises:
        ValueError: If one of the two is neither True nor False, or says something else than `rule`.
    """
    found = {name: value for name, value in given.items() if name not in ALIASES}
    said = {name: given[name] for name in ALIASES if given.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: must be True or False")
    if said.get("kfac"):
        rule = "kfac"
    elif "kfac_like" in said:
        rule = "ikfac" if said["kfac_like"] else "singd"
    else:
        return found
    if found.get("rule") not in (None, rule):
        alias = ", ".join(f"{name}={value!r}" for name, value in said.items())
        raise ValueError(f"rule={found['rule']!r} and {alias}: give the rule alone")
    return found | {"rule": rule}


def check_names(given: Iterable[str], others: Iterable[str] = ()) -> None:
    """Check the names of settings; `others` are what a frontend has beside them.

    Raises:
        ValueError: Naming the one that does not exist, and what was meant if that is near.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for name in given:
        if name not in known and name not in ALIASES:
            found = hint(name, [*known, *others])
            found = found and f" ({found})"
            raise ValueError(f"there is no setting {name!r}{found}; there are {', '.join(known)}")


def validate(s: Settings) -> None:
    """Check every value that is a plain number (an array would have to be waited for).

    Raises:
        ValueError: Naming the setting, its value and what it may be.
    """

    def check(name: str, in_range: Callable[[Any], bool], expected: str) -> None:
        value = getattr(s, name)
        check_rate(name, value, in_range, expected)

    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise ValueError(f"{field.name}={value!r}: must be True or False")
    get_rule(s.rule)
    if s.rounding not in ROUNDINGS:
        raise ValueError(f"rounding={s.rounding!r}: there are {', '.join(map(repr, ROUNDINGS))}")
    for name in ("lr", "weight_decay", "damping"):
        check(name, lambda v: 0.0 <= v < math.inf, "at least 0 and finite")
    if not callable(s.lr_cov):
        if s.normalized:  # it is also the weight of running means
            check("lr_cov", lambda v: 0.0 <= v <= 1.0, "in [0, 1], or a function")
        check("lr_cov", lambda v: 0.0 <= v < math.inf, "at least 0 and finite, or a function")
    for name in ("momentum", "alpha1"):
        check(name, lambda v: 0.0 <= v < 1.0, "in [0, 1)")
    whole = "at least 1 and whole (infinite for all)"
    check("rows", lambda v: v >= 1.0 and (v == math.inf or v == int(v)), whole)
    check("factor_bound", lambda v: v > 0.0, "positive (infinite for no bound)")
    for name, least in (("T", 1), ("order", 1), ("warmup", 0), ("seed", 0)):
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")


def small_step(rates: Iterable[Any]) -> str:
    """What is to be said if the largest of the rates that are given is one of AdamW, else "".

    The rates are rates of the recipe "normalized". Only plain numbers are looked into. A rate of 0
    is taken for intended.
    """
    largest = max((v for v in rates if isinstance(v, (int, float)) and v > 0.0), default=0.0)
    if not 0.0 < largest < _LEAST_STEP:
        return ""
    return (
        f"lr={largest!r}: here the rate is the size of a step, and not what AdamW takes. The "
        f"default is {RECIPES[DEFAULT].lr}: leave the rate out first"
    )


def check_rate(name: str, value: Any, in_range: Callable[[Any], bool], expected: str) -> None:
    """Check a number, or that an array is 0-d.

    Raises:
        ValueError: Naming the setting, its value and its range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if getattr(value, "ndim", None) != 0 and not number:
        hint = "; leave it out for the default" if value is None else ""
        raise ValueError(f"{name}={value!r}: must be a number or a 0-d array, {expected}{hint}")
    if number and not in_range(value):
        raise ValueError(f"{name}={value!r}: must be {expected}")


def check_adamw(given: Mapping[str, Any], prefix: str) -> None:
    """Check settings of AdamW, by the names of `Fallback` after a prefix.

    Raises:
        ValueError: Naming the setting, its value and its range.
    """
    for name in ("lr", "eps", "weight_decay"):
        if name in given:
            expected = "at least 0 and finite"
            check_rate(prefix + name, given[name], lambda v: 0.0 <= v < math.inf, expected)
    betas = given.get("betas", (0.0, 0.0))
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{prefix}betas={betas!r}: give two numbers in [0, 1)")
    for beta in betas:
        check_rate(prefix + "betas", beta, lambda v: 0.0 <= v < 1.0, f"two in [0, 1), not {betas}")


def check_fallback(fallback: Any) -> None:
    """Check what is given for AdamW; a frontend may have rates that are functions.

    Raises:
        TypeError: If it is no `Fallback`.
        ValueError: Naming the setting, its value and its range.
    """
    if not isinstance(fallback, Fallback):
        raise TypeError(f"fallback={fallback!r}: give Fallback(lr=...), or None")
    left_out = {n for n in ("lr", "weight_decay") if getattr(fallback, n) is None}
    given = {n: v for n, v in vars(fallback).items() if n not in left_out and not callable(v)}
    check_adamw(given, "fallback.")


# Names that other optimizers have for a setting, or for a setting of the matrices and of AdamW.
_MEANT = {"learning_rate": "lr", "lr": "learning_rate"}
_HERE = {
    "b1": "b1 is 'momentum' here",
    "b2": "the factors are in the place of what b2 averages, at the rate 'lr_cov'",
    "betas": "b1 is 'momentum' here",
    "eps": "of matrices it is 'damping' here",
}

# Switches of other optimizers that have no place here.
SWITCHES = {"amsgrad", "differentiable", "foreach", "fused", "maximize"}


def hint(name: str, known: Iterable[str]) -> str:
    """What was meant by a name that is unknown, "" if none is near."""
    known = list(known)
    if name in SWITCHES:
        return "SINGD has none: " + ("negate the loss" if name == "maximize" else "leave it out")
    if name in _HERE:
        of_adamw = {"betas": "betas", "eps": "epsilon"}.get(name)
        own = f"fallback_{name}"
        own = repr(own) if own in known else f"in fallback=Fallback({name}=...)"
        return _HERE[name] + (f"; AdamW's {of_adamw} for the rest: {own}" if of_adamw else "")
    near = difflib.get_close_matches(_MEANT.get(name, name), known, 1, cutoff=0.85)
    return f"was {near[0]!r} meant?" if near else ""
