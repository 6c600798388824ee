"""The step of the weights: the bounds, the momentum and the decay of a natural gradient.

Everything here is of matrices, shape (..., d_out, d_in): leading axes are layers of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from singd_core._array import (
    Array,
    Scalar,
    at_least,
    cast,
    expand,
    multiply_add,
    namespace,
    widen,
)
from singd_core._settings import Rate, Settings, is_bound
from singd_core.structures.base import Structure
from singd_core.structures.diagonal import Diagonal


def inner(gradient: Array, natural: Array) -> Array:
    """⟨∇W, n⟩ of the batch axes' shape, in at least float32. It is finite only if both are."""
    n = widen(natural)
    xp, shape = namespace(n), (*n.shape[:-2], n.shape[-2] * n.shape[-1])
    x, y = xp.reshape(cast(gradient, n), shape), xp.reshape(n, shape)
    # No `vecdot`: torch's is a product of matrices, and takes ten times as long as either of these
    # (401,920 numbers on a CPU: 530 µs).
    return x @ y if n.ndim == 2 else xp.sum(x * y, axis=-1)


def norm(x: Array) -> Array:
    """‖x‖_F of the batch axes' shape, in at least float32."""
    return namespace(x).linalg.vector_norm(widen(x), axis=(-2, -1))


def rms_scale(x: Array, bound: Rate, norm_x: Scalar | None = None) -> Scalar:
    """min(1, bound / RMS(x)) of the batch axes' shape, in at least float32.

    For the natural gradient before the momentum, in which a huge one would outlast what the KL
    bound later allows to undo it; and for the update.

    Args:
        x: The array.
        bound: The bound; infinity for none.
        norm_x: Its `norm`, if that is known.
    """
    if not is_bound(bound):
        return 1.0
    limit = bound * math.sqrt(x.shape[-2] * x.shape[-1])
    return 1.0 / at_least((norm(x) if norm_x is None else norm_x) / limit, 1.0)


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """∇W ↦ P_C ∇W P_K, the natural gradient of ∇W, shape (..., d_out, d_in), in the dtype of C.

    Attributes:
        K: Tells the dtype of the product with P_K.
        times_K: The product P_K X of a symmetric P_K.
        C: Tells the dtype of the product with P_C.
        times_C: The product P_C X.
    """

    K: Structure
    times_K: Callable[[Array], Array]
    C: Structure
    times_C: Callable[[Array], Array]

    def __call__(self, gradient: Array) -> Array:
        """The natural gradient."""
        return self.left(self.right(gradient))

    def right(self, gradient: Array) -> Array:
        """∇W P_K, which acts on each row."""
        return self.times_K(cast(gradient, self.K.like).mT).mT

    def left(self, X: Array) -> Array:
        """P_C X, which acts on each column."""
        return self.times_C(cast(X, self.C.like))

    def rows(self, j: slice) -> Preconditioner | None:
        """The one of the rows `j` of ∇W alone, or None where P_C mixes rows. Not of a stack."""
        if not isinstance(self.C, Diagonal):
            return None
        C = Diagonal(self.C.diag[j])
        return dataclasses.replace(self, C=C, times_C=C.precondition)


def kl_scale(energy: Scalar, kl_bound: Rate) -> Scalar:
    """min(1, √(κ / E)) with E = Σ lr² ⟨∇W, n⟩: scales the natural gradient into a trust region.

    ½ E is the KL divergence of a step of rate lr along n, to second order.
    """
    if not is_bound(kl_bound):
        return 1.0
    return 1.0 / at_least((at_least(energy, 0.0) / kl_bound) ** 0.5, 1.0)


def direction(
    natural: Array,
    decay: Array | None,
    momentum: Array | None,
    scale: Scalar,
    s: Settings,
    *,
    donate: bool = False,
) -> tuple[Array, Array | None]:
    """The direction u of the step W ← W − lr c u, and the new momentum m.

    m ← α₂ m + c' n (+ γ W unless the decay is decoupled);  u = m, or n + α₂ m (Nesterov).
    The caller bounds it by c = min(1, bound / RMS(u)), the `rms_scale` of u.

    Args:
        natural: n.
        decay: γ W if `couples_decay(s)`, else None.
        momentum: m, or None without momentum.
        scale: c', from `rms_scale` and `kl_scale`: a number, or of the batch axes' shape.
        s: The settings.
        donate: Whether `natural` and `momentum` may be overwritten, where arrays can be. Then u
            is one of the two if both have the dtype of m.
    """
    u = times(scale, natural, in_place=donate)
    if decay is not None:
        u += cast(decay, u)
    if momentum is not None:
        u, alpha = cast(u, momentum), expand(s.momentum, momentum)
        momentum = multiply_add(momentum, alpha, u, out=momentum if donate else None)
        u = multiply_add(momentum, alpha, u, out=u if donate else None) if s.nesterov else momentum
    return u, momentum


def weight_change(
    u: Array, c: Scalar, weight: Array, s: Settings, onto: Array | None = None
) -> Array:
    """−lr c u, and −lr γ W for a decoupled decay, in the dtype of W, added `onto` an array.

    u is that of `direction`, and c its bound.
    """
    if s.decoupled_weight_decay and _is_on(s.weight_decay):
        onto = _plus(weight, -1.0 * s.lr * s.weight_decay, onto)
    return _plus(cast(u, weight), -1.0 * s.lr * c, onto)


def _plus(x: Array, c: Scalar, y: Array | None) -> Array:
    c = expand(c, x)
    return x * c if y is None else multiply_add(x, c, y, out=y)


def times(c: Scalar, x: Array, *, in_place: bool) -> Array:
    """The product c x, for a number or an array of the batch axes' shape."""
    if not in_place:
        return x * expand(c, x)
    if not (isinstance(c, float) and c == 1.0):
        x *= expand(c, x)
    return x


def couples_decay(s: Settings) -> bool:
    """Whether the weight decay goes through the momentum."""
    return not s.decoupled_weight_decay and _is_on(s.weight_decay)


def _is_on(value: Rate) -> bool:
    return not (isinstance(value, (int, float)) and value == 0.0)
