"""How many kernels a step launches on an accelerator, counted without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from singd_torch import SINGD
from singd_torch.tensors import pieces

# What makes a view, or memory of any content, launches nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class Kernels(TorchDispatchMode):
    """Counts the operations that compute: those of lists of tensors as one."""

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
        works = name not in FREE and not is_view and any(x.numel() for x in tensors[:1])
        self.count += works
        return result


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
    """Four blocks as those of a GPT, whose attention is a sum over earlier positions."""

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


# The whole of a step: 4-layer transformer, 19 layers in 7 stacks, and the norms by AdamW.
LIMITS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "default": ({}, 142, 370, 520),
    "diagonal": ({"structures": ("diagonal", "diagonal")}, 123, 351, 423),
    "decay": ({"weight_decay": 0.01}, 146, 374, 524),
}


@pytest.mark.parametrize("case", LIMITS)
def test_a_step_launches_few_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "on_host", lambda x: False)
    given, between, last, refresh = LIMITS[case]
    model = Transformer()
    optimizer = SINGD(model, T=3, growing_T=False, **given)
    counts = []
    for _ in range(6):
        x = torch.randint(65, (2, 16))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        with Kernels() as kernels:
            optimizer.step()
        counts.append(kernels.count)
    assert max(counts[1], counts[4]) <= between
    assert max(counts[2], counts[5]) <= last  # before a refresh
    assert counts[3] <= refresh
