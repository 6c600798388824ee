"""Parameters that were put in the place of others after construction, as Accelerate does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def switched(
    groups: Sequence[Mapping[str, Any]], known: Sequence[nn.Parameter]
) -> dict[Tensor, nn.Parameter]:
    """The parameters that the groups have now, by those in whose places they are.

    Raises:
        ValueError: If there are more or fewer than before, or they have other shapes.
    """
    now = [p for group in groups for p in group["params"]]
    if len(now) != len(known) or any(p.shape != q.shape for p, q in zip(now, known, strict=True)):
        raise ValueError(
            "the parameters of the groups were replaced by others that are not of the same number "
            "and shapes: build the optimizer again, or call add_param_group"
        )
    return dict(zip(known, now, strict=True))
