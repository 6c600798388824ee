"""Several parameters, or parts of one, that are concatenated before they multiply."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from singd_jax._axes import KEEPS, View, size
from singd_jax._calls import Cut


@dataclasses.dataclass(frozen=True)
class Join:
    """Several views concatenated along one axis."""

    axis: int
    views: tuple[View, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the views along the axis."""
        return tuple(size(view.dims[self.axis]) for view in self.views)

    def times(self, factor: Any) -> Join:
        """The same multiplied by a number."""
        return Join(self.axis, tuple(view.times(factor) for view in self.views))

    def apply(self, name: str, params: Mapping[str, Any]) -> Join | None:
        """The same after an equation that rearranges it, else None."""
        shape = list(self.views[0].shape)
        shape[self.axis] = sum(self.sizes)
        moved = _moved_axis(name, params, shape, self.axis)
        if moved is None:
            return None
        key = {"reshape": "new_sizes", "broadcast_in_dim": "shape"}.get(name)
        views = []
        for view, n in zip(self.views, self.sizes, strict=True):
            own = dict(params)
            if key is not None:
                own[key] = [n if i == moved else m for i, m in enumerate(params[key])]
            new = view.apply(name, own)
            if new is None:
                return None
            views.append(new)
        return Join(moved, tuple(views))


def _moved_axis(
    name: str, params: Mapping[str, Any], shape: Sequence[int], axis: int
) -> int | None:
    """Where an equation moves one axis to, None if it touches its entries."""
    if name in KEEPS:
        return axis
    if name == "transpose":
        return tuple(map(int, params["permutation"])).index(axis)
    if name == "squeeze":
        return axis - len([i for i in params["dimensions"] if i < axis])
    if name == "broadcast_in_dim":
        return int(params["broadcast_dimensions"][axis])
    if name == "reshape" and params.get("dimensions") is None:
        before, new = math.prod(shape[:axis]), params["new_sizes"]
        for j, n in enumerate(new):
            if n == shape[axis] and math.prod(new[:j]) == before:
                return int(j)
    return None


def cuts(
    eqn: Any, side: int, origin: Join, x_ndim: int
) -> list[tuple[Cut | None, Cut | None]] | None:
    """Which part of the operand and of the product belongs to each view of a concatenation."""
    if eqn.primitive.name == "dot_general":
        contract, batch = eqn.params["dimension_numbers"]
        contracted, stack = contract[side], batch[side]
        free = [i for i in range(len(origin.views[0].dims)) if i not in (*contracted, *stack)]
        others = x_ndim - len(contract[1 - side]) - len(stack)
        if origin.axis in stack:
            return None
        in_x = origin.axis in contracted
        if in_x:
            axis = contract[1 - side][list(contracted).index(origin.axis)]
        else:
            axis = len(stack) + (others if side == 1 else 0) + free.index(origin.axis)
    else:
        numbers = eqn.params["dimension_numbers"]
        grouped = eqn.params["feature_group_count"] > 1
        if grouped or origin.axis not in numbers.rhs_spec[:2]:
            return None
        in_x = origin.axis == numbers.rhs_spec[1]
        axis = (numbers.lhs_spec if in_x else numbers.out_spec)[1]
    starts = itertools.accumulate(origin.sizes, initial=0)
    parts = [(int(axis), start, n) for start, n in zip(starts, origin.sizes, strict=False)]
    return [(part, None) if in_x else (None, part) for part in parts]
