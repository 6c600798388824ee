"""Weights that are used by function, under other modes, and by compilers, have their rows."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from uses import Does, draw, ids, loss_of, tables
from watched import CLOSE, Watched, check_rows, layers

from singd_torch import SINGD
from singd_torch.capture import queue

# ---- weights that are used by function -----------------------------------------------------------


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "T": lambda h, W: h @ W.T,
    "mT": lambda h, W: torch.matmul(h, W.mT),
    "t": lambda h, W: h.matmul(W.t()),
    "mm": lambda h, W: torch.mm(h.flatten(0, 1), W.t()),
    "transpose used twice": lambda h, W: F.linear(h @ W.T, W.T),
    "soft look-up": lambda h, W: F.linear(h, W).softmax(-1) @ W,
}


@pytest.mark.parametrize("head", HEADS)
def test_table_that_is_the_head_by_function(head: str) -> None:
    model = tables(HEADS[head])
    check_rows(model.double(), lambda m: loss_of(m(ids())))


def test_tied_by_function_has_the_curvature_of_tied_by_module() -> None:
    """One Kronecker product of the rows of the look-up and of the head; K and C change places."""

    def trace(model: nn.Module) -> float:
        optimizer = SINGD(model)
        loss_of(model(ids())).backward()
        optimizer.step()
        state = optimizer.state[model.table.weight]
        return float(state["averages.t_U"] * state["averages.t_G"])

    torch.manual_seed(1)
    by_function = tables(F.linear).double()
    by_module = Does(
        lambda m, x: m.head(torch.tanh(m.inner(m.table(x)))),
        **{name: copy.deepcopy(layer) for name, layer in by_function.named_children()},
        head=nn.Linear(4, 9, bias=False).double(),
    )
    by_module.head.weight = by_module.table.weight
    assert trace(by_module) == pytest.approx(trace(by_function), rel=CLOSE)


def test_linear_used_by_module_and_without_its_bias() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.layer(x)), m.layer.weight)

    check_rows(Does(call, layer=nn.Linear(5, 5)).double(), lambda m: loss_of(m(draw(9, 5))))


def test_weight_and_its_transpose() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(m.layer(x)) @ m.layer.weight

    model = Does(call, layer=nn.Linear(5, 4, bias=False))
    check_rows(model.double(), lambda m: loss_of(m(draw(9, 5))))


def test_both_uses_of_a_square_weight_wait_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, m.inner.weight)) @ m.inner.weight

    found = []
    for small in (queue.SMALL, 0):  # at 0 no call waits for others
        monkeypatch.setattr(queue, "SMALL", small)
        torch.manual_seed(0)
        model = Does(both, inner=nn.Linear(4, 4, bias=False)).double()
        optimizer = SINGD(model, structures="dense", T=1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(draw(9, 4))).backward()
            optimizer.step()
        found.append(optimizer.state[model.inner.weight])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


def test_a_part_of_a_model_is_called() -> None:
    model = Does(lambda m, x: x, part=tables(F.linear)).double()
    check_rows(model, lambda m: loss_of(m.part(ids())))


def test_checkpointed_modules_that_use_a_weight_by_function() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return checkpoint(m.part, x, use_reentrant=False)

    model = Does(call, part=tables(F.linear)).double()
    check_rows(model, lambda m: loss_of(m(ids())))


def test_checkpointed_function_that_calls_a_module() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(m.layer(x)), x, use_reentrant=False)

    model = Does(call, layer=nn.Linear(5, 4)).double()
    check_rows(model, lambda m: loss_of(m(draw(9, 5).requires_grad_())))


# ---- other modes, inputs and compilers -----------------------------------------------------------


class Plain(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4)


@pytest.mark.parametrize("mode", [lambda: torch.device("cpu"), Plain], ids=["device", "own"])
def test_attention_and_functions_under_another_mode(mode: Callable[[], Any]) -> None:
    x = draw(4, 5, 8)
    with mode():
        check_rows(attention().double(), lambda m: loss_of(m(x, x[..., :6], x[..., :4])[0]))
        check_rows(tables(F.linear).double(), lambda m: loss_of(m(ids())))


def test_subclass_of_attention_that_computes_a_weight() -> None:
    class Signed(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return F.multi_head_attention_forward(
                x, x, x, 8, 2, 2 * self.in_proj_weight, self.in_proj_bias, None, None, False, 0.0,
                self.out_proj.weight, self.out_proj.bias,
            )[0]  # fmt: skip

    model = Signed(8, 2).double()
    optimizer = Watched(model)
    loss_of(model(draw(5, 4, 8))).backward()
    with pytest.warns(UserWarning, match="in_proj_weight"):
        optimizer.step()
    assert optimizer.skipped == 0


SPARSE = {
    "COO": lambda x: x.to_sparse(),
    "CSR": lambda x: x.to_sparse_csr(),
    "jagged": lambda x: torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_and_nested_inputs(layout: str) -> None:
    x = SPARSE[layout]((draw(8, 5) > 0).double())

    def loss(model: nn.Module) -> Tensor:
        z = model(x)
        return loss_of(z.values() if z.is_nested else z)

    check_rows(nn.Linear(5, 4).double(), loss)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_inputs_without_a_shape_train() -> None:
    model = nn.Linear(4, 3)
    optimizer = SINGD(model)
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)])
    model(x).to_padded_tensor(0.0).square().mean().backward()
    with pytest.warns(UserWarning, match="no rows of 'weight'"):
        optimizer.step()


def test_call_that_returns_its_input() -> None:
    class Off(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Off(4, 4), nn.Linear(4, 3))
    SINGD(model)
    model(torch.randn(2, 4, requires_grad=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_trace_while_the_optimizer_lives() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = SINGD(model)
    traced = torch.jit.trace(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    torch.testing.assert_close(traced(x), model(x))
    del optimizer


def test_fast_weights_of_functional_calls_are_not_the_layers() -> None:
    """As in MAML: the inner step has other weights, and the weight itself gives the rows."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def loss(model: nn.Module) -> Tensor:
        weights = dict(model.named_parameters())
        inner = loss_of(torch.func.functional_call(model, weights, (x,)))
        gradients = torch.autograd.grad(inner, list(weights.values()))
        fast = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), gradients, strict=True)}
        return loss_of(torch.func.functional_call(model, fast, (y,)))

    x, y = draw(9, 5), draw(7, 5)
    optimizer = SINGD(model)
    with optimizer.no_rows():
        value = loss(model)
    value.backward()
    assert not any(layer.pending for layer in layers(optimizer))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="probes are compiled from torch 2.13 on")
def test_compiled_parts_of_a_model_that_is_watched() -> None:
    """The whole is not compiled, so its calls are seen; a part is, and gives its rows itself."""

    def call(m: Any, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(m.inner(m.table(x))), m.table.weight)

    def build() -> nn.Module:
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        return Does(call, table=nn.Embedding(9, 4), inner=inner).double()

    found = []
    for compiled in (False, True):
        model = build()
        if compiled:
            model.inner.compile(backend="aot_eager", fullgraph=True)
        optimizer = Watched(model)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(ids())).backward()
            optimizer.step()
        found.append((optimizer.products, [p.detach() for p in model.parameters()]))
    (plain, weights), (parted, others) = found
    assert plain.keys() == parted.keys()
    for name, product in plain.items():
        torch.testing.assert_close(product, parted[name], rtol=CLOSE, atol=CLOSE)
    for p, q in zip(weights, others, strict=True):
        torch.testing.assert_close(p, q)
