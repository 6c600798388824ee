"""The state of the optimizer that is saved, loaded and copied."""

from __future__ import annotations

from typing import Any

import torch

from singd_torch import _state
from singd_torch._groups import settings_of
from singd_torch._loading import Loaded, factors_of, loaded
from singd_torch.capture.copies import when_complete
from singd_torch.capture.watcher import Watcher


class Saving(Watcher):
    """An optimizer whose state can be saved and loaded."""

    def state_dict(self) -> dict[str, Any]:
        """The state as flat tensors and plain values; `torch.load(weights_only=True)` takes it.

        A function given as `lr_cov` is left out: the optimizer that loads it keeps its own. Of a
        model in parts, all processes have to call it, and its tensors are DTensors.
        """
        packed = super().state_dict()
        if self._sharded is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            indices = [index for group in packed["param_groups"] for index in group["params"]]
            found = self._sharded.saved()
            packed["state"] = {
                index: found[p] for index, p in zip(indices, params, strict=True) if found[p]
            }
        return _state.portable(packed)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, tensors in the dtypes they were saved in.

        Raises:
            ValueError: Naming the first entry that does not fit; nothing is changed then.
        """
        found: list[Loaded] = []

        def check(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            given = self._model, self.param_groups, self._names, state_dict
            found.append(loaded(*given) if self._sharded is None else self._sharded.loaded(*given))
            return {"param_groups": found[0].groups, "state": found[0].others}

        def go_on(_: Any) -> None:  # torch would cast every tensor to its parameter's dtype
            if self._sharded is not None:
                for layer in self._layers:
                    layer.by_gradient = layer.weight in found[0].lost
                self._route()
                self._sharded.go_on_from(found[0])
                self._sharded.show(self.state)
                return
            self._route()
            self.state.update((p, own) for p, own in found[0].entries.items() if own)
            self._go_on_from(found[0].factors)

        # after the hooks of others that change what is loaded, before those that see what was
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(go_on, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of, by `copy.deepcopy` or `pickle`; pending rows are left behind.

        The copy trains the copy of the model that is made along with it.
        """
        if self._sharded is not None:
            raise TypeError("an optimizer of a model in parts cannot be copied: build another")
        names = ("_model", "_skipped", "_compile", "_capturable")
        own = {name: getattr(self, name) for name in names}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" not in state:  # a part of torch's load_state_dict
            return
        self._processes = None
        self._watch(state["_model"])
        if "_modules" in vars(self._model):
            self._go_on_as_copied()
        else:  # the model holds its optimizer, and is being copied around it
            when_complete(self._model, self._go_on_as_copied)

    def _go_on_as_copied(self) -> None:
        self._names = {p: name for name, p in self._model.named_parameters()}
        self._route()
        self._go_on_from(
            {
                layer.weight: factors_of(
                    layer, self.state.get(layer.weight, {}), settings_of(layer.group)
                )
                for layer in self._layers
            }
        )
