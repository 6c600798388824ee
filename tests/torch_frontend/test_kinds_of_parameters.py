"""Parameters of a class of their own train as torch's do."""

import warnings

import torch
from torch import Tensor, nn
from unseen import Net, hidden, loss_of, tokens
from watched import Product

from singd_torch import SINGD


class Tagged(nn.Parameter):
    """A parameter of a subclass that says more of it, and that no processes have parts of."""


def replace(model: nn.Module, kind: type[nn.Parameter]) -> None:
    """Give all modules parameters of a kind, with the same numbers."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                setattr(module, name, kind(p.detach()))


def trained(kind: type[nn.Parameter]) -> tuple[str, list[Tensor]]:
    """The table and the parameters, where gradients are dropped and a use of a weight is unseen."""
    torch.manual_seed(0)
    model = Net().double()
    replace(model, kind)
    optimizer = SINGD(model, T=1)
    for step in range(5):
        model.zero_grad(set_to_none=step % 2 == 0)
        (1000 * loss_of(model, tokens())).backward()  # its rows are dropped with its gradient
        model.zero_grad(set_to_none=step % 2 == 0)
        x = tokens()
        unseen = Product.apply(hidden(x), model.head.weight).sin().mean()
        (loss_of(model, x) + (10 * unseen if step > 2 else 0.0)).backward()
        optimizer.step()
    return repr(optimizer), [p.detach() for p in model.parameters()]


def test_a_subclass_of_parameters_trains_as_torchs_own() -> None:
    """It has a stack of matrices, rows that are dropped, and rows that are compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the unseen use
        (table, expected), (found_table, found) = trained(nn.Parameter), trained(Tagged)
    assert "used where no call is seen" in table
    assert found_table == table
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
