"""What the tests of whole models share: a model trains, and its layers see the right rows."""

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad
from torch.utils._python_dispatch import TorchDispatchMode

from singd_core.layers import Embedding
from singd_torch import SINGD
from singd_torch.layers.layer import Layer
from singd_torch.layers.source import Source

STEPS = 20
# Relative, in float64: sums over at most some thousand rows in another order than autograd's.
CLOSE = 1e-12

Loss = Callable[[nn.Module], Tensor]


def layers(optimizer: SINGD) -> list[Layer]:
    """The layers of an optimizer, with the rows of all calls so far in `pending`."""
    optimizer._watcher.queue.flush()
    return optimizer._layers


class Products(TorchDispatchMode):
    """The dtypes of the products of matrices within it.

    Attributes:
        dtypes: How many products there were of each.
    """

    def __init__(self, least: int = 0) -> None:
        """Products of fewer numbers than `least` do not count."""
        super().__init__()
        self.least, self.dtypes = least, Counter[torch.dtype]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        is_product = function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm")
        if is_product and result.numel() >= self.least:
            self.dtypes[result.dtype] += 1
        return result


class Product(torch.autograd.Function):
    """A kernel of one's own: `x Wᵀ`, which torch tells nobody of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x @ W.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, W), (g,) = ctx.saved_tensors, grads
        return g @ W, g.flatten(0, -2).T @ x.flatten(0, -2)


def see_rows(optimizer: SINGD, see: Callable[[Layer, Source, Tensor, Tensor], None]) -> None:
    """Call `see` with the input and the output gradient of each use of a weight that gives rows."""
    watcher = optimizer._watcher
    take = watcher.take_rows

    def both(layer: Layer, source: Source, x: Tensor, g: Tensor) -> None:
        see(layer, source, x, g)
        take(layer, source, x, g)

    watcher.take_rows = both  # type: ignore[method-assign]


class Watched(SINGD):
    """Keeps what its rows are.

    Attributes:
        products: The product BᵀA of all rows of each layer and part, as a sum.
        calls: How many calls of each layer gave rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.products: dict[tuple[str, int | None], Tensor] = {}
        self.calls = Counter[str]()
        super().__init__(*args, **kwargs)
        see_rows(self, self._see)

    def _see(self, layer: Layer, source: Any, x: Tensor, g: Tensor) -> None:
        kind, bias = source.kind, layer.bias is not None and source.biased
        if isinstance(kind, Embedding):
            A = one_hot(x.flatten(), kind.entries) * (
                torch.arange(kind.entries) != kind.padding_idx
            )
        else:
            A, _ = kind.inputs(x, bias=bias, kfac_approx="expand")
            A = pad(A, (0, int(layer.bias is not None and not source.biased)))
        B, _ = kind.outputs(g, kfac_approx="expand", loss_average=None)
        product = B.mT.to(layer.weight) @ A.to(layer.weight)
        if source.swapped:  # a table of embeddings that is tied to the layer
            product = pad(product.mT, (0, int(layer.bias is not None)))
        key = layer.name, source.part
        self.products[key] = self.products.get(key, 0.0) + product
        self.calls[layer.name] += 1


def check_rows(model: nn.Module, loss: Loss, **given: Any) -> None:
    """The rows of every layer explain its gradient: BᵀA of the rows is what autograd found."""
    optimizer = Watched(model, **given)
    loss(model).backward()
    check_products(optimizer)


def check_products(optimizer: Watched, close: float = CLOSE) -> None:
    """The same of what an optimizer has watched."""
    with_rows = [layer for layer in layers(optimizer) if layer.has_rows]
    assert with_rows
    for layer in with_rows:
        gradient = layer.kind.matrix(*(p.grad for p in layer.parameters))
        found = {
            part: own for (name, part), own in optimizer.products.items() if name == layer.name
        }
        if None in found:
            product = found[None]
        else:  # a part that was not used has a gradient of zeros
            product = torch.stack([found.get(i, 0.0 * own) for i, own in enumerate(gradient)])
        assert product.shape == gradient.shape, layer.name
        assert (product - gradient).norm() <= close * gradient.norm(), layer.name


def table(optimizer: SINGD) -> dict[str, str]:
    """The rule by which each parameter is trained, as `print(optimizer)` tells it."""
    rules = {}
    for line in repr(optimizer).splitlines()[2:]:
        names, _, rule, *_ = re.split(r"  +", line)
        weight, *bias = names.split(" + ")
        for name in (weight, *(f"{weight.rpartition('.')[0]}.{b}".lstrip(".") for b in bias)):
            assert name not in rules, f"{name} is listed twice"
            rules[name] = rule
    return rules


def check_trained(
    model: nn.Module, start: nn.Module, optimizer: SINGD, losses: list[float]
) -> None:
    """Every parameter is listed and has moved, and the loss is finite and lower."""
    names = [name for name, _ in model.named_parameters()]
    assert sorted(table(optimizer)) == sorted(names)
    still = [
        name for name in names if torch.equal(model.get_parameter(name), start.get_parameter(name))
    ]
    assert not still
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert optimizer.skipped == 0


def check_model(model: nn.Module, loss: Loss, preconditioned: int, **given: Any) -> SINGD:
    """The model trains for 20 steps, and its layers, so many, see the right rows."""
    start, optimizer, losses = copy.deepcopy(model), SINGD(model, **given), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    check_trained(model, start, optimizer, losses)
    assert sum(layer.has_rows for layer in layers(optimizer)) == preconditioned
    check_rows(copy.deepcopy(model).double(), loss, **given)
    return optimizer
