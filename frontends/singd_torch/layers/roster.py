"""What an optimizer trains: its parameters by group, by name and by layer."""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from singd_core._recipes import small_step
from singd_torch._groups import NO_NOTES, NOTES, plain_name
from singd_torch._warnings import Warnings, listed
from singd_torch.layers.changes import Makeup
from singd_torch.layers.due import is_refresh
from singd_torch.layers.layer import Layer
from singd_torch.layers.matrices import find_all, parameter_names
from singd_torch.layers.reach import Pass
from singd_torch.sharding import is_in_parts
from singd_torch.sharding.guards import refuse_flat

# What the names of parameters have behind them that are not in the model any more.
GONE = " (replaced)"
# What the names of parameters have behind them that never were.
_OUTSIDE = " (not of the model)"
# Steps in a row without any gradient, after which a warning says that nothing is trained.
_IDLE = 10
# Steps after which a warning says that all rates were AdamW's: a slow warm-up is over by then.
_MANY = 200


def matrices_of(layers: Iterable[Layer]) -> int:
    """How many weights of layers are trained."""
    return sum(layer.is_trained for layer in layers)


class Roster:
    """Which parameters form layers, in which groups all are, and what they are called.

    Attributes:
        model: The model, an empty one where parameters were given alone.
        groups: The parameter groups of the optimizer.
        names: The names of parameters.
        notes: What was found out about parameters, also about those that were taken out of groups,
            as long as the model or the state has them.
        layers: The layers.
        fallback: The groups of the parameters that belong to none: AdamW trains them.
        group_of: The group of each parameter.
        by_weight: The layer of each weight.
        makeup: What the model was made of when layers were found.
        warnings: What was warned of.
    """

    makeup: Makeup

    def __init__(self, model: nn.Module) -> None:
        self.model, self.groups = model, list[dict[str, Any]]()
        self.names: dict[Any, str] = {}
        self.notes: dict[Any, dict[str, Any]] = {}
        self.layers: list[Layer] = []
        self.fallback: dict[nn.Parameter, dict[str, Any]] = {}
        self.group_of: dict[nn.Parameter, dict[str, Any]] = {}
        self.by_weight: dict[Tensor, Layer] = {}
        self.warnings = Warnings()
        self._shapes: dict[Tensor, torch.Size] = {}
        self._idle_steps = 0

    def find(self) -> list[nn.Parameter]:
        """Decide which parameters form layers, keeping what is known of those that stay.

        Returns:
            The parameters that begin anew, as they are used in another way than before.
        """
        self.name()
        for group in self.groups:
            group.setdefault(NOTES, NO_NOTES)
        before = self._weights()
        self.layers = find_all(self.model, self.groups, self.notes)
        now, trained = self._weights(), {p for group in self.groups for p in group["params"]}
        anew = [p for p in self.group_of if p in trained and before.get(p) is not now.get(p)]
        for layer in self.layers:
            known = self.by_weight.get(layer.weight)
            layer.name = self.names.get(layer.weight, layer.name)
            layer.notes = self.notes.setdefault(layer.weight, {})
            if known is not None and known.is_found_as(layer):
                layer.pending, layer.seen = known.pending, known.seen
                layer.by_gradient, layer.refreshes = known.by_gradient, known.refreshes
                for module, source in known.sources:
                    if module is None:  # it was met in calls
                        layer.know(source)
            elif known is not None:
                anew += layer.parameters
        self._index()
        return anew

    def let_go(self, state: Collection[Any]) -> None:
        """Keep nothing of parameters that neither groups, nor the model, nor the state has.

        They are not kept by weak references: torch swaps no parameter that has one.
        """
        known = {*self.group_of, *self.model.parameters(), *state}
        gone = self._shapes.keys() - known  # of those that were ever in groups
        self.makeup.left_out -= gone
        for p in gone:
            del self._shapes[p]
            self.notes.pop(p, None)

    def noted(self) -> str:
        """What was found out about the parameters that are trained, in JSON: place, name, notes."""
        params = [p for group in self.groups for p in group["params"]]
        of_all = [{name: x for name, x in self.notes.get(p, {}).items() if x} for p in params]
        known = [(i, p, own) for i, (p, own) in enumerate(zip(params, of_all, strict=True)) if own]
        return json.dumps([(i, plain_name(self.names.get(p, "")), own) for i, p, own in known])

    def _weights(self) -> dict[nn.Parameter, nn.Parameter]:
        """The weight of the layer of each parameter."""
        return {p: layer.weight for layer in self.layers for p in layer.parameters}

    def name(self) -> None:
        """Name the parameters, those that the model has no more by what they were."""
        now = parameter_names(self.model, self.groups)
        for i, p in enumerate(p for group in self.groups for p in group["params"]):
            if p not in now:
                known = self.names.get(p, f"params[{i}]{_OUTSIDE}")
                gone = "" if known.endswith((GONE, _OUTSIDE)) else GONE
                now[p] = known + gone
        self.names = now

    def _index(self) -> None:
        """Find layers and groups by parameters."""
        self.by_weight = {layer.weight: layer for layer in self.layers}
        before = self.group_of
        self.group_of = {p: group for group in self.groups for p in group["params"]}
        for p in self.group_of:
            self._shapes.setdefault(p, p.shape)
        taken_out = before.keys() - self.group_of.keys()
        left_out = {*self.makeup.left_out, *taken_out} if hasattr(self, "makeup") else None
        self.makeup = Makeup(self.model, self.group_of, left_out)
        owned = {p for layer in self.layers for p in layer.parameters}
        self.fallback = {p: group for p, group in self.group_of.items() if p not in owned}

    # ---- what may have changed ------------------------------------------------------------------

    @property
    def is_switched(self) -> bool:
        """Whether others took the places of parameters, in the groups and in the model.

        If others are in the groups alone, such as those of a new head, layers are found anew.
        """
        if not self._has_others():
            return False
        now, known = self._places()
        if not _alike(now, known):
            return self.group_of.keys().isdisjoint(now)  # it is refused
        return any(map(is_in_parts, now)) or self.makeup.has_taken(now, known)

    def _places(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that the groups have now, and those that they had."""
        return [p for group in self.groups for p in group["params"]], [*self.group_of]

    def _has_others(self) -> bool:
        """Whether the first parameter of a group is one that no group had."""
        return any(p not in self.group_of for group in self.groups for p in group["params"][:1])

    def is_regrouped(self) -> bool:
        """Whether parameters were put into lists of the groups, or taken out, by hand."""
        params, known = self._places()
        if len(params) != len(known):
            return True
        if not any(is_refresh(group) for group in self.groups):  # a look-up costs more than `is`
            same = all(map(operator.is_, params, known))
            return not same and any(p not in self.group_of for p in params)
        return any(self.group_of.get(p) is not one for one in self.groups for p in one["params"])

    def follow(self) -> dict[Tensor, nn.Parameter]:
        """Train the parameters that the groups have now.

        Modules are not asked: in a forward pass they may have others still, gathered for it.

        Returns:
            The parameters by those in whose places they are.
        """
        now, known = self._places()
        if not _alike(now, known):
            raise ValueError(
                "the parameters of the groups were replaced by others that are not of the same "
                "number and shapes: build the optimizer again, or call add_param_group"
            )
        new: dict[Tensor, nn.Parameter] = dict(zip(known, now, strict=True))
        for layer in self.layers:
            layer.weight = new[layer.weight]
            layer.bias = None if layer.bias is None else new[layer.bias]
            layer.sources = [(module, source.of(new)) for module, source in layer.sources]
        self.names = {new.get(p, p): name for p, name in self.names.items()}
        self.notes = {new.get(p, p): found for p, found in self.notes.items()}
        self._index()
        return new

    def check_shapes(self, params: Iterable[Tensor]) -> None:
        """Refuse parameters whose data has another shape than when they were given.

        Raises:
            RuntimeError: Naming the first.
            TypeError: If they were flattened since.
        """
        for p in params:
            if p.shape != self._shapes[p]:
                refuse_flat([p])
                name, before = self.names.get(p, "a parameter"), tuple(self._shapes[p])
                raise RuntimeError(
                    f"{name!r} has shape {tuple(p.shape)}, and had {before} when it was given to "
                    "the optimizer, whose state fits that: build the optimizer after what resizes "
                    "the model, such as resize_token_embeddings"
                )

    def check_parameters(self) -> None:
        """Refuse to train nothing, as the model has other parameters by now.

        Raises:
            RuntimeError: If none of the model's parameters is one of the optimizer's.
        """
        theirs = set(self.model.parameters())
        if theirs and not theirs & set(self.group_of):
            raise RuntimeError(
                "the model has none of the optimizer's parameters any more: build the optimizer "
                "after what replaces them, such as fully_shard(model), model.to(...), "
                "model.to_empty(...) and load_state_dict(..., assign=True)"
            )

    def untrained(self) -> list[str]:
        """The names of parameters that have a gradient and are in no group, if not by choice.

        A frozen parameter may still have the gradient of a time before.

        Raises:
            RuntimeError: If some are parts into which the model was split after it was given.
            TypeError: If some were flattened since.
        """
        known = self.group_of.keys() | self.makeup.left_out
        found = {
            name: p
            for name, p in self.model.named_parameters()
            if p.requires_grad and p.grad is not None and p not in known
        }
        if found:
            refuse_flat(found.values())
            self.check_parameters()
            self._check_split(found)
        return list(found)

    def _check_split(self, found: dict[str, nn.Parameter]) -> None:
        theirs, names = set(self.model.parameters()), self.names
        gone = [p for p in self.group_of if p not in theirs]
        before = {plain_name(names.get(p, "")).removesuffix(GONE): p for p in gone}
        both = {name: (p, before.get(plain_name(name))) for name, p in found.items()}
        split = [
            name
            for name, (p, old) in both.items()
            if old is not None and (is_in_parts(p) or is_in_parts(old))
        ]
        if split:
            raise RuntimeError(
                f"the model was split into parts after it was given to the optimizer, which does "
                f"not train the parts that took the places of {listed(split)}: build the optimizer "
                "after parallelize_module(model, ...) and fully_shard(model)"
            )

    def warn_idle(self) -> None:
        """Warn where nothing that requires a gradient has had one for some steps in a row."""
        asked = (p for p in self.group_of if p.requires_grad)
        first = next(asked, None)
        is_idle = first is not None and first.grad is None and all(p.grad is None for p in asked)
        self._idle_steps = self._idle_steps + 1 if is_idle else 0
        if self._idle_steps == _IDLE:
            self.warnings.once(
                f"no parameter of this optimizer has had a gradient for {_IDLE} steps in a row, so "
                "that nothing is trained: give SINGD the model that the loss is computed with, and "
                "no copy of it, and call backward before step"
            )

    def warn_small(self) -> None:
        """Warn where a schedule or a script gives rates of AdamW, for many steps or by its plan."""
        steps = self.groups[0]["steps"]
        if steps not in (0, _MANY):
            return
        groups = [group for group in self.groups if group["normalized"]]
        if small_step(group["base_lr"] for group in groups):  # it was said at the start
            return
        planned = small_step(group.get("max_lr") for group in groups)  # by OneCycleLR
        if steps == 0 and planned:
            self.warnings.once(f"the largest rate of the schedule is {planned}")
        if steps == _MANY and not planned:
            small = small_step(group["largest_lr"] for group in groups)
            if small:
                self.warnings.once(f"the largest rate of the first {_MANY} steps was {small}")

    def check_dense(self) -> None:
        """Refuse gradients that are sparse.

        Raises:
            RuntimeError: Naming the first.
        """
        for p in self.group_of:
            if p.grad is not None and p.grad.is_sparse:
                name = self.names.get(p, "a parameter")
                raise RuntimeError(
                    f"the gradient of {name!r} is sparse, which SINGD does not take: "
                    "give its module sparse=False, or an optimizer of its own"
                )

    def forget_rows(self) -> None:
        """Have no rows of any layer."""
        for layer in self.layers:
            layer.pending, layer.last_pass, layer.called_in = {}, Pass(), -1


def _alike(now: Iterable[Tensor], known: Iterable[Tensor]) -> bool:
    """Whether there are as many parameters as before, of the same shapes."""
    return [p.shape for p in now] == [p.shape for p in known]
