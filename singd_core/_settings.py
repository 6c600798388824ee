"""The settings of an optimizer, and the two recipes that fill them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from singd_core._array import at_most

# With `growing_T`, a gap of n steps begins after so many times n steps.
_PACE = 10

Rate: TypeAlias = Any  # a number, or a 0-d array where a schedule runs on the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a step does; the paper's letters in brackets.

    Attributes:
        lr: Learning rate of the weights (β₂).
        momentum: Momentum of the weights (α₂).
        nesterov: Look ahead along the momentum.
        normalized: The momentum averages gradients, and the step of each matrix has a size of its
            own, whatever the gradient's (section 5); else it averages natural gradients.
        warmup: Steps in which the rates grow from 0.
        weight_decay: Weight decay (γ).
        decoupled_weight_decay: Shrink the weights by lr · γ, as AdamW does; else γ W joins what the
            momentum averages.
        T: Steps between two refreshes of the factors.
        growing_T: Refresh more often at first: after t steps the gap is at most t / 10.
        rows: Rows that a factor is measured with, at least as many as its blocks are wide; others
            at each refresh. Infinite for all.
        lr_cov: Step size of the factors (β₁), or a function of the number of steps taken; with
            `growing_T` it is the step size of one step, and a gap has several steps.
        damping: Damping (λ).
        relative_damping: `damping` is a share of the curvature's mean diagonal.
        alpha1: Riemannian momentum of the factors (α₁).
        kfac_like: The IKFAC form: no Riemannian momentum, adaptive factors replaced by 1.
        normalize_lr_cov: The authors' normalization: the bracket times 1 − α₁, and β₁ divided by
            max(1, largest |entry| of m).
        scaled_start: Start the factors at (t + λ)^(−½) I and not at I, with t the mean diagonal of
            the first curvature.
        early_averaging: Step the factors by at least min(½, 1/(k + 1)) in refresh k: they average
            the first curvatures before they forget at the rate `lr_cov`.
        factor_bound: Bound on the factor step β₁ ‖m‖_F, or infinite. Below 1 it keeps K Kᵀ positive
            definite.
        order: Terms of the exponential Expm(−β₁ m) beyond the identity.
        kfac: Use KFAC with its inverses, the baseline, in place of the inverse-free update.
    """

    lr: Rate = 1e-3
    momentum: Rate = 0.9
    nesterov: bool = False
    normalized: bool = False
    warmup: int = 0
    weight_decay: Rate = 0.0
    decoupled_weight_decay: bool = False
    T: int = 10
    growing_T: bool = False
    rows: float = math.inf
    lr_cov: Rate | Callable[[int], Rate] = 1e-2
    damping: Rate = 1e-3
    relative_damping: bool = False
    alpha1: Rate = 0.5
    kfac_like: bool = False
    normalize_lr_cov: bool = False
    scaled_start: bool = False
    early_averaging: bool = False
    factor_bound: float = math.inf
    order: int = 1
    kfac: bool = False


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
        alpha1=0.0,
        kfac_like=True,
        scaled_start=True,
        early_averaging=True,
        factor_bound=0.5,
    ),
}

DEFAULT = "normalized"

# The rate of AdamW for all other parameters, where none is given.
FALLBACK_RATES = {"paper": 1e-3, DEFAULT: 1e-2}

# The structures of K and C where none are given; None takes what fits each weight.
STRUCTURES: dict[str, tuple[str, str] | None] = {"paper": ("dense", "dense"), DEFAULT: None}


def settings(recipe: str = DEFAULT, **given: Any) -> Settings:
    """The recipe's settings, with those given (not None) in their place.

    Raises:
        ValueError: If there is no such recipe or setting, or a value is out of range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r}: there are {', '.join(map(repr, RECIPES))}")
    check_names(given)
    chosen = dataclasses.replace(
        RECIPES[recipe], **{k: _plain(v) for k, v in given.items() if v is not None}
    )
    validate(chosen)
    return chosen


def check_names(given: Iterable[str], others: Iterable[str] = ()) -> None:
    """Check the names of settings; `others` are what a frontend has beside them.

    Raises:
        ValueError: Naming the one that does not exist, and what was meant if that is near.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for name in given:
        if name not in known:
            near = nearest(name, [*known, *others])
            hint = "" if near is None else f" (was {near!r} meant?)"
            raise ValueError(f"there is no setting {name!r}{hint}; there are {', '.join(known)}")


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
    for name in ("lr", "weight_decay", "damping"):
        check(name, lambda v: 0.0 <= v < math.inf, "at least 0 and finite")
    if not callable(s.lr_cov):
        check("lr_cov", lambda v: 0.0 <= v < math.inf, "at least 0 and finite, or a function")
    for name in ("momentum", "alpha1"):
        check(name, lambda v: 0.0 <= v < 1.0, "in [0, 1)")
    check("rows", lambda v: v >= 1.0, "at least 1 (infinite for all)")
    check("factor_bound", lambda v: v > 0.0, "positive (infinite for no bound)")
    for name, least in (("T", 1), ("order", 1), ("warmup", 0)):
        value = getattr(s, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")


def check_rate(name: str, value: Any, in_range: Callable[[Any], bool], expected: str) -> None:
    """Check a number, or that an array is 0-d.

    Raises:
        ValueError: Naming the setting, its value and its range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if getattr(value, "ndim", None) != 0 and not number:
        raise ValueError(f"{name}={value!r}: must be a number or a 0-d array, {expected}")
    if number and not in_range(value):
        raise ValueError(f"{name}={value!r}: must be {expected}")


# Names that other optimizers have for a setting.
_ALIASES = {"learning_rate": "lr", "betas": "fallback_betas", "eps": "fallback_eps"}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was meant by another one, if there is one that is near."""
    known = list(known)
    if _ALIASES.get(name) in known:
        return _ALIASES[name]
    return next(iter(difflib.get_close_matches(name, known, 1, cutoff=0.85)), None)


def rate(value: Rate | Callable[[int], Rate], step: int) -> Rate:
    """The value of a rate that may be a schedule, after `step` steps."""
    return _plain(value(step) if callable(value) else value)


def gap(step: Any, s: Settings, T: Any = None) -> Any:
    """Steps between two refreshes after `step` steps: T, or with `growing_T` less at first.

    It is the largest power of two that is at most t / 10, and at most T. It depends on nothing
    but the number of steps, so that nothing has to be kept and every frontend finds the same.

    Args:
        step: t, a number or an array.
        s: The settings.
        T: In place of the settings' T, e.g. an array.
    """
    T = s.T if T is None else T
    if not s.growing_T:
        return T
    doublings = (s.T if isinstance(T, int) else 1 << 16).bit_length()
    grown = sum((step >= _PACE * 2**k) * 2 ** (k - 1) for k in range(1, doublings + 1)) + 1
    if isinstance(grown, int) and isinstance(T, int):
        return min(grown, T)
    return at_most(grown, T)


def is_due(step: Any, s: Settings, T: Any = None) -> Any:
    """Whether the factors are refreshed in a step, counted from 0."""
    return step % gap(step, s, T) == 0


def rate_of_factors(step: Any, s: Settings, T: Any = None) -> Rate:
    """β₁ of a refresh: with `growing_T` for all steps since the last one."""
    once = rate(s.lr_cov, step)
    return 1.0 - (1.0 - once) ** gap(step, s, T) if s.growing_T else once


def learns_from_gradients(s: Settings) -> bool:
    """Whether matrices that show no rows have factors; else AdamW trains them."""
    return s.normalized and not s.kfac


def is_bound(value: Rate) -> bool:
    """Whether a bound bounds anything: an array does, as nobody can wait to know its value."""
    return not (isinstance(value, (int, float)) and value == math.inf)


def _plain(value: Any) -> Any:
    """NumPy's float64 scalars, which would promote arrays in float32, as Python floats."""
    return float(value) if isinstance(value, float) else value
