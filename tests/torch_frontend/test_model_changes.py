"""What happens to a model after its optimizer was built: right from the next step on, or said."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from watched import Watched, check_products, layers, table

from singd_torch import SINGD


def network() -> nn.Module:
    layers = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 10, bias=False)
    return nn.Sequential(*layers).double()


def train(model: nn.Module, optimizer: SINGD, n: int = 1) -> list[str]:
    """Take steps, and return the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(n):
            tokens = torch.randint(10, (16,))
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), tokens).backward()
            optimizer.step()
    return [str(warning.message) for warning in found]


# ---- other uses of the same parameters -----------------------------------------------------------


class Low(nn.Module):
    """A weight with a product of low rank, as adapters add it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(6, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[1], "weight", 0.5)  # type: ignore[no-untyped-call]


def pruned_bias(model: Any) -> None:
    prune.l1_unstructured(model[1], "bias", 0.5)  # type: ignore[no-untyped-call]


def adapted(model: Any) -> None:
    model[1].weight.requires_grad_(False)
    parametrize.register_parametrization(model[1], "weight", Low().double())


def patched(model: Any) -> None:
    layer = model[1]
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def other_class(model: Any) -> None:
    model[1].__class__ = Twice


def tied(model: Any) -> None:
    model[3].weight = model[0].weight


def without_bias(model: Any) -> None:
    model[1].bias = None


# What is done, what is warned about, and the layers that have rows then.
OTHERS: dict[str, tuple[Callable[[Any], Any], str, set[str]]] = {
    "pruned": (pruned, "'1.weight_orig' is used in another way", {"0.weight", "3.weight"}),
    "pruned bias": (pruned_bias, "'1.weight' is used", {"0.weight", "1.weight", "3.weight"}),
    "spectral norm": (
        lambda model: parametrizations.spectral_norm(model[1]),
        "'1.parametrizations.weight.original' is used in another way",
        {"0.weight", "3.weight"},
    ),
    "patched": (patched, "'1.weight' is used in another way", {"0.weight", "3.weight"}),
    "class": (other_class, "'1.weight' is used", {"0.weight", "1.weight", "3.weight"}),
    "tied": (tied, "'0.weight' is used in another way", {"0.weight", "1.weight"}),
    "no bias": (without_bias, "'1.weight' is used", {"0.weight", "1.weight", "3.weight"}),
}


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("case", OTHERS)
def test_uses_that_change_are_seen_and_said(case: str, before: int) -> None:
    torch.manual_seed(0)
    change, text, with_rows = OTHERS[case]
    model = network()
    optimizer = Watched(model)
    assert not train(model, optimizer, before)
    change(model)
    old = copy.deepcopy(model.state_dict())
    assert any(text in warning for warning in train(model, optimizer))
    optimizer.products.clear()
    said = train(model, optimizer)
    assert all("no rows of '1.weight' are taken, since" in warning for warning in said)
    assert optimizer.skipped == 0
    assert all(not torch.equal(p, old[name]) for name, p in model.named_parameters())
    assert {layer.name for layer in layers(optimizer) if layer.has_rows} == with_rows
    optimizer.products.clear()
    tokens = torch.randint(10, (16,))
    optimizer.zero_grad()
    F.cross_entropy(model(tokens), tokens).backward()
    check_products(optimizer)
    again = SINGD(model)
    if said:  # it is found out in a call
        return
    assert sorted(table(again).items()) == sorted(
        (name, rule) for name, rule in table(optimizer).items() if "(replaced)" not in name
    )


def test_pruning_that_is_made_permanent_gives_rows_again() -> None:
    model = network()
    optimizer = SINGD(model)
    pruned(model)
    train(model, optimizer, 2)
    assert table(optimizer)["1.weight_orig"] == "SINGD without rows"
    prune.remove(model[1], "weight")  # type: ignore[no-untyped-call]
    train(model, optimizer, 2)
    assert table(optimizer)["1.weight"] == "SINGD"
    assert optimizer.skipped == 0


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def dilated(model: Any, step: int) -> None:
    model[2].dilation = model[2].padding = (1 + step % 2,)  # as many positions


def strided(model: Any, step: int) -> None:
    model[2].stride = (1 + step % 2,)


def strided_back(model: Any, step: int) -> None:
    model[4].stride = (1 + step % 2,)


def padded(model: Any, step: int) -> None:
    model[0].padding_idx = (None, 3)[step % 2]


@pytest.mark.parametrize("change", [dilated, strided, strided_back, padded])
def test_rows_are_those_of_the_arguments_that_a_module_has_now(change: Any) -> None:
    convolutions = nn.Conv1d(6, 6, 3, padding=1), nn.Tanh(), nn.ConvTranspose1d(6, 4, 3, padding=1)
    model = nn.Sequential(nn.Embedding(10, 6), Turned(), *convolutions).double()
    optimizer = SINGD(model, T=1)
    for step in range(5):
        change(model, step)
        optimizer.zero_grad()
        model(torch.randint(10, (8, 12))).sin().mean().backward()
        optimizer.step()  # any warning is an error
    for weight in (model[0].weight, model[2].weight, model[4].weight):
        assert optimizer.state[weight]["averages.k"] == 5
    see = Watched(model)
    change(model, 0)
    model.zero_grad()
    model(torch.randint(10, (8, 12))).sin().mean().backward()
    check_products(see)


@pytest.mark.slow  # it compiles for seconds
@pytest.mark.parametrize("case", ["pruned", "patched"])
def test_uses_that_change_are_seen_in_compiled_models(case: str) -> None:
    torch.compiler.reset()
    change, text, with_rows = OTHERS[case]
    model = network()
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer = SINGD(model)
    assert not train(compiled, optimizer, 2)
    change(model)
    assert any(text in warning for warning in train(compiled, optimizer))
    train(compiled, optimizer, 2)
    assert {name for name, rule in table(optimizer).items() if rule == "SINGD"} >= with_rows
    assert "SINGD without rows" in table(optimizer).values()
    assert optimizer.skipped == 0


def test_forwards_that_are_patched_before_the_first_step_may_take_other_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    optimizer = SINGD(model)
    forward = model[1].forward
    model[1].forward = lambda x: forward(torch.cat([x, x[..., :2]], -1))  # type: ignore[method-assign]
    forward_of_first = model[0].forward
    model[0].forward = lambda x: forward_of_first(x)[..., :4]  # type: ignore[method-assign]
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        if step:
            optimizer.step()
            continue
        with pytest.warns(UserWarning, match="was changed after the optimizer was built"):
            optimizer.step()
    assert set(table(optimizer).values()) == {"SINGD"}


# ---- changes that need no word -------------------------------------------------------------------


def emptied(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)


def frozen(model: Any) -> None:
    model[1].requires_grad_(False)


def other_memory(model: Any) -> None:
    model[3].weight.data = model[3].weight.data.mT.contiguous().mT


def with_a_metric(model: Any) -> None:
    model[2].metric = nn.CrossEntropyLoss()


@pytest.mark.parametrize("change", [emptied, frozen, other_memory, with_a_metric])
def test_what_leaves_layers_what_they_are_is_not_warned_about(
    change: Callable[[Any], None],
) -> None:
    model = network()
    optimizer = SINGD(model)
    before = table(optimizer)
    train(model, optimizer)
    change(model)
    old = copy.deepcopy(model.state_dict())
    assert not train(model, optimizer, 3)
    assert table(optimizer) == before
    for name, p in model.named_parameters():
        assert torch.equal(p, old[name]) is not p.requires_grad


@pytest.mark.parametrize("kind", ["Linear", "MultiheadAttention", "Bilinear"])
def test_a_head_that_is_replaced_is_let_go(kind: str) -> None:
    def head() -> Any:
        if kind == "MultiheadAttention":
            return nn.MultiheadAttention(6, 2, batch_first=True)
        return nn.Linear(6, 3) if kind == "Linear" else nn.Bilinear(6, 6, 3)

    def step() -> None:
        h = model[0](torch.randn(5, 6))
        y = model[1](h) if kind == "Linear" else model[1](h, *[h] * (2 - (kind == "Bilinear")))
        (y[0] if kind == "MultiheadAttention" else y).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = nn.ModuleList([nn.Linear(6, 6), head()])
    optimizer = SINGD(model)
    gone: list[weakref.ref[Any]] = []
    for _ in range(4):
        step()
        for p in model[1].parameters():
            gone.append(weakref.ref(p))
            optimizer.state.pop(p, None)
        gone.append(weakref.ref(model[1]))
        del p
        model[1] = head()
        optimizer.param_groups[0]["params"][2:] = model[1].parameters()
    step()
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)


def test_parameters_may_be_swapped() -> None:
    """As models in parts do it to be cast and moved: a parameter with weak references cannot be."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    twin = copy.deepcopy(model)
    optimizer, other = SINGD(model), SINGD(twin)
    for t in range(30):
        x = torch.sin(torch.arange(30.0, dtype=torch.float64).view(5, 6) + t)
        for one, own in ((model, optimizer), (twin, other)):
            own.zero_grad()
            one(x).square().sum().backward()
            own.step()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.to(torch.float64)
            model.load_state_dict(copy.deepcopy(model.state_dict()))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_head_that_is_replaced_far_from_a_refresh_trains_at_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = SINGD(model, warmup=0)
    for _ in range(400):  # the next refresh is some steps away
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    old = model[2].weight
    model[2] = nn.Linear(6, 3)
    optimizer.param_groups[0]["params"][2:] = model[2].parameters()
    optimizer.state.pop(old, None)
    before = model[2].weight.detach().clone()
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[2].weight)
    assert old not in optimizer.state


def test_the_first_pass_of_parameters_that_took_the_places_of_others_has_rows() -> None:
    """Also without a zero_grad before it. The others are let go."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = SINGD(model)
    gone = [weakref.ref(p) for p in model.parameters()]
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    assert all(optimizer.state[m.weight]["averages.t_U"].any() for m in (model[0], model[2]))
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)
