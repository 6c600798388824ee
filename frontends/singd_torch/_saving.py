"""The state of the optimizer that is saved, loaded and copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from singd_core.rules import Factors
from singd_torch import _state
from singd_torch._loading import Loaded, loaded, saved_factors
from singd_torch._training import Training
from singd_torch.capture.copies import when_complete
from singd_torch.layers.reach import part_again

# What a copy has of what takes steps.
_COPIED = "skipped", "compile", "capturable", "summed"
# What a copy is made of beside what torch's optimizers have.
_APART = "model", "stepper", "notes"


class Saving(Training):
    """An optimizer whose state can be saved and loaded."""

    def state_dict(self) -> dict[str, Any]:
        """The state as flat tensors and plain values; `torch.load(weights_only=True)` takes it.

        It has nothing of parameters that were taken out of the groups. A function given as `lr_cov`
        is left out: the optimizer that loads the state keeps its own.
        With a model in parts, all processes must call this method, and its tensors are DTensors.
        """
        self._note_unknown()
        trained = {p for group in self.param_groups for p in group["params"]}
        state: dict[Any, Any] = self.state
        gone = [p for p in state if isinstance(p, Tensor) and p not in trained]
        kept = {p: state.pop(p) for p in gone}  # torch looks for their places in the groups
        try:
            packed = super().state_dict()
        finally:
            state.update(kept)
        sharded = self._stepper.sharded
        if sharded is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            indices = [index for group in packed["param_groups"] for index in group["params"]]
            found = sharded.saved()
            packed["state"] = {
                index: found[p] for index, p in zip(indices, params, strict=True) if found[p]
            }
        return _state.portable(packed, self._roster.noted())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Tensors keep the dtypes in which they were saved.

        Raises:
            ValueError: Naming the first entry that does not fit. Then nothing is changed.
        """
        part_again(self._roster.model)
        found: list[Loaded] = []
        sharded = self._stepper.sharded

        def check(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            self._roster.name()
            given = self._roster.model, self.param_groups, self._roster.names, state_dict
            found.append(loaded(*given) if sharded is None else sharded.loaded(*given))
            return {"param_groups": found[0].groups, "state": found[0].others}

        def go_on(_: Any) -> None:  # torch would cast every tensor to its parameter's dtype
            self._roster.notes = found[0].notes
            if sharded is not None:
                for layer in self._layers:
                    layer.by_gradient = layer.weight in found[0].lost
                self._route()
                sharded.go_on_from(found[0])
                sharded.show(self.state)
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
        if self._stepper.sharded is not None:
            raise TypeError("an optimizer of a model in parts cannot be copied: build another")
        self._note_unknown()
        own = {name: getattr(self._stepper, name) for name in _COPIED}
        own_state = {"model": self._roster.model, "stepper": own, "notes": self._roster.notes}
        return super().__getstate__() | own_state

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, own, notes = (state.get(key) for key in _APART)
        super().__setstate__({k: v for k, v in state.items() if k not in _APART})
        if model is None or own is None:  # a part of torch's load_state_dict
            return
        self._begin(model)
        self._roster.notes = notes or {}
        vars(self._stepper).update(own)
        if "_modules" in vars(model):
            self._go_on_as_copied()
        else:  # the model holds its optimizer, and is being copied around it
            when_complete(model, self._go_on_as_copied)

    def _note_unknown(self) -> None:
        """Note of layers what the state does not know.

        How many refreshes they have had: factors do not count what was not finite, and of a model
        in parts one process alone has them. And whether they are not used yet.
        """
        for layer in self._layers:
            layer.notes["unused"] = layer.unused and not layer.seen
            k = self.state.get(layer.weight, {}).get("averages.k")
            told = self._stepper.sharded is None and k is not None and bool(k.numel())
            known = int(k.max()) if told else 0
            layer.notes["refreshes"] = layer.refreshes if layer.refreshes != known else 0

    def _go_on_as_copied(self) -> None:
        self._roster.names = {p: name for name, p in self._roster.model.named_parameters()}
        self._route()
        self._go_on_from(
            {
                layer.weight: saved_factors(layer, self.state.get(layer.weight, {}))
                for layer in self._layers
            }
        )

    def _go_on_from(self, factors: Mapping[nn.Parameter, Factors | None]) -> None:
        """Have layers with these factors, which the state has."""
        for layer in self._layers:
            known = factors[layer.weight]  # they are made when rows are first seen
            layer.pending, layer.seen = {}, known is not None
            layer.by_gradient = layer.kind.has_rows and known is not None and not known.has_rows
            layer.refreshes = layer.notes.get("refreshes", 0)
            if known is not None and known.has_rows and not layer.refreshes:
                layer.refreshes = int(known.averages.k.max())
            layer.unused = layer.notes.get("unused", False)
        self._stepper.stack_up()  # layers are equal that learn from the same
        self._watcher.tell()
