"""The table of module kinds: which parameters of a module form layers, and layers of what kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from singd_core.layers import (
    Convolution,
    Embedding,
    LayerKind,
    Linear,
    StackedLinear,
)
from singd_torch._groups import Notes, noted
from singd_torch.layers.functions import transposed
from singd_torch.sharding import is_in_parts

# The kind of a module, or None for one that cannot be treated as a layer after all.
Describe: TypeAlias = Callable[[nn.Module], LayerKind | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """How to see a module: its kind, and the names of its weight and its bias.

    `is_open` if its forward hands both to a function of torch that says as much as the module does.
    `by_output` if its input and its output say as much.
    """

    rows: Describe
    weight: str = "weight"
    bias: str | None = "bias"
    is_open: bool = True
    by_output: bool = True


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


def _transposed(module: nn.Module) -> LayerKind | None:
    assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    of = module.stride, module.padding, module.output_padding, module.groups, module.dilation
    return transposed(module.kernel_size, *of)


def _embedding(module: nn.Module) -> LayerKind | None:
    assert isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    largest = isinstance(module, nn.EmbeddingBag) and module.mode == "max"
    if largest or module.sparse or module.scale_grad_by_freq or module.max_norm is not None:
        return None
    return Embedding(module.num_embeddings, module.padding_idx)


# By class, or by the name of a class in a library that is not imported for it.
_TABLE: dict[type[nn.Module] | str, Entry] = {
    nn.Linear: Entry(lambda module: Linear()),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), Entry(_convolution)),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        Entry(_transposed, bias=None),
    ),
    nn.Embedding: Entry(_embedding),
    # Its call has more than an input: the bags, and the weights of look-ups. So its function is
    # seen, and not its output.
    nn.EmbeddingBag: Entry(_embedding, by_output=False),
    # It flattens its input for torch.addmm, and with that loses what is the batch.
    "transformers.pytorch_utils.Conv1D": Entry(
        lambda module: Linear(transposed=True), is_open=False
    ),
    "torch_geometric.nn.dense.linear.Linear": Entry(lambda module: Linear()),
}


def register_layer(
    module: type[nn.Module],
    rows: LayerKind | Describe,
    *,
    weight: str = "weight",
    bias: str = "bias",
) -> None:
    """Let SINGD precondition modules of a class, and of subclasses that have its `forward`.

    The module must be called with its input first, and return its output. Its weight and bias must
    be parameters. Register a subclass with a `forward` of its own separately. If it is not
    registered, calls of torch functions that get the weight give its rows.

    Args:
        module: The class.
        rows: The kind of layer, such as `singd_core.Linear()`, or a function that returns the kind
            for a module (None if the module gives no rows).
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
    given: Any = module
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise TypeError(f"module={module!r}: give the class, a subclass of torch.nn.Module")
    if isinstance(rows, type) or not (isinstance(rows, LayerKind) or callable(rows)):
        raise TypeError(
            f"rows={rows!r}: give a LayerKind, such as Linear(), or a function from modules to one"
        )
    describe = (lambda _: rows) if isinstance(rows, LayerKind) else rows
    _TABLE[module] = Entry(describe, weight, bias, is_open=False)


@dataclasses.dataclass(frozen=True)
class Use:
    """A weight and bias of a module, by name, and the kind of layer they form.

    Attributes:
        weight: The name of the weight.
        bias: The name of the bias, or None.
        kind: The kind of layer.
        by_output: Whether the module returns the output of the layer.
        is_open: Whether a call of a torch function that is handed the weight gives rows as well.
    """

    weight: str
    bias: str | None
    kind: LayerKind
    by_output: bool = True
    is_open: bool = True


def uses(module: nn.Module) -> Iterator[Use]:
    """The layers that the parameters of one module form."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention(module)
        return
    found = _find(module)
    if found is None:
        return
    cls, entry = found
    kind = entry.rows(module)
    if kind is not None:
        by_output = entry.by_output and _has_forward_of(module, cls)
        is_open = entry.is_open or not by_output
        yield Use(entry.weight, entry.bias, kind, by_output, is_open)


def kind_of(module: nn.Module, weight: str) -> LayerKind | None:
    """The kind of the layer of a module that has this weight, None if there is none."""
    return next((use.kind for use in uses(module) if use.weight == weight), None)


def _find(module: nn.Module) -> tuple[type[nn.Module], Entry] | None:
    """The class of a module, or the nearest that it inherits from, that the table has."""
    for cls in type(module).__mro__:
        entry = _TABLE.get(cls) or _TABLE.get(f"{cls.__module__}.{cls.__qualname__}")
        if entry is not None:
            return cls, entry
    return None


def reasons(model: nn.Module, notes: Notes) -> Iterator[tuple[nn.Parameter, str]]:
    """Why there are no rows of matrices: of modules that are no layers, or used in other ways."""
    lists = [m for m in model.modules() if isinstance(m, ParametrizationList)]
    computing = {module for one in lists for module in one.modules()}
    for module in model.modules():
        known = {name for use in uses(module) for name in (use.weight, use.bias)}
        for name, p in module._parameters.items():
            if p is None or p.ndim < 2:
                continue
            if p.is_complex():
                yield p, "of complex numbers"
            elif name not in known:
                computes = module in computing
                yield p, "a parametrization computes with it" if computes else _why(module, name, p)
    yield from noted(notes, "without_rows").items()


def _why(module: nn.Module, name: str, p: nn.Parameter) -> str:
    """Why a module gives no rows of one of its matrices, of this name."""
    cls, found = type(module).__name__, _find(module)
    if found is None and isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"torch's kernel of {cls} gives none"
    if isinstance(module, nn.MultiheadAttention):
        return f"no projection of {cls}"
    if found is None and p.ndim == 3 and is_in_parts(p):
        return "processes have parts of this stack of matrices, whose products give none"
    has_forward = type(module).forward is not nn.Module.forward
    if found is None and (next(module.children(), None) is not None or not has_forward):
        own = f"a parameter of {cls} itself"
        return f"{own}; to have rows of a product with it, put it into an nn.Linear"
    if found is None:
        if getattr(nn, cls, type(module)) is not type(module):  # a Linear that is not torch's
            cls = f"{type(module).__module__}.{cls}"
        return f"{cls} is not in the table of layers: register_layer"
    if name != found[1].weight:  # as of a weight that is normalized, pruned or adapted
        return f"{cls} is a layer of its {found[1].weight!r}, and not of {name!r}"
    return f"{cls} gives none with its arguments"


def is_known(module: nn.Module) -> bool:
    """Whether the table has the class of a module, or one that it inherits from."""
    return _find(module) is not None


def methods(cls: type[nn.Module]) -> dict[str, Any]:
    """The methods that decide what a module of a class does when it is called, by name."""
    return {name: getattr(cls, name, None) for name in ("__call__", "forward", "_conv_forward")}


def hooks_of_all() -> tuple[int, ...]:
    """Hooks of all modules there are: their own hooks see outputs that these may have changed."""
    return tuple(torch.nn.modules.module._global_forward_hooks)


def _has_forward_of(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module does what its class in the table does, and not what others add to that.

    Of a class of torch that may be a subclass, the module itself, or who patched the class.
    """
    same = methods(type(module)) == methods(cls) and "forward" not in vars(module)
    of_torch = cls.__module__.startswith("torch.nn.")
    return same and not (of_torch and cls.forward.__module__ != cls.__module__)


def _attention(module: nn.MultiheadAttention) -> Iterator[Use]:
    """The projections of query, key and value; the output has a module of its own."""
    if module._qkv_same_embed_dim:
        yield Use("in_proj_weight", "in_proj_bias", StackedLinear(3), is_open=False)
    else:  # their biases are one parameter, which is left to the fallback
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield Use(name, None, Linear(), is_open=False)
