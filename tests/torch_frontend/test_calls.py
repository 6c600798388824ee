"""Calls that are handed the weight itself give rows, whoever makes them; other calls give none."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import _get_current_function_mode_stack
from uses import Does, draw, ids, loss_of
from watched import Watched, check_products, check_rows

from singd_torch import SINGD, check


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


@pytest.mark.parametrize("anew", [False, True], ids=["zero_grad", "another optimizer"])
def test_a_call_that_is_interrupted_leaves_no_mode_behind(*, anew: bool) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        h = m.attention(*[m.table(x)] * 3)[0]
        return F.linear(h, m.table.weight.to(h.dtype))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = Does(call, table=nn.Embedding(9, 4), attention=nn.MultiheadAttention(4, 1)).double()
    other = copy.deepcopy(model)
    handle = model.attention.register_forward_hook(interrupt)
    optimizer = SINGD(model)
    with pytest.raises(KeyboardInterrupt):
        model(ids())
    handle.remove()
    with torch.device("cpu"):
        optimizer = SINGD(model) if anew else optimizer
        optimizer.zero_grad()
        assert len(_get_current_function_mode_stack()) == 1
    for one, its in ((model, optimizer), (other, SINGD(other))):
        for _ in range(3):
            its.zero_grad()
            loss_of(one(ids())).backward()
            its.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "a result": lambda z: torch.exp(3.0 * z),
    "a part": lambda z: z.repeat(1, 2).pow(3).chunk(2, 1)[0],
}


@pytest.mark.parametrize("how", KEPT)
def test_a_hook_that_comes_before_may_hand_on_an_output_that_is_kept(how: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    optimizer = SINGD(model)
    model[0].register_forward_hook(lambda module, args, z: KEPT[how](z), prepend=True)
    loss_of(model(draw(9, 5))).backward()
    with pytest.warns(UserWarning, match=r"no rows of '0\.weight' are taken"):
        optimizer.step()


def test_a_hook_that_comes_before_may_keep_the_output() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, z: kept.append(z.square()), prepend=True)
    check_rows(model, lambda m: loss_of(m(draw(9, 5))) + 0.0 * kept.pop().sum())


@pytest.mark.parametrize("how", ["functional_call", "another parameter"])
def test_calls_with_other_weights_are_not_of_the_layer(how: str) -> None:
    """As an actor's loss goes through the critic, whose weights it does not train."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False)).double()

    def loss(model: Any) -> Tensor:
        actor, critic = model
        through = actor(draw(9, 5))
        if how == "functional_call":
            fixed = {name: p.detach() for name, p in critic.named_parameters()}
            told = torch.func.functional_call(critic, fixed, (through,))
        else:
            own, critic.weight = critic.weight, nn.Parameter(2.0 * critic.weight.detach())
            told = critic(through)
            critic.weight = own
        return loss_of(critic(draw(9, 4))) + loss_of(told)

    check_rows(model, loss)
