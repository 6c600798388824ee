"""What happens to a model after its optimizer was built."""

from __future__ import annotations

from singd_torch.capture.watcher import GONE, Watcher, is_refresh


class Follower(Watcher):
    """An optimizer that notices when its model is made of other modules or parameters.

    Attributes:
        state: Tensors by parameter.
        param_groups: The groups of parameters and their settings.
    """

    def _follow_model(self) -> None:
        """Notice what happened to the model after construction, at steps that may have rows."""
        if not any(is_refresh(group) for group in self.param_groups):
            return
        assert self._makeup is not None
        if self._makeup.is_other():
            self._renew()
        names = self._makeup.untrained()
        if names:
            self._check_parameters()
            self._warn_once(
                f"the model's parameter {names[0]!r} has a gradient and is in no parameter group, "
                f"so that it is not trained ({len(names)} such in all): build the optimizer after "
                "what adds, replaces or unfreezes parameters, or "
                "optimizer.add_param_group({'params': ...})",
                about="untrained",
            )

    def _renew(self) -> None:
        """Find the layers of a model anew, which is made of other modules or parameters by now."""
        before = {layer.weight: layer for layer in self._layers}
        self._route()
        found = [(layer, before.get(layer.weight)) for layer in self._layers]
        others = [one for one, old in found if old is not None and not old.is_found_as(one)]
        for layer in [*others, *(one for one, old in found if old is None)]:
            layer.by_gradient = layer.can_do_without()  # its rows are those of the next step
        self._stack_up()
        names = [one.name for one in others if not one.name.endswith(GONE)]
        if names:
            self._warn_once(
                f"the model was changed after the optimizer was built, and {names[0]!r} is used "
                f"in another way ({len(names)} such in all): its factors and its momentum begin "
                "anew, and print(optimizer) shows by which rule; build the optimizer after what "
                "prunes, parametrizes, ties or patches modules"
            )

    def _check_parameters(self) -> None:
        """Refuse to train nothing, as the model has other parameters by now."""
        theirs = set(self._model.parameters())
        if theirs and not theirs & set(self._group_of):
            raise RuntimeError(
                "the model has none of the optimizer's parameters any more: build the optimizer "
                "after what replaces them, such as fully_shard(model), model.to(...) and "
                "load_state_dict(..., assign=True)"
            )
