"""The check that needs no oracle: the rows of every layer multiply to its gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from singd_core._array import widen
from singd_torch._warnings import listed
from singd_torch.capture.keeper import Keeper
from singd_torch.capture.watcher import Watcher
from singd_torch.layers.layer import Layer
from singd_torch.layers.roster import Roster
from singd_torch.layers.rows import check_sides
from singd_torch.layers.source import Source
from singd_torch.optimizer import SINGD

# Of the format to which CUDA rounds what it multiplies in convolutions of float32.
_EPS_OF_TF32 = 2.0**-10


def check(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], *, tolerance: float | None = None
) -> dict[str, float]:
    """Check that `Bᵀ A = ∇W` holds for the rows of every layer that gives rows.

    The loss is evaluated and differentiated once, on a copy of the model. The model, its gradients
    and an optimizer that watches the model do not change. The result leaves out layers that are
    trained without rows (`print(optimizer)` says why), layers that the loss does not use, and
    layers whose derivatives the loss contains (`create_graph=True`).

    Args:
        model: The model, on any device.
        loss: A function that returns the training loss of the model that it is handed, a number.
        tolerance: The largest difference that is no error, relative to the norm of ∇W. None is
            1e-4, or 8 times the rounding of the coarsest numbers that are multiplied.

    Returns:
        The relative difference of each layer, by the name of its weight.

    Raises:
        AssertionError: If the difference of a layer is larger. The message names the layers.
        RuntimeError: If the model keeps a tensor with a graph, of which torch makes no copy.
        TypeError: If the model is no module, or the loss no number.
        ValueError: If the loss does not depend on the model that its function is handed, if
            gradients are not finite, or if a module was registered as a layer that it is not.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        >>> x = torch.randn(16, 3, dtype=torch.float64)
        >>> gaps = check(model, lambda model: model(x).square().mean())
        >>> sorted(gaps), max(gaps.values()) < 1e-12
        (['0.weight', '2.weight'], True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check wants the model, a torch.nn.Module, not {type(model).__name__}")
    model = _copied(model)
    model.zero_grad()
    optimizer = _Products(model, rows=float("inf"))  # a sample multiplies to another gradient
    watcher = optimizer._watcher
    value = _differentiate(model, loss)
    found, wrong, infinite = {}, [], []
    for layer in optimizer._layers:
        sums = watcher.sums.get(layer.name)
        if sums is None or layer.without_rows or layer.weight.grad is None:
            continue
        if layer in watcher.differentiated:
            continue
        if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters):
            infinite.append(layer.name)
            continue
        gap, error = sums.compare(layer)
        limit = max(1e-4, 8 * sums.eps) if tolerance is None else tolerance
        found[layer.name] = gap
        if not gap <= limit + error:
            wrong.append(f"{layer.name} ({gap:.2g}, where up to {limit:.2g} is rounding)")
    if infinite:
        raise ValueError(
            f"the loss is {float(value):.3g}, and gradients of {listed(infinite)} are NaN or "
            "infinite: give check a loss whose gradients are numbers"
        )
    if wrong:
        raise AssertionError(
            f"the rows of these layers do not multiply to their gradient: {', '.join(wrong)}. If "
            "the loss uses their weights apart from the model's calls, as a penalty does, leave "
            "that out here. If register_layer was called for their modules, give it another kind. "
            "Else this is a bug in singd_torch"
        )
    return found


def _copied(model: nn.Module) -> nn.Module:
    """A copy of a model, which may keep nothing that a forward pass has computed."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        if "deepcopy" not in str(error):
            raise
        named = (
            (f"{path}.{name}".lstrip("."), value)
            for path, module in model.named_modules()
            for name, value in {**vars(module), **module._buffers}.items()
        )
        kept = [name for name, value in named if isinstance(value, Tensor) and not value.is_leaf]
        such = f", such as {kept[0]!r}" if kept else ""
        raise RuntimeError(
            f"check copies the model, and torch makes no copy of a tensor with a graph{such}: call "
            "check before the first forward pass, or delete attributes that hold a graph"
        ) from error


def _differentiate(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The loss of a model, which has no gradients before, after one backward pass."""
    example = "check(model, lambda model: criterion(model(x), y))"
    if not callable(loss):
        raise TypeError(f"loss must be a function of the model, as in {example}")
    with torch.enable_grad():
        value: Any = loss(model)
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss must return one number in a tensor, not {given}, as in {example}")
    if value.requires_grad:
        torch.autograd.backward(value)
    if all(p.grad is None for p in model.parameters()):
        raise ValueError(
            "the loss does not depend on the model that its function is handed, a copy: compute "
            f"it with the argument of the function, as in {example}, and not with a model outside"
        )
    return value.detach()


class _Sums:
    """What is summed up of the rows of one layer: BᵀA by part, and the size of its terms."""

    def __init__(self) -> None:
        self._products: dict[int | None, Tensor] = {}
        self._terms = 0.0
        self.eps = 0.0

    def add(self, layer: Layer, source: Source, x: Tensor, g: Tensor) -> None:
        kind, has_bias = source.kind, layer.bias is not None
        B, _ = kind.outputs(widen(g), kfac_approx="expand", loss_average=None)
        bias = has_bias and source.biased and not source.swapped
        A = kind.all_inputs(widen(x.to(B.device)), bias=bias, like=B)
        A = pad(A, (0, int(has_bias and not bias and not source.swapped)))
        product = B.mT @ A
        if not source.swapped:
            check_sides(layer, source, A, B)
        else:
            product = pad(product.mT, (0, int(has_bias)))
        self._products[source.part] = self._products.get(source.part, 0.0) + product
        self._terms += float(B.norm() * A.norm())
        coarse = [torch.finfo(t.dtype).eps for t in (x, g) if t.dtype.is_floating_point]
        if g.is_cuda and g.dtype == torch.float32:  # convolutions are in TF32 there
            coarse.append(_EPS_OF_TF32)
        self.eps = max(self.eps, *coarse)

    def compare(self, layer: Layer) -> tuple[float, float]:
        """The difference to the gradient relative to its norm, and what of it may be rounding."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters]
        gradient = widen(layer.kind.matrix(*gradients))
        found = self._products
        if None in found:
            product = found[None]
        else:  # a part that was not used has a gradient of zeros
            product = torch.stack(
                [found.get(i, torch.zeros_like(own)) for i, own in enumerate(gradient)]
            )
        norm = max(float(gradient.norm()), 1e-300)
        return float((product - gradient).norm()) / norm, 8 * self.eps * self._terms / norm


class _Multiplier(Watcher):
    """Multiplies the rows in place of measuring them."""

    def __init__(self, roster: Roster, keeper: Keeper) -> None:
        super().__init__(roster, keeper)
        self.sums: dict[str, _Sums] = {}

    def take_rows(self, layer: Layer, source: Source, x: Tensor, g: Tensor) -> None:
        self.begin_pass(layer)
        self.sums.setdefault(layer.name, _Sums()).add(layer, source, x, g)

    def forget_rows(self, layer: Layer) -> None:
        super().forget_rows(layer)
        self.sums.pop(layer.name, None)

    @property
    def differentiated(self) -> set[Layer]:
        """The layers whose derivatives the loss contains."""
        return self._proofs.differentiated


class _Products(SINGD):
    """Has the products of the rows of a model."""

    _watcher: _Multiplier
    _watches = _Multiplier
