"""The table of module kinds: which parameters of a module form layers, and of which kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import nn

from singd_core.curvature import Convolution, Embedding, LayerKind, Linear, StackedLinear

# The kind of a module, or None for one that cannot be treated as a layer after all.
Describe: TypeAlias = Callable[[nn.Module], LayerKind | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """How to see a module: its kind, and the names of its weight and its bias."""

    rows: Describe
    weight: str = "weight"
    bias: str = "bias"


def _convolution(module: nn.Module) -> LayerKind:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return Convolution(
        kernel_size=module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def _embedding(module: nn.Module) -> LayerKind | None:
    assert isinstance(module, nn.Embedding)
    if module.sparse or module.scale_grad_by_freq or module.max_norm is not None:
        return None
    return Embedding(module.num_embeddings, module.padding_idx)


# By class, or by the name of a class in a library that is not imported for it.
_TABLE: dict[type[nn.Module] | str, Entry] = {
    nn.Linear: Entry(lambda module: Linear()),
    nn.Conv1d: Entry(_convolution),
    nn.Conv2d: Entry(_convolution),
    nn.Conv3d: Entry(_convolution),
    nn.Embedding: Entry(_embedding),
    "transformers.pytorch_utils.Conv1D": Entry(lambda module: Linear(transposed=True)),
    "torch_geometric.nn.dense.linear.Linear": Entry(lambda module: Linear()),
}


def register_layer(
    module: type[nn.Module],
    rows: LayerKind | Describe,
    *,
    weight: str = "weight",
    bias: str = "bias",
) -> None:
    """Let SINGD precondition modules of a class, and of its subclasses.

    The module must be called with its input first and return its output, and its weight and bias
    must be parameters.

    Args:
        module: The class.
        rows: The kind of layer it is, such as `singd_core.Linear()`, or a function that tells it
            from the module (None for one that is to be left to AdamW).
        weight: The name of its weight.
        bias: The name of its bias.

    Raises:
        TypeError: If `module` is not a class of modules, or `rows` neither a kind nor a function.

    Example:
        >>> class MyLinear(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.randn(4, 3))
        ...     def forward(self, x):
        ...         return x @ self.w.T
        >>> register_layer(MyLinear, Linear(), weight="w")
    """
    if not issubclass(module, nn.Module):
        raise TypeError(f"{module!r} is not a subclass of torch.nn.Module")
    if isinstance(rows, LayerKind):
        kind = rows
        _TABLE[module] = Entry(lambda _: kind, weight, bias)
    elif callable(rows):
        _TABLE[module] = Entry(rows, weight, bias)
    else:
        raise TypeError(f"rows={rows!r}: give a LayerKind or a function from modules to one")


@dataclasses.dataclass(frozen=True)
class Use:
    """A weight and bias of a module, by name, and the kind of layer they form."""

    weight: str
    bias: str | None
    kind: LayerKind


def uses(module: nn.Module) -> Iterator[Use]:
    """The layers that the parameters of one module form."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention(module)
        return
    for cls in type(module).__mro__:
        entry = _TABLE.get(cls) or _TABLE.get(f"{cls.__module__}.{cls.__qualname__}")
        if entry is not None:
            kind = entry.rows(module)
            if kind is not None:
                yield Use(entry.weight, entry.bias, kind)
            return


def _attention(module: nn.MultiheadAttention) -> Iterator[Use]:
    """The projections of query, key and value; that of the output is a module of its own."""
    if module._qkv_same_embed_dim:
        yield Use("in_proj_weight", "in_proj_bias", StackedLinear(3))
    else:  # their biases are one parameter, which is left to the fallback
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield Use(name, None, Linear())
