"""Passes of `torch.autograd.grad` whose layers have no rows in a `backward` beside them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from singd_torch._uncompiled import uncompiled
from singd_torch.layers.layer import Layer
from singd_torch.layers.reach import Reach


class Beside:
    """Waits for a later pass that adds to the gradient of a weight, and tells of it before it adds.

    Such a pass need not have a call of the layer, as where a meta-learner has made other weights of
    the layer's.
    """

    def __init__(self, owner: Any, layer: Layer, leaf: Tensor) -> None:
        """`owner.drop_returned(layer)` is told; a weight may outlive the owner.

        The last pass of the layer is the one that returned a gradient. The `leaf` is the weight, or
        what was gathered from its parts.
        """
        self._owner = weakref.ref(owner)
        self._layer, self._leaf, self._returned = layer, leaf, layer.last_pass
        self._handle: Any = leaf.register_hook(self)  # type: ignore[no-untyped-call]

    @uncompiled("a hook of backward passes")
    def __call__(self, gradient: Tensor) -> None:
        """What autograd calls with all that a pass adds to the gradient, or returns of it."""
        owner = self._owner()
        if owner is None or self._layer.last_pass is not self._returned:
            self.end()
        elif self._returned.runs_in is None and Reach.of(self._leaf) is Reach.ADDED:
            self.end()
            owner.drop_returned(self._layer)

    def end(self) -> None:
        """Wait no longer."""
        self._handle.remove()
