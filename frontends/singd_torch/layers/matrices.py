"""Parameters that show no rows, whose factors learn from their gradients alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from singd_core import rules
from singd_core.layers import StackedLinear, Tensor
from singd_core.layers.biases import biases
from singd_core.rules import learns_from_gradients
from singd_torch._groups import Notes, noted, parameters_of, settings_of
from singd_torch.layers.find import find, tables_of_bags
from singd_torch.layers.layer import Layer
from singd_torch.sharding import is_in_parts


def find_all(
    model: nn.Module, groups: Sequence[dict[str, Any]], notes: Notes = MappingProxyType({})
) -> list[Layer]:
    """What `find` finds, and the other parameters that have factors, by what is known of them."""
    layers = find(model, groups, noted(notes, "without_rows"))
    owned = {p for layer in layers for p in layer.parameters}
    return [*layers, *_tensors(model, groups, owned, notes)]


def _tensors(
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    owned: Collection[nn.Parameter],
    notes: Notes,
) -> Iterator[Layer]:
    """The matrices that belong to no layer, as layers without sources.

    They are recurrent weights, weights that are computed from others: whatever is used in another
    way than by the call of a known module. Stacks of matrices, as of experts, have rows once a call
    of a product is seen that is handed them. The entries of a table of embeddings have a diagonal
    factor.
    """
    names = parameter_names(model, groups)
    turned, lost = noted(notes, "turned"), noted(notes, "without_rows")
    bags, kinds = tables_of_bags(model), (nn.Embedding, nn.EmbeddingBag)
    tables = {m.weight for m in model.modules() if isinstance(m, kinds)}
    group_of = {p: group for group in groups for p in group["params"]}
    with_bias = _with_bias(groups, names, {*owned, *_without_pairs(model)})
    for p in set(model.parameters()) - set(lost):  # a stack whose calls may give rows
        if p in with_bias and with_bias[p][1].stack:
            del with_bias[p]
    owned = {*owned, *(bias for bias, _ in with_bias.values())}
    for p, group in group_of.items():
        if not learns_from_gradients(settings_of(group)):
            continue
        if p in owned or not (p in with_bias or Tensor.fits(p.shape)) or not p.is_floating_point():
            continue
        bias, kind = with_bias.get(p, (None, Tensor.of(p.shape)))
        if bias is None and kind.stack == 1 and len(p) > 1 and not is_in_parts(p) and p not in lost:
            # a first axis that counts matrices, all of which are here
            kind = StackedLinear(len(p), apart=True, transposed=p in turned)
        shape = kind.shape(p.shape, bias=bias is not None)
        structures = rules.get(group["rule"]).choose(
            group["structures"],
            shape,
            diagonal=(False, p in tables),
            by_rows=kind.has_rows,
            entries_of_bags=len(p) if p in bags else 0,
        )
        of_bias = None if bias is None else group_of[bias]
        yield Layer(names.get(p, "a parameter"), kind, p, bias, [], group, structures, of_bias)


def _without_pairs(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights whose first axis is not the axis of their bias, whatever their shape is."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            yield from (p for p in (module.weight, module.bias) if isinstance(p, nn.Parameter))


def _with_bias(
    groups: Sequence[dict[str, Any]],
    names: Mapping[nn.Parameter, str],
    owned: Collection[nn.Parameter],
) -> dict[nn.Parameter, tuple[nn.Parameter, Any]]:
    """The weights whose names tell their biases, with these, and how the weights are matrices.

    Several models may have parameters of one name: a bias is in the group of its weight then.
    Weights that have no factors have no biases either.
    """
    several = Counter(names[p] for group in groups for p in group["params"] if p in names)
    of_all = [p for group in groups for p in group["params"]]
    unique = [p for p in of_all if several[names.get(p, "")] == 1]
    found: dict[nn.Parameter, tuple[nn.Parameter, Any]] = {}
    taken = set(owned)
    for params in (*(group["params"] for group in groups), unique):
        free = [p for p in params if p in names and p not in taken and p.is_floating_point()]
        named = {names[p]: p for p in free}
        if len(named) < len(free):  # two of one name in one group
            continue
        for weight, bias, kind in biases({name: p.shape for name, p in named.items()}):
            found[named[weight]] = named[bias], kind
            taken |= {named[weight], named[bias]}
    return found


def parameter_names(model: nn.Module, groups: Sequence[dict[str, Any]]) -> dict[nn.Parameter, str]:
    """The names of parameters: those in the model, those given, or without a model their places."""
    names = {p: name for name, p in model.named_parameters()}
    for group in groups:
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False):
            names.setdefault(p, name)
    if not names:
        params = [p for group in groups for p in group["params"]]
        names = {p: f"params[{i}]" for i, p in enumerate(params)}
    return names


def without_model(given: Any, params: Any) -> tuple[nn.Module, Iterable[Any]]:
    """An empty model, and the parameters that were given in its place.

    Raises:
        TypeError: If those are no parameters.
    """
    is_list = isinstance(given, Iterable) and not isinstance(given, str)
    if params is not None and is_list:
        parameters_of(params)  # a rate in second place is what is wrong, if there is one
    if params is not None or not is_list:
        raise TypeError(
            f"model must be a torch.nn.Module, or the parameters alone, got {type(given).__name__}"
        )
    return nn.Module(), given
