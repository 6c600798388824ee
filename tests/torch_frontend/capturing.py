"""What the tests of capture share: a model's rows explain its gradients, and change none."""

import copy
from collections.abc import Callable

from torch import Tensor, nn
from uses import loss_of
from watched import CLOSE, Watched, check_products, layers


def check(
    model: nn.Module,
    x: Tensor,
    *,
    close: float = CLOSE,
    backward: Callable[[nn.Module, Tensor], None] = lambda model, x: loss_of(model(x)).backward(),
    expected_layers: int | None = None,
) -> Watched:
    """Every layer gave rows that explain its gradient, and capture changed no gradient."""
    plain = copy.deepcopy(model)
    backward(plain, x)
    optimizer = Watched(model)
    backward(model, x)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        # equal up to the order of sums: the probe may change the layout of what autograd sums up
        assert p.grad is None or (p.grad - q.grad).norm() <= CLOSE * q.grad.norm()

    found = layers(optimizer)
    assert len(found) == expected_layers if expected_layers is not None else found
    assert all(layer.has_rows for layer in found)
    check_products(optimizer, close)
    optimizer.step()
    assert optimizer.skipped == 0
    return optimizer


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).double()
