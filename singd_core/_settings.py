"""The settings of an optimizer, and the two recipes that fill them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

Rate: TypeAlias = Any  # a number, or a 0-d array where a schedule runs on the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a step does; the paper's letters in brackets.

    Attributes:
        lr: Learning rate of the weights (β₂).
        momentum: Momentum of the weights (α₂).
        nesterov: Look ahead along the momentum.
        weight_decay: Weight decay (γ).
        decoupled_weight_decay: Shrink the weights by lr · γ, as AdamW does; else γ W joins what the
            momentum averages.
        T: Steps between two refreshes of the factors.
        lr_cov: Step size of the factors (β₁), or a function of the number of steps taken.
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
        kl_bound: Bound κ on lr² ⟨∇W, n⟩, summed over the layers, or infinite.
        rms_bound: Bound on the root mean square of the natural gradient of each matrix, and again
            of its update before the rate, or infinite.
        kfac: Use KFAC with its inverses, the baseline, in place of the inverse-free update.
    """

    lr: Rate = 1e-3
    momentum: Rate = 0.9
    nesterov: bool = False
    weight_decay: Rate = 0.0
    decoupled_weight_decay: bool = False
    T: int = 10
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
    kl_bound: float = math.inf
    rms_bound: float = math.inf
    kfac: bool = False


RECIPES: dict[str, Settings] = {
    # the authors' update and the default values of their package
    "paper": Settings(),
    # found on eight small real tasks; `make compare` measures it
    "robust": Settings(
        lr=0.02,
        nesterov=True,
        decoupled_weight_decay=True,
        T=1,
        lr_cov=0.05,
        damping=0.3,
        relative_damping=True,
        alpha1=0.0,
        kfac_like=True,
        scaled_start=True,
        early_averaging=True,
        factor_bound=0.5,
        kl_bound=1e-3,
        rms_bound=0.2,
    ),
}


# The structures of K and C where none are given; None takes what fits each weight.
STRUCTURES: dict[str, tuple[str, str] | None] = {"paper": ("dense", "dense"), "robust": None}


def settings(recipe: str = "robust", **given: Any) -> Settings:
    """The recipe's settings, with those given (not None) in their place.

    Raises:
        ValueError: If there is no such recipe or setting, or a value is out of range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r}: there are {', '.join(map(repr, RECIPES))}")
    known = [f.name for f in dataclasses.fields(Settings)]
    for name in given:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}; there are {', '.join(known)}")
    chosen = dataclasses.replace(
        RECIPES[recipe], **{k: _plain(v) for k, v in given.items() if v is not None}
    )
    validate(chosen)
    return chosen


def validate(s: Settings) -> None:
    """Check every value that is a plain number (an array would have to be waited for).

    Raises:
        ValueError: Naming the setting, its value and its range.
    """

    def check(name: str, in_range: Callable[[Any], bool], expected: str) -> None:
        value = getattr(s, name)
        if isinstance(value, (int, float)) and not in_range(value):
            raise ValueError(f"{name}={value!r}: must be {expected}")

    for name in ("lr", "weight_decay", "lr_cov", "damping"):
        check(name, lambda v: 0.0 <= v < math.inf, "at least 0 and finite")
    for name in ("momentum", "alpha1"):
        check(name, lambda v: 0.0 <= v < 1.0, "in [0, 1)")
    for name in ("factor_bound", "kl_bound", "rms_bound"):
        check(name, lambda v: v > 0.0, "positive (infinite for no bound)")
    for name in ("T", "order"):
        value = getattr(s, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be an integer of at least 1")


def rate(value: Rate | Callable[[int], Rate], step: int) -> Rate:
    """The value of a rate that may be a schedule, after `step` steps."""
    return _plain(value(step) if callable(value) else value)


def is_bound(value: Rate) -> bool:
    """Whether a bound bounds anything: an array does, as nobody can wait to know its value."""
    return not (isinstance(value, (int, float)) and value == math.inf)


def _plain(value: Any) -> Any:
    """NumPy's float64 scalars, which would promote arrays in float32, as Python floats."""
    return float(value) if isinstance(value, float) else value
