"""The check of rows that needs no oracle: they multiply to the gradient."""

from __future__ import annotations

from collections.abc import Mapping

from singd_core._array import Array, total, widen
from singd_core._given import kinds_of
from singd_core._given_rows import row_pair
from singd_core._layer_state import Parameter, pair
from singd_core.curvature import TINY
from singd_core.layers import LayerKind


def check(
    grads: Mapping[str, Parameter],
    params: Mapping[str, Parameter],
    rows: Mapping[str, tuple[Array, Array]],
    layers: Mapping[str, LayerKind] | None = None,
    *,
    tolerance: float = 1e-3,
) -> dict[str, float]:
    """Check that the rows of every layer multiply to its gradient: Bᵀ A = ∇W.

    The check finds the mistakes of a backward pass by hand: an input of another layer, a gradient
    on the wrong side of an activation, a mean that is missing in one of the two. It asks for the
    values of arrays, so call it once, before training. It leaves out tables of embeddings.

    Args:
        grads: The gradients, as `Optimizer.update` takes them.
        params: The parameters.
        rows: For each layer its input and the loss's gradient at its output.
        layers: As for `Optimizer`.
        tolerance: The largest ‖Bᵀ A − ∇W‖ / ‖∇W‖ that is no error.

    Returns:
        The difference ‖Bᵀ A − ∇W‖ / ‖∇W‖ for each layer.

    Raises:
        ValueError: If the difference of a layer is larger. The message names these layers. If a
            factor on the output gradient makes the difference vanish, it names the factor too.

    Example:
        >>> import numpy as np
        >>> x, g = np.ones((8, 3)), np.ones((8, 2)) / 8
        >>> params = {"map": np.zeros((2, 3))}
        >>> check({"map": g.T @ x}, params, {"map": (x, g)})
        {'map': 0.0}
        >>> check({"map": g.T @ x}, params, {"map": (x, 8 * g)})
        Traceback (most recent call last):
        ...
        ValueError: the rows of these layers do not multiply to their gradient: 'map' (off by 7; ...
    """
    kinds, found, wrong = kinds_of(layers, params), {}, []
    for name, given in rows.items():
        if name not in kinds:
            raise ValueError(f"rows of {name!r}: no such layer; there are {list(kinds)}")
        kind, (weight, bias), (x, g) = kinds[name], pair(grads[name]), row_pair(name, given)
        if kind.diagonal_inputs:
            continue
        A, _ = kind.inputs(x, bias=bias is not None, kfac_approx="expand")
        B, _ = kind.outputs(g, kfac_approx="expand", loss_average=None)
        ours, theirs = widen(B).mT @ widen(A), widen(kind.matrix(weight, bias))
        found[name] = _gap(ours, theirs)
        if not found[name] <= tolerance:
            wrong.append(f"{name!r} (off by {found[name]:.3g}{_remedy(ours, theirs, tolerance)})")
    if wrong:
        raise ValueError(
            f"the rows of these layers do not multiply to their gradient: {', '.join(wrong)}"
        )
    return found


def _remedy(ours: Array, theirs: Array, tolerance: float) -> str:
    """What the output gradient has to be multiplied by, if that makes them equal."""
    square = float(total(ours * ours))
    factor = float(total(ours * theirs)) / square if square > 0.0 else 0.0
    if not _gap(ours * factor, theirs) <= tolerance:
        return ""
    return f"; right if its output gradient is multiplied by {factor:.6g}"


def _gap(ours: Array, theirs: Array) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    gap, size = (float(total(M * M)) ** 0.5 for M in (ours - theirs, theirs))
    return float(gap / max(size, TINY))
