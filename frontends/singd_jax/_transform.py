"""SINGD as a transformation of optax."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import optax  # type: ignore[import-untyped]

from singd_core._recipes import DEFAULT, hint
from singd_core.adamw import Fallback
from singd_jax import _compat
from singd_jax._begin import Start
from singd_jax._blind import Curvature
from singd_jax._gradients import MISSING, parted
from singd_jax._layers import Layers
from singd_jax._rates import Rate, Rates
from singd_jax._state import SingdState
from singd_jax._steps import Steps

P = ParamSpec("P")
T_Result = TypeVar("T_Result")

# Arguments of `optax.adamw` that only optax has.
_OF_OPTAX = {
    "mask": "weight_decay is for matrices alone, and fallback=Fallback(weight_decay=0.0) keeps "
    "decay from vectors; for groups of matrices take optax.multi_transform",
    "mu_dtype": "'momentum_dtype' here",
}


def _naming(function: Callable[P, T_Result]) -> Callable[P, T_Result]:
    """The function, which says what was meant by an argument that it does not have."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def named(*args: P.args, **given: P.kwargs) -> T_Result:
        for name in given:
            found = "" if name in known else _OF_OPTAX.get(name) or hint(name, known)
            if found:
                raise TypeError(f"{function.__name__} has no argument {name!r}: {found}")
        return function(*args, **given)

    return named


@_naming
def singd(
    learning_rate: Rate = None,
    *,
    layers: Layers | None = None,
    loss: Callable[..., Any] | None = None,
    structures: Any = None,
    recipe: str = DEFAULT,
    momentum: Rate = None,
    nesterov: bool | None = None,
    normalized: bool | None = None,
    warmup: int | None = None,
    weight_decay: Rate = None,
    decoupled_weight_decay: bool | None = None,
    T: Any = None,
    growing_T: bool | None = None,
    rows: float | None = None,
    lr_cov: Rate = None,
    damping: Rate = None,
    relative_damping: bool | None = None,
    rule: str | None = None,
    alpha1: Rate = None,
    kfac_like: bool | None = None,
    normalize_lr_cov: bool | None = None,
    scaled_start: bool | None = None,
    early_averaging: bool | None = None,
    factor_bound: float | None = None,
    order: int | None = None,
    kfac: bool | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    preconditioner_dtype: tuple[Any, Any] = (None, None),
    momentum_dtype: Any = None,
    fallback: Fallback | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Structured inverse-free natural gradient descent (arXiv 2312.05705).

    Structured factors of the inverse Fisher matrix precondition the layers. Other matrices learn
    their factors from gradients alone; with the recipe "paper" they have no factors. AdamW trains
    the rest. `print(layers)` shows what trains each parameter. A step whose gradient, curvature or
    rate is not finite changes nothing, nor does one with a negative rate. `state.core.skipped`
    counts such steps.

    Without `layers` and `loss`, SINGD needs nothing but gradients: `singd()` takes the place of
    `optax.adamw`.

    `update` takes gradients from `singd_jax.value_and_grad`, or the curvature from
    `value_and_curvature` as a keyword. With `curvature=None` the factors stay as they are. Every
    rate may be a number, a 0-d array or a schedule.

    Args:
        learning_rate: Learning rate (β₂): the size of a step of each matrix, relative to its width
            and inputs (5.10). None is 0.12. With "paper" None is 0.001, and the rate multiplies the
            natural gradient (5.14). Numbers in brackets are equations of docs/mathematics.md.
        layers: What `find_layers` returned.
        loss: Instead of `layers` the loss `loss(params, *batch)`. `tx.init(params, *batch)` then
            finds the layers, with the defaults of `find_layers`. Inside other transformations give
            `layers`, because they call `init(params)`.
        structures: Structures of K and C, one for both, or "cost:n": the richest that cost little
            beside n rows a step. None takes the structures of `layers`, or else of the recipe.
        recipe: "normalized" or "paper": the values of all settings that are None.
        momentum: Momentum of the weights (α₂).
        nesterov: Look ahead along the momentum. `singd_core.Settings` says more of this setting and
            of all that follow.
        normalized: The momentum averages gradients, and the step of each matrix has a size of its
            own, which does not depend on the size of the gradient.
        warmup: Steps in which the rates grow from 0.
        weight_decay: Weight decay (γ) of the preconditioned weights. The number 0.0 also turns off
            AdamW's decay, unless `fallback` is given.
        decoupled_weight_decay: Shrink the weights as AdamW does.
        T: Steps between two refreshes of the factors.
        growing_T: Refresh more often at first: after t steps the gap is about t / 10.
        rows: The number of rows that measure a factor, at least as many as its blocks are wide.
            Each refresh takes other rows. Infinite takes all.
        lr_cov: Step size of the factors (β₁). With `growing_T` it is for one step, and a refresh
            has the steps of its gap.
        damping: Damping (λ).
        relative_damping: `damping` is a share of the curvature's mean diagonal.
        rule: How the factors learn: "singd", "ikfac", "kfac", or one that was registered.
        alpha1: Riemannian momentum of the factors (α₁), for the rule "singd".
        kfac_like: The authors' name for `rule="ikfac"` (True) and `rule="singd"` (False).
        normalize_lr_cov: The authors' normalization of the factor step.
        scaled_start: Start the factors at the scale of the first curvature.
        early_averaging: Average the first curvatures.
        factor_bound: Bound on the factor step.
        order: Terms of the exponential.
        kfac: Another name for `rule="kfac"`.
        rounding: How weights and factors of 16 bits are stored: "stochastic", "kahan" or "nearest".
        seed: The seed of the random bits of stochastic rounding.
        preconditioner_dtype: Dtypes of K and of C. None is the weight's, and float32 for float16.
        momentum_dtype: Dtype of layers' momenta. None is the weight's, and float32 for float16.
        fallback: Settings of AdamW. Its rates may be schedules too; they do not follow
            `learning_rate`.

    Returns:
        The transformation. With `optax.inject_hyperparams` give `layers`, and name `order`,
        `rows`, `warmup` and `seed`, if given, in `static_args`.

    Raises:
        TypeError: If both `layers` and `loss` are given.
        ValueError: If a setting is out of range or a name unknown.
    """
    given = dict(locals())
    del given["layers"], given["loss"]
    rates = Rates(lr=given.pop("learning_rate"), **given)
    return _transformation(Start(rates, layers, loss, structures), Steps(rates).update)


def scale_by_singd(
    *,
    layers: Layers,
    structures: Any = None,
    recipe: str = DEFAULT,
    T: Any = None,
    growing_T: bool | None = None,
    rows: float | None = None,
    lr_cov: Rate = None,
    damping: Rate = None,
    relative_damping: bool | None = None,
    rule: str | None = None,
    alpha1: Rate = None,
    kfac_like: bool | None = None,
    normalize_lr_cov: bool | None = None,
    scaled_start: bool | None = None,
    early_averaging: bool | None = None,
    factor_bound: float | None = None,
    order: int | None = None,
    kfac: bool | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    preconditioner_dtype: tuple[Any, Any] = (None, None),
) -> optax.GradientTransformationExtraArgs:
    """The bare preconditioner: C Cᵀ ∇W K Kᵀ in place of the gradient of each layer.

    It applies no rate, momentum, decay or size of a step, and other parameters keep their
    gradient. Put it into an `optax.chain`. If anything is not finite, all updates are zero and the
    factors stay as they were.

    Args:
        layers: What `find_layers` returned.
        structures: Structures of K and C, one for both, or "cost:n": the richest that cost little
            beside n rows a step. None takes the structures of `layers`, or else of the recipe.
        recipe: "normalized" or "paper": the values of all settings not given.
        T: Steps between two refreshes of the factors.
        growing_T: Refresh more often at first: after t steps the gap is about t / 10.
        rows: The number of rows that measure a factor, at least as many as its blocks are wide.
            Each refresh takes other rows. Infinite takes all.
        lr_cov: Step size of the factors (β₁), as in `singd`.
        damping: Damping (λ).
        relative_damping: `damping` is a share of the curvature's mean diagonal.
        rule: How the factors learn: "singd", "ikfac", "kfac", or one that was registered.
        alpha1: Riemannian momentum of the factors (α₁), for the rule "singd".
        kfac_like: The authors' name for `rule="ikfac"` (True) and `rule="singd"` (False).
        normalize_lr_cov: The authors' normalization of the factor step.
        scaled_start: Start the factors at the scale of the first curvature.
        early_averaging: Average the first curvatures.
        factor_bound: Bound on the factor step.
        order: Terms of the exponential.
        kfac: Another name for `rule="kfac"`.
        rounding: How factors of 16 bits are stored: "stochastic" or "nearest".
        seed: The seed of the random bits of stochastic rounding.
        preconditioner_dtype: Dtypes of K and of C. None is the weight's, and float32 for float16.

    Raises:
        ValueError: If a setting is out of range or a name unknown.
    """
    given = dict(locals())
    del given["layers"]
    if rounding == "kahan":
        raise ValueError(
            'rounding="kahan" keeps what it costs weights, and scale_by_singd changes no weights: '
            'choose "stochastic" or "nearest"'
        )
    rates = Rates(fallback=None, momentum=0.0, **given)
    start = Start(rates, layers, None, structures, others=False)
    return _transformation(start, Steps(rates).precondition)


def _transformation(
    init: Callable[..., SingdState], step: Callable[..., tuple[Any, SingdState]]
) -> optax.GradientTransformationExtraArgs:
    def update(
        updates: Any,
        state: SingdState,
        params: Any = None,
        *,
        curvature: Mapping[str, Curvature] | None = MISSING,
        **_: Any,
    ) -> tuple[Any, SingdState]:
        updates, curvature = parted(updates, curvature)
        if curvature is MISSING and any(one.has_rows for one in state.layers.values()):
            raise ValueError(
                "singd got no curvature: give tx.update the gradients of singd_jax.value_and_grad, "
                "or their parts (grads.tree, curvature=grads.curvature) where something else would "
                "take the gradients apart, such as nnx.Optimizer; curvature=None says that the "
                "factors are to stay as they are"
            )
        known = None if curvature is MISSING else curvature
        sharded = _compat.auto_sharded(step, (updates, state))
        return sharded(updates, state, params, known)  # type: ignore[no-any-return]

    return optax.GradientTransformationExtraArgs(init, update)
