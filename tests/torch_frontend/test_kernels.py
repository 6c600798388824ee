"""How many kernels a step launches on an accelerator, counted without one; calls on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singd_torch import SINGD
from singd_torch.tensors import pieces

# What makes a view, or memory of any content, launches nothing; nor does what reads a number.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
FREE |= {"_local_scalar_dense"}


class Kernels(TorchDispatchMode):
    """Counts the operations that compute. A list of tensors counts as one where CUDA does so."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((result, args)) if isinstance(x, Tensor)]
        is_view = function._schema.name.startswith("aten::") and any(
            r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns
        )
        if name not in FREE and not is_view and any(x.numel() for x in tensors[:1]):
            self.count += launches(name, args)
        return result


def launches(name: str, args: Any) -> int:
    """One, or one for each tensor of lists that CUDA's kernels for lists do not take."""
    if not name.startswith("_foreach"):
        return 1
    lists = [x for x in args if isinstance(x, (list, tuple)) and isinstance(x[0], Tensor)]
    first = lists[0]
    together = all(x.dtype == first[0].dtype and dense(x) for x in first) and all(
        x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
        for other in lists[1:]
        for x, y in zip(first, other, strict=True)
    )
    return 1 if together else len(first)


def dense(x: Tensor) -> bool:
    """Whether the numbers fill their memory, in any order of the axes."""
    axes = sorted(range(x.ndim), key=lambda i: (x.stride(i), x.shape[i]))
    return x.permute(axes[::-1]).is_contiguous()


def block(d: int) -> nn.Module:
    return nn.ModuleDict(
        {
            "norm": nn.LayerNorm(d),
            "qkv": nn.Linear(d, 3 * d),
            "out": nn.Linear(d, d),
            "up": nn.Linear(d, 4 * d),
            "down": nn.Linear(4 * d, d),
        }
    )


class Transformer(nn.Module):
    """Four blocks as a GPT has them. Attention is a sum over earlier positions."""

    def __init__(self, d: int = 128, n: int = 65) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(n, d), nn.Embedding(16, d)
        self.blocks = nn.ModuleList([block(d) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, n)

    def forward(self, x: Tensor) -> Tensor:
        x = self.characters(x) + self.positions(torch.arange(x.shape[1]))
        for one in self.blocks:
            q, k, v = one["qkv"](one["norm"](x)).chunk(3, -1)
            x = x + one["out"](nn.functional.scaled_dot_product_attention(q, k, v))
            x = x + one["down"](nn.functional.gelu(one["up"](x)))
        return self.head(self.norm(x))


def layer_wise(model: Transformer) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Each layer has a rate of its own, and only matrices decay."""
    groups = []
    parts = [model.characters, model.positions, *model.blocks, model.norm, model.head]
    for i, part in enumerate(parts):
        parameters = list(part.parameters())
        for decays in (True, False):
            own = [p for p in parameters if (p.ndim > 1) is decays]
            settings = {"lr": 0.12 * 0.9**i, "weight_decay": 0.1 * decays}
            groups += [{"params": own, **settings}] if own else []
    return model, groups


# The whole of a step: 4-layer transformer, 19 layers in 7 stacks, and the norms by AdamW.
DIAGONAL = {"structures": ("diagonal", "diagonal")}
LIMITS: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], int, int, int]] = {
    "default": (lambda model: model, {}, 147, 190, 448),
    "diagonal": (lambda model: model, DIAGONAL, 247, 290, 656),  # tables have rows
    "decay": (lambda model: model, {"weight_decay": 0.01}, 151, 194, 452),
    "rates of layers": (layer_wise, {}, 190, 233, 491),
    "parameters": (nn.Module.parameters, {}, 130, 176, 446),
    "names": (nn.Module.named_parameters, {}, 162, 211, 546),
    "names, diagonal": (nn.Module.named_parameters, DIAGONAL, 154, 203, 431),
}


def counts(optimizer: SINGD | torch.optim.AdamW, model: nn.Module, steps: int) -> list[int]:
    """The kernels of each step."""
    found = []
    for _ in range(steps):
        x = torch.randint(65, (2, 16))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        with Kernels() as kernels:
            optimizer.step()
        found.append(kernels.count)
    return found


ADAMW = 9  # whose steps are counted by the host


@pytest.mark.parametrize("case", LIMITS)
def test_a_step_launches_few_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "on_host", lambda x: False)
    what, given, between, last, refresh = LIMITS[case]
    model = Transformer()
    params = what(model)
    params = params if isinstance(params, tuple) else (params,)
    found = counts(SINGD(*params, T=5, growing_T=False, **given), model, 16)
    limits = [between] * 3 + [last, refresh]
    later = found[11:]  # the refresh of step 10 compares rows with gradients
    assert all(n <= limit for n, limit in zip(later, limits, strict=True)), later


def test_what_adamw_launches() -> None:
    model = Transformer()
    found = counts(torch.optim.AdamW(model.parameters(), foreach=True), model, 2)
    assert found[1] == ADAMW


class Counted(TorchDispatchMode):
    """Counts the calls that reach a kernel or a view."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "structure", ["dense", "diagonal", "block30diagonal", "hierarchical:1,2", "triltoeplitz"]
)
def test_48_equal_layers_take_at_most_1500_calls_to_refresh_and_500_between(
    structure: str,
) -> None:
    model = nn.Sequential(*(m for _ in range(48) for m in (nn.Linear(64, 64), nn.Tanh())))
    x = torch.randn(128, 64)

    def run(step: Callable[[], None]) -> int:
        with Counted() as counted:
            model(x).square().mean().backward()
            step()
        return counted.calls

    plain = run(lambda: None)
    optimizer = SINGD(model, structures=(structure, structure), T=2, growing_T=False)
    calls = [run(optimizer.step) - plain for _ in range(8)]
    # The first refresh makes the state, and all but the last ask whether rows tell the gradient.
    assert max(calls[6], 1) <= 1500
    assert max(calls[1], calls[3], calls[5], calls[7]) <= 500
