"""Training loops in styles of their own: each trains, and the rows belong to the loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward
import torch.nn.functional as F
from torch import Tensor, nn
from watched import CLOSE, Watched, layers, table

from singd_torch import SINGD


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 4, dtype=torch.float64), torch.randint(3, (32,))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(model: Any, optimizer: SINGD, n: int) -> list[float]:
    losses, (x, y) = [], data()
    for _ in range(n):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_parameters_that_are_put_into_a_group_by_hand() -> None:
    """As `add_param_group` would, where torch's optimizers take them as well."""
    model = network()
    optimizer = SINGD(model, model[0].parameters())
    with torch.no_grad():
        start = model[2].weight.clone()
    train(model, optimizer, 3)
    assert torch.equal(model[2].weight, start)
    optimizer.param_groups[0]["params"].extend(model[2].parameters())
    losses = train(model, optimizer, 5)
    assert table(optimizer) == dict.fromkeys(("0.weight", "0.bias", "2.weight", "2.bias"), "SINGD")
    assert losses[-1] < losses[0]
    assert optimizer.skipped == 0


def test_parameters_that_are_taken_out_of_a_group_by_hand() -> None:
    model = network()
    optimizer = SINGD(model)
    train(model, optimizer, 3)
    group = optimizer.param_groups[0]
    group["params"] = group["params"][2:]
    start = model[0].weight.detach().clone()
    train(model, optimizer, 3)
    assert torch.equal(model[0].weight, start)
    assert set(table(optimizer)) == {"2.weight", "2.bias"}
    optimizer.add_param_group({"params": model[0].parameters()})
    train(model, optimizer, 2)
    assert not torch.equal(model[0].weight, start)


def test_parameters_that_go_to_another_group_by_hand() -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = SINGD(model, groups)
    train(model, optimizer, 2)
    first, second = (group["params"] for group in optimizer.param_groups)
    first.append(second.pop())
    bias, weight = model[2].bias.detach().clone(), model[2].weight.detach().clone()
    train(model, optimizer, 2)
    assert torch.equal(model[2].bias, bias)
    assert not torch.equal(model[2].weight, weight)


def same_head(model: nn.Sequential) -> None:
    model[2] = nn.Linear(8, 3).double()


def wider_head(model: nn.Sequential) -> None:
    model[2] = nn.Linear(8, 5).double()


def longer_head(model: nn.Sequential) -> None:
    model[2] = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), model[2]).double()


@pytest.mark.parametrize("change", [same_head, wider_head, longer_head])
@pytest.mark.parametrize("T", [1, 50])  # a refresh is next, or is not
def test_a_head_that_is_replaced_in_a_group_of_its_own(
    change: Callable[[nn.Sequential], None], T: int
) -> None:
    """It begins anew, as with torch's optimizers: the momentum of the old head is not its own."""
    model = network()
    groups = [{"params": list(model[i].parameters())} for i in (0, 2)]
    optimizer = SINGD(model, groups, T=T, growing_T=False)
    train(model, optimizer, 4)
    old, K = model[2].weight, optimizer.state[model[0].weight]["K.matrix"].clone()
    change(model)
    new = list(model[2].parameters())
    optimizer.param_groups[1]["params"] = new
    start = [p.detach().clone() for p in new]
    train(model, optimizer, 1)  # warnings are errors here
    assert not any(torch.equal(p, q) for p, q in zip(new, start, strict=True))
    if new[0].shape == old.shape:
        momenta = (optimizer.state[p]["momentum_buffer"] for p in (old, new[0]))
        assert not torch.allclose(*momenta, rtol=0.1)
    assert torch.equal(optimizer.state[model[0].weight]["K.matrix"], K) is (T == 50)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    assert len(saved["state"]) == len([p for p in model.parameters() if optimizer.state[p]])
    assert optimizer.state[old]  # as torch keeps it
    rules = {"SINGD"} if T == 1 else {"SINGD", "SINGD without rows"}  # they refresh factors
    assert set(table(optimizer).values()) == rules


class Experts(nn.Module):
    """Modules. A batch may use some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 8) for _ in range(3))
        self.head, self.used = nn.Linear(8, 3), 2

    def forward(self, x: Tensor) -> Tensor:
        which = torch.arange(len(x)) % self.used
        out = x.new_zeros(len(x), 8)
        for i, expert in enumerate(self.experts):
            at = (which == i).nonzero()[:, 0]
            out = out.index_add(0, at, expert(x[at]))
        return self.head(out.tanh())  # type: ignore[no-any-return]


def test_an_expert_without_inputs_waits_for_them() -> None:
    torch.manual_seed(0)
    model = Experts().double()
    optimizer, start = SINGD(model), model.experts[2].weight.detach().clone()
    train(model, optimizer, 3)  # warnings are errors here
    assert torch.equal(model.experts[2].weight, start)
    model.used = 3
    train(model, optimizer, 3)
    model.used = 2
    K = optimizer.state[model.experts[2].weight]["K.matrix"].clone()
    train(model, optimizer, 5)
    assert torch.equal(optimizer.state[model.experts[2].weight]["K.matrix"], K)
    assert {rule for name, rule in table(optimizer).items()} == {"SINGD"}
    assert not torch.equal(model.experts[2].weight, start)


def test_jagged_indices() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "layer": nn.Linear(4, 3)}).double()
    lists = [torch.randint(9, (n,)) for n in (3, 1, 5)]
    jagged = torch.nested.nested_tensor(lists, layout=torch.jagged)
    optimizer = Watched(model)
    h = model["layer"](model["table"](jagged))
    sum(part.sin().square().mean() for part in h.unbind()).backward()
    for name in ("table.weight", "layer.weight"):
        layer = next(own for own in layers(optimizer) if own.name == name)
        gradient = layer.kind.matrix(*(p.grad for p in layer.parameters))
        product = optimizer.products[name, None]
        assert (product - gradient).norm() <= CLOSE * gradient.norm()
    optimizer.step()
    assert set(table(optimizer).values()) == {"SINGD"}


@pytest.mark.parametrize(("weight", "expected"), [(1e-6, "SINGD"), (10.0, "SINGD without rows")])
def test_forward_derivatives_in_the_loss(weight: float, expected: str) -> None:
    """Rows come from the calls, until a tenth of the gradient is of derivatives."""
    model, (x, y) = network(), data()
    optimizer = SINGD(model)
    for _ in range(3):  # warnings are errors here
        optimizer.zero_grad()
        with forward.dual_level():
            dual = model(forward.make_dual(x, torch.ones_like(x)))
            logits, slope = forward.unpack_dual(dual)
            (F.cross_entropy(logits, y) + weight * slope.square().mean()).backward()
        optimizer.step()
    rules = table(optimizer)
    assert {rules[name] for name, p in model.named_parameters() if p.ndim > 1} == {expected}


def test_attention_that_two_optimizers_watch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).double()
    watched = [Watched(model) for _ in range(2)]
    model(torch.randn(5, 3, 8, dtype=torch.float64)).sin().sum().backward()
    first, second = (own.products for own in watched)
    assert {name for name, _ in first} >= {
        "0.self_attn.in_proj_weight",
        "0.self_attn.out_proj.weight",
    }
    assert first.keys() == second.keys()
    for key, product in first.items():
        assert torch.equal(product, second[key])
