"""The settings of an optimizer, and what follows from them in each step."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from singd_core._scalars import at_most

# With `growing_T`, a gap of n steps begins after so many times n steps.
_PACE = 10
# The golden ratio less 1, in parts of 2^15. Only the last 15 bits of its multiples count, so
# integers of 32 bits may overflow.
_GOLDEN = 20251

Rate: TypeAlias = Any  # a number, or a 0-d array where a schedule runs on the device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers and switches of a step.

    In brackets are the letters of the paper and the equations of docs/mathematics.md.

    Attributes:
        lr: Learning rate of the weights (β₂; 5.10, 5.10b, 5.14).
        momentum: Momentum of the weights (α₂; 5.8). With `normalized` it becomes smaller when the
            rate becomes smaller (5.8b).
        nesterov: Look ahead along the momentum (5.8).
        normalized: The momentum averages gradients, and the step of each matrix has a size of its
            own, which does not depend on the size of the gradient (5.8 to 5.12b). Otherwise the
            momentum averages natural gradients (5.14).
        warmup: Steps in which the rates grow from 0 (5.13).
        weight_decay: Weight decay (γ; 5.15).
        decoupled_weight_decay: Shrink the weights by lr · γ, as AdamW does. Otherwise the momentum
            averages γ W too (5.15).
        T: Steps between two refreshes of the factors (2.1, 3.4).
        growing_T: Refresh more often at first: after t steps the gap is about t / 10 (5.6).
        rows: The number of rows that measure a factor, at least as many as its blocks are wide.
            Each refresh takes other rows (5.7). Infinite takes all.
        lr_cov: Step size of the factors (β₁; 2.1, 3.4), or a function of the number of steps taken.
            With `growing_T` it is for one step, and a refresh has the steps of its gap.
        damping: Damping (λ; 2.2, 3.2, 3.3). A larger one keeps the matrices of the rule "kfac"
            invertible. A layer with one that is not skips its step, and the step is counted.
        relative_damping: `damping` is a share of the curvature's mean diagonal (5.1, 5.2).
        rule: How the factors learn. "singd" is INGD with dense factors. "ikfac" has no Riemannian
            momentum, and 1 in place of the adaptive curvature. "kfac" is the baseline with its
            inverses. Or a rule that was registered.
        alpha1: Riemannian momentum of the factors (α₁; 3.2), for the rule "singd".
        normalize_lr_cov: The authors' normalization (3.2, 3.4): the bracket times 1 − α₁, and β₁
            divided by max(1, largest |entry| of m).
        scaled_start: Start the factors at (t + λ)^(−½) I and not at I, with t the mean diagonal of
            the first curvature (5.3).
        early_averaging: Step the factors by at least min(½, 1/(k + 1)) in refresh k. They then
            average the first curvatures before they forget at the rate `lr_cov` (5.4).
        factor_bound: Bound on the factor step β₁ ‖m‖_F (5.5), or infinite. A bound below 1 keeps
            K Kᵀ positive definite.
        order: Terms of the exponential Expm(−β₁ m) beyond the identity (3.4).
        rounding: How weights and factors are stored in 16 bits: "stochastic"; "kahan", which keeps
            the rounding error of each weight; or "nearest", the nearest number (7.1).
        seed: The seed of the random bits of stochastic rounding (7.1).
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
    rule: str = "singd"
    alpha1: Rate = 0.5
    normalize_lr_cov: bool = False
    scaled_start: bool = False
    early_averaging: bool = False
    factor_bound: Rate = math.inf
    order: int = 1
    rounding: str = "stochastic"
    seed: int = 0


# The settings that may be arrays.
RATES = tuple(f.name for f in dataclasses.fields(Settings) if "Rate" in str(f.type))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings(Settings):
    """The settings of one step.

    Attributes:
        share: The rate before any warm-up, over the largest such rate so far.
        warm: The share of the rates that the warm-up leaves.
        depth: The share of R that each of many matrices has.
    """

    share: Rate = 1.0
    warm: Rate = 1.0
    depth: float = 1.0


def rate(value: Rate | Callable[[int], Rate], step: int) -> Rate:
    """The value of a rate that may be a schedule, after `step` steps."""
    return plain(value(step) if callable(value) else value)


def gap(step: Any, s: Settings, T: Any = None) -> Any:
    """Mean steps between two refreshes after `step` steps: T, or with `growing_T` less at first.

    It is the largest power of two that is at most t / 10, and at most T. It depends only on the
    number of steps. So nothing has to be kept, and every frontend finds the same gap.

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
    """Whether the factors are refreshed in a step, counted from 0.

    With `growing_T` there is one refresh in each window of a gap, and multiples of the golden ratio
    say where. So no layer and no data that come in turns miss all refreshes or have them all,
    whatever the turns are: every second step, 25 and 25 steps, or epochs of 50 batches.
    """
    n = gap(step, s, T)
    if not s.growing_T:
        return True if type(n) is int and n == 1 else step % n == 0
    return step % n == (step // n * _GOLDEN % 2**15) * n // 2**15


def rate_of_factors(step: Any, s: Settings) -> Rate:
    """β₁ of a refresh: with `growing_T` for as many steps as its gap.

    Raises:
        ValueError: If the function `lr_cov` returns no rate.
    """
    once = rate(s.lr_cov, step)
    most = 1.0 if s.normalized else sys.float_info.max
    is_rate = 0.0 <= once <= most if isinstance(once, (int, float)) else once is not None
    if not is_rate:
        allowed = "a number in [0, 1]" if s.normalized else "a number of at least 0"
        raise ValueError(f"lr_cov({step}) is {once!r}: must be {allowed}")
    return 1.0 - (1.0 - once) ** gap(step, s) if s.growing_T else once


def arrays_of(s: Settings, fallback: Any) -> list[Any]:
    """The settings that are arrays, whose values nobody has checked: finite ones, or none.

    An infinite bound is a finite one here. A function of the number of steps is left out.

    Args:
        s: The settings of layers.
        fallback: The settings of AdamW.
    """
    rates = [getattr(s, name) for name in RATES if name != "factor_bound"]
    rates += at_most(s.factor_bound, 1.0), fallback.lr, fallback.weight_decay, fallback.eps
    # exactly these: an operation on a 0-d array of NumPy returns a float of its own
    return [
        rate
        for rate in (*rates, *fallback.betas)
        if type(rate) not in (int, float) and not callable(rate)
    ]


def is_bound(value: Rate) -> bool:
    """Whether a bound bounds anything: an array does, as nobody can wait to know its value."""
    return not (isinstance(value, (int, float)) and value == math.inf)


def is_zero(value: Any) -> bool:
    """Whether a rate is the plain number 0: nobody can wait to know the value of an array."""
    return isinstance(value, (int, float)) and value == 0.0


def plain(value: Any) -> Any:
    """NumPy's scalars as Python numbers: its float64 would promote arrays in float32."""
    if type(value) in (int, float, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
