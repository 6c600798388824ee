"""Which parameters of a model form layers, and of which kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from singd_core import preconditioner
from singd_core._array import ranged
from singd_core.curvature import Convolution, LayerKind, Linear
from singd_core.preconditioner import Factors
from singd_core.structures import Structure
from singd_torch._pending import Pending


@dataclasses.dataclass(eq=False)
class Layer:
    """A weight with its bias, the modules that use them, and what the optimizer knows of them.

    Attributes:
        name: The name of the weight in the model.
        kind: How the weight is a matrix, and what its rows are.
        weight: The weight.
        bias: Its bias, or None if it has none that is trained.
        modules: The modules whose calls give rows.
        group: The parameter group of the weight.
        structures: Of K and of C.
        factors: The preconditioner, None until it is first needed.
        pending: The rows of the current step, summed up, or None.
        seen: Whether rows have ever reached the factors.
    """

    name: str
    kind: LayerKind
    weight: nn.Parameter
    bias: nn.Parameter | None
    modules: list[nn.Module]
    group: dict[str, Any]
    structures: tuple[type[Structure], type[Structure]]
    factors: Factors | None = None
    pending: Pending | None = None
    seen: bool = False

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weight and, if there is one, the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[tuple[int, ...], int, int]:
        """The batch axes, d_out and d_in of the matrix."""
        return self.kind.shape(tuple(self.weight.shape), self.bias is not None)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of K, of C and of the momentum: float16 has no range for them."""
        own = ranged(self.weight[..., :0]).dtype
        K, C = self.group["preconditioner_dtype"]
        return K or own, C or own, own

    def matrix(self, parts: Sequence[Tensor]) -> Tensor:
        """The matrix whose parts belong to `parameters`."""
        matrix: Tensor = self.kind.matrix(*parts)
        return matrix

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The parts of a matrix that belong to `parameters`."""
        parts = self.kind.split(matrix, tuple(self.weight.shape), self.bias is not None)
        return tuple(part for part in parts if part is not None)


def kind_of(module: nn.Module, average_groups: bool = False) -> LayerKind | None:
    """The kind of layer that a module is, or None if it is none that gives rows."""
    # The projection inside nn.MultiheadAttention is used by a fused call, never called itself.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear):
        return Linear()
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Convolution(
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            average_groups=average_groups,
        )
    return None


@dataclasses.dataclass
class _Use:
    """A weight that modules of one kind use, with the biases and modules."""

    name: str
    kind: LayerKind
    biases: list[nn.Parameter | None]
    modules: list[nn.Module]


def find(model: nn.Module, groups: Sequence[dict[str, Any]]) -> list[Layer]:
    """The layers of a model whose weight is trained by one of the groups.

    A weight used by several modules is one layer if they are of one kind; its bias belongs to the
    layer if all of them have the same one. All other parameters are left to the fallback.
    """
    uses: dict[nn.Parameter, _Use | None] = {}
    average_groups = {p: group["average_groups"] for group in groups for p in group["params"]}
    for path, module in model.named_modules():
        # a parametrized or spectrally normalized weight is computed and not a parameter
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        kind = kind_of(module, average_groups.get(weight, False))
        if weight is None or kind is None or isinstance(weight, nn.UninitializedParameter):
            continue
        use = uses.setdefault(weight, _Use(f"{path}.weight".lstrip("."), kind, [], []))
        if use is None or use.kind != kind:
            uses[weight] = None
            continue
        use.biases.append(bias)
        use.modules.append(module)

    group_of = {p: group for group in groups for p in group["params"]}
    layers = []
    for weight, use in uses.items():
        if use is None or weight not in group_of or not weight.requires_grad:
            continue
        bias, group = use.biases[0], group_of[weight]
        shared = all(other is bias for other in use.biases)
        trained = bias is not None and bias in group_of and bias.requires_grad
        structures = preconditioner.resolve(group["structures"], kfac=group["kfac"])
        own_bias = bias if shared and trained else None
        layers.append(Layer(use.name, use.kind, weight, own_bias, use.modules, group, structures))
    return layers
