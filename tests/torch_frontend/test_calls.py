"""Calls that are handed the weight itself give rows, whoever makes them; other calls give none."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from watched import CLOSE, Watched, check_products, check_rows, layers

from singd_torch import SINGD, check


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def loss_of(z: Tensor) -> Tensor:
    return (torch.sin(z) - 0.3).square().mean()


class Does(nn.Module):
    """A module that does what a function says with its layers."""

    def __init__(self, call: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.call = call

    def forward(self, *args: Any) -> Tensor:
        return self.call(self, *args)


# ---- subclasses ----------------------------------------------------------------------------------


class CausalConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Channels(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class Active(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Smooth(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(super().forward(x))


class Normed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.layer_norm(x, x.shape[-1:]))


class Gated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        left, right = super().forward(x).chunk(2, -1)
        return left * right.sigmoid()


class Half(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).chunk(2, -1)[0]


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


class Padded(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (0, 1, 0, 1)), weight, bias)


class Late(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * 2.0


class Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight.t())


class Offset(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 2)


SUBCLASSES = {
    "padding": (CausalConv1d(3, 4, 3), draw(5, 3, 8)),
    "padding that alone makes the kernel fit": (CausalConv1d(3, 4, 5), draw(5, 3, 3)),
    "other layout": (Channels(5, 4, 1), draw(6, 7, 5)),
    "activation": (Active(5, 4), draw(9, 5)),
    "activation that keeps its input": (Smooth(5, 4), draw(9, 5)),
    "norm": (Normed(5, 4), draw(9, 5)),
    "gate": (Gated(5, 8), draw(9, 5)),
    "one of two chunks": (Half(5, 8), draw(9, 5)),
    "flattened": (Flat(6, 4), draw(9, 2, 3)),
    "a convolution's own hook": (Padded(3, 4, 2), draw(5, 3, 4, 4)),
    "no bias": (Late(5, 4, bias=False), draw(9, 5)),
    "products": (Product(5, 4), draw(9, 5)),
    "table": (Offset(9, 4), torch.randint(7, (6, 3))),
}


@pytest.mark.parametrize("case", SUBCLASSES)
def test_subclass_with_a_forward_of_its_own(case: str) -> None:
    module, x = SUBCLASSES[case]
    check_rows(copy.deepcopy(module).double(), lambda m: loss_of(m(x)))
    check_rows(nn.Sequential(copy.deepcopy(module)).double(), lambda m: loss_of(m(x)))


def test_forward_replaced_in_a_module() -> None:
    module = nn.Linear(5, 4)
    forward = module.forward
    module.forward = lambda x: torch.relu(forward(x))  # type: ignore[method-assign]
    check_rows(module.double(), lambda m: loss_of(m(draw(9, 5))))


def test_forward_replaced_in_a_class_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, module.weight, module.bias)) - 0.1

    monkeypatch.setattr(nn.Linear, "forward", forward)
    check_rows(nn.Linear(5, 4).double(), lambda m: loss_of(m(draw(9, 5))))
    check_rows(nn.Sequential(nn.Linear(5, 4)).double(), lambda m: loss_of(m(draw(9, 5))))


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda m: m.register_forward_hook(lambda m, args, z: 2.0 * torch.relu(z)),
    "input": lambda m: m.register_forward_pre_hook(lambda m, args: (torch.tanh(args[0]),)),
    "gradient of the input": lambda m: m.register_full_backward_hook(lambda m, g, _: (0.5 * g[0],)),
    "gradient": lambda m: m.register_full_backward_pre_hook(lambda m, g: (torch.tanh(g[0]),)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_a_module_that_change_what_it_does(hook: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    HOOKS[hook](model[1])
    check_rows(model, lambda m: loss_of(m(draw(9, 5))))


@pytest.mark.parametrize("later", [False, True], ids=["before", "after the optimizer was built"])
def test_hooks_of_all_modules_that_change_what_they_do(*, later: bool) -> None:
    """A step notices hooks that come later."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 4)).double()
    x, optimizer = draw(9, 1, 3, 3), Watched(model) if later else None
    with register_module_forward_hook(lambda module, args, z: 2.0 * z):
        optimizer = optimizer or Watched(model)
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.products = {}
            loss_of(model(x)).backward()
            if not later:
                check_products(optimizer)
            optimizer.step()
    check_products(optimizer)


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return F.linear(x.bfloat16(), self.weight.to(torch.bfloat16), self.bias.bfloat16()).float()


class CastConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        return self._conv_forward(x, self.weight.to(dtype=x.dtype), self.bias.type_as(x))  # type: ignore[union-attr]


class CastTable(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight.bfloat16())


class CastTransposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16() @ self.weight.to(torch.bfloat16).t().contiguous()


CAST = {
    "linear": (Cast(5, 4), (9, 5)),
    "convolution": (CastConvolution(3, 4, 2), (5, 3, 4, 4)),
    "table": (CastTable(9, 4), None),
    "transposed": (CastTransposed(5, 4, bias=False), (9, 5)),
}


@pytest.mark.parametrize("case", CAST)
def test_layers_that_compute_in_another_dtype_than_their_weight(case: str) -> None:
    module, shape = CAST[case]
    model = nn.Sequential(copy.deepcopy(module))
    x = torch.randn(shape) if shape else torch.randint(9, (6, 3))
    assert check(model, lambda m: loss_of(m(x).float())).keys() == {"0.weight"}
    optimizer = SINGD(model)
    for _ in range(2):  # warnings are errors here
        optimizer.zero_grad()
        loss_of(model(x).float()).backward()
        optimizer.step()
    assert "without rows" not in repr(optimizer)
    assert optimizer.state[model[0].weight]["momentum_buffer"].dtype == torch.float32


def test_a_weight_that_tells_an_input_its_dtype_is_not_used() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        h = m.first(x).to(m.layer.weight).type_as(m.layer.weight)
        return m.layer(h)

    check_rows(
        Does(call, first=nn.Linear(5, 4), layer=nn.Linear(4, 4)).double(),
        lambda m: loss_of(m(draw(9, 5))),
    )


# ---- weights that are used by function -----------------------------------------------------------


def ids() -> Tensor:
    return torch.arange(12).reshape(4, 3) % 9


def tables(head: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    def call(m: Any, x: Tensor) -> Tensor:
        return head(torch.tanh(m.inner(m.table(x))), m.table.weight)

    return Does(call, table=nn.Embedding(9, 4), inner=nn.Linear(4, 4))


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


def test_a_part_of_a_model_is_called() -> None:
    model = Does(lambda m, x: x, part=tables(F.linear)).double()
    check_rows(model, lambda m: loss_of(m.part(ids())))


def test_checkpointed_modules_that_use_a_weight_by_function() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return checkpoint(m.part, x, use_reentrant=False)

    model = Does(call, part=tables(F.linear)).double()
    check_rows(model, lambda m: loss_of(m(ids())))


def test_checkpointed_functions_give_no_rows_and_train() -> None:
    """They are called again in the backward pass, by nobody who watches."""

    def call(m: Any, x: Tensor) -> Tensor:
        h = m.inner(m.table(x))
        return checkpoint(lambda h: F.linear(h, m.table.weight), h, use_reentrant=False)

    model = Does(call, table=nn.Embedding(9, 4), inner=nn.Linear(4, 4)).double()
    assert_without_rows(model, "table.weight", "checkpointed", ids())


def test_checkpointed_function_that_calls_a_module() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(m.layer(x)), x, use_reentrant=False)

    model = Does(call, layer=nn.Linear(5, 4)).double()
    check_rows(model, lambda m: loss_of(m(draw(9, 5).requires_grad_())))


# ---- no rows -------------------------------------------------------------------------------------


def assert_without_rows(model: nn.Module, name: str, reason: str, *args: Tensor) -> None:
    """The layer trains, the table and a warning say why without rows, and others keep theirs."""
    optimizer, before = SINGD(model), copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(*args)).backward()
            optimizer.step()
    again = SINGD(model)
    again.load_state_dict(optimizer.state_dict())
    assert repr(again) == repr(optimizer)
    saved, loaded = optimizer.state_dict()["state"], again.state_dict()["state"]
    torch.testing.assert_close(loaded, saved, rtol=0.0, atol=0.0)
    assert [str(w.message) for w in warned if name in str(w.message) and reason in str(w.message)]
    lines = {re.split(r"  +| \+ ", line)[0]: line for line in repr(optimizer).splitlines()[2:]}
    assert "SINGD without rows" in lines[name]
    assert reason in lines[name]
    assert sum("without rows" in line for line in lines.values()) == 1
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q)
    assert optimizer.skipped == 0


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tril(), self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1)[None], None, None, training=True)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class BiasApart(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * 2 + self.bias


COMPUTED = {
    "masked": (Masked(5, 5), (9, 5), "tril"),
    "scaled": (Scaled(5, 4), (9, 5), "mul"),
    "standardized": (Standardized(3, 4, 2), (5, 3, 4, 4), "flatten"),
    "bias apart": (BiasApart(5, 4), (9, 5), "add"),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_computed_weights_are_trained_without_rows(case: str) -> None:
    module, shape, reason = COMPUTED[case]
    model = nn.Sequential(copy.deepcopy(module)).double()
    assert_without_rows(model, "0.weight", reason, draw(*shape))


def test_weight_used_by_its_module_and_in_a_way_that_is_not_seen() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.layer(x) @ (2 * m.layer.weight)

    model = Does(call, layer=nn.Linear(5, 4)).double()
    assert_without_rows(model, "layer.weight", "used by torch.Tensor.mul", draw(9, 5))


@pytest.mark.filterwarnings("ignore:no rows of '0.weight' are taken")
def test_recipes_that_need_rows_leave_computed_weights_to_adamw() -> None:
    model = nn.Sequential(Masked(5, 5))
    optimizer = SINGD(model, recipe="paper")
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(torch.randn(9, 5))).backward()
        optimizer.step()
    assert [line.split()[2] for line in repr(optimizer).splitlines()[2:]] == ["AdamW", "AdamW"]
    assert optimizer.skipped == 0


def test_recurrent_layers_say_why() -> None:
    for layer in (nn.LSTM(4, 4), nn.GRU(4, 4), nn.RNN(4, 4)):
        text = repr(SINGD(layer))
        assert text.count(f"torch's kernel of {type(layer).__name__} gives none") == 2


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down = nn.Parameter(torch.ones(2, 4))


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)  # type: ignore[no-untyped-call]


class Positions(nn.Module):
    """What is added to the outputs of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table, self.token = (nn.Parameter(torch.zeros(1, n, 4)) for n in (3, 1))


WITHOUT_ROWS = {
    "weight normalized": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        "a parametrization computes with it",
    ),
    "spectral": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        "a parametrization computes with it",
    ),
    "pruned": (pruned, "Linear is a layer of its 'weight', and not of 'weight_orig'"),
    "adapted": (Adapted, "Adapted is a layer of its 'weight', and not of 'down'"),
    "bounded": (lambda: nn.Embedding(4, 4, max_norm=1.0), "gives none with its arguments"),
    "bags": (lambda: nn.EmbeddingBag(4, 4), "EmbeddingBag is not in the table of layers"),
    "added": (Positions, "a parameter of Positions itself; a product with it wants a module"),
}


def test_what_is_no_matrix_has_no_reason() -> None:
    line = next(one for one in repr(SINGD(Positions())).splitlines() if one.startswith("token"))
    assert line.split() == ["token", "1×1×4", "AdamW", "32"]


@pytest.mark.parametrize("case", WITHOUT_ROWS)
def test_matrices_of_other_modules_say_why(case: str) -> None:
    make, reason = WITHOUT_ROWS[case]
    lines = [line for line in repr(SINGD(make())).splitlines() if "SINGD without rows" in line]
    assert [reason in line for line in lines] == [True]


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
