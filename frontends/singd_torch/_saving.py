"""The state of the optimizer that is saved, loaded and copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from singd_torch import _state
from singd_torch._groups import settings_of
from singd_torch._layers import find
from singd_torch._watcher import Watcher


class Saving(Watcher):
    """An optimizer whose state can be saved and loaded."""

    def state_dict(self) -> dict[str, Any]:
        """The state as flat tensors and plain values; `torch.load(weights_only=True)` takes it.

        A function given as `lr_cov` is left out: the optimizer that loads it keeps its own.
        """
        return _state.portable(super().state_dict())

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, tensors in the dtypes they were saved in.

        Raises:
            ValueError: Naming the first entry that does not fit; nothing is changed then.
        """
        saved = _state.completed(state_dict, self.param_groups)
        entries = _state.by_parameter(saved, self.param_groups)
        groups = [
            group | {"params": own["params"]}
            for group, own in zip(saved["param_groups"], self.param_groups, strict=True)
        ]
        older = [group for group in state_dict["param_groups"] if "normalized" not in group]
        factors = {}
        for layer in find(self._model, groups):
            s, own = settings_of(layer.group), entries[layer.weight]
            if older:
                _state.upgrade(layer, entries, normalized=s.normalized)
            factors[layer.weight] = _state.checked(layer, own, s)
        super().load_state_dict(saved)
        for p, found in entries.items():  # torch casts every tensor to the parameter's dtype
            if found:
                self.state[p] = found
        self._route()
        self._go_on_from(factors)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of, by `copy.deepcopy` or `pickle`; pending rows are left behind.

        The copy trains the copy of the model that is made along with it.
        """
        names = ("_model", "_skipped", "_compile")
        own = {name: getattr(self, name) for name in names}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" not in state:  # a part of torch's load_state_dict
            return
        self._processes = None
        self._watch(state["_model"])
        self._names = {p: name for name, p in self._model.named_parameters()}
        self._route()
        self._go_on_from(
            {
                layer.weight: _state.checked(
                    layer, self.state.get(layer.weight, {}), settings_of(layer.group)
                )
                for layer in self._layers
            }
        )
