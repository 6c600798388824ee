"""The check of rows that needs no oracle: they multiply to the gradient."""

from __future__ import annotations

from collections.abc import Mapping

from singd_core._array import Array, namespace, total, widen
from singd_core._given import check_gradients, check_layers, check_named, check_params, kinds_of
from singd_core._given_rows import rows_of
from singd_core._layer_state import Parameter, pair
from singd_core._parameter import layer_rows
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
    values of arrays, so call it once, before training. Of a table of embeddings it checks shapes
    and the range of the indices alone. The result leaves such a table out.

    Args:
        grads: The gradients, as `Optimizer.update` takes them.
        params: The parameters.
        rows: For each layer its input and the loss's gradient at its output.
        layers: As for `Optimizer`.
        tolerance: The largest ‖Bᵀ A − ∇W‖ / ‖∇W‖ that is no error.

    Returns:
        The difference ‖Bᵀ A − ∇W‖ / ‖∇W‖ for each layer.

    Raises:
        TypeError: As from `Optimizer.update`.
        ValueError: If the difference of a layer is larger. The message names these layers. If a
            factor on the output gradient makes the difference vanish, it names the factor too.
            Also if an index is none of its table, and as from `Optimizer.init` and `update`.

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
    check_layers(layers)
    check_named(params)
    kinds, found, wrong = kinds_of(layers, params), {}, []
    check_gradients(grads, params)
    for name, x, g in rows_of(rows, kinds, params):
        check_params({name: params[name]}, kinds)
        kind = kinds[name]
        try:
            A, _, B, _ = layer_rows(kind, params[name], x, g, "expand", None)
            if kind.no_row is not None:
                _check_indices(x, kind.no_row)
        except ValueError as error:
            raise ValueError(f"rows of {name!r}: {error}") from None
        if kind.diagonal_inputs:
            continue
        ours, theirs = widen(B).mT @ widen(A), widen(kind.matrix(*pair(grads[name])))
        found[name] = _gap(ours, theirs)
        if not found[name] <= tolerance:
            wrong.append(f"{name!r} (off by {found[name]:.3g}{_remedy(ours, theirs, tolerance)})")
    if wrong:
        raise ValueError(
            f"the rows of these layers do not multiply to their gradient: {', '.join(wrong)}"
        )
    return found


def _check_indices(x: Array, entries: int) -> None:
    """Refuse indices that are none of a table."""
    if 0 in x.shape:
        return
    least, most = (int(of(x)) for of in (namespace(x).min, namespace(x).max))
    if least < 0 or most >= entries:
        raise ValueError(
            f"its indices are from {least} to {most}, and the table has entries from 0 to "
            f"{entries - 1}: count negative ones from the start"
        )


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
