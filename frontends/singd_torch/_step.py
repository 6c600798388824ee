"""One step of the layers: refresh the factors, precondition, move the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._array import ADD_PRODUCT, INVERSE, MULTIPLY_ADD, number, ranged, total, widen
from singd_core._settings import Settings, is_bound, rate
from singd_core.preconditioner import Factors
from singd_core.updates.curvature import Curvature
from singd_core.updates.weights import (
    Preconditioner,
    couples_decay,
    direction,
    inner,
    kl_scale,
    norm,
    rms_scale,
    times,
    weight_change,
)
from singd_torch._join import join
from singd_torch._pieces import cut, piece_size, placed, plain
from singd_torch._scaling import Scales
from singd_torch._stacks import Stack, State

# Weights of so many numbers, and stacks of smaller ones, are changed by one call.
_JOINED = 1 << 13


@dataclasses.dataclass(eq=False)
class Work:
    """What a step has found out of a stack of layers before anything is changed.

    Attributes:
        stack: The layers.
        s: Their settings.
        factors: Their refreshed factors, or those they had.
        natural: The natural gradient.
        scale: What its bound scales it by.
        energy: ⟨∇W, n⟩ so scaled, 0-d or a number.
    """

    stack: Stack
    s: Settings
    factors: Factors
    natural: Tensor
    scale: Any
    energy: Any


def prepare(stack: Stack, s: Settings, scales: Scales) -> Work:
    """The natural gradients of layers, their factors refreshed by the rows that are pending.

    A stack that has a report is told there of the refresh.
    """
    layer, factors = stack.layers[0], stack.factors
    assert factors is not None
    preconditioner = stack.preconditioner
    if layer.pending:
        lr_cov = rate(s.lr_cov, layer.group["steps"])
        if stack.compile is not None:  # else each value of a schedule would be compiled anew
            lr_cov = torch.zeros_like(factors.averages.k) + lr_cov
        curvature = stack.curvature(scales.rows)
        for one in stack.layers:  # its rows are as large as its factors, and so is the curvature
            one.pending = {}
        factors = stack.run(_refresh, factors, curvature, lr_cov, s, stack.report)
        del curvature
        preconditioner = None
    elif preconditioner is None and stack.compile is None:
        preconditioner = stack.preconditioner = factors.preconditioner(s.T)
    gradient = stack.matrix(_gradient)
    if scales.grads is not None:
        gradient = ranged(gradient) / scales.grads
    donate = len(layer.parameters) > 1  # it is no gradient itself, but was joined
    return Work(stack, s, factors, *stack.run(_solve, factors, gradient, s, preconditioner, donate))


def _refresh(
    factors: Factors, curvature: Curvature, lr_cov: Any, s: Settings, report: dict[str, Any] | None
) -> Factors:
    return factors.refresh(curvature, lr_cov, s, report)


def _solve(
    factors: Factors,
    gradient: Tensor,
    s: Settings,
    preconditioner: Preconditioner | None,
    donate: bool,
) -> tuple[Tensor, Any, Any]:
    """The last three attributes of `Work`.

    Nothing else is changed, so that it can be compiled, but a large gradient if `donate`.
    """
    preconditioner = preconditioner or factors.preconditioner(1)
    most = piece_size(type(preconditioner.K), type(preconditioner.C))
    if len(cut(gradient, most)) > 1:
        return _solve_by_pieces(preconditioner, gradient, s, donate, most)
    natural = preconditioner(gradient)
    scale = plain(rms_scale(natural, s.rms_bound, _norm(natural, s)))
    return natural, scale, number(total(scale * inner(gradient, natural)))


def _solve_by_pieces(
    preconditioner: Preconditioner, gradient: Tensor, s: Settings, donate: bool, most: int
) -> tuple[Tensor, float, float]:
    """The last three attributes of `Work` of a large matrix, without temporaries of its size."""
    dtype, by_rows = preconditioner.C.like.dtype, preconditioner.rows(slice(0)) is not None
    in_place = by_rows and donate and gradient.dtype == dtype
    natural = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    norms, energy = [], 0.0

    def keep(own: Tensor, found: Tensor, place: Tensor) -> None:
        nonlocal energy
        norms.append(_norm(found, s))
        energy += number(inner(own, found))
        place.copy_(found)

    pieces = zip(cut(gradient, most), cut(natural, most), strict=True)
    if by_rows:
        start = 0
        for own, place in pieces:
            rows = preconditioner.rows(slice(start, start + len(own)))
            assert rows is not None
            keep(own, rows(own), place)
            start += len(own)
    else:
        for own, place in pieces:
            place.copy_(preconditioner.right(own))
        for own, place in zip(cut(gradient.mT, most), cut(natural.mT, most), strict=True):
            keep(own.mT, preconditioner.left(place.mT), place.mT)
    scale = rms_scale(natural, s.rms_bound, math.hypot(*norms))
    return natural, scale, scale * energy


def _norm(x: Tensor, s: Settings) -> Any:
    """The norm of `x` if it is bounded."""
    return number(norm(x)) if is_bound(s.rms_bound) else 0.0


def apply(
    works: Sequence[Work],
    state: State,
    settings_of: Callable[[nn.Parameter], Settings],
    energy: Any,
    ok: Tensor | None,
) -> None:
    """Write the new factors, momenta and weights.

    Args:
        works: What `prepare` found.
        state: The optimizer's state.
        settings_of: The settings of a parameter's own group; a bias may have its own.
        energy: The sum of the works' energies.
        ok: On an accelerator, whether the step may change anything; None where it is known to.
    """
    kl = {id(work.s): kl_scale(energy, work.s.kl_bound) for work in works}
    for work in works:
        stack, s, factors = work.stack, work.s, work.factors
        parameters, decay = stack.layers[0].parameters, None
        if any(couples_decay(settings_of(p)) for p in parameters):
            decay = stack.matrix(partial(_coupled_decay, settings_of))
        if stack.momentum is None and s.momentum != 0.0:
            momentum = torch.zeros_like(work.natural, dtype=stack.layers[0].dtypes[2])
            stack.hold_momentum(momentum, state)
        scale = work.scale * kl[id(s)]
        if ok is not None:
            s, scale = _masked(s, ok, work.natural), torch.where(ok, scale, 0.0)
            for term in (work.natural, decay):
                if term is not None:
                    term.masked_fill_(~ok, 0.0)  # NaN times 0 is NaN
            if factors is not stack.factors:
                factors = factors.map(partial(_either, ok), stack.factors)  # type: ignore[arg-type]
        step = _directed if stack.compile is None else _directed_anew
        u, c, moved = stack.run(step, work.natural, decay, stack.momentum, scale, s)
        if moved is not None and moved is not stack.momentum:
            stack.hold_momentum(moved, state)
        if stack.report is not None:
            stack.report |= {"natural_scale": scale, "update": s.lr * c * norm(u)}
        if isinstance(c, Tensor) and c.ndim > 0:  # the parts of u may have other axes
            u, c = times(c, u, in_place=u is not stack.momentum), 1.0
        if factors is not stack.factors:
            stack.hold(factors, state, seen=True)
        places = zip(*(layer.parameters for layer in stack.layers), strict=True)
        for place, part in zip(places, stack.layers[0].split(u), strict=True):
            own = settings_of(place[0])
            own = own if ok is None else _masked(own, ok, u)
            moves = [p.grad is not None for p in place]  # one may have been frozen since
            if len(place) > 1 and place[0].numel() <= _JOINED and all(moves):
                joined = join(place)
                weight_change(part, c, joined, own, onto=joined)
                torch._foreach_copy_(place, stack.split(joined))  # type: ignore[arg-type]
                continue
            for weight, direct in compress(zip(place, stack.split(part), strict=True), moves):
                for piece, change in zip(cut(weight), cut(direct), strict=True):
                    weight_change(change, c, piece, own, onto=piece)


def _directed(
    natural: Tensor, decay: Tensor | None, momentum: Tensor | None, scale: Any, s: Settings
) -> tuple[Tensor, Any, Tensor | None]:
    """The direction, its bound and the new momentum.

    The natural gradient is this step's own, and the momentum is updated where it is.
    """
    if momentum is not None and momentum.dtype != natural.dtype:
        u, momentum = direction(natural, decay, momentum, scale, s, donate=True)
        return u, plain(rms_scale(u, s.rms_bound, _norm(u, s))), momentum
    n, norms = len(cut(natural)), []
    arrays = ((None,) * n if a is None else cut(a) for a in (natural, decay, momentum))
    for own, added, old in zip(*arrays, strict=True):
        part, _ = direction(own, added, old, scale, s, donate=True)
        norms.append(_norm(part, s))
    u = natural if momentum is None or part is own else momentum
    c = rms_scale(u, s.rms_bound, norms[0] if n == 1 else math.hypot(*norms))
    return u, plain(c), momentum


def _directed_anew(
    natural: Tensor, decay: Tensor | None, momentum: Tensor | None, scale: Any, s: Settings
) -> tuple[Tensor, Any, Tensor | None]:
    """`_directed` for compilers, which find out by themselves what can be overwritten."""
    u, moved = direction(natural, decay, momentum, scale, s)
    return u, rms_scale(u, s.rms_bound), moved


def _masked(s: Settings, ok: Tensor, like: Tensor) -> Settings:
    """The settings with which zeros in place of a natural gradient change nothing unless ok."""
    dtype = widen(like[..., :0]).dtype
    momentum, lr = (placed(v, dtype, ok.device) for v in (s.momentum, s.lr))
    return dataclasses.replace(
        s, momentum=torch.where(ok, momentum, 1.0), lr=torch.where(ok, lr, 0.0)
    )


def _multiply_add(x: Tensor, c: float | Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    if isinstance(c, Tensor):
        return torch.addcmul(y, x, c, out=out)
    return torch.add(y, x, alpha=c, out=out)


def _add_product(Y: Tensor, A: Tensor, B: Tensor) -> Tensor:
    # Matrices of a stack `baddbmm_` multiplies one by one, if they are views.
    return Y.addmm_(A, B) if Y.ndim == A.ndim == B.ndim == 2 else Y.add_(A @ B)


MULTIPLY_ADD |= dict.fromkeys((Tensor, nn.Parameter), _multiply_add)
ADD_PRODUCT[Tensor] = _add_product
# `inv` waits to know whether there is an inverse.
INVERSE[Tensor] = lambda A: torch.linalg.inv_ex(A).inverse


def _gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _coupled_decay(settings_of: Callable[[nn.Parameter], Settings], p: nn.Parameter) -> Tensor:
    s = settings_of(p)
    return p * (s.weight_decay if couples_decay(s) else 0.0)


def _either(ok: Tensor, new: Any, old: Any) -> Any:
    return new if new is old else torch.where(ok, new, old)
