"""Which parameters of a model form layers, and layers of what kind."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from singd_core import rules
from singd_core._settings import Settings
from singd_core.layers import LayerKind, Linear, Tensor
from singd_core.structures import Structure
from singd_torch._groups import settings_of
from singd_torch.layers.kinds import Use, uses
from singd_torch.layers.layer import Layer
from singd_torch.layers.source import Source

_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclasses.dataclass
class _Shared:
    """A weight, and everything that uses it."""

    name: str
    uses: list[tuple[nn.Module, Use, nn.Parameter | None]]

    def bias(self, kind: LayerKind) -> nn.Parameter | None:
        """The bias that all uses of this kind have in common."""
        biases = [bias for _, use, bias in self.uses if use.kind == kind]
        return biases[0] if all(bias is biases[0] for bias in biases) else None


def find(model: nn.Module, groups: Sequence[dict[str, Any]], lost: Collection[Any]) -> list[Layer]:
    """The layers of a model whose weight is trained by one of the groups.

    A weight that several modules use is one layer if they are of one kind, or a table of embeddings
    and the linear map tied to it. Its bias belongs to the layer if all of them have the same one.
    All other parameters are left out, a bias of several weights among them, and so are weights
    whose rows are `lost`.
    """
    group_of = {p: group for group in groups for p in group["params"]}
    found: dict[nn.Parameter, _Shared] = {}
    for path, module in model.named_modules():
        for use in uses(module):
            # a parametrized or spectrally normalized weight is computed and not a parameter
            weight = module._parameters.get(use.weight)
            bias = module._parameters.get(use.bias) if use.bias else None
            if weight is None or weight not in group_of or weight in lost:
                continue
            if not weight.is_floating_point() or not weight.numel():
                continue
            if group_of[weight]["average_groups"]:
                use = dataclasses.replace(use, kind=use.kind.with_average_groups())
            shared = found.setdefault(weight, _Shared(f"{path}.{use.weight}".lstrip("."), []))
            shared.uses.append((module, use, bias))

    owners = Counter(b for s in found.values() for b in {bias for _, _, bias in s.uses})
    turned, fused = set(_sequence_first(model)), set(_projections_inside(model))
    bags = tables_of_bags(model)
    layers = []
    for weight, shared in found.items():
        common, group = _common([use.kind for _, use, _ in shared.uses]), group_of[weight]
        tied, rule = any(use.kind != common for _, use, _ in shared.uses), rules.get(group["rule"])
        if common is None or (rule.only_dense and (tied or common.diagonal_inputs)):
            continue
        bias = shared.bias(common)
        if bias not in group_of or owners[bias] > 1:  # it has one matrix to be a column of
            bias = None
        shape = common.shape(tuple(weight.shape), bias is not None)
        structures = rule.choose(
            group["structures"],
            shape,
            diagonal=(common.diagonal_inputs, tied),
            entries_of_bags=len(weight) if weight in bags else 0,
        )
        of_bias = None if bias is None else group_of[bias]
        given = _of_gradients(common, weight, bias, settings_of(group), structures, tied=tied)
        if given is not None:
            layers.append(Layer(shared.name, given, weight, bias, [], group, structures, of_bias))
            continue
        sources: list[tuple[nn.Module | None, Source]] = [
            (
                m,
                Source(
                    weight,
                    use.kind,
                    swapped=use.kind != common,
                    batch_second=m in turned,
                    name=use.weight,
                    by_output=use.by_output,
                    is_open=use.is_open and m not in fused,
                ),
            )
            for m, use, _ in shared.uses
        ]
        layers.append(Layer(shared.name, common, weight, bias, sources, group, structures, of_bias))
    return layers


def tables_of_bags(model: nn.Module) -> set[torch.Tensor]:
    """The weights of `nn.EmbeddingBag` that modules of no other kind have."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.EmbeddingBag)}
    others = (m for m in model.modules() if not isinstance(m, nn.EmbeddingBag))
    return tables - {p for m in others for p in m._parameters.values() if p is not None}


def _of_gradients(
    kind: LayerKind,
    weight: nn.Parameter,
    bias: nn.Parameter | None,
    s: Settings,
    structures: tuple[type[Structure], type[Structure]],
    *,
    tied: bool,
) -> LayerKind | None:
    """The kind of a layer that learns from gradients though it has rows; None if it learns by rows.

    A single row learns by rows: AdamW would train it otherwise.
    """
    found = None if tied or rules.wants_rows(s, structures) else kind.of_gradients()
    if found is None or found.shape(weight.shape, bias=False)[1] == 1:
        return None
    return found if bias is not None or Tensor.fits(weight.shape) else None


def by_choice(model: nn.Module, layers: Iterable[Layer]) -> dict[nn.Parameter, str]:
    """Why weights of a model learn from gradients: by their structures, whatever else there is."""
    own = set(model.parameters())
    return {
        layer.weight: rules.BY_CHOICE
        for layer in layers
        if layer.weight in own and not layer.kind.has_rows
        if not rules.wants_rows(settings_of(layer.group), layer.structures)
    }


def _sequence_first(model: nn.Module) -> Iterator[nn.Module]:
    """The linear layers that are called with (length, batch, d), which only their parent knows."""
    for module in model.modules():
        if isinstance(module, _BLOCKS) and not module.self_attn.batch_first:
            yield from (module.linear1, module.linear2)


def _projections_inside(model: nn.Module) -> Iterator[nn.Module]:
    """The linear layers that attention uses without a call of them."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module.out_proj


def _common(kinds: Sequence[LayerKind]) -> LayerKind | None:
    """The kind of a layer with uses of these kinds: the one, or Linear for a tied table."""
    several = set(kinds)
    if len(several) == 1:
        return kinds[0]
    tables = {kind for kind in several if kind.diagonal_inputs}
    return Linear() if len(tables) == 1 and several - tables == {Linear()} else None
